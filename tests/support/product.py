"""Scaled gradient descent of W = W0 + s a b from the gradient of W, for ``y = x W``."""

import numpy as np

LR = 0.1


def step_of_product(a, b, G, s):
    """New a (..., n, r) and b (..., r, m) from the gradient G (..., n, m), and W's change."""
    a, b, G = (np.asarray(x, np.float64) for x in (a, b, G))
    c = a - LR * s * G @ b.mT @ np.linalg.inv(b @ b.mT)
    d = b - LR * s * np.linalg.inv(a.mT @ a) @ a.mT @ G
    return c, d, s * (c @ d - a @ b)
