"""All pairs of one rank at once: lists of factors, and one stack of r x r matrices for the model.

In *row form*, A as it is and B transposed, both factors are (r, N), a change of basis acts on both
from the left, and a formula for A is one for B. A stack (2K, r, r) has first what belongs to the K
A factors, then what belongs to the K B factors; P acts as ``P A`` and as ``(P Bᵀ)ᵀ = B Pᵀ``.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any, TypeAlias

from rlora.core.algebra import lost_below
from rlora.core.backend import Backend, Workspace
from rlora.core.checks import ComputeDtype, check_choice
from rlora.core.dispatch import get_backend
from rlora.core.factors import (
    Array,
    Factors,
    Tree,
    counterparts,
    in_pairs,
    indices_by_rank,
    rebuild_each,
    where_moving,
)
from rlora.core.sizes import moderate, range_numbers, swapped
from rlora.core.transform import ApplyFn, State, Transform, apply_updates

Stack: TypeAlias = Array
"""(2K, ...): members of the A factors, then members of the B factors."""


class RankGroup:
    """Pairs of one rank, dtype and device.

    Parameters
    ----------
    backend : Backend
        The backend of the parameters.
    params : sequence of Factors
        A (..., r, n) and B (..., m, r), of any outer sizes; K counts every layer of them.
    moving : sequence of (bool, bool), optional
        True for factors with a gradient; all by default.
    fixed_B : sequence of bool, optional
        True for pairs whose B no step moves, of which covariant damping is 0; none by default.
    numbers : sequence of Factors, optional
        Numbers by which the factors have been divided, (..., 1, 1); see `by_rank`.
    dtype : dtype, optional
        The dtype of the r x r algebra; the parameters' own by default, at least float32.
    workspace : dict, optional
        Memory to use again at the next call with factors of the same shapes.
    """

    def __init__(
        self,
        backend: Backend,
        params: Sequence[Factors],
        *,
        moving: Sequence[tuple[bool, bool]] | None = None,
        fixed_B: Sequence[bool] | None = None,
        numbers: Sequence[Factors] | None = None,
        dtype: Any = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.backend, self.xp, self.params = backend, backend.xp, params
        self.like = params[0].A
        self.rank: int = self.like.shape[-2]
        self.wide = backend.compute_dtype(self.like.dtype)  # of what acts on factors
        self.dtype = dtype or self.wide
        self.lost = lost_below(self.xp, self.rank, self.wide)
        self.workspace = workspace
        self.moving = moving or [(True, True)] * len(params)
        self.all_move = all(map(all, self.moving))
        self.fixed_B = fixed_B
        self.numbers = numbers
        self._leads = [tuple(pair.A.shape[:-2]) for pair in params]
        self.layers = sum(map(prod, self._leads))

    # --- factor-sized work ----------------------------------------------------------------------

    def gram(self, X: Sequence[Factors]) -> Stack:
        """``X Xᵀ`` in row form: ``A Aᵀ`` and ``Bᵀ B``."""
        A, B = zip(*X, strict=True)
        return self.xp.concat(self.backend.grams(A, B, self.dtype, self.workspace))

    def partner_gram(self, X: Sequence[Factors]) -> Stack:
        """``X Xᵀ`` of the partner of each factor: ``Bᵀ B`` and ``A Aᵀ``."""
        A, B = zip(*X, strict=True)
        return self.xp.concat(self.backend.grams(A, B, self.dtype, self.workspace)[::-1])

    def cross(self, X: Sequence[Factors], Y: Sequence[Factors]) -> Stack:
        """``X Yᵀ`` in row form."""
        x, y = ([pair.A for pair in each] + [pair.B.mT for pair in each] for each in (X, Y))
        return self.backend.cross_rows(x, y, self.dtype)

    def partner_cross(self, X: Sequence[Factors], Y: Sequence[Factors]) -> Stack:
        """``X Yᵀ`` of the partner of each factor: ``X_Bᵀ Y_B`` and ``X_A Y_Aᵀ``."""
        x, y = ([pair.B.mT for pair in each] + [pair.A for pair in each] for each in (X, Y))
        return self.backend.cross_rows(x, y, self.dtype)

    def apply(
        self, P: Stack, X: Sequence[Factors], accumulate: Sequence[Factors] | None = None
    ) -> list[Factors]:
        """``P X_A`` and ``X_B Pᵀ``, added to `accumulate` if given, which may be overwritten."""
        (A, B), (P_A, P_B) = zip(*X, strict=True), zip(*self.multipliers(P), strict=True)
        to_A, to_B = (None, None) if accumulate is None else zip(*accumulate, strict=True)
        left = self.backend.apply_left(P_A, A, self.workspace, to_A)
        right = self.backend.apply_right(B, P_B, self.workspace, to_B)
        return list(map(Factors, left, right))

    def in_range(self, X: Sequence[Factors]) -> tuple[list[Factors], Stack | float]:
        """X, each factor times a number that brings its squares into range, and the numbers."""
        A, B = zip(*X, strict=True)
        numbers = range_numbers(self.backend, [*A, *B])
        if numbers is None:
            return list(X), 1.0
        pieces = zip(self.unstack(numbers), X, strict=True)
        sized = [Factors(c.A * x.A, c.B * x.B) for c, x in pieces]
        return sized, self.backend.cast(numbers, self.dtype)

    def filled(self, X: Sequence[Factors]) -> list[Factors]:
        """Gradients or directions, with zeros for those that are None."""
        leaves = zip(chain.from_iterable(X), chain.from_iterable(self.params), strict=True)
        return in_pairs([self.xp.zeros_like(p) if x is None else x for x, p in leaves])

    # --- the stack ------------------------------------------------------------------------------

    def swap_sides(self, S: Stack) -> Stack:
        """The members of the partner of each factor: the halves are swapped."""
        return self.xp.concat([S[self.layers :, ...], S[: self.layers, ...]])

    def halves(self, S: Stack) -> tuple[Array, Array]:
        """The members of the A factors and those of the B factors."""
        return S[: self.layers, ...], S[self.layers :, ...]

    def stack(self, X: Sequence[Factors]) -> Stack:
        """Small arrays, one per factor with the leading axes of its pair, as (2K, ...)."""
        flat = []
        for side in zip(*X, strict=True):
            for lead, x in zip(self._leads, side, strict=True):
                flat.append(self.xp.reshape(x, (prod(lead), *x.shape[len(lead) :])))
        return self.backend.cast(self.xp.concat(flat), self.dtype)

    def unstack(self, S: Stack) -> list[Factors]:
        """The inverse of `stack`."""
        A, B = zip(*self.params, strict=True)
        if S.dtype != self.wide:
            S = self.backend.cast(S, self.wide)
        pieces = self.backend.unstack(S, [*A, *B])
        return list(map(Factors, pieces[: len(A)], pieces[len(A) :]))

    def multipliers(self, P: Stack) -> list[Factors]:
        """The matrices that multiply A from the left and B from the right: P and ``Pᵀ``."""
        return [Factors(P_A, P_B.mT) for P_A, P_B in self.unstack(P)]

    def per_layer(self, X: Sequence[Factors]) -> Stack:
        """One number per factor, or one per layer of it, as (2K, 1, 1)."""
        spread = self.xp.broadcast_to
        X = [Factors(spread(x.A, k), spread(x.B, k)) for x, k in zip(X, self._leads, strict=True)]
        return self.xp.reshape(self.stack(X), (-1, 1, 1))

    def constant(self, values: Sequence[tuple[float, float]]) -> Stack:
        """Python numbers, two for each pair, as (2K, 1, 1)."""
        kept = {} if self.workspace is None else self.workspace
        key = ("constant", tuple(values))
        if key not in kept:
            flat = [
                value[side]
                for side in (0, 1)
                for lead, value in zip(self._leads, values, strict=True)
                for _ in range(prod(lead))
            ]
            kept[key] = self.backend.constants(flat, self.dtype, self.like)
        return kept[key]

    def columns(self) -> Stack:
        """N, the number of columns in row form: n for an A, m for a B."""
        return self.constant([(pair.A.shape[-1], pair.B.shape[-2]) for pair in self.params])

    def both_move(self) -> Array | float:
        """For each pair 1 where both factors have a gradient, else 0: (K, 1, 1)."""
        if self.all_move:
            return 1.0
        both = [float(a and b) for a, b in self.moving]
        return self.constant(list(zip(both, both, strict=True)))[: self.layers, ...]


Rule: TypeAlias = Callable[[RankGroup, list[Factors], State], tuple[list[Factors], State]]
"""``rule(group, grads, state) -> (directions, state)`` for all pairs of one rank: lists of
Factors, and a named tuple of lists of whatever the state has for each pair. A factor without a
gradient comes with a zero one; its direction is dropped, and its share of the state stays."""

TransportRule: TypeAlias = Callable[[RankGroup, Sequence[Factors], State], State]
"""``transport(group, old, state) -> state`` for all pairs of one rank, after the group's
parameters were `old`; factors that have not been updated count as not moving."""


def by_rank(
    init: Callable[..., State],
    rule: Rule,
    *,
    transport: TransportRule | None = None,
    apply: ApplyFn = apply_updates,
    compute_dtype: str | None = None,
    rescaled: bool = True,
    sharded: bool = False,
) -> Transform:
    """A transform out of a rule for all pairs of one rank.

    Parameters
    ----------
    init : callable
        ``init(params, scaling)``, a named tuple of trees that have at each pair of the parameters
        Factors or one array.
    rule, transport : callable
        See `Rule` and `TransportRule`.
    apply : callable
        See `rlora.Transform`.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.
    rescaled : bool
        Huge factors come brought down to an ordinary size, their gradients are those by such
        factors, and the directions shrink as much; with False both are left as they are, for a
        rule whose direction does not shrink as the partner grows.
    sharded : bool
        See `rlora.Transform`.
    """
    check_choice("compute_dtype", compute_dtype, ComputeDtype)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        def work(group: RankGroup, G: list[Factors], part: State) -> tuple[list[Factors], State]:
            whole = G if group.all_move else group.filled(G)
            if group.numbers is None or not rescaled:
                return rule(group, whole, part)
            D, part = rule(group, swapped(group.numbers, whole), part)
            return swapped(group.numbers, D), part

        return _each_rank(work, params, grads, state, compute_dtype)

    if transport is None:
        return Transform(init, update, apply, sharded=sharded)
    carried = transport

    def carry(state: State, old: Tree, new: Tree) -> State:
        def work(group: RankGroup, old: list[Factors], part: State) -> tuple[list[Factors], State]:
            return old, carried(group, old, part)

        return _each_rank(work, new, old, state, compute_dtype, transport=True)[1]

    return Transform(init, update, apply, transport=carry, sharded=sharded)


def _each_rank(
    work: Callable[..., tuple[list[Factors], State]],
    tree: Tree,
    grads: Tree,
    state: State,
    compute_dtype: str | None,
    *,
    transport: bool = False,
) -> tuple[Tree, State]:
    """Do `work` rank by rank, on the gradients, and put its results in their places.

    In a transport there are the old factors instead of gradients, and None for what stayed.
    """
    pairs, G, *fields = counterparts(tree, tree, grads, *state)
    backend = get_backend(*chain.from_iterable(pairs))
    directions = [Factors(None, None)] * len(pairs)
    with backend.exact(pairs[0].A):
        for everyone in indices_by_rank(pairs):
            # What has no gradient at all is left out: nothing of it may be written to.
            members = [i for i in everyone if G[i].A is not None or G[i].B is not None]
            if not members:
                continue
            count = len(members)
            given, now = [G[i] for i in members], [pairs[i] for i in members]
            old = list(map(where_moving, given, given, now)) if transport else []
            sized, numbers = moderate(backend, now + old)
            group = RankGroup(
                backend,
                sized[:count],
                numbers=numbers and numbers[:count],
                moving=[(g.A is not None, g.B is not None) for g in given],
                dtype=compute_dtype and backend.compute_dtype(now[0].A.dtype, compute_dtype),
            )
            part = type(state)(*[[field[i] for i in members] for field in fields])
            found, part = work(group, sized[count:] if transport else given, part)
            whole = transport or group.all_move
            for all_values, new in zip([directions, *fields], [found, *part], strict=True):
                for i, x in zip(members, new, strict=True):
                    all_values[i] = x if whole else where_moving(G[i], x, all_values[i])
    direction, *new_fields = rebuild_each(tree, directions, *fields)
    return direction, type(state)(*new_fields)
