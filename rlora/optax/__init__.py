"""The methods as optax transformations of any pytree of parameters.

The pairs are found by the names in the tree, or given. `transformation` makes one out of a
method; `scaled_adamw`, `lora_rite` and the others are shorthand.
"""

from rlora.core.errors import not_installed as _not_installed

try:
    import jax as _jax  # noqa: F401  before what needs them
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name not in ("jax", "optax"):  # they are there, and broken
        raise
    raise _not_installed(_error.name, extra="jax") from _error

from rlora.optax import method_transformations
from rlora.optax.method_transformations import *  # noqa: F403  (as many as there are methods)
from rlora.optax.pair_transformation import scale_by_gram, transformation

__all__ = ["scale_by_gram", "transformation"]
__all__ += method_transformations.__all__
__all__.sort()
