"""The methods of the family in float64 NumPy, written from their equations and from nothing else.

Deliberately unlike the library: one pair at a time and with the dense (m, n) gradient at hand.
Projectors are formed, of the singular vectors of a factor or of the product; signs of matrices,
roots and best approximations come from dense SVDs; linear problems are solved as such, on the
matrix of the linear map, instead of by a closed form; factors of the step before are kept.

Each oracle is ``Oracle(lr=..., **options)`` with ``step(A, B, G, s) -> (A, B)``, G the dense
gradient by the weight, and may keep what it likes between steps. Damping is relative.
"""

from dataclasses import dataclass, field

import numpy as np
from oracle import ScaledOracle


def run(oracle, problem, steps=20):
    """The pairs after every step."""
    A, B = problem.params
    path = []
    for _ in range(steps):
        G = problem.error(problem.params._replace(A=A, B=B))
        A, B = oracle.step(A, B, G, problem.scaling)
        path.append((A, B))
    return path


# --- pieces ------------------------------------------------------------------------------------------


def row_projector(A):
    """On the row space of A, (n, n)."""
    V = np.linalg.svd(A, full_matrices=False)[2]
    return V.T @ V


def column_projector(B):
    """On the column space of B, (m, m)."""
    return row_projector(B.T)


def on_tangent_space(Y, A, B):
    """The nearest matrix of the form ``B X + Z A``."""
    P_A, P_B = row_projector(A), column_projector(B)
    return P_B @ Y + Y @ P_A - P_B @ Y @ P_A


def damped_inverse(F, damping):
    """``(F Fᵀ + damping tr(F Fᵀ)/r I)⁻¹`` of F (r, N)."""
    S = F @ F.T
    return np.linalg.inv(S + damping * np.trace(S) / len(S) * np.eye(len(S)))


def polar(F):
    """``((F Fᵀ)^-½, (F Fᵀ)^-½ F)`` of F (r, N): the inverse stretch and the nearest frame."""
    U, sigma, Vt = np.linalg.svd(F, full_matrices=False)
    return (U / sigma) @ U.T, U @ Vt


def msign(M, rank=None):
    """The matrix with M's first singular vectors and all singular values 1."""
    U, _, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :rank] @ Vt[:rank]


class Moments:
    """Heavy ball or Adam of one array."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.t, self.m, self.v = 0, 0.0, 0.0

    def ball(self, g, dampening=0.0):
        self.m = g if self.t == 0 else self.b1 * self.m + (1 - dampening) * g
        self.t += 1
        return self.m

    def adam(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.eps)


def both(**options):
    return {"A": Moments(**options), "B": Moments(**options)}


# --- one factor at a time ------------------------------------------------------------------------------


@dataclass
class Alt:
    """AltLoRA, and with a b2 AltLoRA+: the partner's old self is kept."""

    lr: float
    b1: float = 0.9
    b2: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    first: str = "B"
    damping: float = 1e-6
    t: int = 0
    M: dict = field(default_factory=dict)
    V: dict = field(default_factory=dict)
    seen: dict = field(default_factory=dict)

    def step(self, A, B, G, s):
        mine = self.first if self.t % 2 == 0 else {"A": "B", "B": "A"}[self.first]
        self.t += 1
        if mine == "B":
            return A, self.half("B", B.T, A, s * A @ G.T, s).T
        return self.half("A", A, B.T, s * B.T @ G, s), B

    def half(self, name, F, partner, G, s):
        """F (r, N) after its turn; the partner is (r, M)."""
        g = damped_inverse(partner, self.damping) @ G / s**2
        M, old = self.M.get(name, np.zeros_like(F)), self.seen.get(name, partner)
        # What the moment did through the partner of its last turn, by the present one.
        M = np.linalg.pinv(partner.T) @ old.T @ M
        M = self.b1 * M + (1 - self.b1) * g
        self.M[name], self.seen[name] = M, partner
        if self.b2 is not None:
            self.V[name] = self.b2 * self.V.get(name, 0.0) + (1 - self.b2) * g * g
            M = M / (np.sqrt(self.V[name]) + self.eps)
        return F - self.lr * (M + self.weight_decay * F)


@dataclass
class Loft:
    """LoFT with every projected full gradient kept: seen anew through the partner at each step."""

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    first: str = "B"
    t: int = 0
    past: dict = field(default_factory=lambda: {"A": [], "B": []})

    def step(self, A, B, G, s):
        P_A, P_B = row_projector(A), column_projector(B)
        self.past["A"] = [P_B @ X for X in [*self.past["A"], G]]
        self.past["B"] = [X @ P_A for X in [*self.past["B"], G]]
        mine = self.first if self.t % 2 == 0 else {"A": "B", "B": "A"}[self.first]
        self.t += 1
        X = np.stack(self.past[mine])
        age = np.arange(self.t)[::-1, None, None]
        first, second = (np.array(b) ** age for b in (self.b1, self.b2))
        M = (first * X).sum(0) / first.sum()
        U = M / (np.sqrt((second * X**2).sum(0) / second.sum()) + self.eps)
        if mine == "B":
            return A, B - self.lr * (U @ np.linalg.pinv(A) / s + self.weight_decay * B)
        return A - self.lr * (np.linalg.pinv(B) @ U / s + self.weight_decay * A), B


@dataclass
class Rac:
    """One block of RAC-LoRA: G times the pseudo-inverse of the sketch."""

    lr: float
    frozen: str = "A"
    adam: bool = False
    weight_decay: float = 0.0
    moments: Moments = field(default_factory=Moments)

    def step(self, A, B, G, s):
        d = G @ np.linalg.pinv(A) / s if self.frozen == "A" else np.linalg.pinv(B) @ G / s
        d = self.moments.adam(d) if self.adam else d
        if self.frozen == "A":
            return A, B - self.lr * (d + self.weight_decay * B)
        return A - self.lr * (d + self.weight_decay * A), B


@dataclass
class Graft:
    """Scaled gradients, each factor's move of the product as long as AdamW's."""

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        self.of_A, self.of_B = (Moments(self.b1, self.b2, self.eps) for _ in "AB")

    def step(self, A, B, G, s):
        D_A = np.linalg.solve(B.T @ B + 1e-4 * np.linalg.inv(A @ A.T), s * B.T @ G)
        D_B = s * G @ np.linalg.pinv(A)
        U_A, U_B = self.of_A.adam(s * B.T @ G), self.of_B.adam(s * G @ A.T)
        a = np.linalg.norm(B @ U_A) / np.linalg.norm(B @ D_A)
        b = np.linalg.norm(U_B @ A) / np.linalg.norm(D_B @ A)
        decay = self.weight_decay
        return A - self.lr * (a * D_A + decay * A), B - self.lr * (b * D_B + decay * B)


@dataclass
class Core:
    """LoRA-SB with its core: B R A₀, of which R moves. The pair it shows is (R A₀, B)."""

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    R: np.ndarray | None = None

    def step(self, A, B, G, s):
        if self.R is None:
            _, self.A0 = polar(A)
            self.R = A @ self.A0.T
            self.moments = Moments(self.b1, self.b2, self.eps)
        # The least squares of s B g A₀ ~ G over the core's gradient g.
        g = np.linalg.pinv(B) @ G @ np.linalg.pinv(self.A0) / s
        self.R = self.R - self.lr * (self.moments.adam(g) + self.weight_decay * self.R)
        return self.R @ self.A0, B


# --- both factors, by the weight they make --------------------------------------------------------------


@dataclass
class Ref:
    """RefLoRA as it is told: to the balanced split, a step of descent, and back."""

    lr: float
    form: str = "matrix"
    momentum: float = 0.0
    weight_decay: float = 0.0
    moments: dict | None = None

    def step(self, A, B, G, s):
        self.moments = self.moments or both(b1=self.momentum)
        if self.form == "scalar":
            way = (np.linalg.norm(A) / np.linalg.norm(B)) ** 0.5 * np.eye(len(A))
        else:
            _, sigma, Vt = np.linalg.svd(B @ A, full_matrices=False)
            r = len(A)
            balanced = np.sqrt(sigma[:r])[:, None] * Vt[:r]  # A' of (A', B') with A'A'ᵀ = B'ᵀB'
            way = A @ np.linalg.pinv(balanced)  # A = way A', B = B' way⁻¹
        back = np.linalg.inv(way)
        d_A = way @ (s * (B @ way).T @ G)  # what the descent of A' is for A
        d_B = (s * G @ (back @ A).T) @ back
        d_A, d_B = self.moments["A"].ball(d_A), self.moments["B"].ball(d_B)
        return (
            A - self.lr * (d_A + self.weight_decay * A),
            B - self.lr * (d_B + self.weight_decay * B),
        )


@dataclass
class Pro:
    """LoRA-Pro: the best effect on the weight, and the gauge by the problem that defines it."""

    lr: float
    gauge: str = "sylvester"
    mode: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    moments: dict | None = None

    def moves(self, A, B, G, s):
        G_A, G_B = s * B.T @ G, s * G @ A.T
        r = len(A)
        g_A = np.linalg.pinv(B) @ G / s
        g_B = (G - column_projector(B) @ G) @ np.linalg.pinv(A) / s
        # (g_A + X A, g_B - B X): X by least squares on the matrix of this linear map.
        if self.gauge == "sylvester":  # nearest to the gradients
            target = [G_A - g_A, g_B - G_B]
            maps = [lambda X: X @ A, lambda X: B @ X]
        elif self.gauge == "balanced":  # with parts of the effect that are nearest to each other
            target = [-(B @ g_A - g_B @ A)]
            maps = [lambda X: 2 * B @ X @ A]
        else:
            return g_A, g_B
        unit = np.eye(r * r).reshape(-1, r, r)
        columns = [np.concatenate([f(E).ravel() for f in maps]) for E in unit]
        aim = np.concatenate([y.ravel() for y in target])
        X = np.linalg.lstsq(np.stack(columns, axis=1), aim, rcond=None)[0].reshape(r, r)
        return g_A + X @ A, g_B - B @ X

    def step(self, A, B, G, s):
        self.moments = self.moments or (both(b1=self.momentum) if self.mode == "sgd" else both())
        shrink = 1 - self.lr * self.weight_decay
        if self.mode == "full":
            G = self.moments["A"].adam(on_tangent_space(G, A, B))
            d_A, d_B = self.moves(A, B, G, s)
            shrink = shrink**0.5
        else:
            d_A, d_B = self.moves(A, B, G, s)
            move = "ball" if self.mode == "sgd" else "adam"
            d_A, d_B = (getattr(self.moments[x], move)(d) for x, d in (("A", d_A), ("B", d_B)))
        return shrink * A - self.lr * d_A, shrink * B - self.lr * d_B


@dataclass
class AdaPre:
    """AdaPreLoRA, its weighted least squares solved on the matrix of the linear map."""

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    t: int = 0
    rows: np.ndarray | float = 0.0
    columns: np.ndarray | float = 0.0
    moments: dict | None = None

    def step(self, A, B, G, s):
        self.moments = self.moments or both(b1=self.b1)
        squares = on_tangent_space(G, A, B) ** 2
        decay = self.b2 * (1 - self.b2**self.t) / (1 - self.b2 ** (self.t + 1))
        self.t += 1
        self.rows = decay * self.rows + (1 - decay) * squares.sum(axis=1)
        self.columns = decay * self.columns + (1 - decay) * squares.sum(axis=0)
        rows = self.rows + self.eps * self.rows.mean()
        columns = self.columns + self.eps * self.columns.mean()
        V = np.outer(rows, columns) / rows.sum()  # Adafactor's second moment
        d_A, d_B = nearest_in_metric(A, B, G, np.sqrt(V), np.sqrt(V))
        d_A, d_B = (
            self.moments[x].ball(d / s, dampening=self.b1) for x, d in (("A", d_A), ("B", d_B))
        )
        return (
            A - self.lr * (d_A + self.weight_decay * A),
            B - self.lr * (d_B + self.weight_decay * B),
        )


def nearest_in_metric(A, B, G, root, metric):
    """The (D_A, D_B) with ``B D_A + D_B A`` nearest to ``G / root`` in ``<Y, metric∘Y>``; of all
    those the one with the least ``B D_A - D_B A``."""
    (r, n), m = A.shape, len(B)
    half = np.sqrt(metric)
    pairs = [np.split(e, [r * n]) for e in np.eye(r * n + m * r)]
    parts = [(B @ a.reshape(r, n), b.reshape(m, r) @ A) for a, b in pairs]
    effect = np.stack([(half * (x + y)).ravel() for x, y in parts], axis=1)
    difference = np.stack([(half * (x - y)).ravel() for x, y in parts], axis=1)
    best = np.linalg.lstsq(effect, (half * G / root).ravel(), rcond=1e-10)[0]
    free = np.linalg.svd(effect)[2][effect.shape[1] - r * r :].T  # (r n + m r, r²)
    best -= free @ np.linalg.lstsq(difference @ free, difference @ best, rcond=None)[0]
    a, b = np.split(best, [r * n])
    return a.reshape(r, n), b.reshape(m, r)


@dataclass
class Muon:
    """LoRA-Muon, by the polar decompositions of the factors."""

    lr: float
    b1: float = 0.95
    nesterov: bool = False
    weight_decay: float = 0.0
    moments: dict | None = None

    def step(self, A, B, G, s):
        self.moments = self.moments or both(b1=self.b1)
        moves = []
        for x, partner, g in (("A", B.T, s * B.T @ G), ("B", A, s * A @ G.T)):
            M = self.moments[x].ball(g)
            M = g + self.b1 * M if self.nesterov else M
            W, _ = polar(partner)
            moves.append(W @ msign(W @ M) / (2 * s))
        c = (1 - self.lr * self.weight_decay) ** 0.5
        return c * A - self.lr / c * moves[0], c * B - self.lr / c * moves[1].T


@dataclass
class FactorMuon:
    """Muon, once for A and once for B."""

    lr: float
    b1: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    moments: dict | None = None

    def step(self, A, B, G, s):
        self.moments = self.moments or both(b1=self.b1)
        new = []
        for x, F, g in (("A", A, s * B.T @ G), ("B", B, s * G @ A.T)):
            M = self.moments[x].ball(g)
            M = g + self.b1 * M if self.nesterov else M
            move = 0.2 * max(F.shape) ** 0.5 * msign(M)
            new.append(F - self.lr * (move + self.weight_decay * F))
        return tuple(new)


@dataclass
class AdamW:
    """Each factor by itself."""

    lr: float
    weight_decay: float = 0.0
    moments: dict | None = None

    def step(self, A, B, G, s):
        self.moments = self.moments or both()
        d_A, d_B = (self.moments[x].adam(g) for x, g in (("A", s * B.T @ G), ("B", s * G @ A.T)))
        keep = 1 - self.lr * self.weight_decay
        return keep * A - self.lr * d_A, keep * B - self.lr * d_B


@dataclass
class Balanced(AdamW):
    """AdamW, then the balanced split that a positive definite change of basis leads to.

    From the singular vectors of the product to a balanced split, and from there by the rotation that
    makes the change of basis of A symmetric.
    """

    def step(self, A, B, G, s):
        A, B = super().step(A, B, G, s)
        r = len(A)
        _, sigma, Vt = np.linalg.svd(B @ A, full_matrices=False)
        change = np.sqrt(sigma[:r])[:, None] * Vt[:r] @ np.linalg.pinv(A)  # any balanced one
        _, stretch, Wt = np.linalg.svd(change)
        half = (Wt.T * stretch) @ Wt  # its symmetric polar factor
        return half @ A, B @ np.linalg.inv(half)


@dataclass
class Stable(AdamW):
    """AdamW from an A that shrinks first."""

    shrink: float = 5e-4

    def step(self, A, B, G, s):
        means = [np.linalg.norm(F) / F.size for F in (A, B)]
        start = (1 - self.shrink) * A if means[0] >= means[1] else A
        moved, B = super().step(A, B, G, s)
        keep = 1 - self.lr * self.weight_decay
        return moved - A + start if keep == 1 else moved - keep * A + start - (1 - keep) * A, B


@dataclass
class TrustRegion(AdamW):
    """AdamW, its steps cut by products that are formed and the root of a polynomial."""

    bound: float = 1e-2

    def step(self, A, B, G, s):
        a, b = (old - new for old, new in zip((A, B), super().step(A, B, G, s), strict=True))
        f, q = (np.sqrt(np.mean(X**2)) for X in (B @ a + b @ A, b @ a))
        t = 1.0 if f + q <= self.bound else max(np.roots([q, f, -self.bound]))
        return A - t * a, B - t * b


@dataclass
class Prodigy:
    """Scaled AdamW, and a learning rate from how far the gradients say that the solution is."""

    lr: float
    b1: float = 0.7
    b2: float = 0.8
    eps: float = 1e-8
    weight_decay: float = 0.01
    d0: float = 1e-4
    damping: float = 1e-2
    d: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    start: tuple | None = None
    total: tuple = (0.0, 0.0)

    def __post_init__(self):
        self.d = self.d0
        self.scaled = ScaledOracle(
            lr=0.0,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            damping=self.damping,
            damping_mode="covariant",
            placement="both",
        )

    def step(self, A, B, G, s):
        self.start = self.start or (A, B)
        grads = s * B.T @ G, s * G @ A.T
        weight = (self.d / self.d0) ** 2
        for g, x0, x in zip(grads, self.start, (A, B), strict=True):
            self.gain += weight * np.vdot(g, x0 - x)
            self.noise += weight**2 * np.linalg.norm(g * (x0 - x)) ** 2
        P_A, P_B = (self.scaled.half(side, A, B) for side in "AB")
        whitened = P_A @ grads[0], grads[1] @ P_B.T
        self.total = tuple(t + weight * w for t, w in zip(self.total, whitened, strict=True))
        bound = self.gain - 2 * np.sqrt(self.noise)
        self.d = max(self.d, bound / sum(np.abs(t).sum() for t in self.total))
        moves = [self.scaled.direction(x, A, B, g) for x, g in zip("AB", grads, strict=True)]
        return tuple(
            x - self.lr * self.d * (move + self.weight_decay * x)
            for x, move in zip((A, B), moves, strict=True)
        )


@dataclass
class Riemannion:
    """On the manifold itself: a dense point, a dense tangent vector, a dense SVD."""

    lr: float
    b1: float = 0.9
    weight_decay: float = 0.0
    M: np.ndarray | float = 0.0

    def step(self, A, B, G, s):
        r = len(A)
        X = B @ A
        U, _, Vt = np.linalg.svd(X, full_matrices=False)
        point = Vt[:r], U[:, :r]
        old = on_tangent_space(self.M, *point) if np.ndim(self.M) else 0.0
        self.M = on_tangent_space(s * G, *point) + self.b1 * old
        move = on_tangent_space(msign(self.M, 2 * r), *point)
        U, sigma, Vt = np.linalg.svd(
            (1 - self.lr * self.weight_decay) * X - self.lr * move, full_matrices=False
        )
        return sigma[:r, None] * Vt[:r], U[:, :r]


@dataclass
class Op:
    """OPLoRA on dense targets: each half-step a least squares problem, the sum's starts kept."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    M: tuple | None = None

    def step(self, A, B, G, s):
        M_A, M_B = self.M or (A, 0 * B)
        gradient = on_tangent_space(G, A, B) / s
        seen = on_tangent_space(G / s + self.momentum * M_B @ M_A, A, B)
        target = self.momentum * M_B @ M_A + gradient
        if self.M:  # before the first gradient no M_A is better than another one
            M_A = np.linalg.lstsq(M_B, target, rcond=None)[0]
        self.M = M_A, np.linalg.lstsq(M_A.T, target.T, rcond=None)[0].T
        target = B @ A - self.lr * seen
        new_A = np.linalg.lstsq(B, target, rcond=None)[0]
        new_B = np.linalg.lstsq(new_A.T, target.T, rcond=None)[0].T
        decay = self.lr * self.weight_decay
        return new_A - decay * A, new_B - decay * B
