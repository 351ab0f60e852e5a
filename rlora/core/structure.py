"""Comparing states: their types, fields and shapes, on the host."""

from collections.abc import Callable, Mapping
from typing import Any

from rlora.core.errors import ShapeError


def same_shapes(one: Any, other: Any) -> bool:
    """Return whether two states have the same types, fields and shapes."""
    leaves = side_by_side(one, other)
    if leaves is None:
        return False
    alike = [getattr(x, "shape", None) == getattr(y, "shape", None) for x, y in leaves]
    return all(alike)


def side_by_side(one: Any, other: Any) -> list[tuple[Any, Any]] | None:
    """The arrays of two states, each with its counterpart; None if types or fields differ."""
    leaves: list[tuple[Any, Any]] = []
    pending = [(one, other)]
    while pending:  # of lists, which older compilers of torch know better than iterators
        x, y = pending.pop()
        if isinstance(x, (tuple, list)):
            if not (type(x) is type(y) or _kind(x) is _kind(y)) or len(x) != len(y):
                return None
            pending += list(zip(x, y, strict=True))
        elif hasattr(x, "shape") and hasattr(y, "shape"):  # most are, and `Mapping` is slow
            leaves.append((x, y))
        elif isinstance(x, Mapping):
            if not isinstance(y, Mapping) or x.keys() != y.keys():
                return None
            pending += [(x[key], y[key]) for key in x]
        elif isinstance(y, (tuple, list, Mapping)) or (x is None) is not (y is None):
            return None
        else:
            leaves.append((x, y))
    return leaves


def another_state(new: Any, state: Any) -> ShapeError:
    """The error for a method whose state has other types or fields after a step than before."""
    msg = (
        f"the update and the transport of a method must give a state of the types and fields of "
        f"its init's: {difference(new, state)}"
    )
    return ShapeError(msg)


def check_state(state: Any, expected: Callable[[], Any], cause: Exception | None = None) -> None:
    """Raise a ShapeError that says what came, unless a state has the shapes of the expected one."""
    if text := difference(state, expected()):
        msg = (
            f"the state does not belong to this method and these parameters: {text}; make it by "
            f"this method's init(params), or load it by rlora.unflatten_state"
        )
        raise ShapeError(msg) from cause


def difference(state: Any, expected: Any, path: str = "") -> str | None:
    """The first difference in types, fields or shapes in words; None without any."""
    if same_shapes(state, expected):
        return None
    if isinstance(expected, Mapping):
        if isinstance(state, Mapping) and state.keys() == expected.keys():
            parts = [(key, state[key], child) for key, child in expected.items()]
            return _first(parts, path)
    elif (kind := _kind(expected)) and kind is _kind(state) and len(state) == len(expected):
        keys = getattr(expected, "_fields", range(len(expected)))
        return _first(list(zip(keys, state, expected, strict=True)), path)
    return f"{path or 'it'} is {_say(state)}, expected {_say(expected)}"


def _first(parts: list[tuple[Any, Any, Any]], path: str) -> str | None:
    key, state, expected = next(part for part in parts if not same_shapes(*part[1:]))
    return difference(state, expected, f"{path}.{key}" if path else str(key))


def _kind(x: Any) -> type | None:
    """The class of a named tuple, one for all plain sequences, None for anything else."""
    if not isinstance(x, (tuple, list)):
        return None
    return type(x) if hasattr(x, "_fields") else tuple


def _say(x: Any) -> str:
    if isinstance(x, Mapping):
        return f"a dict with keys {sorted(map(str, x))[:6]}"
    if not isinstance(x, (tuple, list)):
        return f"an array of shape {tuple(x.shape)}" if hasattr(x, "shape") else type(x).__name__
    if hasattr(x, "_fields"):
        return type(x).__name__
    return f"({', '.join(map(_say, x[:6]))})"
