"""Methods of the study, and the learning rates that each is tried at."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import nn

import rlora
import rlora.torch
from rlora import Transform

Start = Literal["gaussian", "lora_one"]
Make = Callable[[nn.Module, float], torch.optim.Optimizer]

USUAL: Final = (0.9, 0.999)
FAST: Final = (0.7, 0.8)
"""The betas with which the paper trains scaled AdamW on GPT-2."""

COVARIANT: Final = {"damping": 1e-4, "damping_mode": "covariant"}
PUBLISHED: Final[dict[str, Any]] = {
    "placement": "before",
    "damping": 1e-6,
    "damping_mode": "relative",
}
BOTH: Final[dict[str, Any]] = {"placement": "both", **COVARIANT}


class Method(NamedTuple):
    """An optimizer with its settings; everything but the learning rate."""

    make: Make
    rates: tuple[float, ...]
    """Learning rates of the sweep, in rising order, a factor of two apart."""

    start: Start = "gaussian"
    """Start of the adapters: a method of `rlora.torch.initialize`, or "gaussian", as PEFT does."""


def adamw(betas: tuple[float, float]) -> Make:
    """AdamW of torch on the adapters."""

    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=0.0, fused=True)

    return make


def of(kind: str, **options: Any) -> Make:
    """A class of rlora.torch; no weight decay, as for all others."""
    make = getattr(rlora.torch, kind)
    return lambda model, lr: make(model, lr=lr, weight_decay=0.0, **options)


scaled: Final = partial(of, "ScaledAdamW", fused=True)


def around_scaled(wrap: Callable[[Transform], Transform], **options: Any) -> Make:
    """A method around scaled AdamW with the fast betas."""

    def method(*, weight_decay: float = 0.0) -> Transform:
        b1, b2 = FAST
        return wrap(rlora.scaled_adamw(b1=b1, b2=b2, weight_decay=weight_decay, **options))

    kind = rlora.torch.optimizer_class(method)
    return lambda model, lr: kind(model, lr=lr)


def clipped(share: float) -> Make:
    """Scaled AdamW in a trust region: no step moves W by more than a share of its size.

    One size for all layers, the root mean square of the entries of all frozen weights beside
    adapters.
    """

    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        layers: list[Any] = [x for x in model.modules() if hasattr(x, "lora_A")]
        squares = [x.base_layer.weight.double().square().mean() for x in layers]
        size = float(torch.stack(squares).mean().sqrt()) / layers[0].scaling["default"]
        return around_scaled(partial(rlora.trust_region, bound=share * size))(model, lr)

    return make


def favouring_b(ratio: float, **options: Any) -> Make:
    """Scaled AdamW with a larger learning rate for B, as LoRA+ has."""
    return around_scaled(partial(rlora.lora_plus, ratio=ratio), **options)


def rates(lowest: float, count: int = 4) -> tuple[float, ...]:
    """From the lowest up, each twice the one before."""
    return tuple(lowest * 2**k for k in range(count))


FOUND: Final = (1.0,)
"""The learning rate of a method that finds its own."""

METHODS: Final[dict[str, Method]] = {
    "adamw": Method(adamw(USUAL), rates(2e-3)),
    "adamw-fast": Method(adamw(FAST), rates(1e-3, 8)),
    "lora-plus-fast": Method(of("LoRAPlus", ratio=16.0, betas=FAST), rates(1e-3)),
    "lora-plus-before-fast": Method(favouring_b(16.0, **PUBLISHED), rates(1e-3)),
    "lora-plus-both-fast": Method(favouring_b(4.0, **BOTH), rates(1e-3)),
    "scaled-before": Method(scaled(betas=USUAL, **PUBLISHED), rates(4e-3)),
    "scaled-before-fast": Method(scaled(betas=FAST, **PUBLISHED), rates(4e-3)),
    "scaled-after-fast": Method(
        scaled(placement="after", betas=FAST, **COVARIANT), rates(3.125e-5)
    ),
    "scaled-both": Method(scaled(betas=USUAL, **BOTH), rates(2e-3)),
    "scaled-both-fast": Method(scaled(betas=FAST, **BOTH), rates(1e-3, 8)),
    "scaled-both-fast-relative": Method(
        scaled(betas=FAST, **{**PUBLISHED, "placement": "both"}), rates(2e-3)
    ),
    "scaled": Method(scaled(betas=FAST), rates(1e-3, 7)),
    "scaled-prodigy": Method(of("ScaledProdigy"), FOUND),
    "scaled-clipped": Method(clipped(0.01), rates(4e-3, 5)),
    # In the size of AdamW's step, so that its learning rate fits.
    "grafted-both-fast": Method(around_scaled(rlora.graft_adamw, **BOTH), rates(1e-3, 7)),
    "lora-rite": Method(of("LoRARite", betas=USUAL), rates(1e-3)),
    "lora-rite-fast": Method(of("LoRARite", betas=FAST), rates(1e-3)),
    "lora-pro-fast": Method(of("LoRAProAdamW", betas=FAST), rates(4e-3)),
    "lora-one-adamw-fast": Method(adamw(FAST), rates(1e-3), start="lora_one"),
    "lora-one-scaled-both-fast": Method(scaled(betas=FAST, **BOTH), rates(1e-3), start="lora_one"),
}
"""Those called fast have the betas `FAST`, the others `USUAL`."""
