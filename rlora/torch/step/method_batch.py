"""The step of a method over the pairs of one group: its pure function on stacks of equal layers."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlora.core.backend import Workspace
from rlora.core.checks import checked_rate
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors, map_leaves
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.step import move
from rlora.core.structure import another_state, side_by_side
from rlora.core.transform import State, Transform
from rlora.torch.pairing.pairs import ProductView, Side, TensorPair, is_distributed, local
from rlora.torch.step.dtensors import check_cut, layer_of
from rlora.torch.step.plan import Share, keep, take_over
from rlora.torch.step.rounding import store

PORTION = 1 << 23
"""Numbers in the factors that are stepped at once on a CPU: copies of so many are held for it."""


class MethodBatch:
    """The pairs of one group on one device, layers of equal shapes on one stack.

    So the number of operations in a step depends on the number of shapes, not of layers. What
    counts is the optimizer's state: the stacks in which a step reads it are memory for the views
    that stand there, and follow whatever else is put in their place.
    """

    def __init__(
        self, optimizer: Any, group: int, products: list[ProductView], memory: Workspace
    ) -> None:
        self._optimizer, self._group, self._memory = optimizer, group, memory
        alike: dict[Any, list[ProductView]] = {}
        for product in products:
            moves = product.pair.has_gradients()
            cut = [getattr(p, "placements", None) for p in product.params]
            key = (moves, *product.shapes, product.params[0].dtype, *cut)
            alike.setdefault(key, []).append(product)
        self._buckets, self._moves = list(alike.values()), [key[0] for key in alike]
        self._sides = [[Side(bucket, side) for side in (0, 1)] for bucket in self._buckets]
        self._in_pieces = is_distributed(products[0].params[0])
        options = optimizer.param_groups[group]
        self._chosen = optimizer._chosen(options)
        self._transform = optimizer._transform(options)
        self._state = self._initial()
        self._shares = self._shares_of(flatten_state(self._state))
        self.follow(fresh=True)

    def _initial(self) -> State:
        scaling = self._optimizer.param_groups[self._group]["scaling"]
        return start_of(self._transform, self._buckets, scaling)

    def _shares_of(self, flat: Mapping[str, Tensor]) -> list[Share]:
        """For each parameter that has a state what the stacks hold of it."""
        shares: dict[int, Share] = {}
        for name, (i, side, key) in places_in(flat).items():
            for k, product in enumerate(self._buckets[i]):
                owner, partner = product.keepers if side is None else (product.owners[side], None)
                share = shares.setdefault(id(owner), Share(owner, [], []))
                share.keys.append(key + product.suffix)
                share.views.append(layer_of(flat[name], k))
                share.sources.append(Source(name, k, partner))
        return list(shares.values())

    def follow(self, *, fresh: bool = False) -> None:
        """Take over the optimizer's state; what is missing there begins as a fresh one does.

        Parameters
        ----------
        fresh : bool
            True if the stacks hold a fresh start.
        """
        initial: dict[str, Tensor] = {}
        moved: list[tuple[dict[str, Any], str]] = []

        def start(share: Share, k: int) -> Tensor | None:
            stack, layer, partner = share.sources[k]
            if partner is not None:  # one was frozen or freed meanwhile
                held = self._optimizer.state.get(partner, {})
                kept: Tensor | None = held.get(share.keys[k])
                if kept is not None:
                    moved.append((held, share.keys[k]))
                    return kept
            if fresh:
                return None
            if not initial:
                initial.update(flatten_state(self._initial()))
            return initial[stack][layer]

        take_over(self._shares, self._optimizer.state, start)
        for held, key in moved:  # nothing was refused
            del held[key]

    def prepare(self) -> None:
        """Take over options and state, which may be refused, before any parameter changes."""
        if torch.compiler.is_compiling():  # then this has just been made
            return
        group = self._optimizer.param_groups[self._group]
        checked_rate(group["lr"])
        if (chosen := self._optimizer._chosen(group)) != self._chosen:  # a scheduler's work
            self._chosen, self._transform = chosen, self._optimizer._transform(group)
        self.follow()

    def move(self) -> tuple[dict[str, Factors], State]:
        """The pairs and their state after the step, some of them written to already."""
        group = self._optimizer.param_groups[self._group]
        params, grads, lr = {}, {}, group["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr  # more axes would widen float32
        wide = group["stochastic_rounding"]
        for i, sides in enumerate(self._sides):
            (A, G_A), (B, G_B) = (self._stacks(side, (i, k), wide) for k, side in enumerate(sides))
            params[f"{i}"], grads[f"{i}"] = Factors(A, B), Factors(G_A, G_B)
        if group["maximize"]:
            grads = map_leaves(torch.neg, grads)
        like = self._buckets[0][0].params[0]
        backend = get_backend(like)
        # Methods of the library disable autocast and TF32 themselves, others may not.
        with backend.exact(like), backend.reusing(self._memory):
            return move(self._transform, params, grads, self._state, lr, donate=True)

    def _stacks(self, side: Side, slot: Any, wide: bool) -> list[Any]:
        """The factors of a side and their gradients, or None, as two views of one stack."""
        lists = [side.factors(), side.gradients()]
        if lists[1][0] is None:
            return [self._stack(lists[0], slot, wide), None]
        (count, first), grad = (len(lists[0]), lists[0][0]), lists[1][0]
        if count == 1 or self._in_pieces or grad.dtype != first.dtype:
            return [self._stack(x, (slot, i), wide) for i, x in enumerate(lists)]
        both = self._stack([*lists[0], *lists[1]], slot, wide)
        return [both[:count], both[count:]]

    def _stack(self, tensors: list[Tensor], slot: Any, wide: bool) -> Tensor:
        """Matrices on a stack of this step; on a CPU in memory of the last one."""
        dtype = torch.float32 if wide and tensors[0].itemsize == 2 else tensors[0].dtype
        if len(tensors) == 1 and tensors[0].dtype == dtype:
            return tensors[0].detach()[None]
        if tensors[0].device.type != "cpu" or self._in_pieces:
            return torch.stack(tensors).to(dtype)
        shape = torch.Size((len(tensors), *tensors[0].shape))
        held = self._memory.get(slot)
        if held is None or held.numel() < shape.numel() or held.dtype != dtype:
            held = self._memory[slot] = torch.empty(shape.numel(), dtype=dtype, device="cpu")
        return torch.stack(tensors, out=held[: shape.numel()].view(shape))

    def finish(self, _: None) -> None:
        """Step the pairs, and write them and their state where they belong."""
        params, state = self.move()
        if (both := side_by_side(self._state, state)) is None:  # a transport may have changed it
            raise another_state(state, self._state)
        old: list[Tensor] = []
        new: list[Tensor] = []
        for moves, sides, stacks in zip(self._moves, self._sides, params.values(), strict=True):
            for updated, side, stack in zip(moves, sides, stacks, strict=True):
                if not updated:
                    continue
                places = side.places()
                if self._in_pieces:
                    check_cut(stack, places[0])
                    stack, places = local(stack), list(map(local, places))
                values = side.as_stored(stack.unbind(0))
                if len(values) > 1 or not lies_in(places[0], values[0]):
                    old += places
                    new += values
        if changed := [x for x in both if x[0] is not x[1]]:
            mine, theirs = map(list, zip(*changed, strict=True))
            if self._in_pieces:
                mine, theirs = list(map(local, mine)), list(map(local, theirs))
            old += mine
            new += theirs
        store(old, new, self._optimizer.param_groups[self._group])
        if torch.compiler.is_compiling():
            for share in self._shares:
                for key, view in zip(share.keys, share.views, strict=True):
                    keep(self._optimizer.state[share.owner], key, view)


def lies_in(p: Tensor, value: Tensor) -> bool:
    """Return whether the values of a parameter have been written where they belong."""
    if p.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return p.data_ptr() == value.data_ptr()


class Source(NamedTuple):
    """The place of one entry of a parameter's state in the stacks of a batch."""

    stack: str
    """The stack's name in the flat state."""
    layer: int
    partner: Tensor | None
    """The other parameter that may have kept it."""


def batches_of(optimizer: Any, group: int, pairs: Iterable[TensorPair]) -> list[MethodBatch]:
    """For each device the batches of the pairs of a group that have a gradient.

    On a CPU a few layers at a time, equal shapes together, in memory that all batches share. On an
    accelerator all at once, so that the number of launches does not depend on the layers.
    """
    by_device: dict[torch.device, list[ProductView]] = {}
    for pair in pairs:
        if any(pair.has_gradients()):
            by_device.setdefault(pair.A.device, []).extend(pair.products())
    together = optimizer._transform(optimizer.param_groups[group]).together
    batches: list[MethodBatch] = []
    for device, products in by_device.items():
        in_parts = device.type == "cpu" and not together
        if in_parts and not torch.compiler.is_compiling():  # in a graph shapes may be symbols
            products = sorted(products, key=lambda product: product.shapes)
        memory: Workspace = {}
        parts: list[list[ProductView]] = []
        room = 0
        for product in products:
            size = sum(map(prod, product.shapes))
            if not parts or (in_parts and size > room):
                parts.append([])
                room = PORTION
            parts[-1].append(product)
            room -= size
        batches += [MethodBatch(optimizer, group, part, memory) for part in parts]
    return batches


def start_of(transform: Transform, buckets: list[list[ProductView]], given: float | None) -> State:
    """The state before the first step; layers of one stack may have different s.

    `given` is the s of all; without one a layer's own counts, and 1 where it does not say it.
    """
    scales = [[given or product.pair.scaling or 1.0 for product in bucket] for bucket in buckets]
    first, *others = dict.fromkeys(s for row in scales for s in row)
    like = buckets[0][0].params[0]
    with get_backend(like).exact(like):  # autocast refuses to stack the other 16-bit dtype
        start = transform.init(stacks_of(buckets), first)
        # Each array its own memory: it is written to after a step. And in order: torch's
        # checkpoints send it to other processes as it lies.
        memory = {
            name: x.clone(memory_format=torch.contiguous_format)
            for name, x in flatten_state(start).items()
        }
        places = places_in(memory)
        for s in others:
            layers = [[k for k, own in enumerate(row) if own == s] for row in scales]
            some = [[b[k] for k in rows] for b, rows in zip(buckets, layers, strict=True)]
            for name, x in flatten_state(transform.init(stacks_of(some), s)).items():
                local(memory[name])[layers[places[name][0]]] = local(x)
    return unflatten_state(memory, start)


def stacks_of(buckets: list[list[ProductView]]) -> dict[str, Factors]:
    """The factors of each bucket on two stacks, by its position; of an empty one none."""
    return {
        f"{i}": Factors(*(torch.stack([x.read(side) for x in bucket]) for side in (0, 1)))
        for i, bucket in enumerate(buckets)
        if bucket
    }


def places_in(flat: Mapping[str, Tensor]) -> dict[str, tuple[int, int | None, str]]:
    """Bucket, side and name of each array of a state over `stacks_of`.

    The side is 0 for A, 1 for B, and None for what a pair has once. A name is the field's own;
    where two transformations of a chain have a field of one name, the place in the chain is first.
    """
    places = {}
    for name in flat:
        path, _, last = name.rpartition(".")
        side = "AB".index(last) if last in ("A", "B") else None
        bucket = last
        if side is not None:
            path, _, bucket = path.rpartition(".")
        places[name] = (int(bucket), side, path)
    keys = {key for _, _, key in places.values()}
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(keys):
        return places
    return {name: (bucket, side, short[key]) for name, (bucket, side, key) in places.items()}
