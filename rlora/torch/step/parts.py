"""Factors that a step over lists takes together, with their moments."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.torch.step.plan import Share
from rlora.torch.step.rounding import store


class Part:
    """Factors of one side that a backend operation takes together: many small, or all large ones.

    Parameters
    ----------
    params : list of Tensor
        Factors of one dtype; of one shape if they are stacked.
    side : int
        0 for A, 1 for B.
    places : list of int
        Places of their Grams in the (2K, r, r) stack of all factors.
    stacked : bool
        Whether they are copied to a stack, (k, r, n) or (k, m, r).
    group : dict or None
        The parameter group; None for factors that stay.
    """

    def __init__(
        self,
        params: list[Tensor],
        side: int,
        places: list[int],
        stacked: bool,
        group: dict[str, Any] | None,
    ) -> None:
        self.params, self.side, self.stacked, self.group = params, side, stacked, group
        first, last = places[0], places[-1]
        run = places == [*range(first, last + 1)]  # then a view takes the place of a copy
        self.places = slice(first, last + 1) if run else torch.tensor(places)
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        ready = all(p.dtype == self.dtype and p.is_contiguous() for p in params)
        self.copied = stacked or not ready
        self.X = self._like_params(torch.empty) if self.copied else [p.detach() for p in params]
        self.workspace: Workspace = {}
        self.D: list[Tensor] = []
        """Preconditioned gradients, in whose place the kernel writes Adam's direction."""
        if group is None:
            return
        self.G = self._like_params(torch.empty) if self.copied else []
        self.steps = torch.zeros(len(params))
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        self.moments = {name: self._like_params(torch.zeros) for name in names}
        memory = [self.steps.unbind(0), *map(self._each, self.moments.values())]
        views = zip(*memory, strict=True)
        self.shares = [
            Share(p, ["step", *names], list(some)) for p, some in zip(params, views, strict=True)
        ]

    def _like_params(self, make: Any) -> list[Tensor]:
        shapes = [p.shape for p in self.params]
        if self.stacked:
            shapes = [torch.Size((len(shapes), *shapes[0]))]
        return [make(shape, dtype=self.dtype) for shape in shapes]

    def _each(self, arrays: list[Tensor]) -> Sequence[Tensor]:
        """The arrays of each parameter, in the order of `params`."""
        return arrays[0].unbind(0) if self.stacked else arrays

    def _gather(self, arrays: list[Tensor], tensors: list[Any]) -> None:
        """Copy tensors, one a parameter, to arrays of this part."""
        if self.stacked and tensors[0].dtype == self.dtype:
            torch.stack(tensors, out=arrays[0])
        else:
            torch._foreach_copy_(list(self._each(arrays)), tensors)

    def gram(self, backend: Backend, S: Tensor) -> None:
        """Write ``A Aᵀ`` or ``Bᵀ B`` of every factor to its place in S."""
        if self.copied:
            self._gather(self.X, self.params)
        gram = backend.gram_columns if self.side else backend.gram_rows
        S[self.places] = gram(self.X, S.dtype, self.workspace)

    def precondition(self, backend: Backend, P: Tensor | None) -> None:
        """``P G`` for factors A, ``G Pᵀ`` for factors B, or G itself, in `D`."""
        G: list[Any] = [p.grad for p in self.params]
        if self.copied:
            self._gather(self.G, G)
            G = self.G
        # Contiguous as the moments are: the kernel runs through memory without a look at strides.
        if P is None:
            self.D = [g.clone(memory_format=torch.contiguous_format) for g in G]
        else:
            self.D = self._apply(backend, P, G)

    def _apply(
        self,
        backend: Backend,
        P: Tensor,
        X: list[Tensor],
        onto: list[Tensor] | None = None,
        keep: float = 1.0,
    ) -> list[Tensor]:
        """``P X``, or ``X Pᵀ`` for B; see `Backend.apply_left`."""
        P = P[self.places].mT if self.side else P[self.places]
        each = [P] if self.stacked else list(P.unbind(0))
        if self.side:
            return backend.apply_right(X, each, self.workspace, onto, keep)
        return backend.apply_left(each, X, self.workspace, onto, keep)

    def kernel(self, own: bool) -> Iterator[tuple[Tensor, ...]]:
        """Target, gradient, step and moments for the kernel, a stack with equal steps at once.

        Parameters
        ----------
        own : bool
            Whether the target is the parameters, else the gradient, which the direction replaces.
        """
        self.steps += 1
        arrays = [self.X if own else self.D, self.D, *self.moments.values()]
        counts = self.steps.numpy()
        if self.stacked and (counts == counts[0]).all():
            target, gradient, *moments = (x[0] for x in arrays)
            yield target, gradient, self.steps[0], *moments
            return
        steps = self.steps.unbind(0)
        yield from zip(
            *map(self._each, arrays[:2]), steps, *map(self._each, arrays[2:]), strict=True
        )

    def move(self, backend: Backend, P: Tensor, keep: float) -> None:
        """``X <- keep X + P D``, or with ``D Pᵀ`` for B."""
        moved = self._apply(backend, P, self.D, self.X, keep)
        for x, new in zip(self.X, moved, strict=True):
            if new is not x:  # from the generic backend
                x.copy_(new)

    def write(self) -> None:
        """Copy the stack back to the parameters, if there is one."""
        if self.copied and self.group is not None:
            store(self.params, self._each(self.X), self.group)
