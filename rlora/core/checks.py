"""Hyperparameters are checked where they are given, and the message says what may be given."""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np

from rlora.core.backend import dtype_name
from rlora.core.dispatch import get_backend
from rlora.core.errors import ShapeError

ComputeDtype: TypeAlias = Literal[None, "float32", "float64"]
"""Precision of the r x r algebra; None is the parameters' own, at least float32."""

Maker = TypeVar("Maker", bound=Callable[..., Any])


def plain_number(value: Any) -> Any:
    """A real number or flag of any library as Python's own, in a tuple too; else as it is.

    A NumPy scalar would have a say in the dtype of what it is multiplied with, and a file with one
    in it is refused by ``torch.load(weights_only=True)``.
    """
    if type(value) is tuple:
        return tuple(map(plain_number, value))
    if isinstance(value, np.bool_):
        return bool(value)
    if type(value) in (int, float, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def hyperparameters(method: Maker) -> Maker:
    """Let a method take real numbers of any library, and say what it calls torch's ``betas``."""
    rates = [name for name in inspect.signature(method).parameters if name in ("b1", "b2")]

    @wraps(method)
    def make(*args: Any, **options: Any) -> Any:
        if rates and "betas" in options:
            msg = (
                f"{method.__name__} has no 'betas', torch's name for the pair: give "
                f"{' and '.join(f'{name}=...' for name in rates)}"
            )
            raise TypeError(msg)
        numbers = {name: plain_number(value) for name, value in options.items()}
        return method(*map(plain_number, args), **numbers)

    return cast("Maker", make)


def keeps(
    factor: Literal["A", "B"],
    advice: str = "start it at random, or freeze the pair",
) -> Callable[[Maker], Maker]:
    """Name the factor that a method never moves, and advice for one that is zero."""

    def mark(method: Maker) -> Maker:
        cast("Any", method).kept = (factor, advice)
        return method

    return mark


def default_rate(lr: float) -> Callable[[Maker], Maker]:
    """Name the learning rate of a method that finds its own: the default of its torch class."""

    def mark(method: Maker) -> Maker:
        cast("Any", method).lr = lr
        return method

    return mark


def mark_of(method: Any, name: Literal["kept", "lr"]) -> Any:
    """Return what `keeps` or `default_rate` says of a method, also under a `functools.partial`."""
    return getattr(getattr(method, "func", method), name, None)


def is_traced(value: Any) -> bool:
    """Return whether a number is a JAX array: it may differ at each step, and has no value in jit.

    `optax.inject_hyperparams` makes them. Their values are never read.
    """
    return not isinstance(value, (int, float)) and hasattr(value, "aval")


def is_zero(value: Any) -> bool:
    """Return whether a number is known to be 0."""
    return not is_traced(value) and bool(value == 0)


def check_real(name: str, value: Any) -> None:
    """TypeError unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        msg = f"{name} must be a real number, got {described(value)}"
        raise TypeError(msg)


def described(value: Any) -> str:
    """A value that is no number, for an error: with its type, and what YAML may have done to it."""
    numeric = isinstance(value, str) and re.fullmatch(r"[-+\d.]+[eE][-+]?\d+", value)
    hint = "; YAML reads 1e-3 as text: write 1.0e-3" if numeric else ""
    return f"{value!r} ({type(value).__name__}){hint}"


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
    check_real(name, value)
    if not 0.0 <= float(value) < float("inf"):
        msg = f"{name} must be finite and at least 0, got {value!r}"
        raise ValueError(msg)


def check_betas(value: Any) -> None:
    """TypeError unless these are two; the numbers are checked by themselves."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        msg = f"betas must be two numbers, as in (0.9, 0.999), got {value!r}"
        raise TypeError(msg)


def check_count(name: str, value: Any, least: int, most: float = math.inf, where: str = "") -> None:
    """TypeError unless the value is an integer, ValueError unless it is in its range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be an integer, got {described(value)}"
        raise TypeError(msg)
    if not least <= int(value) <= most:
        msg = f"{name} must be in {least}..{most}{where}, got {value}"
        raise ValueError(msg)


def check_positive(name: str, value: Any) -> None:
    """ValueError or TypeError unless the value is a positive number."""
    check_nonnegative(name, value)
    if is_zero(value):
        msg = f"{name} must be positive, got {value!r}"
        raise ValueError(msg)


def check_flag(name: str, value: Any, *, or_none: bool = False) -> None:
    """TypeError unless `value` is True or False, or with `or_none` None."""
    if not isinstance(value, bool) and not (or_none and value is None):
        known = "True, False or None" if or_none else "True or False"
        msg = f"{name} must be {known}, got {described(value)}"
        raise TypeError(msg)


def _check_traced(name: str, value: Any) -> None:
    kind = dtype_name(value.dtype)
    if value.shape != () or kind not in ("float32", "float64", "int32", "int64"):
        msg = (
            f"{name} must be one real number of at least 32 bits, got an array of shape "
            f"{value.shape} and dtype {kind}; with bfloat16 parameters give "
            f"optax.inject_hyperparams hyperparam_dtype=jnp.float32"
        )
        raise TypeError(msg)


def checked_rate(lr: Any) -> Any:
    """A learning rate that steps can compute with: a plain number, or an array of 32 bits or more.

    In 16 bits ``1 - lr λ`` is 1, and in an unsigned integer ``-lr`` is large and positive. The
    values of an array are not asked for: it may be on a device, or traced. ValueError or TypeError
    for any other.
    """
    if not isinstance(lr, bool) and isinstance(lr, Real):
        if not 0.0 <= float(lr) < float("inf"):
            msg = f"lr must be finite and at least 0, got {lr!r}"
            raise ValueError(msg)
        return plain_number(lr)
    shape = getattr(lr, "shape", None)
    if shape is None:
        msg = f"lr must be one real number or an array, got {described(lr)}"
        raise TypeError(msg)
    kind = dtype_name(getattr(lr, "dtype", None))
    if kind in ("float32", "float64"):
        return lr
    if not kind.startswith(("int", "uint", "float16", "bfloat16")):
        msg = (
            f"lr must be real: a float, or an array of floating-point numbers, got an array of "
            f"shape {tuple(shape)} and dtype {kind}"
        )
        raise TypeError(msg)
    backend = get_backend(lr)
    return backend.cast(lr, backend.xp.float32)


def check_rates(lr: Any, arrays: Iterable[Any]) -> None:
    """ShapeError unless an array has one learning rate, or one for each layer of a stack."""
    for x in arrays:
        sizes = (*x.shape[:-2], 1, 1)
        fits = zip(reversed(lr.shape), reversed(sizes), strict=False)
        if len(lr.shape) > len(sizes) or any(k not in (1, size) for k, size in fits):
            msg = (
                f"lr must be one number, or an array (..., 1, 1) with one for each layer of a "
                f"stack, got shape {tuple(lr.shape)} for a factor of shape {tuple(x.shape)}"
            )
            raise ShapeError(msg)


def check_scaling(scaling: Any) -> None:
    """ValueError or TypeError unless the s of ``W0 + s B A`` is positive, finite, or an array."""
    if isinstance(scaling, np.ndarray) and scaling.shape == ():
        scaling = float(scaling)
    elif getattr(scaling, "shape", None) == () and not isinstance(scaling, Real):
        return  # its value is not asked for
    check_real("scaling", scaling)
    if not 0.0 < float(scaling) < float("inf"):
        msg = (
            f"scaling must be finite and positive, got {scaling!r}; it is the s of W0 + s B A, "
            f"lora_alpha / r in most libraries"
        )
        raise ValueError(msg)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        msg = f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}"
        raise ValueError(msg)
