"""One step of an optimizer over stand-ins: their construction, and the parent's step.

A stand-in of a parameter in a pair is a tensor that the parent optimizer steps in its place. It is
made once and serves until parameters, gradients' presence or hyperparameters change.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlora.core.placement import Placement
from rlora.torch.batch import Batch, Job, recipe_of
from rlora.torch.listwise import ListwiseAdamW
from rlora.torch.pairs import TensorPair, is_distributed

Groups = list[dict[str, Any]]


class Work(Protocol):
    """The work for some pairs around the parent's step."""

    def prepare(self) -> Any:
        """Do everything that may fail; no parameter has changed when this returns."""

    def finish(self, half: Any) -> None:
        """Do the rest, with the result of `prepare`."""


class Plan(NamedTuple):
    """Everything a step needs that does not change from one step to the next."""

    batches: Sequence[Work]
    params: list[list[tuple[Tensor, Tensor]]]
    """For each group (parameter, stand-in); a plain parameter stands in for itself."""

    def run(self, optimizer: Any, parent_step: Callable[[Any], Any]) -> None:
        """Directions, the parent's own step over the stand-ins, and the rest."""
        halves = [batch.prepare() for batch in self.batches]
        if any(self.params):
            over_stand_ins(optimizer, self.params, parent_step)
        for batch, P in zip(self.batches, halves, strict=True):
            batch.finish(P)


def over_stand_ins(
    optimizer: Any, params: list[list[tuple[Tensor, Tensor]]], call: Callable[[Any], Any]
) -> Any:
    """Call a method of the parent while stand-ins are in the places of their parameters.

    Parameters
    ----------
    optimizer : Optimizer
        Its groups and state are changed meanwhile.
    params : list of lists of (Tensor, Tensor)
        See `Plan`.
    call : callable
        Called with the optimizer.
    """
    real_groups, real_state = optimizer.param_groups, optimizer.state
    state: dict[Any, Any] = defaultdict(dict)
    state.update((key, v) for key, v in real_state.items() if not isinstance(key, Tensor))
    groups = []
    compiling = torch.compiler.is_compiling()  # then fusing is the compiler's business
    for group, members in zip(real_groups, params, strict=True):
        for p, stand_in in members:
            if held := real_state.get(p):
                state[stand_in] = held
        stand_ins = {"params": [stand_in for _, stand_in in members]}
        unfused = {"fused": None} if compiling and "fused" in group else {}
        groups.append({**group, **stand_ins, **unfused})
    optimizer.param_groups = [group for group in groups if group["params"]]
    optimizer.state = state
    try:
        return call(optimizer)
    finally:
        optimizer.param_groups, optimizer.state = real_groups, real_state
        for real, group, members in zip(real_groups, groups, params, strict=True):
            if not compiling:
                real.update((key, v) for key, v in group.items() if key != "params")
            for p, stand_in in members:
                if stand_in in state:
                    real_state[p] = state[stand_in]
        real_state.update((k, v) for k, v in state.items() if not isinstance(k, Tensor))


def make_plan(
    pairs: Sequence[TensorPair],
    groups: Groups,
    sides: str,
    *,
    plain: bool,
    listwise: Sequence[ListwiseAdamW] = (),
) -> Plan:
    """The plan for the factors in `sides` ("A", "B", "AB"), and for plain parameters or not.

    Factors in `listwise` need no stand-in.
    """
    without = {id(p) for work in listwise for p in work.params}
    group_of = {id(p): group for group in groups for p in group["params"]}
    cut = [pair for pair in pairs if is_distributed(pair.A)]
    work: dict[Any, tuple[list[TensorPair], list[Any], list[Any]]] = {}
    stand_ins: dict[int, Tensor] = {}
    place: dict[Any, int] = {}  # of a pair in its batch
    for k, pair in enumerate(pairs):
        for side, (letter, p) in enumerate(zip("AB", pair[:2], strict=True)):
            if letter not in sides or id(p) in without or is_distributed(p):
                continue
            if pair.gradient(side) is None:
                continue
            group = group_of[id(p)]
            recipe = recipe_of(group)
            stand_in = stand_ins[id(p)] = _stand_in(p, recipe.placement)
            key = (recipe, _in_place(p, recipe.placement), p.dtype, p.device)
            batch, *jobs = work.setdefault(key, ([], [], []))
            i = place.setdefault((key, k), len(batch))
            if i == len(batch):
                batch.append(pair)
            jobs[side].append((i, Job(p, stand_in, group, pair, side)))
    batches: list[Work] = [*listwise]
    batches += [Batch(key[0], key[1], *parts) for key, parts in work.items()]
    if cut:
        from rlora.torch.sharded import sharded_work  # DTensors take half a second to import

        theirs, pieces = sharded_work(cut, group_of, sides)
        batches, stand_ins = [*batches, *theirs], {**stand_ins, **pieces}
    paired = {id(p) for pair in pairs for p in pair.moved}
    params = [
        [
            (p, stand_ins.get(id(p), p))
            for p in group["params"]
            if id(p) in stand_ins or (plain and id(p) not in paired)
        ]
        for group in groups
    ]
    return Plan(batches, params)


def _stand_in(p: Tensor, placement: Placement) -> Tensor:
    """The parameter's own memory where the parent may write its result there, else scratch."""
    return p.detach() if _in_place(p, placement) else _scratch(p)


def _in_place(p: Tensor, placement: Placement) -> bool:
    """Return whether the parent may write its result into the parameter.

    Fused kernels run through memory without a look at strides: scratch has the strides that the
    parent's moments will have, and a parameter with gaps in its memory needs scratch.
    """
    scratch = _scratch(p)
    return placement == "before" and p.dtype == scratch.dtype and p.stride() == scratch.stride()


def _scratch(p: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.empty_like(p, dtype=wide, requires_grad=False)  # gaps are not preserved
