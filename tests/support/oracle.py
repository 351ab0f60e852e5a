"""Scaled SGD and AdamW in float64 NumPy, written from the equations and from nothing else.

Deliberately unlike the library: one pair at a time, no batching, powers through the SVD of the
factor itself instead of its Gram, scalars in Python.
"""

import math
from dataclasses import dataclass, field

import numpy as np


def powers_by_svd(F: np.ndarray, shift: float, exponent: float) -> np.ndarray:
    """``(Fᵀ F + shift I)^exponent`` for F (m, r), without forming ``Fᵀ F``."""
    r = F.shape[1]
    _, sigma, Vt = np.linalg.svd(F, full_matrices=True)
    sigma = np.concatenate([sigma, np.zeros(r - len(sigma))])
    return (Vt.T * (sigma**2 + shift) ** exponent) @ Vt


@dataclass
class ScaledOracle:
    lr: float
    kind: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    damping: float = 1e-6
    damping_mode: str = "relative"
    placement: str = "before"
    order: str = "jacobi"
    state: dict = field(default_factory=dict)

    def metric_power(self, side, A, B, p):
        """The power of the damped Gram that acts on `side`."""
        own, partner = (A, B) if side == "A" else (B.T, A.T)
        r = A.shape[0]
        least = (0.0 if self.placement == "before" else 1e-6) / r
        floor = least * (partner**2).sum()
        if self.damping_mode == "absolute":
            return powers_by_svd(partner, max(self.damping, floor), p)
        if self.damping_mode == "relative":
            return powers_by_svd(partner, max(self.damping / r * (partner**2).sum(), floor), p)
        if side == "B":
            return powers_by_svd(partner, floor, p)
        S_A = own @ own.T
        S = partner.T @ partner
        S = S + self.damping * np.linalg.inv(S_A + least * np.trace(S_A) * np.eye(r))
        S = S + least * np.trace(S) * np.eye(r)
        w, Q = np.linalg.eigh(S)
        return (Q * w**p) @ Q.T

    def half(self, side, A, B):
        """Triangular P with ``Pᵀ P = H⁻¹``: upper for A, lower for B."""
        inverse = self.metric_power(side, A, B, -1.0)
        if side == "A":
            return np.linalg.cholesky(inverse).T
        return np.linalg.cholesky(inverse[::-1, ::-1]).T[::-1, ::-1]

    def moments(self, side, G):
        s = self.state.setdefault(side, {"t": 0, "m": np.zeros_like(G), "v": np.zeros_like(G)})
        s["t"] += 1
        if self.kind == "sgd":
            s["m"] = self.momentum * s["m"] + G
            return s["m"]
        s["m"] = self.b1 * s["m"] + (1 - self.b1) * G
        s["v"] = self.b2 * s["v"] + (1 - self.b2) * G**2
        m_hat = s["m"] / (1 - self.b1 ** s["t"])
        v_hat = s["v"] / (1 - self.b2 ** s["t"])
        return m_hat / (np.sqrt(v_hat) + self.eps)

    def second(self, side, A, B):
        """The preconditioner behind the moments: a power of the Gram, without its null space."""
        m, n = B.shape[0], A.shape[1]
        partner, c = (B, (m / n) ** 0.25) if side == "A" else (A.T, (n / m) ** 0.25)
        S = partner.T @ partner
        if self.placement == "after":
            H = self.metric_power(side, A, B, -1.0)
            return c * H @ np.linalg.matrix_power(S @ H, 4)
        P = self.half(side, A, B)
        Q = c * P.T @ np.linalg.matrix_power(P @ S @ P.T, 4)
        return Q if side == "A" else Q.T

    def direction(self, side, A, B, G):
        def times(P, X):
            return P @ X if side == "A" else X @ P

        if self.placement == "before":
            G = times(self.metric_power(side, A, B, -1.0), G)
        if self.placement == "both":
            P = self.half(side, A, B)
            G = P @ G if side == "A" else G @ P.T
        d = self.moments(side, G)
        if self.placement != "before":
            d = times(self.second(side, A, B), d)
        return d + self.weight_decay * (A if side == "A" else B)

    def step(self, A, B, G_A, G_B):
        d_A = self.direction("A", A, B, G_A)
        A_new = A - self.lr * d_A
        d_B = self.direction("B", A_new if self.order == "gauss_seidel" else A, B, G_B)
        return A_new, B - self.lr * d_B

    def run(self, problem, steps=20):
        A, B = problem.params
        path = []
        for _ in range(steps):
            G = problem.scaling * (problem.scaling * B @ A - problem.target)
            A, B = self.step(A, B, B.T @ G, G @ A.T)
            path.append(B @ A)
        assert all(math.isfinite(np.abs(W).max()) for W in path)
        return np.stack(path)
