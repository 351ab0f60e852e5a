"""Hyperparameters are checked where they are given, and the message says what may be given."""

import math
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from rlora.core.backend import dtype_name

ComputeDtype: TypeAlias = Literal[None, "float32", "float64"]
"""Precision of the r x r algebra; None is the parameters' own, at least float32."""


def is_traced(value: Any) -> bool:
    """Whether a number is a JAX array: one may be another at each step, and under jit has no value.

    `optax.inject_hyperparams` makes them. Nothing asks what they are.
    """
    return not isinstance(value, (int, float)) and hasattr(value, "aval")


def is_zero(value: Any) -> bool:
    """Whether a number is known to be 0."""
    return not is_traced(value) and bool(value == 0)


def check_unit(name: str, value: Any) -> None:
    """ValueError unless 0 <= value < 1, TypeError unless it is a number."""
    check_nonnegative(name, value)
    if not is_traced(value) and value >= 1.0:
        msg = f"{name} must be in [0, 1), got {value!r}"
        raise ValueError(msg)


def check_nonnegative(name: str, value: Any) -> None:
    """ValueError unless `value` is finite and at least 0, TypeError unless it is a number."""
    if is_traced(value):
        _check_traced(name, value)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} must be a real number, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)
    if not 0.0 <= value < float("inf"):
        msg = f"{name} must be finite and at least 0, got {value!r}"
        raise ValueError(msg)


def _check_traced(name: str, value: Any) -> None:
    kind = dtype_name(value.dtype)
    if value.shape != () or kind not in ("float32", "float64", "int32", "int64"):
        msg = (
            f"{name} must be one real number of at least 32 bits, got an array of shape "
            f"{value.shape} and dtype {kind}; with bfloat16 parameters give "
            f"optax.inject_hyperparams hyperparam_dtype=jnp.float32"
        )
        raise TypeError(msg)


def check_rate(lr: Any) -> None:
    """ValueError or TypeError unless a learning rate is finite and at least 0, or an array of one.

    The value of an array is not asked for: it may be on a device, or traced.
    """
    if isinstance(lr, Real) and not isinstance(lr, bool):
        if not 0.0 <= lr < float("inf"):
            msg = f"lr must be finite and at least 0, got {lr!r}"
            raise ValueError(msg)
    elif math.prod(getattr(lr, "shape", (0,))) != 1:
        what = f"an array of shape {tuple(lr.shape)}" if hasattr(lr, "shape") else repr(lr)
        msg = f"lr must be one real number or an array of shape (), got {what}"
        raise TypeError(msg)


def check_scaling(scaling: Any) -> None:
    """ValueError or TypeError unless s, of ``W0 + s B A``, is positive and finite; an array is."""
    if getattr(scaling, "shape", None) == () and not isinstance(scaling, Real):
        return  # its value is not asked for
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        msg = f"scaling must be a real number, got {scaling!r} ({type(scaling).__name__})"
        raise TypeError(msg)
    if not 0.0 < scaling < float("inf"):
        msg = (
            f"scaling must be finite and positive, got {scaling!r}; it is the s of W0 + s B A, "
            f"lora_alpha / r in most libraries"
        )
        raise ValueError(msg)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        msg = f"{name} must be one of {', '.join(map(str, get_args(choices)))}, got {value!r}"
        raise ValueError(msg)
