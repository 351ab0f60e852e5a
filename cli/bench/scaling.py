"""``--suite scaling``: how the overhead grows with the width and with the number of layers."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Final

from .options import Options, make_options

NAME: Final = "scaling"
METHODS: Final = ["scaled_adamw", "lora_rite", "lora_pro_adamw"]
RANK: Final = 16
WIDTHS: Final = (256, 512, 1024, 2048, 4096)
LAYERS: Final = (1, 4, 16, 64)
USUAL_WIDTH, USUAL_LAYERS = 1024, 8
SECONDS: Final = 8.0
"""For each problem: all of them in less than two minutes."""


def scaling_options(preset: str | None, ranks: Sequence[str], **given: Any) -> list[Options]:
    """Make the options for each width at 8 layers and each number of layers at width 1024."""
    backend = "torch" if importlib.util.find_spec("torch") else "numpy"
    if given["seconds"] is None and given["repeat"] is None:
        given["seconds"] = SECONDS
    return [
        make_options(
            backend=[backend],
            methods=METHODS,
            ranks=ranks or [str(RANK)],
            preset=shape,
            against=[],
            **given,
        )
        for shape in ([preset] if preset else shapes())
    ]


def shapes() -> list[str]:
    """Every problem of the suite, each once."""
    wide = [f"{width}x{width}*{USUAL_LAYERS}" for width in WIDTHS]
    return wide + [f"{USUAL_WIDTH}x{USUAL_WIDTH}*{layers}" for layers in LAYERS]
