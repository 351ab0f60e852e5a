"""Write the signatures that are made of the methods down for type checkers and editors.

``python -m rlora.write_stubs``, after a method has been added or its options have changed: of
rlora.torch's classes and of rlora.optax's functions.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from rlora.optax import method_transformations
from rlora.torch import method_classes

TORCH: Final = '''"""Written by ``python -m rlora.write_stubs``."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlora.torch.pairing.discovery import Pairs
from rlora.torch.optimizers.method_optimizer import MethodOptimizer
'''

OPTAX: Final = '''"""Written by ``python -m rlora.write_stubs``."""

from typing import Literal

import optax

from rlora.core.transform import Transform
from rlora.optax.param_tree import Hold
from rlora.pairing import Source
'''

TORCH_ALIASES: Final = {"pairs": "Pairs"}
OPTAX_ALIASES: Final = {
    "learning_rate": "optax.ScalarOrSchedule",
    "pairs": "Source | None",
    "hold": "Hold",
    "rest": "optax.GradientTransformation | None",
}
"""Types that are written by their names, by the names of the parameters."""


def torch_stub() -> str:
    """Each class with the signature of its constructor."""
    lines = [TORCH, f"__all__ = {method_classes.__all__}\n"]
    for name in method_classes.__all__:
        kind = getattr(method_classes, name)
        lines.append(f"class {name}(MethodOptimizer, torch.optim.{kind.__bases__[1].__name__}):")
        lines.append("    def __init__(\n        self,")
        lines += [f"    {line}" for line in _parameters(kind, TORCH_ALIASES)]
        lines.append("    ) -> None: ...\n")
    return "\n".join(lines)


def optax_stub() -> str:
    """Each function with its signature."""
    lines = [OPTAX, f"__all__ = {method_transformations.__all__}\n"]
    for name in method_transformations.__all__:
        lines.append(f"def {name}(")
        lines += _parameters(getattr(method_transformations, name), OPTAX_ALIASES)
        lines.append(") -> optax.GradientTransformationExtraArgs: ...\n")
    return "\n".join(lines)


STUBS: Final = ((method_classes, torch_stub), (method_transformations, optax_stub))


def target(module: ModuleType) -> Path:
    """The path of the stub of a module."""
    return Path(str(module.__file__)).with_suffix(".pyi")


def _parameters(function: Callable[..., Any], aliases: Mapping[str, str]) -> list[str]:
    lines = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        kind = aliases.get(p.name) or inspect.formatannotation(p.annotation)
        for long, short in (("torch.Tensor", "Tensor"), ("rlora.core.transform.", "")):
            kind = kind.replace(long, short)
        default = "" if p.default is p.empty else f" = {p.default!r}"
        lines.append(f"    {p.name}: {kind}{default},")
    return lines


if __name__ == "__main__":
    for module, stub in STUBS:
        target(module).write_text(stub(), encoding="utf-8")
