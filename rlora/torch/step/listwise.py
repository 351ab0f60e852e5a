"""The step of pairs over lists of tensors: Grams, preconditioned gradients, torch's kernel.

The factors and their gradients are read where they lie. Torch's own AdamW or SGD steps the
parameters along ``P G``; where a second half follows, it steps zeros, which then are the move, and
the parameter moves by that times the second half.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.placement import Preconditioners, RankGrams, gram_powers, rank_grams
from rlora.torch.pairing.pairs import TensorPair, local
from rlora.torch.step.kernels import Kernel, Number
from rlora.torch.step.rounding import store


class FactorUpdate(NamedTuple):
    """A factor to be updated: A (0) or B (1) of a pair."""

    pair: TensorPair
    side: int
    live: bool = True
    """False for a factor without gradient that takes part in what processes do together."""

    @property
    def param(self) -> Tensor:
        """The parameter it lies in."""
        return self.pair[:2][self.side]

    def read(self, stored: Tensor) -> list[Tensor]:
        """The factors in what has the shape of the parameter."""
        return [views[self.side].read(stored) for views in self.pair.views]

    def write(self, factors: Sequence[Tensor]) -> Tensor:
        """The inverse of `read`."""
        parts = [v[self.side].write(x) for v, x in zip(self.pair.views, factors, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ListStep:
    """The step of pairs of one group, dtype and device; of each both factors are read.

    Parameters
    ----------
    optimizer : Optimizer
        Its state holds what the kernel carries.
    group : dict
        The parameter group.
    kernel : type
        The `Kernel` that steps the targets.
    updates : list of FactorUpdate
        The factors to be updated.
    """

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        kernel: type[Kernel],
        updates: list[FactorUpdate],
    ) -> None:
        self.group = group
        self.updates = sorted(updates, key=lambda update: update.side)
        self.pairs = pairs = list({id(update.pair.A): update.pair for update in updates}.values())
        self.workspace: Workspace = {}
        self.plain = all(view.is_plain for pair in pairs for both in pair.views for view in both)
        # Reading a dense parameter gives a view, which stays valid.
        dense = all(p.is_contiguous() for pair in pairs for p in (pair.A, pair.B))
        self.stays = self.plain or dense
        self.values: list[Factors] = []
        ends = [*accumulate((len(pair.views) for pair in pairs), initial=0)]
        of_pair = {id(pair.A): range(*ends[i : i + 2]) for i, pair in enumerate(pairs)}
        self.products = [of_pair[id(update.pair.A)] for update in self.updates]
        fixed = [[pair.has_fixed_B(optimizer.state)] * len(pair.views) for pair in pairs]
        self.fixed_B = [x for of_pair in fixed for x in of_pair]
        own = [local(update.param).detach() for update in self.updates]
        self.own = own
        # Kernels run through memory without a look at strides: what they step lies as their state.
        self.copied = group["placement"] != "before" or not all(map(_lies_well, own))
        self.targets = [_scratch(p) for p in own] if self.copied else own
        self.live = [k for k, update in enumerate(self.updates) if update.live]
        self.kernel = kernel(
            optimizer,
            group,
            self._living([x.param for x in self.updates]),
            self._living(self.targets),
        )

    def _living(self, x: Sequence[Any]) -> list[Any]:
        return [x[k] for k in self.live]

    # --- before anything moves ------------------------------------------------------------------

    def prepare(self) -> Preconditioners:
        """Do everything that may fail; the preconditioners around the kernel."""
        return self.direct(self.grams())

    def factors(self) -> list[Factors]:
        """Both factors of every product."""
        return [factors for pair in self.pairs for factors in pair.factors()]

    def sizes(self) -> list[tuple[int, int]]:
        """The m and n of every product."""
        return [(pair.B.shape[-2], pair.A.shape[-1]) for pair in self.values]

    def gradients(self) -> list[Tensor]:
        """The gradients of the factors to be updated."""
        return [cast("Tensor", update.pair.gradient(update.side)) for update in self.updates]

    def grams(self) -> list[RankGrams]:
        """The Grams of both factors of every product, rank by rank."""
        if not (self.stays and self.values):
            self.values = self.factors()
        backend, like = get_backend(self.values[0].A), self.values[0].A
        with backend.exact(like):
            return rank_grams(
                backend,
                self.values,
                compute_dtype=self.group["compute_dtype"],
                workspace=self.workspace,
                fixed_B=self.fixed_B,
            )

    def direct(self, grams: list[RankGrams]) -> Preconditioners:
        """Do as `prepare`, from Grams that are given."""
        backend, gradients = get_backend(self.values[0].A), self.gradients()
        placement = self.group["placement"]
        with backend.exact(self.values[0].A):
            P = gram_powers(
                grams,
                self.sizes(),
                placement=placement,
                damping=self.group["damping"],
                damping_mode=self.group["damping_mode"],
            )
            directions = self._apply(backend, P.first, gradients)
        pairs = zip(directions, self.targets, strict=True)
        self.directions = self._living([_laid_as(d, target) for d, target in pairs])
        self.kernel.prepare(self.directions)
        if placement != "before":
            torch._foreach_zero_(self.targets)
        elif self.copied:
            torch._foreach_copy_(self.targets, self.own)
        return P

    def _apply(
        self, backend: Backend, P: list[Factors] | None, stored: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """``P X`` for what belongs to an A, ``X P`` for what belongs to a B."""
        if P is None:
            return stored
        sides: tuple[tuple[list[Tensor], list[Tensor]], ...] = (([], []), ([], []))
        for update, products, x in zip(self.updates, self.products, stored, strict=True):
            powers, factors = sides[update.side]
            powers += [P[i][update.side] for i in products]
            factors += [x] if self.plain else update.read(x)
        (P_A, X_A), (P_B, X_B) = sides
        done = backend.apply_left(P_A, X_A, self.workspace)
        done += backend.apply_right(X_B, P_B, self.workspace)
        if self.plain:
            return done
        rest = iter(done)
        return [update.write([next(rest) for _ in update.pair.views]) for update in self.updates]

    # --- the move -------------------------------------------------------------------------------

    def finish(self, P: Preconditioners) -> None:
        """The kernel, and the second half behind it if there is one."""
        lr, weight_decay = self.group["lr"], self.group.get("weight_decay", 0.0)
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr  # one element in any shape
        if self.live:
            self.kernel.run(self.directions, lr, weight_decay if P.second is None else 0.0)
        if P.second is not None:
            self._move(P.second, 1 - lr * weight_decay)
        elif self.copied:
            store(self.own, self.targets, self.group)
        if self.own[0].device.type != "cpu":  # there the workspace keeps them
            self.directions = []

    def _move(self, P: list[Factors], keep: Number) -> None:
        """``X <- keep X + P D``, where D is what the kernel has made of zeros."""
        backend = get_backend(self.values[0].A)
        with backend.exact(self.values[0].A):
            moves = self._living(self._apply(backend, P, self.targets))
        params = self._living(self.own)
        if not params:
            return
        wide = [p.to(moves[0].dtype) for p in params]  # the parameters themselves where wide
        torch._foreach_mul_(wide, keep)
        torch._foreach_add_(wide, moves)
        if wide[0] is not params[0]:
            store(params, wide, self.group)


def _scratch(p: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.empty_like(p, dtype=wide)  # gaps are not preserved


def _lies_well(p: Tensor) -> bool:
    """Return whether a kernel may step the parameter itself."""
    scratch = _scratch(p)
    return p.dtype == scratch.dtype and p.stride() == scratch.stride()


def _laid_as(direction: Tensor, target: Tensor) -> Tensor:
    """The direction with the dtype, shape and strides of what is stepped along it."""
    if direction.dtype != target.dtype:
        direction = direction.to(target.dtype)
    if direction.shape != target.shape:
        direction = direction.view(target.shape)
    if direction.stride() != target.stride():
        direction = torch.empty_like(target).copy_(direction)
    return direction
