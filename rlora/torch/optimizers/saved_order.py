"""A saved state in the order and the groups of an optimizer that others were saved from.

A file has numbers in the place of parameters, in groups, and often names beside them. Torch goes by
place alone. Here names go first; without any, or where none is known, the place; and where the
groups differ too, the shapes of the saved moments.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from rlora.core.errors import ShapeError
from rlora.torch.optimizers.state_entries import ELEMENTWISE

Groups = Sequence[Mapping[str, Any]]
Key = Hashable
"""A name, or a name and the number of its group where several groups have it."""

WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""The parts that torch puts into names where a module is compiled, checkpointed or sharded."""


def as_groups_are(saved: dict[str, Any], groups: Groups, names: Sequence[str | None]) -> Any:
    """The saved state with the parameters of each group in the order of `groups`.

    Parameters
    ----------
    saved : dict
        From ``state_dict()`` of an optimizer.
    groups : sequence of dict
        The groups of the optimizer that loads it.
    names : sequence of str or None
        Names of all parameters in `groups`.

    Returns
    -------
    dict
        A state for `groups`. Where a group is made of several saved ones, the options on which
        those disagree are its own.

    Raises
    ------
    ValueError
        When a trainable parameter is not in the file, or one with state only there.
    ShapeError
        When there are no names, the groups differ, and shapes are ambiguous too.
    """
    theirs: Groups = saved["param_groups"]
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, theirs))
    params = [p for group in groups for p in group["params"]]
    ids = [i for group in theirs for i in group["params"]]
    here, there = _split(names, sizes), [_names_of(group) for group in theirs]
    both = {name for group in here for name in group} & {name for group in there for name in group}
    mine, keys = (keys_of(without_wrappers(x, both)) for x in (here, there))
    known = {*mine, *keys} - {None}
    common = known & {*mine} & {*keys}
    if sizes == saved_sizes and all(
        a == b or not {a, b} & common for a, b in zip(mine, keys, strict=True)
    ):
        found: list[Any] = ids
        _warn_of_other_names(mine, keys, common)
    elif common:
        found = _by_name(params, mine, dict(zip(keys, ids, strict=True)), saved["state"])
    else:
        found = _by_shape(groups, saved)
    found = [f"new {k}" if i is None else i for k, i in enumerate(found)]
    options = theirs if found == ids and sizes == saved_sizes else _options(groups, theirs, found)
    aligned = []
    for group, theirs_now, members, own in zip(
        groups, options, _split(found, sizes), _split(names, sizes), strict=True
    ):
        kept = {k: v for k, v in theirs_now.items() if k != "param_names"}
        if "param_names" in group:
            kept["param_names"] = own
        aligned.append({**kept, "params": members})
    gone = {*ids} - {*found}
    state = {i: held for i, held in saved["state"].items() if i not in gone}
    return {**saved, "state": state, "param_groups": aligned}


def _warn_of_other_names(mine: Sequence[Key], keys: Sequence[Key], common: Set[Key]) -> None:
    """RuntimeWarning where some names are those of the file and others are not.

    All may have got a prefix, but of some the layers may be others of the same shapes.
    """
    both = [(a, b) for a, b in zip(mine, keys, strict=True) if None not in (a, b) and a != b]
    if common and both:
        here, there = both[0]
        msg = (
            f"{len(both)} parameters have other names in the saved state, the first is {here!r} "
            f"here and {there!r} there: they get the state at their place; if these are other "
            f"layers, build the optimizer from those that were saved"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=2)


def without_wrappers(
    names: Sequence[Sequence[str | None]], known: Set[str | None]
) -> list[Sequence[str | None]]:
    """The names, but for `known` ones without the wrappers that torch puts around single layers.

    A group in which two would get one name, as a model's and one's that is compiled, keeps its own.
    """
    short = [
        [x if x is None or x in known else WRAPPERS.sub("", x) for x in group] for group in names
    ]
    pairs = zip(names, short, strict=True)
    return [new if len({*new}) == len({*old}) else old for old, new in pairs]


def keys_of(names: Sequence[Sequence[str | None]]) -> list[Key]:
    """Unique keys of the named parameters of all groups; None for those without a name."""
    count = Counter(name for group in names for name in group)
    return [
        name if name is None or count[name] == 1 else (i, name)
        for i, group in enumerate(names)
        for name in group
    ]


def _names_of(group: Mapping[str, Any]) -> Sequence[str | None]:
    names, size = group.get("param_names", ()), len(group["params"])
    # Whoever took parameters out of a group may have left their names.
    return names if len(names) == size else [None] * size


def _split(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    rest = iter(items)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _by_name(
    params: Sequence[Tensor], keys: Sequence[Key], ids: Mapping[Key, Any], state: Mapping[Any, Any]
) -> list[Any]:
    """The number of each parameter in the file, or None for a frozen one that is not there."""
    found = [None if key is None else ids.get(key) for key in keys]
    absent = [
        f"parameter {k}" if key is None else repr(key)
        for k, (p, key, i) in enumerate(zip(params, keys, found, strict=True))
        if i is None and p.requires_grad
    ]
    extra = [repr(key) for key, i in ids.items() if state.get(i) and i not in found]
    if absent or extra:
        msg = (
            f"the saved parameter groups are of other parameters: {len(absent)} of this optimizer "
            f"are not in them{_such_as(absent)}, {len(extra)} with state are only there"
            f"{_such_as(extra)}; build this optimizer from the same trainable parameters"
        )
        raise ValueError(msg)
    return found


def _by_shape(groups: Groups, saved: Mapping[str, Any]) -> list[Any]:
    """As `_by_name`, where moments of each shape follow in one order that nothing has cut."""
    state = saved["state"]
    given, wanted = defaultdict[Any, list[Any]](list), defaultdict[Any, list[Any]](list)
    places = defaultdict[Any, set[Any]](set)
    for side, gs in ((given, saved["param_groups"]), (wanted, groups)):
        for k, group in enumerate(gs):
            for p in group["params"]:
                live = p.requires_grad if isinstance(p, Tensor) else bool(state.get(p))
                if live:
                    shape = tuple(p.shape) if isinstance(p, Tensor) else _shape_of(state[p])
                    side[shape].append(p)
                    places[side is given, shape].add(k)
    counts = [(shape, len(given[shape]), len(wanted[shape])) for shape in {**given, **wanted}]
    wrong = [f"{a} saved and {b} here of shape {shape}" for shape, a, b in counts if a != b]
    cut = [f"shape {shape} is in several groups" for (_, shape), k in places.items() if len(k) > 1]
    if wrong or cut:
        sizes = [[len(group["params"]) for group in gs] for gs in (saved["param_groups"], groups)]
        msg = (
            f"the saved parameter groups have {sizes[0]} parameters, these have {sizes[1]}, and "
            f"no names say which is which; nor do the shapes of those with state "
            f"({'; '.join((wrong or cut)[:3])}): build both optimizers from named_parameters(), "
            f"or this one with the groups of the saved one"
        )
        raise ShapeError(msg)
    queues = {shape: iter(ids) for shape, ids in given.items()}
    params = [p for group in groups for p in group["params"]]
    return [next(queues[tuple(p.shape)]) if p.requires_grad else None for p in params]


def _shape_of(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of the parameter that owns the state, if the moments show it."""
    moments = [state[key] for key in ELEMENTWISE if isinstance(state.get(key), Tensor)]
    return tuple(moments[0].shape) if moments else None


def _options(groups: Groups, theirs: Groups, found: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Options of each group: those on which the saved groups of its parameters agree."""
    source = {i: group for group in theirs for i in group["params"]}
    options: list[Mapping[str, Any]] = []
    for mine, ids in zip(groups, _split(found, [len(g["params"]) for g in groups]), strict=True):
        used = list({id(source[i]): source[i] for i in ids if i in source}.values())
        first, *others = used or [mine]
        agreed = {
            key: value
            for key, value in first.items()
            if all(key in other and _same(value, other[key]) for other in others)
        }
        if isinstance(count := agreed.get("rounded"), Tensor):  # each group counts in its own
            agreed["rounded"] = count.clone()
        options.append({**mine, **agreed})
    return options


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _such_as(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" if names else ""
