"""Factors that a step over lists takes together, with their moments."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.torch.step.kernels import counter_dtype
from rlora.torch.step.plan import Share


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
        first, last, device = places[0], places[-1], params[0].device
        run = places == [*range(first, last + 1)]  # then a view takes the place of a copy
        self.places = slice(first, last + 1) if run else torch.tensor(places, device=device)
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        ready = all(p.dtype == self.dtype and p.is_contiguous() for p in params)
        self.copied = stacked or not ready
        self.held = self.copied and device.type == "cpu"
        """True for copies in memory of the last step; on a device torch's allocator keeps it."""
        self.X = self._memory() if self.copied else [p.detach() for p in params]
        self.workspace: Workspace = {}
        self.D: list[Tensor] = []
        """Preconditioned gradients, in whose place the kernel writes Adam's direction."""
        if group is None:
            return
        self.G = self._memory()
        # On the host as torch has them, unless the options say that the device counts.
        there = device.type != "cpu" and (group["fused"] or group["capturable"])
        self.steps = torch.zeros(
            len(params), dtype=counter_dtype(there), device=device if there else "cpu"
        )
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        self.moments = {name: self._like_params(torch.zeros) for name in names}
        self.views = [self.steps.unbind(0), *map(self._each, self.moments.values())]
        views = zip(*self.views, strict=True)
        self.shares = [
            Share(p, ["step", *names], list(some)) for p, some in zip(params, views, strict=True)
        ]

    def _memory(self) -> list[Tensor]:
        return self._like_params(torch.empty) if self.held else []

    def _like_params(self, make: Any) -> list[Tensor]:
        shapes = [p.shape for p in self.params]
        if self.stacked:
            shapes = [torch.Size((len(shapes), *shapes[0]))]
        return [make(shape, dtype=self.dtype, device=self.params[0].device) for shape in shapes]

    def _each(self, arrays: list[Tensor]) -> Sequence[Tensor]:
        """The arrays of each parameter, in the order of `params`."""
        return arrays[0].unbind(0) if self.stacked else arrays

    def _gather(self, memory: list[Tensor], tensors: list[Any]) -> list[Tensor]:
        """Copies of tensors, one a parameter, as arrays of this part, in `memory` if it is held."""
        if not self.held:
            return [torch.stack(tensors).to(self.dtype)]
        if self.stacked and tensors[0].dtype == self.dtype:
            torch.stack(tensors, out=memory[0])
        else:
            torch._foreach_copy_(list(self._each(memory)), tensors)
        return memory

    def gram(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        """``A Aᵀ`` or ``Bᵀ B`` of every factor, (k, r, r)."""
        if self.copied:
            self.X = self._gather(self.X, self.params)
        gram = backend.gram_columns if self.side else backend.gram_rows
        S: Tensor = gram(self.X, dtype, self.workspace)
        return S

    def precondition(self, backend: Backend, P: Tensor | None) -> None:
        """``P G`` for factors A, ``G Pᵀ`` for factors B, or G itself, in `D`."""
        G: list[Any] = [p.grad for p in self.params]
        if self.copied:
            G = self._gather(self.G, G)
        # Contiguous as the moments are: the kernel runs through memory without a look at strides.
        if P is None:
            own = self.copied and not self.held  # made by `_gather` a moment ago
            self.D = G if own else [g.clone(memory_format=torch.contiguous_format) for g in G]
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
        places = self.places
        P = P[places] if isinstance(places, slice) else P.index_select(0, places)
        P = P.mT if self.side else P
        each = [P] if self.stacked else list(P.unbind(0))
        if self.side:
            return backend.apply_right(X, each, self.workspace, onto, keep)
        return backend.apply_left(each, X, self.workspace, onto, keep)

    def kernel(self, own: bool, counters: dict[float, Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Target, gradient, counter and moments for the kernel, a stack with equal steps at once.

        Parameters
        ----------
        own : bool
            Whether the target is the parameters, else the gradient, which the direction replaces.
        counters : dict
            Counters on the device by their value, to which those that are missing are added.
        """
        target, gradient, device = self.X if own else self.D, self.D, self.params[0].device
        steps, *moments = self.views
        if self.steps.device.type == "cpu":
            counts = self.steps.tolist()
            if device.type != "cpu":
                for n in {*counts} - counters.keys():
                    counters[n] = torch.full((), n, dtype=torch.float32, device=device)
                steps = [counters[n] for n in counts]
            if self.stacked and len({*counts}) == 1:
                yield target[0], gradient[0], steps[0], *(x[0] for x in self.moments.values())
                return
        yield from zip(*map(self._each, (target, gradient)), steps, *moments, strict=True)

    def move(self, backend: Backend, P: Tensor, keep: float) -> None:
        """``X <- keep X + P D``, or with ``D Pᵀ`` for B."""
        moved = self._apply(backend, P, self.D, self.X, keep)
        for x, new in zip(self.X, moved, strict=True):
            if new is not x:  # from the generic backend
                x.copy_(new)
