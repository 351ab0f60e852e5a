"""Balanced LoRA: after each step of any method, a split of the product in which S_A = S_B.

V. Castin, K. Nadjahi, P. Ablin, G. Peyré. Balanced LoRA: Removing Parameter Invariance to
Accelerate Convergence. arXiv:2605.31484, 2026.
"""

from typing import Final

from rlora.core.algebra import eye_like, traces
from rlora.core.checks import hyperparameters
from rlora.core.factors import Array, Factors, Tree, map_pairs
from rlora.core.inner import check_jacobi, inner_or_adamw
from rlora.core.linalg import geometric_mean
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, no_state, rounded_once

SINGULAR: Final = 1e-6
"""Addition to each Gram, relative to its mean eigenvalue: a direction that one factor has lost
would take the other one's with it."""


@hyperparameters
def balanced_lora(
    inner: Transform | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Any method, its factors balanced after every step.

    After the step of `inner`, with ``S_A = A Aᵀ`` and ``S_B = Bᵀ B``::

        K = S_A^-½ (S_A^½ S_B S_A^½)^½ S_A^-½,   A <- K^½ A,   B <- B K^-½

    so that ``S_A = S_B``: the split in which, as the paper shows, a minimum of the loss is best
    conditioned. The product stays.

    Parameters
    ----------
    inner : Transform, optional
        Any method whose factors move at once; AdamW with the following hyperparameters by default.
    b1, b2, eps, weight_decay
        Of the default AdamW; without effect on an `inner` that is given.

    Returns
    -------
    Transform
        State: that of `inner`.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type, or `inner` moves its factors
        one after the other.

    Notes
    -----
    A pair with a frozen or a zero factor is left as it is; Grams are damped by 1e-6 of their mean
    eigenvalue. The authors' code takes singular vectors of the product, whose order and signs jump
    from step to step under moments that stay, or turns them towards the factors as they were; the
    symmetric change of basis K^½ is the one that turns nothing.

    References
    ----------
    V. Castin, K. Nadjahi, P. Ablin, G. Peyré. Balanced LoRA: Removing Parameter Invariance to
    Accelerate Convergence. arXiv:2605.31484, 2026.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.balanced_lora(weight_decay=0.01)
    >>> scaled = rlora.balanced_lora(rlora.scaled_sgd())
    """
    inner = inner_or_adamw(inner, b1, b2, eps, weight_decay)
    check_jacobi("balanced_lora", inner)
    move, rebase = inner.apply, by_rank(no_state, balance, rescaled=False).update

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        new = move(params, direction, lr)

        def moving(pair: Factors, d: Factors) -> Factors:
            return Factors(None, None) if d.A is None or d.B is None else pair

        rebased, _ = rebase(map_pairs(moving, new, direction), (), new)
        return map_pairs(lambda x, found: x if found.A is None else found, new, rebased)

    return inner._replace(apply=rounded_once(apply))


def balance(group: RankGroup, X: list[Factors], state: State) -> tuple[list[Factors], State]:
    """``K^½ A`` and ``B K^-½`` of a group's own factors X."""
    backend, xp = group.backend, group.xp
    S = group.gram(group.params)
    trace = traces(xp, S)
    a, b = group.halves(trace)
    info = xp.finfo(S.dtype)
    least, most = float(info.smallest_normal) / float(info.eps), float(info.max)
    live = (a > least) & (b > least) & (a < most) & (b < most)
    live = xp.concat([live, live])
    eye = eye_like(xp, S)
    unit = xp.where(live, trace, xp.ones_like(trace))
    S_A, S_B = group.halves(xp.where(live, S / unit + SINGULAR / group.rank * eye, eye))
    w, Q = backend.eigh(geometric_mean(backend, S_A, S_B))
    w = xp.clip(w, min=float(info.eps) * xp.max(w, axis=-1, keepdims=True))[..., None, :]
    half, back = (backend.matmul(Q * w**p, Q.mT) for p in (0.5, -0.5))
    root = unit**0.25
    c = group.swap_sides(root) / root
    if group.numbers is not None:  # huge factors, of which these Grams are not
        n = group.stack(group.numbers)
        c = c * group.swap_sides(n) ** 0.5 / n**0.5
    P = xp.where(live, c * xp.concat([half, back]), eye)
    sized, number = group.in_range(X)
    return group.apply(P / number, sized), state
