"""Seeing what a step does: figures of every pair, for a logger, a table or a Trainer.

A step that nobody watches does nothing for this. A watched one copies the factors first. When the
figures are asked for, the device forms r x r Grams and a few norms of every pair, all of them come
to the host in one read, and the rest is done there, in float64.
"""

import math
import statistics
from collections import Counter
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rlora.core.diagnostics import Damping, gram_figures
from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError
from rlora.core.metric import LEAST, DampingMode
from rlora.torch.monitor.run_warnings import peaks, state_peaks, warn_of_nan
from rlora.torch.monitor.snapshot import Watch, lost, read, refuse_shards
from rlora.torch.pairing.base_weights import plain_weight
from rlora.torch.pairing.layers import find_layers
from rlora.torch.pairing.pairs import TensorPair, is_distributed

MEASURES: tuple[str, ...] = ("cond_A", "cond_B", "damped_cond_A", "damped_cond_B")
MEASURES += ("anisotropy_A", "anisotropy_B", "step", "step_A", "step_B", "step_in_weight")
MEASURES += ("grown_A", "grown_B", "lost_A", "lost_B")
"""Figures that the summary gives the least, the median and the largest of."""

MARKS: tuple[str, ...] = ("skipped_A", "skipped_B", "nan_A", "nan_B", "damped_A", "damped_B")
MARKS += ("no_grad_A", "no_grad_B", "wide_A", "wide_B", "bad_state_A", "bad_state_B")
"""Figures that are 0 or 1, of which the summary counts the ones."""

Rows = dict[str, dict[str, float]]
"""The figures of every layer, by its name."""


def watch(optimizer: Any, model: nn.Module | None = None) -> None:
    """Keep what `diagnostics` needs of every step from now on: a copy of the factors.

    Parameters
    ----------
    optimizer : Optimizer
        One of `rlora.torch`; also its method ``optimizer.watch(model)``.
    model : Module, optional
        The model of the factors. Where its base weights are plain linear ones, steps are
        compared with them too.

    Raises
    ------
    ShardingError
        When a factor is a DTensor.
    """
    refuse_shards(optimizer._current_pairs())
    optimizer._watching[:] = [Watch({} if model is None else weights_under(model, optimizer))]


def unwatch(optimizer: Any) -> None:
    """Undo `watch`. Copies and pickles of an optimizer do not watch either."""
    optimizer._watching.clear()


def diagnostics(optimizer: Any, *, per_pair: bool = True) -> dict[str, float]:
    """Figures of the last watched step, or if none has been, of the factors as they are.

    Parameters
    ----------
    optimizer : Optimizer
        One of `rlora.torch`; also its method ``optimizer.diagnostics()``.
    per_pair : bool
        With the figures of every pair, or only their summary.

    Returns
    -------
    dict of str to float
        ``rlora/<pair>/<figure>``, and for all pairs ``rlora/pairs``, their number,
        ``rlora/<figure>/min``, ``/median`` and ``/max``, and ``/count`` for figures that are 0
        or 1. A figure of A is about ``A Aᵀ``, which preconditions B, and one of B about
        ``Bᵀ B``, which preconditions A:

        - ``cond_A``, ``cond_B``: condition number; inf where rank is lost, NaN for zero.
        - ``damped_cond_A``, ..: with the damping of the group, what a Gram method inverts.
        - ``anisotropy_A``, ..: how far the inverse of that is from a multiple of the identity,
          from 0 to below 1. At 0 the preconditioner is a number, which Adam cancels.
        - ``damped_A``, ..: 1 where damping has more than doubled the smallest eigenvalue.
        - ``skipped_A``, ..: 1 where too small or large to invert: no update of the partner.
        - ``nan_A``, ..: 1 where it has a NaN.

        Changes of the factors themselves in a watched step:

        - ``step``: ``|B A - B0 A0| / |B0 A0|``; inf from zero.
        - ``step_A``, ``step_B``: ``|A - A0| / |A0|`` and the same of B.
        - ``step_in_weight``: ``s |B A - B0 A0| / |W0|`` where `watch` has found W0; s is 1
          unless the layer or the optimizer says it.
        - ``lost_A``, ``lost_B``: for parameters narrower than float32 the share of the entries
          with a gradient that the step has left as they were, less than half the spacing of
          numbers away; 0 without a gradient and where bfloat16 is rounded at random.
        - ``no_grad_A``, ``no_grad_B``: 1 where there was no gradient.

        And as they are after it:

        - ``grown_A``, ``grown_B``: the largest entry of the parameter, against what it was when
          watching began and the sum of the learning rates since and of a hundred steps more: as
          far as AdamW can have moved it.
        - ``wide_A``, ``wide_B``: 1 where r is above n, or above m: the Gram is singular.
        - ``bad_state_A``, ..: 1 where the optimizer's state has NaN or inf.

    Raises
    ------
    ShardingError
        When a factor is a DTensor.

    Warns
    -----
    RuntimeWarning
        Once, when a pair or its state is not finite; `state_dict` warns too where it can look
        without waiting for a device.

    Notes
    -----
    Methods without damping, and those that precondition by something else, are shown what
    `ScaledAdamW` would make of their Grams, with their damping or with none. With
    ``order="gauss_seidel"`` B has seen the Gram of the new A, and the figures are of the old.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> A, B = torch.eye(2, 3, requires_grad=True), torch.eye(4, 2, requires_grad=True)
    >>> optimizer = rlora.torch.ScaledSGD([A, B], lr=0.1, pairs=[(A, B)])
    >>> optimizer.watch()
    >>> (B @ A).sum().backward()
    >>> optimizer.step()
    >>> optimizer.diagnostics()["rlora/cond_A/max"]
    1.0
    """
    rows = rows_of(optimizer)
    pairs = {f"rlora/{name}/{key}": x for name, row in rows.items() for key, x in row.items()}
    return summary(rows) | (pairs if per_pair else {})


def rows_of(optimizer: Any) -> Rows:
    """The figures of every layer of an optimizer's pairs."""
    record = next(iter(optimizer._watching), None) or Watch()
    stepped = bool(record.pairs)
    if not stepped:
        record = Watch(record.weights)
        record.note(optimizer._current_pairs(), optimizer.report)
    if not record.pairs:  # all have been taken out of the groups
        return {}
    places, state = state_peaks(optimizer, record.pairs)
    now = peaks([p.detach() for pair in record.pairs for p in pair[:2]])
    reach = [record.reach] if isinstance(record.reach, Tensor) else []
    shares = lost(record)
    parts, scalars = read(record, [*record.start, *now, *shares.values(), *state, *reach])
    ends, bad = ends_of(record, list(shares), places, scalars, stepped=stepped)
    warn_of_nan(optimizer, record.names, bad)
    rows: Rows = {}
    for owners, S, sizes in parts:
        damping = dampings([record.pairs[i] for i in owners], optimizer)
        columns = columns_of(S, damping) | (ratios_of(sizes) if stepped else {})
        changes = sizes[0].tolist()
        layers, count = Counter(owners), Counter[int]()
        for k, i in enumerate(owners):
            row = {key: values[k] for key, values in columns.items()}
            weight = record.weights.get(record.pairs[i].A)
            if stepped and weight and layers[i] == 1:
                row["step_in_weight"] = changes[k] / weight
            row["no_grad_A"], row["no_grad_B"] = (float(not x) for x in record.moving[i])
            row |= ends[i]
            rows[record.names[i] + (f"[{count[i]}]" if layers[i] > 1 else "")] = row
            count[i] += 1
    return rows


def ends_of(
    watch: Watch, narrow: list[int], places: list[int], scalars: list[float], *, stepped: bool
) -> tuple[list[dict[str, float]], set[int]]:
    """The figures of each pair after the step, and where factors or state are not finite.

    Parameters
    ----------
    narrow, places : list of int
        The factors of which shares were lost, and the owner of each array of the state: 2k for A
        and 2k + 1 for B.
    scalars : list of float
        Largest entries of all factors at first and now, the shares, largest entries of the state,
        and the reach if a device has it.
    """
    count = len(watch.start)
    first, last, rest = scalars[:count], scalars[count : 2 * count], scalars[2 * count :]
    stuck = dict(zip(narrow, rest, strict=False))
    state = zip(places, rest[len(narrow) :], strict=False)
    bad = {place for place, x in state if not math.isfinite(x)}
    reach = scalars[-1] if isinstance(watch.reach, Tensor) else watch.reach
    rows: list[dict[str, float]] = []
    for i, pair in enumerate(watch.pairs):
        row = {}
        for side, letter in enumerate("AB"):
            at = 2 * i + side
            row[f"wide_{letter}"] = float(is_wide(pair, side))
            row[f"bad_state_{letter}"] = float(at in bad)
            if stepped:
                row[f"grown_{letter}"] = last[at] / (first[at] + reach or 1.0)
                if at in stuck:
                    row[f"lost_{letter}"] = stuck[at]
        rows.append(row)
    return rows, bad | {at for at, x in enumerate(last) if not math.isfinite(x)}


def is_wide(pair: TensorPair, side: int) -> bool:
    """Return whether a factor has a rank above the inputs (A) or outputs (B) of its layer."""
    sizes = [(views[side].shape[-2:]) for views in pair.views]
    return any(r > n for r, n in (size if side == 0 else size[::-1] for size in sizes))


def columns_of(S: Tensor, damping: Damping) -> dict[str, list[float]]:
    """The figures of Grams, one column for each letter."""
    figures = gram_figures(get_backend(S), S, damping)._asdict()
    halves = {key: x.view(2, -1).tolist() for key, x in figures.items()}
    return {f"{key}_{x}": both[k] for key, both in halves.items() for k, x in enumerate("AB")}


def ratios_of(sizes: Tensor) -> dict[str, list[float]]:
    """The step against what was there before; nothing from nothing is nothing."""
    ratios = torch.where(sizes[:3] == 0, 0.0, sizes[:3] / sizes[3:]).tolist()
    return dict(zip(("step", "step_A", "step_B"), ratios, strict=True))


def dampings(pairs: list[TensorPair], optimizer: Any) -> Damping:
    """Damping of the Grams of the A factors, from B's group, then of those of the B factors."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    # Classes of methods damp an A whose B is fixed all the same: they see gradients alone.
    knows_fixed = not hasattr(optimizer, "method")
    rows = []
    for side, partner in ((0, 1), (1, 0)):
        for pair in pairs:
            # Parameters may have left the groups since the step.
            group = groups.get((pair.A, pair.B)[partner], optimizer.defaults)
            mode, damping = group.get("damping_mode", "relative"), float(group.get("damping", 0.0))
            # Covariant damping is for the metric of A alone, while B may grow.
            fixed = knows_fixed and pair.has_fixed_B(optimizer.state)
            size = 0.0 if mode == "covariant" and (side == 0 or fixed) else damping
            wide = get_backend(pair.A).compute_dtype(pair.A.dtype, group.get("compute_dtype"))
            info = torch.finfo(wide)
            by_mode = [size if mode == name else 0.0 for name in get_args(DampingMode)]
            least = 0.0 if group.get("placement", "before") == "before" else LEAST
            rows.append([*by_mode, least, info.eps, info.smallest_normal, info.max])
    return Damping(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def summary(rows: Rows) -> dict[str, float]:
    """Figures of all rows together."""
    found = {"rlora/pairs": float(len(rows))}
    for key in MEASURES:
        values = [row[key] for row in rows.values() if key in row]
        if values:
            known = [x for x in values if not math.isnan(x)] or [math.nan]
            found[f"rlora/{key}/min"] = min(known)
            found[f"rlora/{key}/median"] = statistics.median(known)
            found[f"rlora/{key}/max"] = max(known)
    for key in MARKS:
        found[f"rlora/{key}/count"] = sum(row[key] for row in rows.values())
    return found


def weights_under(model: nn.Module, optimizer: Any) -> dict[Tensor, float]:
    """``|W0| / s`` for the A of every linear layer whose base weight is a plain one."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    names = [pair.adapter for pair in optimizer.report if pair.adapter is not None]
    found = {}
    for adapter in dict.fromkeys(names) or ("default",):
        try:
            layers, _ = find_layers(model, adapter)
        except PairingError:
            continue
        for layer in layers:
            weight = plain_weight(layer.name, layer.module, layer.shape)
            if isinstance(weight, Tensor) and not is_distributed(weight):
                given = groups.get(layer.A, optimizer.defaults).get("scaling")
                wide = torch.promote_types(weight.dtype, torch.float32)
                size = torch.linalg.vector_norm(weight.detach(), dtype=wide)
                found[layer.A] = size / (given or layer.scaling or 1.0)
    return {A: float(size) for A, size in found.items()}
