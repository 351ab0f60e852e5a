"""Warnings of runs that cannot go on: what is not finite, stands still, or is tied no longer."""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.core.checks import mark_of
from rlora.torch.pairing.pairs import TensorPair, groups_by_id, is_distributed


def peaks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The largest absolute entry of each, a scalar where the tensor is; NaN where there is one."""
    return list(torch._foreach_norm(list(tensors), math.inf)) if tensors else []


def state_peaks(optimizer: Any, pairs: Sequence[TensorPair]) -> tuple[list[int], list[Tensor]]:
    """Owner (2k for A, 2k + 1 for B) and peak of every array in the state of paired factors."""
    held = [
        (2 * k + side, x)
        for k, pair in enumerate(pairs)
        for side in (0, 1)
        for x in _arrays(optimizer.state.get(pair[side], {}))
        # Steps are counted on the host: what is elsewhere is not looked at. Nor are subclasses,
        # such as moments of 8 bits, of which nobody may have a norm.
        if type(x) is Tensor and x.device == pair.A.device and x.is_floating_point() and x.numel()
    ]
    return [place for place, _ in held], peaks([x for _, x in held])


def warn_of_nan(optimizer: Any, names: Sequence[str], places: Collection[int]) -> None:
    """RuntimeWarning, once an optimizer, that names the first pair that is not finite.

    Parameters
    ----------
    names : sequence of str
        Names of all pairs.
    places : sequence of int
        Factors with values that are not finite: 2k for the A of pair k, 2k + 1 for its B.
    """
    if not places or "nan" in optimizer._told:
        return
    optimizer._told |= {"nan"}
    first = min(places)
    count = len({place // 2 for place in places})
    msg = (
        f"{type(optimizer).__name__}: {'AB'[first % 2]} of {names[first // 2]}, or its state, is "
        f"not finite, the first of {count} such pairs of {len(names)}: nothing that it touches "
        f"will be; go back to a checkpoint, with a lower learning rate"
    )
    warnings.warn(msg, RuntimeWarning, stacklevel=4)


def look_on_the_host(optimizer: Any) -> None:
    """`warn_of_nan` of the pairs on a CPU: what lies on an accelerator would have to be awaited."""
    if "nan" in optimizer._told:
        return
    pairs = optimizer._pairs  # as the last step had them: saving refuses nothing
    here = [k for k, pair in enumerate(pairs) if _is_on_host(pair)]
    places, found = state_peaks(optimizer, [pairs[k] for k in here])
    factors = peaks([p.detach() for k in here for p in pairs[k][:2]])
    if not factors:
        return
    values = torch.stack([x.double() for x in (*factors, *found)])
    bad = values.isfinite().logical_not().nonzero().view(-1).tolist()
    where = [*range(len(factors)), *places]
    at = [2 * here[where[i] // 2] + where[i] % 2 for i in bad]
    warn_of_nan(optimizer, [pair.name for pair in optimizer.report], at)


def warn_of_zero_factor(optimizer: Any, pairs: Sequence[TensorPair]) -> None:
    """RuntimeWarning, once, at the first step of a method that never moves a factor which is zero.

    The one time that a step asks a device for values, and of such methods alone.
    """
    kept = mark_of(getattr(type(optimizer), "method", None), "kept")
    if kept is None or torch.compiler.is_compiling() or "start" in optimizer._told:
        return
    optimizer._told |= {"start"}
    letter, advice = kept
    group_of = groups_by_id(optimizer.param_groups)
    groups = [optimizer.param_groups[group_of[id(pair.A)]] for pair in pairs]
    stay = ["AB".index(group.get("frozen", letter)) for group in groups]
    fresh = [
        k
        for k, (pair, side) in enumerate(zip(pairs, stay, strict=True))
        if not any(optimizer.state.get(p) for p in pair[:2])
        and not is_distributed(pair.A)
        and pair[:2][side].data_ptr()
    ]
    largest = peaks([pairs[k][:2][stay[k]].detach() for k in fresh])
    if not largest:
        return
    values = torch.stack([x.to(largest[0].device, torch.float32) for x in largest]).tolist()
    still = [k for k, x in zip(fresh, values, strict=True) if x == 0]
    if still:
        letter = "AB"[stay[still[0]]]
        msg = (
            f"{type(optimizer).__name__} never moves {letter}, and {letter} is zero in "
            f"{len(still)} of {len(pairs)} pairs, the first "
            f"{list(optimizer.report)[still[0]].name}: they stand still; {advice}"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=2)


def warn_of_idle_pairs(optimizer: Any, pairs: Sequence[TensorPair]) -> None:
    """RuntimeWarning, once, when trainable pairs stand still because they have no gradient.

    Those of which a factor is no longer of the model that was given; and all of them, when nothing
    had a gradient in the first two steps, or where no model was given no pair had one, or when
    nothing is trainable any longer.
    """
    if torch.compiler.is_compiling() or "orphans" in optimizer._told:
        return
    still = {k: factors for k, pair in enumerate(pairs) if (factors := _idle_factors(pair))}
    idle = [k for k in still if not any(pairs[k].has_gradients())]
    models = [model for _, model in optimizer._models()]
    gone = list[int]()
    if still:
        there = {id(p) for model in models for p in model.parameters()}
        layers = {name for model in models for name, _ in model.named_modules()}
        names = [pair.layer for pair in optimizer.report]  # groups may be added from other models
        gone = [
            k
            for k, factors in still.items()
            if names[k] in layers and any(there.isdisjoint(map(id, x)) for x in factors)
        ]
    if gone:
        why = (
            "they are no longer those of the model; where others have taken their place, as in "
            "PEFT's prepare_model_for_compiled_hotswap or a state loaded with assign=True, build "
            "the optimizer afterwards and load the old one's state_dict() if ranks are the same"
        )
    elif _idle_again(optimizer, all_idle=len(idle) == len(pairs) > 0 and not models):
        gone = idle or list(range(len(pairs)))
        why = (
            "they had no gradient in two steps; was backward() called, and is this the model that "
            "is trained? The optimizer is to be built after the adapters, and after whatever puts "
            "others in their place; add_param_group takes what is added later"
        )
    if not gone:
        return
    optimizer._told |= {"orphans"}
    optimizer._idle_steps = None
    alone = any(pairs[gone[0]].has_gradients())
    what = "have a factor that stands still" if alone else "stand still"
    msg = (
        f"{type(optimizer).__name__}: {len(gone)} of {len(pairs)} pairs, the first "
        f"{list(optimizer.report)[gone[0]].name}, {what}: {why}"
    )
    warnings.warn(msg, RuntimeWarning, stacklevel=2)


def _idle_factors(pair: TensorPair) -> list[tuple[Tensor, ...]]:
    """Those of the two that are trained and have no gradient, each with what is tied to it."""
    trained = [any(p.requires_grad for p in side) for side in pair.sides]
    return [pair.sides[k] for k in (0, 1) if trained[k] and not pair.has_gradient(k)]


def _idle_again(optimizer: Any, *, all_idle: bool) -> bool:
    """Count a step without gradients; True for the second in a row.

    One alone may be there to make state, or by chance. Once there have been gradients, as where
    layers are dropped at random, it counts if nothing is trainable any longer.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    nothing = bool(params) and all(p.grad is None for p in params)
    count = optimizer._idle_steps
    first = count is not None or not any(p.requires_grad for p in params)
    idle = first and (nothing or all_idle)
    optimizer._idle_steps = (count or 0) + 1 if idle else None
    return bool(optimizer._idle_steps == 2)


def warn_of_ties(kind: str, before: Mapping[str, str], now: Collection[str]) -> None:
    """RuntimeWarning when a tied factor has got memory of its own."""
    if apart := [name for name in before if name not in now]:
        msg = (
            f"{kind}: {apart[0]} was tied to {before[apart[0]]} and has memory of its own now, as "
            f"after a move or a copy of the model: it is stepped by itself; tie the two again, and "
            f"build the optimizer afterwards, if they are to stay equal"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=5)


def _is_on_host(pair: TensorPair) -> bool:
    return pair.A.device.type == "cpu" and not is_distributed(pair.A) and pair.A.data_ptr() != 0


def _arrays(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """Plain ones, no quantised or sharded kinds; bitsandbytes wraps its own in a dict."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _arrays(value)
        elif type(value) is Tensor and value.itemsize > 1:
            yield value
