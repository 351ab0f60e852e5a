"""Pairs of torch parameters, and how they are seen as factors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError
from rlora.core.factors import Factors
from rlora.core.layout import Shape, Views, read_pairs


class TensorPair(NamedTuple):
    """Two parameters, and their views as factors.

    Parameters
    ----------
    A, B : Tensor
        As they are stored.
    views : tuple of (View, View)
        Views of the factors in them.
    diagonal : Tensor, optional
        AdaLoRA's diagonal: the product is ``B diag(e) A``. It is in no Gram: AdaLoRA holds A and B
        near orthonormal by a loss that does not pass through it, and sets entries of it to 0, so
        that an inverse of ``diag(e) S diag(e)`` would multiply gradients without bound.
    tied : tuple of (Tensor, ...)
        Tied parameters, which share the memory of A and of B: their gradients are added.
    owners : tuple of (Tensor, Tensor), optional
        The parameters that own the state, where A and B are only copies.
    scaling : float, optional
        The s of ``W0 + s B A``, where the model says it.
    """

    A: Tensor
    B: Tensor
    views: tuple[Views, ...]
    diagonal: Tensor | None = None
    tied: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
    owners: tuple[Tensor, Tensor] | None = None
    scaling: float | None = None

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """Every parameter that is updated with the pair."""
        return (self.A, self.B, *self.tied[0], *self.tied[1])

    @property
    def sides(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A, and B, each with the parameters that are tied to it."""
        return (self.A, *self.tied[0]), (self.B, *self.tied[1])

    @property
    def is_dense(self) -> bool:
        """True if the parameters are the factors themselves, two plain matrices of one dtype."""
        return (
            len(self.views) == 1
            and all(view.is_plain for view in self.views[0])
            and not any(self.tied)
            and self.A.ndim == self.B.ndim == 2
            and not is_distributed(self.A)
            and (self.A.dtype, self.A.device) == (self.B.dtype, self.B.device)
        )

    def has_gradient(self, side: int) -> bool:
        """Return whether A (0) or B (1), or a parameter tied to it, has a gradient."""
        return any(p.grad is not None for p in self.sides[side])

    def has_gradients(self) -> tuple[bool, bool]:
        """Return `has_gradient` of A and of B."""
        return self.has_gradient(0), self.has_gradient(1)

    def has_fixed_B(self, state: Mapping[Any, Any]) -> bool:
        """Return whether B is frozen and no step has moved it: it has no state in the optimizer."""
        return not any(moves(p) or state.get(p) for p in self.sides[1])

    def gradient(self, side: int) -> Tensor | None:
        """The gradient of A (0) or B (1), with those of its tied parameters."""
        p, tied = self[:2][side], self.tied[side]
        if not tied:
            return p.grad
        grads = [q.grad if _lies_as(q, p) else q.grad.mT for q in (p, *tied) if q.grad is not None]
        if not grads:
            return None
        with get_backend(p).exact(p):  # autocast refuses to stack the other 16-bit dtype
            return torch.stack(grads).sum(0)

    def with_tied(self, A: Tensor, B: Tensor) -> "TensorPair":
        """The pair with two more tied parameters, of the memory of A and B."""
        for p, q in ((self.A, A), (self.B, B)):
            if not (_lies_as(q, p) or _lies_as(q.mT, p)):
                msg = (
                    f"tied factors of shapes {tuple(p.shape)} and {tuple(q.shape)} are neither "
                    f"the same nor the transpose of each other"
                )
                raise PairingError(msg)
        return self._replace(tied=((*self.tied[0], A), (*self.tied[1], B)))

    def whole(self) -> "TensorPair":
        """The same of whole tensors, zero, whose state belongs to the parameters of this one."""
        A, B = (torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in (self.A, self.B))
        owners = (self.A, self.B)
        return TensorPair(A, B, self.views, owners=owners, scaling=self.scaling)

    def products(self) -> "Iterator[ProductView]":
        """The pair's products one by one."""
        several = len(self.views) > 1
        for i, views in enumerate(self.views):
            yield ProductView(self, views, f".{i}" if several else "")

    def factors(self) -> list[Factors]:
        """The factors, whose Grams are the partners' metrics."""
        return read_pairs(self.views, self.A.detach(), self.B.detach())

    def replaced(self, successor: Callable[[Tensor], Tensor | None]) -> "TensorPair | None":
        """The pair of the successors of its parameters; None where A, B or the diagonal has none.

        Parameters
        ----------
        successor : callable
            Gives what stands in a parameter's place now, or None.
        """
        core = [None if p is None else successor(p) for p in (self.A, self.B, self.diagonal)]
        if core[0] is None or core[1] is None or (self.diagonal is not None and core[2] is None):
            return None
        tied = [tuple(q for p in side if (q := successor(p)) is not None) for side in self.tied]
        return self._replace(A=core[0], B=core[1], diagonal=core[2], tied=(tied[0], tied[1]))


class ProductView(NamedTuple):
    """One product, or one stack of products, of a pair."""

    pair: TensorPair
    views: Views
    suffix: str
    """Suffix in the names of its state that distinguishes it from others of its pair."""

    @property
    def params(self) -> tuple[Tensor, Tensor]:
        """The parameters it lies in."""
        return self.pair.A, self.pair.B

    @property
    def owners(self) -> tuple[Tensor, Tensor]:
        """The parameters that own the state."""
        return self.pair.owners or self.params

    @property
    def keepers(self) -> tuple[Tensor, Tensor]:
        """The parameter whose state holds the entries that a pair has once, and its partner.

        That of A, or that of B where A is frozen: the state of frozen parameters is not loaded by
        everyone.
        """
        A, B = self.owners
        return (B, A) if B.requires_grad and not A.requires_grad else (A, B)

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Shapes of its factors."""
        return self.views[0].shape, self.views[1].shape

    def read(self, side: int) -> Tensor:
        """One of its factors."""
        return cast("Tensor", self.views[side].read(self.params[side].detach()))

    def write(self, side: int, factor: Tensor) -> Tensor:
        """The inverse of `read`: the values of `part` of the parameter that hold this factor."""
        return cast("Tensor", self.views[side].write(factor))

    def part(self, side: int) -> Tensor:
        """The rows of the parameter in which the factor lies."""
        return cast("Tensor", self.views[side].part(self.params[side]))

    def gradient(self, side: int) -> Tensor | None:
        """The gradient of one of its factors."""
        grad = self.pair.gradient(side)
        return None if grad is None else cast("Tensor", self.views[side].read(grad.detach()))


class Side:
    """The factors A (0) or B (1) of products that are stepped together.

    Parameters
    ----------
    products : list of ProductView
        At least one.
    side : {0, 1}
        Which factors.
    """

    def __init__(self, products: list[ProductView], side: int) -> None:
        self._products, self._side = products, side
        plain = all(x.views[side].is_plain and not x.pair.tied[side] for x in products)
        # Where each parameter is the factor itself, no product is asked.
        self._own = [x.params[side] for x in products] if plain else None

    def factors(self) -> list[Tensor]:
        """One of each product."""
        return self._own or [x.read(self._side) for x in self._products]

    def gradients(self) -> list[Any]:
        """Those of `factors`, or None."""
        if self._own:
            return [p.grad for p in self._own]
        return [x.gradient(self._side) for x in self._products]

    def places(self) -> list[Tensor]:
        """The parts of parameters that hold the factors."""
        return self._own or [x.part(self._side) for x in self._products]

    def as_stored(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The values of `places` that hold these factors."""
        if self._own:
            return list(factors)
        return [p.write(self._side, x) for p, x in zip(self._products, factors, strict=True)]


def params_of(pairs: Iterable[TensorPair]) -> list[Tensor]:
    """Every parameter that is updated with one of the pairs."""
    return [p for pair in pairs for p in pair.moved]


def groups_by_id(groups: Iterable[dict[str, Any]]) -> dict[int, int]:
    """The place of the group of each parameter, by the id of that."""
    return {id(p): i for i, group in enumerate(groups) for p in group["params"]}


def scalings_of(pairs: Iterable[TensorPair]) -> dict[int, float]:
    """The s of pairs that know theirs, by the identity of each of their parameters."""
    return {id(p): pair.scaling for pair in pairs if pair.scaling is not None for p in pair.moved}


def identical(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Return whether these are the same objects."""
    return len(now) == len(before) and all(map(is_, now, before))


def moves(p: Tensor) -> bool:
    """Return whether a step can move a parameter: a frozen one never gets a gradient."""
    return p.requires_grad or p.grad is not None


def memory(p: Tensor) -> int:
    """Address of a parameter's memory, its id if it has none: equal where memory is shared."""
    is_fake = hasattr(p, "fake_mode")  # as of `torch._subclasses`, which warns
    return id(p) if is_fake else p.data_ptr() or id(p)


def is_distributed(p: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing the distributed package."""
    return hasattr(p, "device_mesh")


def local(p: Any) -> Tensor:
    """The piece of a DTensor that this process has, another tensor itself: inside a step."""
    return cast("Tensor", p.to_local() if is_distributed(p) else p)


def mesh_of(p: Any) -> Any:
    """The device mesh of a DTensor."""
    return p.device_mesh


def cut_dims(p: Any, axis: int) -> list[int]:
    """The dimensions of the mesh along which an axis of a DTensor is cut."""
    return [d for d, place in enumerate(p.placements) if getattr(place, "dim", None) == axis]


def _lies_as(p: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same entries at the same places of one memory."""
    return p.shape == other.shape and p.stride() == other.stride()
