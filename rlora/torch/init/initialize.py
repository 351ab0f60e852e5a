"""Start LoRA layers from the gradient or the inputs of a few batches, or from the base weights."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlora.core.checks import check_choice
from rlora.core.errors import PairingError
from rlora.initializers import Start
from rlora.pairing.report import first_of, number_of
from rlora.torch.init.gradients import Loss, capture
from rlora.torch.init.offsets import Offset, take_offset
from rlora.torch.init.rows import InputRows, Rows
from rlora.torch.init.starts import (
    FROM_GRADIENT,
    Method,
    check_layer,
    check_model,
    moves_weights,
    start_of,
)
from rlora.torch.pairing.base_weights import (
    is_called_elsewhere,
    module_places,
    movable_weight,
    weight_places,
)
from rlora.torch.pairing.layers import LoraLayer, choose, find_layers


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
            lines.append(f"  layer {kind}: {number_of(len(names), 'time')}, {first_of(names)}")
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
    """Start the LoRA layers ``W = W0 + s B A`` of a model, in place.

    From the mean gradient ``G = dL/dW`` (m, n) of a few batches, formed one layer at a time:

    - "lora_one": ``s B A`` is a step along ``[-G]_r``; the base weight stays.
    - "lora_sb": ``B A = [-lr sign(G)]_r``. As "lora_one"; s must be 1.
    - "lora_ga", "loi": the first step is along ``[G]_2r``. The base becomes ``W0 - s B A``, so
      the model computes what it did.

    From the inputs of a layer in a few batches, without a backward pass:

    - "eva": A holds their principal directions, B is zero.

    From W0, or from its shape, with neither batches nor a loss:

    - "pissa", "milora", "olora": A and B are a part of W0 itself, offset in the same way.
    - "gaussian": PEFT's plain start. "orthogonal": A and B not zero, ``B A`` zero. "init_ab": A and
      B random, and ``s B A`` noise that is not offset unless ``offset=True``.

    Build the optimizer before or after: the parameters stay the same objects.

    Parameters
    ----------
    model : nn.Module
        A PEFT model, or any with modules that have lora_A, lora_B and a base: an nn.Linear or
        transformers' Conv1D, a quantised layer, or a weight of their own, (m, n). One of (n, m) is
        known by its shape; where m = n the module says ``fan_in_fan_out = True``. It runs in the
        mode it is in; `eval()` gives a gradient without dropout.
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
        For options out of their range, a scaling that is not positive, "lora_sb" with another than
        1, and where the scaling is needed and not known; when `batches` is one tensor or dict, or
        `layers` a text.
    RuntimeError, ShapeError, NamespaceError, NumericsError, ShardingError
        As `full_gradients`; for factors that are not finite in the parameters' dtype, or
        sharded. After any error nothing has been written.

    Notes
    -----
    The gradient is that of the model as it stands, including its adapters: start from B = 0, as
    all libraries do; a B that is not zero is replaced with a RuntimeWarning. In float16 the
    gradients of a small loss vanish without an error: run the model in a wider dtype. For memory
    see `full_gradients`. A base weight is changed in its own dtype, with the factors as rounded to
    theirs: in bfloat16 the function stays to the rounding of W.
    Over several processes, initialize before wrapping the model in DDP, which then sends the
    start of rank 0 to all. Layers that the loss never calls, or with a gradient of zero, are
    skipped, and so are embeddings, convolutions and DoRA, and layers of a rank that the method
    cannot give: above a side of the weight, for "lora_ga" and "loi" above half of it, for "eva"
    above the tokens seen, for "orthogonal" odd. "gaussian" and "init_ab" give every rank.

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
    >>> from rlora.torch.init.initialize import initialize
    >>> layer = torch.nn.Linear(6, 4)
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(2, 6))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(4, 2))
    >>> model = torch.nn.Sequential(layer)
    >>> loss = lambda model, x: model(x).square().mean()
    >>> print(initialize(model, [torch.eye(6)], loss, gamma=0.01))
    lora_one: 1 layer started, 0 skipped
      layer 4 x 6, rank 2: 1 time, 0
    """
    check_model(model)
    check_choice("method", method, Method)
    moves = moves_weights(method, options)
    found, skipped = find_layers(model, adapter, scaling)
    chosen = choose(found, layers)
    places = module_places(model)
    holders = weight_places(places)
    weights: dict[str, Tensor] = {}
    for name, layer in chosen.items():
        check_layer(layer, method)
        if moves:
            weights[name] = movable_weight(layer, holders)
    begin = partial(start_of, chosen, method, options)
    if method not in (*FROM_GRADIENT, "eva"):
        # Random starts need only the shape of the weight: a matrix without memory.
        blank = {n: x.B.detach().new_zeros(()).expand(x.shape) for n, x in chosen.items()}
        starts = {n: begin(n, W) for n, W in {**blank, **weights}.items()}
    elif loss is None:
        msg = (
            f"{method} needs batches and a loss, as in initialize(model, batches, lambda model, "
            f"batch: model(**batch).loss); method='pissa' needs neither"
        )
        raise TypeError(msg)
    else:
        targets = {
            name: layer.target(whole=is_called_elsewhere(layer, places))
            for name, layer in chosen.items()
        }
        kind = InputRows if method == "eva" else Rows
        starts = capture(model, targets, batches, loss, begin, layers_per_pass, offload, kind)
    for name in chosen:
        start = starts.get(name, "the loss never calls it")
        if isinstance(start, str):
            skipped[name] = start
    if skipped.keys() >= chosen.keys():
        msg = f"no layer can be started; {next(iter(chosen))}: {skipped[next(iter(chosen))]}"
        raise PairingError(msg)
    _warn_of_use([x for x in chosen.values() if x.name not in skipped])
    return _write(method, list(chosen.values()), skipped, starts, weights)


def _warn_of_use(layers: Iterable[LoraLayer]) -> None:
    used = [layer.name for layer in layers if bool(torch.any(layer.B != 0))]
    if used:
        msg = (
            f"{first_of(used)}: B was not zero, and the adapter that was there is replaced; if it "
            f"had been started by an offset of the base weight, that offset is still taken: load "
            f"the original base model first"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=3)


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
