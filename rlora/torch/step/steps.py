"""The pairs of an optimizer, sorted into steps: by group, dtype, device and memory."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlora.core.errors import PairingError
from rlora.torch.pairing.pairs import TensorPair, groups_by_id, is_distributed
from rlora.torch.step.kernels import AdamW, Kernel, has_kernel
from rlora.torch.step.listwise import FactorUpdate, ListStep
from rlora.torch.step.method_batch import batches_of
from rlora.torch.step.plan import Turn, Work
from rlora.torch.step.stacks import StackedAdamW


def steps_of(optimizer: Any, kernel: type[Kernel], pairs: Sequence[TensorPair], sides: str) -> Turn:
    """The steps of scaled AdamW and SGD, or of an optimizer that they are put in front of.

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
    group_of = groups_by_id(groups)
    by_stacks = kernel is AdamW and not torch.compiler.is_compiling()
    stacked: dict[Any, tuple[list[TensorPair], list[tuple[bool, bool]]]] = {}
    listed: dict[Any, list[FactorUpdate]] = {}
    cut = []
    for pair in pairs:
        if is_distributed(pair.A):
            cut.append(pair)
            continue
        moves = [side for side in (0, 1) if "AB"[side] in sides and pair.has_gradient(side)]
        owners, A = {group_of[id(pair[side])] for side in moves}, pair.A
        if by_stacks and len(owners) == 1 and pair.is_dense:
            i = owners.pop()
            if has_kernel(groups[i], A.device.type):
                members, moving = stacked.setdefault((i, A.shape[0], A.dtype, A.device), ([], []))
                members.append(pair)
                moving.append((0 in moves, 1 in moves))
                continue
        for side in moves:
            p = pair[:2][side]
            key = (group_of[id(p)], p.dtype, p.device)
            listed.setdefault(key, []).append(FactorUpdate(pair, side))
    steps: list[Any] = [StackedAdamW(optimizer, groups[i[0]], *x) for i, x in stacked.items()]
    lists = [ListStep(optimizer, groups[i[0]], kernel, updates) for i, updates in listed.items()]
    steps += lists
    if cut:  # DTensors take half a second to import
        from rlora.torch.step.dtensor_group import sharded_steps

        theirs = sharded_steps(optimizer, kernel, cut, group_of, sides)
        steps += theirs
        lists += [step for work in theirs for step in work.steps]
    return steps, {id(p): stand_in for step in lists for p, stand_in in step.kernel.members}


def steps_of_method(optimizer: Any, pairs: Sequence[TensorPair]) -> list[Work]:
    """The steps of any other method, which moves both factors of a pair together.

    Raises
    ------
    PairingError
        When the factors of a pair are in two groups.
    """
    check_one_group(optimizer, pairs)
    group_of = groups_by_id(optimizer.param_groups)
    parts: dict[Any, list[TensorPair]] = {}
    for pair in pairs:
        owner = next(group_of[id(p)] for p in pair.moved)
        parts.setdefault((is_distributed(pair.A), owner), []).append(pair)
    steps: list[Work] = []
    for (cut, i), members in parts.items():
        if cut:  # DTensors take half a second to import
            from rlora.torch.step.dtensor_methods import steps_on_dtensors

            steps += steps_on_dtensors(optimizer, i, members)
        else:
            steps += batches_of(optimizer, i, members)
    return steps


def check_one_group(optimizer: Any, pairs: Iterable[TensorPair]) -> None:
    """PairingError where the trainable factors of a pair are in two groups."""
    group_of = groups_by_id(optimizer.param_groups)
    for pair in pairs:
        if len({group_of[id(p)] for p in pair.moved}) > 1:
            msg = (
                f"the factors of a pair of shapes {tuple(pair.A.shape)} and "
                f"{tuple(pair.B.shape)} are in two parameter groups; "
                f"{optimizer.__class__.__name__} moves them together: put both in one (for two "
                f"learning rates: LoRAPlus)"
            )
            raise PairingError(msg)
