"""The gradients of a query's adapter go through matrices of low rank, as long as scores are small.

With ``f = softmax(Q Kᵀ)`` row by row (L, L), values C and the output's gradient E, the gradient of
the scores is ``p = f ∘ (E Cᵀ) - diag(r) f``, and that of the query's weight ``(p K)ᵀ X``. A Taylor
polynomial of exp of degree g in d dimensions gives f two factors of ``binom(d + g, d)`` columns,
and p the rank of d + 1 times that: no (L, L) matrix is formed, and time is linear in L.
"""

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement
from typing import Final, NamedTuple

import numpy as np

from rlora import Factors
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array

from .claim import Check, Claim, Outcome, Setting, lines
from .problems import Matrix, exponent

HEAD, INPUTS, RANK = 3, 12, 2
NORMS: Final = (1.0, 2.0, 4.0, 8.0)
"""Length of queries and keys: the largest score is about the square."""
DEGREES: Final = (0, 2, 4, 6, 8, 10)
"""Even ones: an odd polynomial may be negative, and its rows then sum to nothing."""

TOLERANCE: Final = 1e-3
"""Singular values below that share of the largest do not count for the rank."""
BOUNDED: Final = 0.2
"""Largest exponent of the length that counts as none, as for widths."""
FULL: Final = 0.8
"""Least exponent of a rank that grows with the length; of full rank it is 1."""
CLOSE: Final = 1e-5
"""Scores of 1.3 leave 1.3^11 / 11! = 4e-7 of exp behind degree 10; a softmax and a difference of
products of it magnify that by some tens."""
LOST: Final = 0.5


class Attention(NamedTuple):
    """One head: tokens X (L, n), the weights (d, n), an adapter of W_Q, and outputs to be met."""

    X: Array
    W_Q: Array
    W_K: Array
    W_V: Array
    target: Array
    adapter: Factors

    def projected(self) -> tuple[Array, Array, Array]:
        """Queries, with the adapter, keys and values, (L, d) each."""
        W_Q = self.W_Q + self.adapter.B @ self.adapter.A
        return self.X @ W_Q.T, self.X @ self.W_K.T, self.X @ self.W_V.T

    def factor_gradients(self, pK: Array) -> Factors:
        """Return those of A and B, from p K."""
        G = pK.T @ self.X
        return Factors(self.adapter.B.T @ G, G @ self.adapter.A.T)


def attention(setting: Setting, length: int, norm: float) -> Attention:
    """Tokens whose first d entries lie on the sphere, and weights that see them, turned."""
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((length, HEAD))
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    X = np.hstack([seen, rng.standard_normal((length, INPUTS - HEAD)) / INPUTS**0.5])
    blind = np.zeros((HEAD, INPUTS - HEAD))
    turns = (np.linalg.qr(rng.standard_normal((HEAD, HEAD)))[0] for _ in range(2))
    W_Q, W_K = (np.hstack([norm * turn, blind]) for turn in turns)
    A, B = rng.standard_normal((RANK, INPUTS)), rng.standard_normal((HEAD, RANK))
    pair = Factors(A / INPUTS**0.5, 0.1 * norm * B / HEAD**0.5)
    W_V, target = rng.standard_normal((HEAD, INPUTS)), rng.standard_normal((length, HEAD))
    X, W_Q, W_K, W_V, target = map(setting.array, (X, W_Q, W_K, W_V, target))
    return Attention(X, W_Q, W_K, W_V, target, setting.arrays(pair))


def score_gradient(head: Attention) -> Array:
    """Gradient p (L, L) of the scores, of the loss ``½ |f C - target|² / L``."""
    Q, K, C = head.projected()
    S, xp = Q @ K.T, get_backend(Q).xp
    f = xp.exp(S - xp.max(S, axis=1, keepdims=True))
    f = f / xp.sum(f, axis=1, keepdims=True)
    fq = f * ((f @ C - head.target) / C.shape[0] @ C.T)
    return fq - xp.sum(fq, axis=1, keepdims=True) * f


def exact_gradients(head: Attention) -> Factors:
    """The factors' gradients through the whole of p."""
    return head.factor_gradients(score_gradient(head) @ head.projected()[1])


def chained_gradients(head: Attention, degree: int) -> Factors:
    """The same, with f of low rank and no matrix of L² entries."""
    Q, K, C = head.projected()
    left, right, xp = features(Q, degree), features(K, degree), get_backend(Q).xp
    left = left / (left @ xp.sum(right, axis=0))[:, None]
    out = left @ (right.T @ C)
    E = (out - head.target) / C.shape[0]
    # f ∘ (E Cᵀ) has the row by row products of both pairs of factors as its own.
    fqK = columns(E, left) @ (columns(C, right).T @ K)
    r = xp.sum(E * out, axis=1, keepdims=True)
    return head.factor_gradients(fqK - r * (left @ (right.T @ K)))


def features(X: Array, degree: int) -> Array:
    """Rows φ(x) with ``φ(x)ᵀφ(y) = Σ_j (xᵀy)^j / j!`` up to the degree."""
    found, xp = [], get_backend(X).xp
    for j in range(degree + 1):
        for entries in combinations_with_replacement(range(X.shape[1]), j):
            powers = np.bincount(entries, minlength=X.shape[1]) if entries else ()
            size = math.prod(math.factorial(a) for a in powers)
            product = math.prod((X[:, i] for i in entries), start=xp.ones_like(X[:, 0]))
            found.append(product / size**0.5)
    return xp.stack(found, axis=1)


def columns(X: Array, Y: Array) -> Array:
    """Each column of X times each of Y, (L, products)."""
    return get_backend(X).xp.reshape(X[:, :, None] * Y[:, None, :], (X.shape[0], -1))


def run(setting: Setting) -> Outcome:
    """Numerical ranks of p over lengths, and errors of gradients over ranks, for several norms."""
    lengths = (128, 256, 512) if setting.quick else (128, 256, 512, 1024)
    ranks, wrong, values = {}, {}, setting.backend.to_numpy
    for norm in setting.track(NORMS, "norms"):
        heads = [attention(setting, length, norm) for length in lengths]
        ranks[norm] = [rank(values(score_gradient(head))) for head in heads]
        exact = [values(x) for x in exact_gradients(heads[-1])]
        chained = [map(values, chained_gradients(heads[-1], degree)) for degree in DEGREES]
        wrong[norm] = [error(found, exact) for found in chained]
    sizes = [math.comb(HEAD + degree, HEAD) for degree in DEGREES]
    growth = {norm: exponent(lengths, found) for norm, found in ranks.items()}
    return Outcome(
        checks=(
            Check("exponent of the rank in the length, norm 1", growth[1.0], "<=", BOUNDED),
            Check("the same, norm 8", growth[8.0], ">=", FULL),
            Check("error of the gradients, degree 10, norm 1", wrong[1.0][-1], "<=", CLOSE),
            Check("the same, norm 8", wrong[8.0][-1], ">=", LOST),
        ),
        panels=(
            lines(
                "rank of the scores' gradient",
                ("tokens", lengths),
                f"singular values above {TOLERANCE:g} of the largest",
                {f"norm {norm:g}": found for norm, found in ranks.items()},
            ),
            lines(
                f"gradients of A and B, {lengths[-1]} tokens",
                ("columns of the factors of softmax", sizes),
                "relative error",
                {f"norm {norm:g}": found for norm, found in wrong.items()},
            ),
        ),
    )


def rank(p: Matrix) -> float:
    """Return how many singular values count."""
    sigma = np.linalg.svd(p, compute_uv=False)
    return float((sigma > TOLERANCE * sigma[0]).sum())


def error(found: Iterable[Matrix], exact: Iterable[Matrix]) -> float:
    """Relative difference of the gradients of both factors."""
    ours, theirs = (np.concatenate([x.ravel() for x in pair]) for pair in (found, exact))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


CLAIM = Claim(
    name="gradient-rank",
    statement=(
        "The gradients of an attention adapter are chains of low-rank products whose rank does not "
        "grow with the number of tokens while queries and keys are short; where they are long, it "
        "grows in proportion."
    ),
    source=(
        "J. Y.-C. Hu, M. Su, E.-J. Kuo, Z. Song, H. Liu. Computational Limits of Low-Rank "
        "Adaptation (LoRA) Fine-Tuning for Transformer Models. arXiv:2406.03136, 2024. Theorems on "
        "the low-rank decomposition and on almost linear algorithms"
    ),
    run=run,
)
