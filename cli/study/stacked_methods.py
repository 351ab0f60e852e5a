"""Methods of the study of strings: pure functions for a stack of runs."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import rlora
from rlora import Transform, chain
from rlora.core.factors import Array, Tree
from rlora.methods.scaled import scale_by_gram

from .experiments import favour_b, scale_by_growing_adam
from .methods import FAST, FOUND, PUBLISHED, USUAL, rates

Sizes = Mapping[str, float]
"""Name of an adapted weight -> root mean square of the entries of W0, divided by s: what a change
of B A is measured by."""

Make = Callable[[Sizes], Transform]


class StackedMethod(NamedTuple):
    """A method with its settings; everything but the learning rate."""

    make: Make
    rates: tuple[float, ...]
    """Learning rates that a sweep begins with, in rising order, a factor of two apart."""

    waits: bool = False
    """True if a step asks a device for values, so that no CUDA graph can hold it."""


def of(make: Callable[..., Transform], **options: Any) -> Make:
    """A method of the library without weight decay."""
    return lambda sizes: make(weight_decay=0.0, **options)


def with_betas(make: Callable[..., Transform], betas: tuple[float, float], **options: Any) -> Make:
    """The same with betas."""
    return of(make, b1=betas[0], b2=betas[1], **options)


def clipped(make: Make) -> Make:
    """A method in a trust region, of each layer by its own size."""

    def method(sizes: Sizes) -> Transform:
        inner = make(sizes)
        cut = {name: rlora.trust_region(inner, bound=SHARE * x) for name, x in sizes.items()}

        def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
            return {name: cut[name].apply(params[name], direction[name], lr) for name in params}

        return inner._replace(apply=apply)

    return method


SHARE: Final = 0.01
"""Share of the root mean square of W0 by which a clipped step may move the entries of s B A."""

BETAS: Final = ((0.9, 0.95), (0.9, 0.99))
"""Those between `FAST` and `USUAL`."""

WIDE: Final = rates(2.5e-4, 11)
"""Learning rates from 0.00025 to 0.256."""


ADAMW: Final = with_betas(rlora.lora_plus, FAST, ratio=1.0)
SCALED: Final = with_betas(rlora.scaled_adamw, FAST)


def both(
    name: str, make: Callable[..., Transform], *, waits: bool = False, **options: Any
) -> dict[str, StackedMethod]:
    """A method with Adam's betas and with the fast ones."""
    return {
        name: StackedMethod(with_betas(make, USUAL, **options), WIDE, waits),
        f"{name}-fast": StackedMethod(with_betas(make, FAST, **options), WIDE, waits),
    }


def between(name: str, make: Callable[..., Transform], **options: Any) -> dict[str, StackedMethod]:
    """A method with the betas between these."""
    return {
        f"{name}-{betas[0]}-{betas[1]}": StackedMethod(with_betas(make, betas, **options), WIDE)
        for betas in BETAS
    }


METHODS: Final[Mapping[str, StackedMethod]] = {
    **both("adamw", rlora.lora_plus, ratio=1.0),
    **between("adamw", rlora.lora_plus, ratio=1.0),
    "adamw-growing": StackedMethod(lambda sizes: scale_by_growing_adam(FAST[0]), WIDE),
    **both("lora-plus-2", rlora.lora_plus, ratio=2.0),
    **both("lora-plus-4", rlora.lora_plus, ratio=4.0),
    **both("lora-plus-8", rlora.lora_plus, ratio=8.0),
    **both("lora-plus-16", rlora.lora_plus, ratio=16.0),
    "scaled": StackedMethod(SCALED, WIDE),
    "scaled-usual": StackedMethod(with_betas(rlora.scaled_adamw, USUAL), WIDE),
    "scaled-prodigy": StackedMethod(of(rlora.scaled_prodigy), FOUND),
    **between("scaled", rlora.scaled_adamw),
    "scaled-growing": StackedMethod(
        lambda sizes: chain(
            scale_by_gram(scale_by_growing_adam(FAST[0]), damping=1e-2, placement="both")
        ),
        WIDE,
    ),
    **both("scaled-before", rlora.scaled_adamw, **PUBLISHED),
    **both("scaled-after", rlora.scaled_adamw, placement="after"),
    **both("lora-rite", rlora.lora_rite),
    **both("lora-pro", rlora.lora_pro_adamw, waits=True),
    **both("alt-lora-plus", rlora.alt_lora_plus),
    **both("adapre-lora", rlora.adapre_lora),
    **both("loft", rlora.loft),
    **both("graft", rlora.graft_adamw),
    **both("balanced", rlora.balanced_lora, waits=True),
    **both("stable", rlora.stable_lora),
    **both("lora-fa", rlora.lora_fa),
    "lora-muon": StackedMethod(of(rlora.lora_muon), WIDE),
    "factor-muon": StackedMethod(of(rlora.factor_muon), WIDE),
    "alt-lora": StackedMethod(of(rlora.alt_lora), rates(0.032, 11)),
    "ref-lora": StackedMethod(of(rlora.ref_lora, momentum=0.9), rates(0.032, 11), True),
    "scaled-sgd": StackedMethod(of(rlora.scaled_sgd, momentum=0.9), rates(0.032, 11)),
    "lora-pro-sgd": StackedMethod(of(rlora.lora_pro_sgd, momentum=0.9), rates(0.032, 11), True),
    "riemannion": StackedMethod(of(rlora.riemannion), WIDE, True),
    "scaled-clipped": StackedMethod(clipped(SCALED), WIDE),
    "adamw-fast-clipped": StackedMethod(clipped(ADAMW), WIDE),
    "scaled-favoured": StackedMethod(lambda sizes: favour_b(SCALED(sizes)), WIDE),
}
"""Betas: (0.7, 0.8) of those called fast, others as named, else (0.9, 0.999).

But `scaled`, and what is made of it, has the fast ones; growing ones have a b1 of 0.7; both Muons
have a momentum of 0.95, `alt-lora` and `riemannion` one of 0.9, as those of SGD. Clipped ones move
no weight by more than the share `SHARE`. `scaled-prodigy` finds its rate.
"""

BY_BETAS: Final = tuple(
    (fast, *(f"{method}-{b1}-{b2}" for b1, b2 in BETAS), usual, f"{method}-growing")
    for method, fast, usual in (
        ("adamw", "adamw-fast", "adamw"),
        ("scaled", "scaled", "scaled-usual"),
    )
)
"""Names of AdamW, and of scaled AdamW, with each betas."""
