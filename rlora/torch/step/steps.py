"""The pairs of an optimizer, sorted into steps: by group, dtype, device and memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.torch.pairing.pairs import TensorPair, is_distributed
from rlora.torch.step.kernels import AdamW, Kernel, has_kernel
from rlora.torch.step.listwise import Job, ListStep
from rlora.torch.step.plan import Work
from rlora.torch.step.stacks import Moving, StackedAdamW, is_dense


def steps_of(
    optimizer: Any, kernel: type[Kernel], pairs: Sequence[TensorPair], sides: str
) -> tuple[list[Work], dict[int, Tensor]]:
    """The steps of all pairs, and by the id of its parameter each stand-in that they have.

    Parameters
    ----------
    optimizer : Optimizer
        Its state holds what the kernel carries.
    kernel : type
        The `Kernel` of its class.
    pairs : sequence of TensorPair
        All pairs.
    sides : {"A", "B", "AB"}
        The factors to be updated.
    """
    groups = optimizer.param_groups
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    by_stacks = kernel is AdamW and not torch.compiler.is_compiling()
    fits = [by_stacks and has_kernel(group) for group in groups]
    stacked: dict[Any, tuple[list[TensorPair], list[Moving]]] = {}
    listed: dict[Any, tuple[list[TensorPair], list[Job]]] = {}
    cut = []
    for pair in pairs:
        if is_distributed(pair.A):
            cut.append(pair)
            continue
        moves = [side for side in (0, 1) if "AB"[side] in sides and pair.gradient(side) is not None]
        owners = {group_of[id(pair[side])] for side in moves}
        if len(owners) == 1 and fits[i := owners.pop()] and is_dense(pair):
            members = stacked.setdefault((i, pair.A.shape[0], pair.A.dtype), ([], []))
            members[0].append(pair)
            members[1].append((0 in moves, 1 in moves))
            continue
        for side in moves:
            p = pair[:2][side]
            some, jobs = listed.setdefault((group_of[id(p)], p.dtype, p.device), ([], []))
            if not some or some[-1] is not pair:
                some.append(pair)
            jobs.append(Job(p, pair, len(some) - 1, side))
    steps: list[Any] = [StackedAdamW(optimizer, groups[i[0]], *x) for i, x in stacked.items()]
    lists = [ListStep(optimizer, groups[i[0]], kernel, *x) for i, x in listed.items()]
    steps += lists
    if cut:
        from rlora.torch.step.dtensor_group import (
            sharded_steps,  # DTensors take half a second to import
        )

        theirs = sharded_steps(optimizer, kernel, cut, group_of, sides)
        steps += theirs
        lists += [step for work in theirs for step in work.steps]
    kernels: list[Any] = [step.kernel for step in lists]
    stand_ins = {id(p): s for k in kernels for p, s in getattr(k, "members", ())}
    return steps, stand_ins
