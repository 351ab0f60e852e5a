"""LoRA-RITE: a matrix-valued Adam on the rank side, in coordinates that no split can change.

J.-N. Yen, S. Si, Z. Meng, F. Yu, S. S. Duvvuri, I. S. Dhillon, C.-J. Hsieh, S. Kumar. LoRA Done
RITE: Robust Invariant Transformation Equilibration for LoRA Optimization. arXiv:2410.20625, 2024.
"""

import math
from functools import partial
from typing import Any, Final, NamedTuple

from rlora.core.algebra import eye_like, traces
from rlora.core.backend import Backend
from rlora.core.checks import check_nonnegative, check_unit, hyperparameters
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, leaves_of, map_leaves, map_pairs
from rlora.core.linalg import congruence, no_overlap, record_overlap
from rlora.core.moments import corrected_decays, counts, each, small_zeros, zeros
from rlora.core.rank_group import RankGroup, Stack, by_rank
from rlora.core.sizes import euclidean_norm, into_range, shrink_to, times
from rlora.core.transform import (
    State,
    Transform,
    apply_updates,
    chain,
    no_state,
    pass_on,
    rounded_once,
)

OFFICIAL: Final[dict[str, Any]] = {"max_norm": 1.0, "max_rms": 1.0}
"""`lora_rite` with the guards that the authors' code has on."""


class RiteState(NamedTuple):
    """State of LoRA-RITE for each factor, in the present coordinates of its partner."""

    mu: Tree
    """First moment of the preconditioned step, like the parameters."""

    nu: Tree
    """Second moment, (..., r, r)."""

    overlap: Tree
    """The partner's new rows times its old ones, (..., r, r)."""

    spectrum: Tree
    """Eigenvalues of the second moment, (..., r), after the last step with `escape`."""

    escaped: Tree
    """Mass that has left the second moment as the partner turned, (...), likewise."""

    count: Tree
    """Steps taken."""


@hyperparameters
def scale_by_rite(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    *,
    escape: bool = False,
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-RITE without guards and decay; see `lora_rite`."""
    check_unit("b1", b1)
    check_unit("b2", b2)
    check_nonnegative("eps", eps)

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], RiteState]:
        backend, xp = group.backend, group.xp
        t = group.per_layer(state.count)
        decay1, decay2 = corrected_decays(backend, (b1, b2), t)

        S = group.partner_gram(group.params)
        W = backend.pseudo_half(S, group.lost)  # W G: the unmagnified gradient
        U = backend.matmul(W, group.stack(state.overlap))
        T = backend.matmul(W.mT, U)  # old coordinates to new

        V = congruence(backend, U, group.stack(state.nu))
        # The largest gradient whose square is kept: as in Adam, the second moment ends there.
        largest = math.pow(xp.finfo(group.wide).max, 0.49)
        if escape:
            lost = _escaped(backend, group.stack(state.spectrum), V)
            rho = decay2 * (group.per_layer(state.escaped) + lost)
            rho = xp.clip(rho, max=largest**2)  # it adds up, and is kept in the parameters' dtype
            state = state._replace(escaped=group.unstack(rho[:, 0, 0]))
        G, numbers = group.in_range(G)
        Q = congruence(backend, W, group.gram(G)) / group.columns()
        # A bound of the spectral norm, whose squares may be out of range.
        norm = xp.linalg.vector_norm(W, ord=1, axis=(-2, -1), keepdims=True)
        # Back to the gradient's own size, or less where its square would leave the range.
        size = xp.sqrt(traces(xp, Q)) * xp.clip(norm, min=1.0)
        back = xp.clip(size / largest, min=numbers) ** -1.0  # one operation, 1 / x two
        V = backend.lerp((back * Q) * back, V, decay2)
        shifted = V
        if escape:
            spectrum, _ = backend.eigh(V)
            state = state._replace(spectrum=group.unstack(spectrum))
            shifted = V + rho * eye_like(xp, V)

        H = backend.inverse_root_half(shifted, eps, W, group.lost)
        X = backend.matmul(H.mT, (1 - decay1) * back * H)
        mu = group.apply(X, G, accumulate=group.apply(decay1 * T, state.mu))
        nu = group.unstack(congruence(backend, W.mT, V))
        return mu, state._replace(
            mu=mu,
            nu=nu,
            overlap=no_overlap(group, T),
            count=group.unstack((t + 1)[:, 0, 0]),
        )

    return by_rank(_init, rule, transport=record_overlap, compute_dtype=compute_dtype, sharded=True)


def _init(params: Tree, scaling: float = 1.0) -> RiteState:
    return RiteState(
        mu=zeros(params),
        nu=small_zeros(params, 2),
        overlap=small_zeros(params, 2),
        spectrum=small_zeros(params, 1),
        escaped=small_zeros(params, 0),
        count=counts(params),
    )


def _escaped(backend: Backend, before: Array, V: Stack) -> Array:
    """The mass ρ that a second moment with eigenvalues `before` has lost in V, (2K, 1, 1)."""
    xp = backend.xp
    after, _ = backend.eigh(V)
    largest, total = xp.max(before - after, axis=-1), xp.sum(before - after, axis=-1)
    return xp.clip(xp.minimum(largest, total), min=0.0)[:, None, None]


def clip_unmagnified(max_norm: float | None = None, max_rms: float | None = None) -> Transform:
    """Guards on the unmagnified gradients, whose size no split of the product can change.

    With ``Ḡ_A = S_B^-½ G_A`` and ``Ḡ_B = G_B S_A^-½``: a factor whose ``|Ḡ|_F / sqrt(r N)`` is
    above `max_rms` has its gradient set to 0 in this step; then all gradients of the model shrink
    by one number so that the norm of all ``Ḡ`` together is at most `max_norm`. A pair that is not
    finite does not count, and stays visible.

    Parameters
    ----------
    max_norm, max_rms : float, optional
        Not negative; None for no bound.

    Returns
    -------
    Transform
        Without state.
    """
    for name, value in (("max_norm", max_norm), ("max_rms", max_rms)):
        if value is not None:
            check_nonnegative(name, value)

    def measure(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        W = group.backend.pseudo_half(group.partner_gram(group.params), group.lost)
        G, numbers = group.in_range(G)
        squares = traces(group.xp, congruence(group.backend, W, group.gram(G)))
        norms = squares**0.5 / numbers
        if group.numbers is not None:
            norms = norms / group.swap_sides(group.stack(group.numbers))
        return group.unstack(norms[:, 0, 0]), state

    unmagnified_norms = by_rank(no_state, measure, rescaled=False).update

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        if not (leaves := leaves_of(grads)):
            return grads, state
        norms, _ = unmagnified_norms(grads, (), params)
        xp = get_backend(*leaves).xp

        if max_rms is not None:

            def too_large(g: Array, norm: Array) -> Array:
                return norm > max_rms * (g.shape[-2] * g.shape[-1]) ** 0.5

            over = map_leaves(too_large, grads, norms)
            grads = map_leaves(lambda g, x: xp.where(each(x), 0 * g, g), grads, over)
            norms = map_leaves(lambda norm, x: xp.where(x, 0 * norm, norm), norms, over)
        if max_norm is None:
            return grads, state
        finite = [xp.where(xp.isfinite(x), x, xp.zeros_like(x)) for x in leaves_of(norms)]
        factor = shrink_to(xp, max_norm, euclidean_norm(xp, finite))
        return map_leaves(partial(times, factor), grads), state

    return Transform(no_state, update, sharded=True, together=True)


@hyperparameters
def lora_rite(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    escape: bool = False,
    max_norm: float | None = None,
    max_rms: float | None = None,
    balance: bool = False,
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-RITE, robust invariant transformation equilibration.

    With any orthonormal bases ``B = U_B R_B`` and ``Aᵀ = U_A R_A`` and ``Ḡ_B = G_B R_A⁻¹``::

        P = U_Aᵀ U_A,old                       how the partner's basis has turned
        V = β₂ P V Pᵀ + (1 - β₂) Ḡ_Bᵀ Ḡ_B / m  second moment, (r, r)
        M = β₁ M Pᵀ + (1 - β₁) Ḡ_B ((V + ρ I)^½ + ε I)⁻¹
        B = B - lr (M R_A⁻ᵀ + λ B)

    and the same for Aᵀ with the bases of B, and n for m. The decays are bias-corrected, ``β (1 -
    β^t) / (1 - β^(t+1))`` with t from 0. For r up to m and n, B A follows the same path however it
    is split.

    Parameters
    ----------
    b1, b2 : float
        Decay rates, in [0, 1).
    eps : float
        At least 0.
    weight_decay : float
        λ, at least 0; decoupled, of each factor.
    escape : bool
        Give back to the denominator the mass ρ that V loses when P is no rotation: ``ρ <- β₂ (ρ +
        min(max_i (λ_i(V) - λ_i(P V Pᵀ)), tr V - tr P V Pᵀ))``, no less than 0, with sorted
        eigenvalues. In the paper's algorithm; off in the authors' code, as here.
    max_norm, max_rms : float, optional
        Guards, see `clip_unmagnified`. The authors' code has 1.0 for both (`OFFICIAL`); here they
        are off: they tie pairs together (in `rlora.torch` those of one group on one device), and
        stop a loss that is summed instead of averaged without a word.
    balance : bool
        After each step, scale A and B to equal norms; the product stays.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.

    Returns
    -------
    Transform
        State: one array like each factor and 2 r² + r + 2 numbers.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    No basis is stored. M R_A⁻ᵀ and R⁻¹ V R⁻ᵀ live in the coordinates of the factors, where the
    transport is ``A_old Aᵀ S_A⁻¹``: `transport` writes down ``A A_oldᵀ`` when the parameters move.
    Whoever changes the factors otherwise calls it too, or starts the state anew. A direction in
    which a factor has no mass does not move its partner; an eigenvalue of V below its own rounding
    counts as that rounding. On a CUDA device, where eigenvalues would have to be waited for, both
    inverses have a relative damping of sqrt(eps) instead: of a factor's mass in float32 what is
    below about 2 % of its root mean square. NaN stays NaN, which the authors' code makes 0.

    References
    ----------
    J.-N. Yen, S. Si, Z. Meng, F. Yu, S. S. Duvvuri, I. S. Dhillon, C.-J. Hsieh, S. Kumar. LoRA Done
    RITE: Robust Invariant Transformation Equilibration for LoRA Optimization. arXiv:2410.20625,
    2024.

    Examples
    --------
    >>> import rlora
    >>> from rlora.methods.rite import OFFICIAL
    >>> method = rlora.lora_rite(**OFFICIAL)
    """
    rite = scale_by_rite(b1, b2, eps, escape=escape, compute_dtype=compute_dtype)
    chained = [rite, add_decayed_weights(weight_decay)]
    if max_norm is not None or max_rms is not None:
        chained.insert(0, clip_unmagnified(max_norm, max_rms))
    if balance:
        chained.append(Transform(no_state, pass_on, _apply_and_balance, sharded=True))
    return chain(*chained)


@rounded_once
def _apply_and_balance(params: Tree, direction: Tree, lr: Array | float) -> Tree:
    def balance(pair: Factors, moves: Factors) -> Factors:
        if moves.A is None or moves.B is None:
            return pair
        backend = get_backend(pair.A)
        xp = backend.xp
        sized, numbers = into_range(backend, list(pair))
        a, b = (xp.sum(x * x, axis=(-2, -1), keepdims=True) ** 0.25 for x in sized)
        live = (a > 0) & (b > 0)
        c = xp.where(live, b, xp.ones_like(b)) / xp.where(live, a, xp.ones_like(a))
        if numbers is not None:
            c = xp.where(live, c * (numbers[0] ** 0.5 / numbers[1] ** 0.5), c)
        return Factors(c * pair.A, pair.B / c)

    return map_pairs(balance, apply_updates(params, direction, lr), direction)
