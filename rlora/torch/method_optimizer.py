"""A torch optimizer out of any method: its pure step over the pairs, the parent's over the rest."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from rlora.core.backend import Workspace
from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError
from rlora.core.factors import Factors
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.transform import State, Transform, step
from rlora.torch.compiling import keep
from rlora.torch.loading import ELEMENTWISE, Shapes
from rlora.torch.matching import Pairs, without_middles
from rlora.torch.pair_optimizer import PairOptimizer
from rlora.torch.pairs import Member, TensorPair
from rlora.torch.plan import Plan
from rlora.torch.rounding import store

Method = Callable[..., Transform]

PLAIN = {"lr", "betas", "eps", "weight_decay", "momentum", "maximize"}
"""Options that the parent keeps in its groups too."""

PORTION = 1 << 22
"""Numbers in the factors that are stepped at once on a CPU."""


class MethodOptimizer(PairOptimizer):
    """What `optimizer_class` puts in front of AdamW or SGD. Not to be used by itself."""

    method: Method
    """Gives the transform for the options of a group."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float = 1.0,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        known = self._options()
        if unknown := sorted(options.keys() - known.keys()):
            msg = f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(known)}"
            raise TypeError(msg)
        options = {**known, **options}
        plain = {name: options.pop(name) for name in PLAIN & options.keys()}
        super().__init__(
            params,
            lr=lr,
            own={**options, "scaling": scaling, "stochastic_rounding": stochastic_rounding},
            pairs=pairs,
            adapter=adapter,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            **plain,
        )

    @classmethod
    def _options(cls) -> dict[str, Any]:
        """The method's hyperparameters with their defaults, as torch calls them."""
        parameters = inspect.signature(cls.method).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        if options.keys() >= {"b1", "b2"}:
            options = {"betas": (options.pop("b1"), options.pop("b2")), **options}
        return options

    def _transform(self, group: Mapping[str, Any]) -> Transform:
        return type(self).method(**self._chosen(group))

    def _chosen(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What the method is given, as it calls it."""
        chosen = {name: group[name] for name in self._options()}
        if "betas" in chosen:
            chosen["b1"], chosen["b2"] = chosen.pop("betas")
        return chosen

    def _choices(self, group: dict[str, Any]) -> list[Any]:
        return [*super()._choices(group), bool(group.get("momentum"))]  # without one, no state

    def _check_own(self, group: dict[str, Any]) -> None:
        self._transform(group)

    def _pair_up(self) -> None:
        super()._pair_up()
        self._pairs, self.report = without_middles(self._pairs, self.report)

    def _make_plans(self, pairs: list[TensorPair]) -> list[Plan]:
        owner = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        work: dict[Any, list[Member]] = {}
        for pair in pairs:
            if len(groups := {owner[id(p)] for p in pair.moved}) > 1:
                msg = (
                    f"the factors of a pair of shapes {tuple(pair.A.shape)} and "
                    f"{tuple(pair.B.shape)} are in two parameter groups; {type(self).__name__} "
                    f"moves them together: put both in one (for two learning rates: LoRAPlus)"
                )
                raise PairingError(msg)
            if pair.gradient(0) is not None or pair.gradient(1) is not None:
                work.setdefault((groups.pop(), pair.A.device), []).extend(pair.members())
        batches = [
            Portions(self, i, portions(members, device)) for (i, device), members in work.items()
        ]
        paired = {id(p) for pair in pairs for p in pair.moved}
        plain = [
            [(p, p) for p in group["params"] if id(p) not in paired] for group in self.param_groups
        ]
        return [Plan(batches, plain)]

    def _state_shapes(self, p: Tensor) -> Shapes:
        shapes: dict[str, torch.Size] = {}
        pairs = [pair for pair in self._current_pairs() if pair.A is p or pair.B is p]
        members = [member for pair in pairs for member in pair.members()]
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        for member in members:
            flat = flatten_state(self._transform(group).init(_stacks([[member]]), group["scaling"]))
            for name, (_, side, key) in _places(flat).items():
                if member.params[side] is p:
                    shapes[key + member.suffix] = flat[name].shape[1:]
        others = dict.fromkeys(ELEMENTWISE)
        return {**others, **shapes} if members else super()._state_shapes(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parent would look for its own entries in the state of the pairs.
        pairs = state.get("_pairs") or self._current_pairs()
        paired = {id(p) for pair in pairs for p in pair.moved}
        everything = state["state"]
        plain = {p: held for p, held in everything.items() if id(p) not in paired}
        super().__setstate__({**state, "state": plain})
        self.state = defaultdict(dict, everything)


class Portions:
    """Batches that are stepped and written back one after the other, in the same memory."""

    def __init__(self, optimizer: MethodOptimizer, group: int, parts: list[list[Member]]) -> None:
        memory: Workspace = {}
        self._batches = [MethodBatch(optimizer, group, part, memory) for part in parts]

    def prepare(self) -> None:
        """Nothing: what could be refused has been when the batches were made."""

    def finish(self, _: None) -> None:
        """Step every batch."""
        for batch in self._batches:
            batch.finish(batch.prepare())


class MethodBatch:
    """The pairs of one group on one device, layers of equal shapes on one stack.

    So the number of operations in a step depends on the number of shapes, not of layers. The state
    lives in stacks too, and the optimizer's state of a parameter is a view of its layer.
    """

    def __init__(
        self, optimizer: MethodOptimizer, group: int, members: list[Member], memory: Workspace
    ) -> None:
        self._optimizer, self._group, self._memory = optimizer, group, memory
        alike: dict[Any, list[Member]] = {}
        for member in members:
            still = [member.gradient(side) is None for side in (0, 1)]
            alike.setdefault((*member.shapes, member.params[0].dtype, *still), []).append(member)
        self._buckets = list(alike.values())
        options = optimizer.param_groups[group]
        self._chosen = optimizer._chosen(options)
        self._transform = optimizer._transform(options)
        start = self._transform.init(_stacks(self._buckets), options["scaling"])
        # Each array its own memory: it is written to after a step.
        memory = {name: x.clone() for name, x in flatten_state(start).items()}
        self._state = unflatten_state(memory, start)
        self._places = _places(flatten_state(self._state))
        self._registered = False
        self._recall()

    def _recall(self) -> None:
        """Take over what the optimizer knows of these parameters."""
        for name, x in flatten_state(self._state).items():
            bucket, side, key = self._places[name]
            for layer, member in zip(x.unbind(0), self._buckets[bucket], strict=True):
                held = self._optimizer.state.get(member.params[side], {})
                if (known := held.get(key + member.suffix)) is not None:
                    layer.copy_(known)

    def prepare(self) -> tuple[dict[str, Factors], State]:
        """The pairs and their state after the step; nothing has moved yet."""
        group = self._optimizer.param_groups[self._group]
        if (chosen := self._optimizer._chosen(group)) != self._chosen:  # by a scheduler, say
            self._chosen, self._transform = chosen, self._optimizer._transform(group)
        params, grads = {}, {}
        for i, bucket in enumerate(self._buckets):
            readers = (Member.read, Member.gradient)
            values = [[read(m, side) for m in bucket] for read in readers for side in (0, 1)]
            wide = group["stochastic_rounding"]
            A, B, G_A, G_B = (self._stack(x, (i, k), wide) for k, x in enumerate(values))
            params[f"{i}"], grads[f"{i}"] = Factors(A, B), Factors(G_A, G_B)
        if group["maximize"]:
            torch._foreach_neg_([g for pair in grads.values() for g in pair if g is not None])
        like = self._buckets[0][0].params[0]
        backend = get_backend(like)
        with backend.exact(like), backend.reusing(self._memory):
            moved: tuple[dict[str, Factors], State] = step(
                self._transform, params, grads, self._state, group["lr"]
            )
        return moved

    def _stack(self, tensors: list[Any], slot: Any, wide: bool) -> Tensor | None:
        """Matrices on a stack of this step; on a CPU in memory of the last one."""
        if tensors[0] is None:
            return None
        dtype = torch.float32 if wide and tensors[0].itemsize == 2 else tensors[0].dtype
        if tensors[0].device.type != "cpu":
            return torch.stack(tensors).to(dtype)
        shape = torch.Size((len(tensors), *tensors[0].shape))
        held = self._memory.get(slot)
        if held is None or held.numel() < shape.numel() or held.dtype != dtype:
            held = self._memory[slot] = torch.empty(shape.numel(), dtype=dtype)
        return torch.stack(tensors, out=held[: shape.numel()].view(shape))

    def finish(self, moved: tuple[dict[str, Factors], State]) -> None:
        """Write both where they belong."""
        params, state = moved
        old, new = [], []
        for bucket, stacks in zip(self._buckets, params.values(), strict=True):
            for side in (0, 1):
                if bucket[0].gradient(side) is not None:
                    old += [member.part(side) for member in bucket]
                    layers = zip(bucket, stacks[side].unbind(0), strict=True)
                    new += [member.views[side].write(layer) for member, layer in layers]
        store(old, new, self._optimizer.param_groups[self._group])
        mine, theirs = flatten_state(self._state), flatten_state(state)
        changed = [name for name, x in mine.items() if x is not theirs[name]]
        if changed:
            torch._foreach_copy_([mine[n] for n in changed], [theirs[n] for n in changed])
        if not self._registered:
            self._register(mine)

    def _register(self, flat: Mapping[str, Tensor]) -> None:
        for name, x in flat.items():
            bucket, side, key = self._places[name]
            for layer, member in zip(x.unbind(0), self._buckets[bucket], strict=True):
                keep(self._optimizer.state[member.params[side]], key + member.suffix, layer)
        self._registered = True


def portions(members: list[Member], device: torch.device) -> list[list[Member]]:
    """On a CPU a few layers at a time, equal shapes together, in memory that all portions share.

    On an accelerator all at once, so that the number of launches does not depend on the layers.
    """
    if device.type != "cpu":
        return [members]
    parts: list[list[Member]] = []
    room = 0
    for member in sorted(members, key=lambda member: member.shapes):
        size = sum(map(prod, member.shapes))
        if size > room:
            parts.append([])
            room = PORTION
        parts[-1].append(member)
        room -= size
    return parts


def _stacks(buckets: list[list[Member]]) -> dict[str, Factors]:
    return {
        f"{i}": Factors(*(torch.stack([m.read(side) for m in bucket]) for side in (0, 1)))
        for i, bucket in enumerate(buckets)
    }


def _places(flat: Mapping[str, Tensor]) -> dict[str, tuple[int, int, str]]:
    """Of each array of a state over `_stacks` the bucket, the side (0 or 1), and its name.

    What a pair has once is kept with its A. A name is the field's own; where two links of a chain
    have a field of one name, the place of the link comes first.
    """
    places = {}
    for name in flat:
        *path, bucket, letter = (name if name[-2:] in (".A", ".B") else f"{name}.A").split(".")
        places[name] = (int(bucket), "AB".index(letter), ".".join(path))
    keys = {key for _, _, key in places.values()}
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(keys):
        return places
    return {name: (bucket, side, short[key]) for name, (bucket, side, key) in places.items()}
