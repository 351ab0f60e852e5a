"""Optimizers for LoRA factors that know the two factors belong together, on any array library.

``W = W0 + s B A`` with A (r, n) and B (m, r). This module imports no framework;
``rlora.torch`` has the torch optimizers.
"""

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
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.transform import Transform, apply_updates, chain, step
from rlora.methods import *  # noqa: F403  a method's export line is in rlora.methods
from rlora.pairing import Pair, PairReport, find_pairs

__version__ = "0.1.0"

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
    "step",
    "unflatten_state",
]
__all__ += methods.__all__
__all__.sort()
