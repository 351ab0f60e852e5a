"""From what people hand to a torch optimizer to named groups, and what a factor must be."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rlora.core.checks import check_flag, check_nonnegative, check_real, plain_number
from rlora.core.errors import NamespaceError, PairingError, ShapeError, ShardingError
from rlora.core.layout import Layout
from rlora.pairing import (
    Known,
    Source,
    find_pairs as find_named_pairs,
    is_factor,
    pairs_by_order,
)
from rlora.pairing.order import BY_ORDER
from rlora.pairing.report import number_of
from rlora.torch.pairing.pairs import TensorPair, is_distributed


def trainable(
    model: nn.Module, pairs: Source | None = None, known: Known | None = None
) -> list[tuple[str, Tensor]]:
    """Named trainable parameters, and the frozen partners of trainable LoRA factors.

    A frozen factor gets neither gradients nor updates, but its Gram preconditions the other.
    """
    named = dict(model.named_parameters())
    wanted = {name for name, p in named.items() if p.requires_grad}
    for pair in find_named_pairs(named, pairs=pairs, known=known):
        factors = {name for name in (pair.a, pair.b, pair.diagonal) if name is not None}
        if wanted & factors:
            wanted |= factors
    return [(name, p) for name, p in named.items() if name in wanted]


def as_groups(
    params: Any, pairs: Source | None = None, known: Known | None = None
) -> list[dict[str, Any]]:
    """Parameter groups as torch takes them, with names where there are any."""
    if isinstance(params, nn.Module):
        params = trainable(params, pairs, known) or _nothing_trainable(params)
    if isinstance(params, Tensor):
        msg = "params must be a model, named_parameters(), tensors or groups, got one Tensor"
        raise TypeError(msg)
    items = list(params)
    if not items:
        _nothing_trainable()
    if not isinstance(items[0], dict):
        return [{"params": items}]
    groups = [{**group, "params": as_list(group["params"], pairs, known)} for group in items]
    for group in groups:
        _check_names(group.get("param_names"), group["params"])
    if not any(group["params"] for group in groups):
        _nothing_trainable(*(g["params"] for g in items if isinstance(g["params"], nn.Module)))
    if any(isinstance(p, tuple) for group in groups for p in group["params"]):
        for group in groups:  # torch takes groups with names or without; an empty one has none
            if not group["params"]:
                group["param_names"] = []
    return groups


def in_order(
    groups: Iterable[dict[str, Any]], known: Known | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The pairs among the trainable tensors of groups, across them, by order and shapes.

    PairingError where a model, if one is given, knows of layers that are no such pairs.
    """
    given = [p for group in groups for p in group["params"]]
    if known and (why := _known_otherwise([p for p in given if isinstance(p, tuple)], known)):
        msg = (
            f"pairs={BY_ORDER!r} takes factors for matrices of single pairs, and the model says "
            f"otherwise: {why}; leave pairs out, and it is asked"
        )
        raise PairingError(msg)
    tensors = [p[1] if isinstance(p, tuple) else p for p in given]
    tensors = [p for p in tensors if p.requires_grad]  # model.parameters() has the base too
    places = pairs_by_order([tuple(p.shape) for p in tensors])
    return [(tensors[a], tensors[b]) for a, b in places]


def _known_otherwise(named: Iterable[tuple[str, Tensor]], known: Known) -> str | None:
    """A pair among named tensors of which a model knows more than their order says, or None."""
    report = find_named_pairs({name: p for name, p in named if p.requires_grad}, known=known)
    for pair in report:
        if isinstance(known.get(pair.name, known.get(pair.layer)), Layout):
            return f"{pair.name} has a layout of its own"
    told = [why for why in report.refused.values() if why in known.values()]
    return told[0] if told else None


def pairs_of_group(group: dict[str, Any]) -> list[Any]:
    """The pairs that a group gives by hand, or by the order of its tensors; taken out of it."""
    pairs = group.pop("pairs", ())
    if pairs != BY_ORDER:
        return list(pairs)
    group["params"] = as_list(group["params"])  # it may be gone through once
    return in_order([group])


def plain_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a group with Python's numbers, so that any file and any kernel takes them."""
    return {k: v if k == "params" else plain_number(v) for k, v in options.items()}


def refuse_text(options: Mapping[str, Any], *, numbers: bool = False) -> None:
    """TypeError for numbers that came as text, which torch would compare with numbers.

    With `numbers` for all that are no numbers: not for optimizers that may take None for one.
    """
    for name in ("lr", "betas", "eps", "weight_decay", "momentum", "dampening"):
        if name not in options:
            continue
        value: Any = options[name]
        several = isinstance(value, (tuple, list))
        for x in value if several else (value,):
            if isinstance(x, str) or (numbers and name in NUMBERS and not isinstance(x, Tensor)):
                check_real(f"each of {name}" if several else name, x)


NUMBERS = ("lr", "eps", "weight_decay", "momentum")
"""Options of torch's own optimizers that are numbers."""

FLAGS = ("maximize", "amsgrad", "nesterov", "capturable")
"""Options of torch's own optimizers that are True or False."""

LOOPS = ("foreach", "fused")
"""Those that are True, False, or None for torch's own choice."""


def check_whole(group: Mapping[str, Any], names: Iterable[str]) -> None:
    """ValueError for a group that lacks some of these options, as one put there by hand may."""
    if missing := [name for name in names if name not in group]:
        msg = (
            f"a parameter group has no {', '.join(missing)}; give it to add_param_group, which "
            f"takes the defaults for them, or copy the options of another group"
        )
        raise ValueError(msg)


def check_options(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """ValueError, ShapeError or TypeError for values of torch's options that make no sense."""
    refuse_text(group)
    for name in (*FLAGS, *LOOPS):
        if name in group:
            check_flag(name, group[name], or_none=name in LOOPS)
    for name in NUMBERS:
        if name not in group or isinstance(defaults.get(name), tuple):  # Adafactor has two eps
            continue
        value = group[name]
        if not isinstance(value, Tensor):
            check_nonnegative(name, value)
        elif value.numel() != 1:
            msg = (
                f"{name} must be one number for all of a group, got a tensor of shape "
                f"{tuple(value.shape)}; give each value a group of its own"
            )
            raise ShapeError(msg)


def split_names(group: dict[str, Any]) -> list[str] | None:
    """Take the names out of a group, its ``params`` being tensors then; None if it has none."""
    params = group["params"]
    names: list[str] | None = group.pop("param_names", None)
    if params and all(isinstance(p, tuple) for p in params):  # torch refuses a mixture
        names, group["params"] = [p[0] for p in params], [p[1] for p in params]
    _check_names(names, group["params"])
    return names


def _check_names(names: Sequence[str] | None, params: Sequence[Any]) -> None:
    if names is not None and len(names) != len(params):
        msg = (
            f"a group has {len(params)} params, but {len(names)} param_names: give each parameter "
            f"its own, or leave the names out"
        )
        raise ValueError(msg)


def names_of(models: Iterable[nn.Module], params: Sequence[Tensor]) -> list[str] | None:
    """The names of parameters in the models that have them; None unless every one has one."""
    known = {id(p): name for model in models for name, p in model.named_parameters()}
    return [known[id(p)] for p in params] if known.keys() >= set(map(id, params)) else None


@contextmanager
def without_names(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Hide the names of groups from torch, which wants them of all groups or of none."""
    names = [group.pop("param_names", None) for group in groups]
    try:
        yield
    finally:
        for group, kept in zip(groups, names, strict=False):
            if kept is not None:
                group["param_names"] = kept


def _nothing_trainable(*models: nn.Module) -> NoReturn:
    """Say why there is nothing to train: a frozen adapter, a merged one, or an unknown reason."""
    factors = [name for m in models for name, _ in m.named_parameters() if is_factor(name)]
    load = "PeftModel.from_pretrained(model, path, is_trainable=True)"
    if factors:
        msg = (
            f"no parameter of the model is trainable: its {number_of(len(factors), 'LoRA factor')},"
            f" such as {factors[0]}, are frozen; load the adapter by {load}, or call "
            f"requires_grad_(True) on its factors first"
        )
    elif models:
        msg = (
            f"no parameter of the model ({type(models[0]).__name__}) is trainable and none is a "
            f"LoRA factor: it has no adapter yet, or none any more, as after merge_and_unload() or "
            f"unload(); build the optimizer while the adapter is in the model"
        )
    else:
        msg = (
            f"got an empty parameter list: a merged adapter has no parameters, and one loaded "
            f"without is_trainable is frozen; load it by {load}, and give the model itself"
        )
    raise PairingError(msg)


def as_list(params: Any, pairs: Source | None = None, known: Known | None = None) -> list[Any]:
    """A group's params as a list, of a model with names; TypeError for a set of them."""
    if isinstance(params, (set, frozenset)):
        msg = (
            "optimizer parameters need to be organized in ordered collections, got a set: its "
            "order is another in each run, and a saved state would go to other parameters; give "
            "a list"
        )
        raise TypeError(msg)
    if isinstance(params, nn.Module):
        return trainable(params, pairs, known)
    return [params] if isinstance(params, Tensor) else list(params)


def misfit(a: Tensor, b: Tensor) -> str | None:
    """The reason why two tensors of fitting shapes cannot be a pair, or None."""
    if a.dtype != b.dtype or a.device != b.device:
        return (
            f"the factors are {a.dtype} on {a.device} and {b.dtype} on {b.device}; "
            f"bring both to one dtype and device"
        )
    if not a.is_floating_point():
        return f"the factors have dtype {a.dtype}; they must be real floating-point tensors"
    return None


def check_pairs(pairs: Iterable[TensorPair]) -> None:
    """NamespaceError or ShardingError for factors or gradients that a step cannot take."""
    for pair in pairs:
        for p in pair.moved:
            check_grad(p)
        if why := misfit(pair.A, pair.B):
            raise NamespaceError(why)


def check_grad(p: Tensor) -> None:
    """Refuse a gradient that the arithmetic is not made for, before any parameter changes."""
    if p.is_meta:
        msg = (
            f"a LoRA factor of shape {tuple(p.shape)} is on the meta device and has no values; "
            f"load the model, or model.to_empty(device=...) and initialise it, before a step"
        )
        raise NamespaceError(msg)
    grad = p.grad
    if grad is None:
        return
    if grad.layout != torch.strided or not grad.is_floating_point():
        kind = "sparse" if grad.layout != torch.strided else str(grad.dtype)
        msg = (
            f"a LoRA factor of shape {tuple(p.shape)} has a {kind} gradient; dense real ones are "
            f"needed (for an embedding, build it with sparse=False)"
        )
        raise NamespaceError(msg)
    if is_distributed(grad) != is_distributed(p):
        kinds = [type(x).__name__ for x in (p, grad)]
        msg = f"a LoRA factor is a {kinds[0]}, but its gradient a {kinds[1]}; both must be DTensors"
        raise ShardingError(msg)
