"""From what people hand to a torch optimizer to named groups, and from names to pairs."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlora.core.errors import NamespaceError, PairingError, ShapeError, ShardingError
from rlora.pairing import (
    Pair,
    PairReport,
    find_pairs as find_named_pairs,
    flatten_kernel,
    nothing_paired,
)

TensorPair = tuple[Tensor, Tensor]


def find_pairs(
    params: nn.Module | Iterable[tuple[str, Tensor]], *, adapter: str | None = None
) -> PairReport:
    """What an optimizer of `rlora.torch` would pair, without building it.

    Parameters
    ----------
    params : Module or iterable of (str, Tensor)
        A model, or its ``named_parameters()``. Of a model, only trainable parameters count, and
        the frozen partners of trainable factors.
    adapter : str, optional
        Only pairs of this adapter.

    Returns
    -------
    PairReport
        Print it to see what was found.

    Raises
    ------
    ShardingError
        When factors have been flattened or cut by a sharding scheme.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Module()
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(4, 16))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> len(rlora.torch.find_pairs(layer))
    1
    """
    named = trainable(params) if isinstance(params, nn.Module) else list(params)
    check_whole(named)
    return without_experts(find_named_pairs(named, adapter=adapter), expert_stacks(params))


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Named trainable parameters, and the frozen partners of trainable LoRA factors.

    A frozen factor never gets a gradient and never moves, but its Gram preconditions the other.
    """
    named = dict(model.named_parameters())
    wanted = {name for name, p in named.items() if p.requires_grad}
    for pair in find_named_pairs(named):
        if wanted & {pair.a, pair.b}:
            wanted |= {pair.a, pair.b}
    return [(name, p) for name, p in named.items() if name in wanted]


def check_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    """ShardingError when a LoRA factor is a flat, empty or distributed piece of itself."""
    for name, p in named:
        if not re.search(r"lora_|_lora\b", name):
            continue
        if is_distributed(p):
            msg = f"{name} is a DTensor; sharded factors are not supported yet, use DDP"
        elif hasattr(p, "ds_id"):
            msg = f"{name} is partitioned by DeepSpeed ZeRO; use stage 0 (plain data parallel)"
        elif p.ndim == 1 and not re.search(r"bias$|magnitude|alpha$|scal", name):
            msg = (
                f"{name} has shape {tuple(p.shape)}: a LoRA factor that FSDP or ZeRO has "
                f"flattened; build the optimizer before sharding, or use DDP"
            )
        else:
            continue
        raise ShardingError(msg)


def is_distributed(p: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing the distributed package."""
    return hasattr(p, "device_mesh")


def expert_stacks(params: Any) -> set[str]:
    """Names of the modules of a model in which PEFT has stacked the factors of several experts."""
    if not isinstance(params, nn.Module):
        return set()
    return {
        name
        for name, module in params.named_modules()
        if hasattr(module, "lora_A") and getattr(module, "num_experts", 1) not in (1, None)
    }


def without_experts(report: PairReport, stacks: set[str]) -> PairReport:
    """The report without stacked experts: A is stored by expert, B by rank.

    Shapes cannot tell them from one large pair, but the wrapper module knows its experts.
    """
    why = "stacked experts: one pair for each expert, which this version does not take apart"
    bad = [pair for pair in report if any(pair.a.startswith(f"{name}.lora_") for name in stacks)]
    refused = dict(report.refused) | {name: why for pair in bad for name in (pair.a, pair.b)}
    return PairReport(tuple(p for p in report if p not in bad), report.plain, refused)


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Parameter groups as torch takes them, with names where there are any."""
    if isinstance(params, nn.Module):
        params = trainable(params)
    if isinstance(params, Tensor):
        msg = "params must be a model, named_parameters(), tensors or groups, got one Tensor"
        raise TypeError(msg)
    items = list(params)
    if not items:
        msg = "got an empty parameter list"
        raise ValueError(msg)
    if not isinstance(items[0], dict):
        return [{"params": items}]
    groups = [{**group, "params": as_list(group["params"])} for group in items]
    if any(isinstance(p, tuple) for group in groups for p in group["params"]):
        for group in groups:  # torch takes groups with names or without; an empty one has none
            if not group["params"]:
                group["param_names"] = []
    return groups


def as_list(params: Any) -> list[Any]:
    """A group's params as a list, of a model with names."""
    if isinstance(params, nn.Module):
        return trainable(params)
    return [params] if isinstance(params, Tensor) else list(params)


def match(
    named: Sequence[tuple[str, Tensor]], stacks: set[str], adapter: str | None
) -> tuple[list[TensorPair], PairReport]:
    """The pairs among named tensors; of those that cannot work together, the reason."""
    check_whole(named)
    report = without_experts(find_named_pairs(named, adapter=adapter), stacks)
    tensors = dict(named)
    pairs, kept, refused = [], [], dict(report.refused)
    storages: dict[int, str] = {}
    for pair in report:
        a, b = tensors[pair.a], tensors[pair.b]
        why = misfit(a, b)
        for name, p in ((pair.a, a), (pair.b, b)):
            twin = storages.setdefault(p.data_ptr(), name) if p.data_ptr() else name
            if twin != name:
                why = f"shares its memory with {twin}, which is updated once already"
        if why:
            refused |= {pair.a: why, pair.b: why}
        else:
            pairs.append((a, b))
            kept.append(pair)
    return pairs, PairReport(tuple(kept), report.plain, refused)


def check_explicit(
    pairs: Iterable[Any], members: Sequence[Tensor]
) -> tuple[list[TensorPair], PairReport]:
    """Pairs given by hand: every one must be right, and among the parameters, and there once."""
    known = {id(p) for p in members}
    used: set[int] = set()
    checked: list[TensorPair] = []
    report: list[Pair] = []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            msg = f"pairs[{i}] must be a tuple (A, B) of two tensors, got {type(pair).__name__}"
            raise PairingError(msg)
        a, b = pair
        if missing := [letter for letter, p in (("A", a), ("B", b)) if id(p) not in known]:
            msg = f"{' and '.join(missing)} of pairs[{i}] is not among the optimizer's parameters"
            raise PairingError(msg)
        if used & {id(a), id(b)} or a is b:
            msg = f"pairs[{i}] has a factor of another pair; a tied factor has no single partner"
            raise PairingError(msg)
        used |= {id(a), id(b)}
        shape_a, shape_b = flatten_kernel(tuple(a.shape)), flatten_kernel(tuple(b.shape))
        if shape_a is None or shape_b is None or shape_a[0] != shape_b[1]:
            msg = (
                f"pairs[{i}] does not fit: A is {tuple(a.shape)} and B is {tuple(b.shape)}, but A "
                f"must be (r, n) and B (m, r) with the same r"
            )
            raise ShapeError(msg)
        if why := misfit(a, b):
            msg = f"pairs[{i}]: {why}"
            raise NamespaceError(msg)
        checked.append((a, b))
        name = f"pairs[{i}]"
        report.append(Pair(name, f"{name}[0]", f"{name}[1]", shape_a, shape_b))
    plain = [f"parameter {i}" for i, p in enumerate(members) if id(p) not in used]
    return checked, PairReport(tuple(report), tuple(plain))


def no_pair(names: Sequence[str | None], report: PairReport, kind: str) -> PairingError:
    """The error for parameters among which there is no pair, or that have no names."""
    if report.refused or not names or any(name is not None for name in names):
        return nothing_paired((name for name in names if name is not None), report)
    msg = (
        f"no LoRA pair: the {len(names)} parameters have no names; give the model, its "
        f"named_parameters(), groups of (name, tensor), or pairs=[(A, B), ...]; in transformers' "
        f"Trainer optimizer_cls_and_kwargs=(lambda: {kind}, {{...}}) hands over the model"
    )
    return PairingError(msg)


def misfit(a: Tensor, b: Tensor) -> str | None:
    """Why two tensors of fitting shapes still cannot be a pair, or None."""
    if a.dtype != b.dtype or a.device != b.device:
        return (
            f"the factors are {a.dtype} on {a.device} and {b.dtype} on {b.device}; "
            f"bring both to one dtype and device"
        )
    if not a.is_floating_point():
        return f"the factors have dtype {a.dtype}; they must be real floating-point tensors"
    return None


def check_grad(p: Tensor) -> None:
    """Refuse a gradient that the arithmetic is not made for, before anything has moved."""
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
    if is_distributed(grad) or is_distributed(p):
        msg = "a LoRA factor has become a DTensor; sharded factors are not supported yet, use DDP"
        raise ShardingError(msg)
