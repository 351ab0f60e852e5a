"""Optimizers for LoRA factors that know the two factors belong together, on any array library.

``W = W0 + s B A`` with A (r, n) and B (m, r). This module imports no framework;
``rlora.torch`` has the torch optimizers.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

from rlora import initializers, methods
from rlora.core.errors import (
    BackendError,
    NamespaceError,
    NumericsError,
    PairingError,
    RLoraError,
    ShapeError,
    ShardingError,
)
from rlora.core.factors import Factors
from rlora.core.rebalance import rebalance
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.step import step
from rlora.core.suggest_lr import suggest_lr
from rlora.core.transform import Transform, apply_updates, chain
from rlora.methods import *  # noqa: F403  a method's export line is in rlora.methods
from rlora.pairing import Pair, PairReport, find_pairs

__version__ = "0.1.0"

# Python takes `rlora/` from the working directory before an installed copy. In a clone `backends/`
# and `cli/` lie beside it: without this line they would be missing, and the generic backend would
# take over without a word.
_project = _Path(__file__).parents[1] / "pyproject.toml"
if _project.is_file() and '"rlora.backends" = "backends"' in _project.read_text("utf-8"):
    __path__.append(str(_project.parent))  # noqa: F405  this package's own


def __getattr__(name: str) -> _Any:
    """Packages that are imported when they are asked for; two of them import a framework."""
    if name in ("backends", "integrations", "optax", "testing", "torch"):
        return _import_module(f"rlora.{name}")
    where = "; optimizers of torch are in rlora.torch" if name[:1].isupper() else ""
    msg = f"module 'rlora' has no attribute {name!r}{where}"
    raise AttributeError(msg)


__all__ = [
    "BackendError",
    "Factors",
    "NamespaceError",
    "NumericsError",
    "Pair",
    "PairReport",
    "PairingError",
    "RLoraError",
    "ShapeError",
    "ShardingError",
    "Transform",
    "apply_updates",
    "chain",
    "find_pairs",
    "flatten_state",
    "initializers",
    "methods",
    "rebalance",
    "step",
    "suggest_lr",
    "unflatten_state",
]
__all__ += methods.__all__
__all__.sort()
