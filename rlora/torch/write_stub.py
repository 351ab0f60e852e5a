"""Write the signatures of the methods' optimizer classes down for type checkers and editors.

``python -m rlora.torch.write_stub``, after a method has been added or its options have changed.
"""

import inspect
from pathlib import Path

from rlora.torch import method_classes

HEAD = '''"""Written by ``python -m rlora.torch.write_stub``."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlora.torch.pairing.discovery import Pairs
from rlora.torch.optimizers.method_optimizer import MethodOptimizer
'''


def stub() -> str:
    """The text of the stub: each class with the signature of its constructor."""
    lines = [HEAD, f"__all__ = {method_classes.__all__}\n"]
    for name in method_classes.__all__:
        kind = getattr(method_classes, name)
        lines.append(f"class {name}(MethodOptimizer, torch.optim.{kind.__bases__[1].__name__}):")
        lines.append("    def __init__(\n        self,")
        marked = False
        for p in list(inspect.signature(kind).parameters.values()):
            if p.kind is p.KEYWORD_ONLY and not marked:
                lines.append("        *,")
                marked = True
            lines.append(f"        {p.name}: {_annotation(p)}{_default(p)},")
        lines.append("    ) -> None: ...\n")
    return "\n".join(lines)


def _annotation(p: inspect.Parameter) -> str:
    if p.name == "pairs":
        return "Pairs"
    return inspect.formatannotation(p.annotation).replace("torch.Tensor", "Tensor")


def _default(p: inspect.Parameter) -> str:
    return "" if p.default is p.empty else f" = {p.default!r}"


if __name__ == "__main__":
    target = Path(str(method_classes.__file__)).with_suffix(".pyi")
    target.write_text(stub(), encoding="utf-8")
