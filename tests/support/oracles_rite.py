"""LoRA-RITE in float64 NumPy, written from the paper's equations and from nothing else.

Deliberately unlike the library: Householder QR of the factors instead of roots of their Grams, the
bases of the step before kept as they are, moments in the coordinates of the bases instead of those
of the factors, one pair at a time.
"""

from dataclasses import dataclass, field

import numpy as np


def corrected(b: float, t: int) -> float:
    """``b (1 - b^t) / (1 - b^(t+1))``, t steps having been made before."""
    return b * (1 - b**t) / (1 - b ** (t + 1))


@dataclass
class Side:
    """Moments of one factor, as (N, r) with rows of its own and columns in its partner's basis."""

    M: np.ndarray | None = None
    V: np.ndarray | None = None
    basis: np.ndarray | None = None
    rho: float = 0.0


@dataclass
class RiteOracle:
    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    escape: bool = False
    t: int = 0
    sides: dict = field(default_factory=lambda: {"A": Side(), "B": Side()})

    def back(self, letter, G, partner):
        """The direction of a factor (N, r) with gradient G (N, r), its partner being (M, r)."""
        side = self.sides[letter]
        U, R = np.linalg.qr(partner)
        unmagnified = G @ np.linalg.inv(R)
        if side.basis is None:
            r = R.shape[0]
            side.M, side.V = np.zeros_like(G), np.zeros((r, r))
            P = np.eye(r)
        else:
            P = U.T @ side.basis
        b1, b2 = corrected(self.b1, self.t), corrected(self.b2, self.t)
        old = np.linalg.eigvalsh(side.V)
        V = P @ side.V @ P.T
        new = np.linalg.eigvalsh(V)
        if self.escape:
            lost = min(max((old - new).max(), 0.0), max((old - new).sum(), 0.0))
            side.rho = b2 * (side.rho + lost)
        side.V = b2 * V + (1 - b2) * unmagnified.T @ unmagnified / len(unmagnified)
        w, Q = np.linalg.eigh(side.V)
        step = unmagnified @ (Q / (np.sqrt(w + side.rho) + self.eps)) @ Q.T
        side.M = b1 * side.M @ P.T + (1 - b1) * step
        side.basis = U
        return side.M @ np.linalg.inv(R).T

    def step(self, A, B, G_A, G_B):
        d_A = self.back("A", G_A.T, B).T
        d_B = self.back("B", G_B, A.T)
        self.t += 1
        return (
            A - self.lr * (d_A + self.weight_decay * A),
            B - self.lr * (d_B + self.weight_decay * B),
        )

    def run(self, problem, steps):
        A, B = problem.params
        path = []
        for _ in range(steps):
            G_A, G_B = problem.grads(problem.params._replace(A=A, B=B))
            A, B = self.step(A, B, G_A, G_B)
            path.append((A, B))
        return path
