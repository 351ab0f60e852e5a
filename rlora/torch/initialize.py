"""Start LoRA layers from the gradient of a few batches, or from the base weights."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlora import initializers
from rlora.core.checks import check_choice
from rlora.core.errors import NumericsError, PairingError, ShapeError
from rlora.core.factors import Factors
from rlora.initializers import Start
from rlora.pairing.report import number_of
from rlora.torch.gradients import Loss, capture
from rlora.torch.layers import LoraLayer, choose, find_layers, movable_weight, weight_owners
from rlora.torch.offsets import Offset, take_offset

Method = Literal["lora_one", "lora_ga", "lora_sb", "loi", "pissa", "gaussian"]
FROM_WEIGHT = ("pissa", "gaussian")


class StartedLayer(NamedTuple):
    """One layer that was started.

    Parameters
    ----------
    name : str
        Name of the module that holds the factors.
    shape, rank, scaling : (int, int), int, float or None
        (m, n) of its weight, r, and s where it is known.
    gradient_norm : float, optional
        The Frobenius norm of the gradient that it was started from.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float | None
    gradient_norm: float | None


@dataclass(frozen=True)
class InitReport:
    """Result of `initialize`.

    Parameters
    ----------
    method : str
        As it was given.
    layers : tuple of StartedLayer
        The layers that were started.
    skipped, offsets : dict of str to str, and of str to Offset
        Adapted layers that keep the start they had, and why; what was taken from base weights.
    """

    method: str
    layers: tuple[StartedLayer, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, Offset] = field(default_factory=dict)

    def __str__(self) -> str:
        started = number_of(len(self.layers), "layer")
        lines = [f"{self.method}: {started} started, {len(self.skipped)} skipped"]
        kinds: dict[str, list[str]] = {}
        for layer in self.layers:
            (m, n), r = layer.shape, layer.rank
            kinds.setdefault(f"{m} x {n}, rank {r}", []).append(layer.name)
        for kind, names in kinds.items():
            lines.append(f"  layer {kind}: {number_of(len(names), 'time')}, {_names(names)}")
        if self.offsets:
            lines.append(f"  base weights changed: {len(self.offsets)}; save report.offsets")
        lines += [f"  skipped {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def initialize(
    model: nn.Module,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    *,
    method: Method = "lora_one",
    scaling: float | None = None,
    adapter: str = "default",
    layers: Iterable[str] | None = None,
    layers_per_pass: int | None = None,
    offload: bool = False,
    **options: Any,
) -> InitReport:
    """Start the LoRA layers of a model from the full gradient of a few batches, in place.

    For each layer ``W = W0 + s B A`` the mean gradient ``G = dL/dW`` (m, n) is formed, one layer
    at a time, and decomposed:

    - "lora_one": ``s B A`` is a step along ``[-G]_r``; the base weight stays.
    - "lora_sb": ``B A = [-lr sign(G)]_r``. As "lora_one"; s must be 1.
    - "lora_ga", "loi": the first step is along ``[G]_2r``. The base becomes ``W0 - s B A``, so
      the model computes what it did.
    - "pissa": A and B are the leading part of W0 itself, offset in the same way; "gaussian" is
      PEFT's plain start. Both need neither batches nor a loss.

    Build the optimizer before or after: the parameters stay the same objects.

    Parameters
    ----------
    model : nn.Module
        A PEFT model, or any with modules that have lora_A, lora_B and a base: an nn.Linear or
        transformers' Conv1D, a quantised layer, or a weight of their own. It runs in the mode it
        is in; `eval()` gives a gradient without dropout.
    batches : iterable
        Arguments of `loss`. 8 to 64 samples are usual.
    loss : callable
        ``loss(model, batch)`` is a scalar tensor; for transformers
        ``lambda model, batch: model(**batch).loss``.
    method : str
        One of the above, of `rlora.initializers`.
    scaling : float, optional
        The s of layers that do not say it themselves.
    adapter, layers : str, and iterable of str, optional
        The adapter to start, where adapters have names, and in which layers; None is all.
    layers_per_pass, offload
        As in `full_gradients`, to bound the memory.
    **options
        Options of the method: ``gamma``, ``form``, ``lr``, ``alpha``, ``seed``, ``iterations``, ..

    Returns
    -------
    InitReport
        Print it to see what was started and what was skipped. Keep its `offsets`: an adapter that
        has been started by an offset fits the changed base only. See `restore_offsets` and
        `as_plain_lora`.

    Raises
    ------
    PairingError
        When there is no adapted layer, or none that can be started; when an adapter is merged; when
        an offset cannot be taken: the base is quantised, tied, or under several adapters, or B is
        not zero; when the loss does not depend on a layer that it calls.
    ValueError, TypeError
        For options out of their range, for "lora_sb" with another scaling than 1, and where the
        scaling is needed and not known.
    ShapeError, NamespaceError, NumericsError, ShardingError
        As `full_gradients`; for factors that are not finite in the parameters' dtype, or
        sharded. After any error nothing has been written.

    Notes
    -----
    The gradient is that of the model as it stands, including its adapters: start from B = 0, as
    all libraries do. For memory see `full_gradients`. A base weight is changed in its own dtype,
    with the factors as rounded to theirs: in bfloat16 the function stays to the rounding of W.
    Over several processes, initialize before wrapping the model in DDP, which then sends the
    start of rank 0 to all. Layers that the loss never calls, or with a gradient of zero, are
    skipped, and so are embeddings, convolutions and DoRA, and layers of a rank that the method
    cannot give: above a side of the weight, for "lora_ga" and "loi" above half of it; "gaussian"
    gives every rank.

    References
    ----------
    Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning
    Large Language Models, Provably and Efficiently. arXiv:2502.01235, 2025.

    S. Wang, L. Yu, J. Li. LoRA-GA: Low-Rank Adaptation with Gradient Approximation.
    arXiv:2407.05000, 2024.

    K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. Initialization
    using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
    arXiv:2411.19557, 2024.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch.initialize import initialize
    >>> layer = torch.nn.Linear(6, 4)
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(2, 6))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(4, 2))
    >>> model = torch.nn.Sequential(layer)
    >>> loss = lambda model, x: model(x).square().mean()
    >>> print(initialize(model, [torch.eye(6)], loss, gamma=0.01))
    lora_one: 1 layer started, 0 skipped
      layer 4 x 6, rank 2: 1 time, 0
    """
    check_choice("method", method, Method)
    moves = _probe(method, options)
    found, skipped = find_layers(model, adapter, scaling)
    chosen = choose(found, layers)
    owners = weight_owners(model)
    weights: dict[str, Tensor] = {}
    for name, layer in chosen.items():
        _check(layer, method)
        if moves:
            weights[name] = movable_weight(layer, owners)
    begin = partial(_start, chosen, method, options)
    if method in FROM_WEIGHT:
        # "gaussian" needs only the shape of the weight: a matrix without memory.
        blank = {n: x.B.detach().new_zeros(()).expand(x.shape) for n, x in chosen.items()}
        starts = {n: begin(n, W) for n, W in {**blank, **weights}.items()}
    elif loss is None:
        msg = f"{method} needs batches and a loss"
        raise TypeError(msg)
    else:
        targets = {name: layer.target() for name, layer in chosen.items()}
        starts = capture(model, targets, batches, loss, begin, layers_per_pass, offload)
    for name in chosen:
        start = starts.get(name, "the loss never calls it")
        if isinstance(start, str):
            skipped[name] = start
    if skipped.keys() >= chosen.keys():
        msg = f"no layer can be started; {next(iter(chosen))}: {skipped[next(iter(chosen))]}"
        raise PairingError(msg)
    return _write(method, list(chosen.values()), skipped, starts, weights)


def _probe(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether the method changes base weights; raises for options that it does not take."""
    kwargs = {"scaling": 1.0, **options} if method == "pissa" else options
    start: Start = getattr(initializers, method)(torch.eye(4), 1, **kwargs)
    return start.offset is not None


def _check(layer: LoraLayer, method: str) -> None:
    if getattr(layer.module, "merged", False):
        msg = f"{layer.name} has its adapter merged into W; unmerge it first"
        raise PairingError(msg)
    if method == "lora_sb" and layer.scaling != 1.0:
        msg = (
            f"lora_sb needs a scaling of 1, but that of {layer.name} is {layer.scaling}; set "
            f"alpha = r, or pass scaling=1.0 if the layer says none"
        )
        raise ValueError(msg)


@torch.no_grad()
def _start(
    chosen: Mapping[str, LoraLayer],
    method: str,
    options: Mapping[str, Any],
    name: str,
    matrix: Tensor,
) -> tuple[Start, float | None] | str:
    """The start in the dtype of the layer's factors and the norm of its gradient, or why none."""
    layer = chosen[name]
    given = method not in FROM_WEIGHT
    if given and not matrix.any():
        return "its gradient is zero"
    kwargs = dict(options)
    if method == "pissa":
        kwargs["scaling"] = layer.scaling
    elif method == "gaussian":  # the order of the layers must not matter
        kwargs["seed"] = kwargs.get("seed", 0) + zlib.crc32(layer.name.encode())
    try:
        start: Start = getattr(initializers, method)(matrix, layer.rank, **kwargs)
    except ShapeError as error:
        return f"{error}, of which {method} has no start; method='gaussian' has one"
    except Exception as error:
        error.add_note(f"in layer {layer.name}, {layer.shape}, rank {layer.rank}")
        raise
    params = _rounded(layer, start.params)
    offset = None if start.offset is None else _rounded(layer, start.offset)
    for x in params:
        if not torch.isfinite(x).all():
            msg = f"the start of {layer.name} is not finite in {x.dtype}"
            raise NumericsError(msg)
    return Start(params, offset), float(torch.linalg.matrix_norm(matrix)) if given else None


def _rounded(layer: LoraLayer, pair: Factors) -> Factors:
    A, B = pair
    return Factors(A.to(layer.A.device, layer.A.dtype), B.to(layer.B.device, layer.B.dtype))


@torch.no_grad()
def _write(
    method: str,
    layers: list[LoraLayer],
    skipped: dict[str, str],
    starts: Mapping[str, tuple[Start, float | None] | str],
    weights: Mapping[str, Tensor],
) -> InitReport:
    """Everything has been computed and checked: from here nothing is refused."""
    started: list[StartedLayer] = []
    offsets: dict[str, Offset] = {}
    for layer in layers:
        result = starts.get(layer.name, "")
        if isinstance(result, str):
            continue
        (params, offset), norm = result
        layer.A.copy_(params.A)
        layer.B.copy_(params.B)
        if offset is not None and layer.scaling is not None:
            offsets[layer.name] = take_offset(weights[layer.name], offset, layer.scaling)
        started.append(StartedLayer(layer.name, layer.shape, layer.rank, layer.scaling, norm))
    return InitReport(method, tuple(started), skipped, offsets)


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
