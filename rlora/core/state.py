"""A method's state as one flat dict of arrays, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlora.core.backend import dtype_name
from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError, ShapeError
from rlora.core.factors import Array, device_of
from rlora.core.transform import State


def flatten_state(state: State) -> dict[str, Array]:
    """A state as one flat dict of arrays, for np.savez, safetensors or torch.save.

    Parameters
    ----------
    state : State
        The result of `Transform.init` or `update`.

    Returns
    -------
    dict of str to array
        Names are the path through the state, such as ``"1.mu.layers.0.A"``. Keys may have dots.

    Raises
    ------
    PairingError
        When two paths have one name, as ``{"a.b": ...}`` beside ``{"a": {"b": ...}}`` have.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> pair = rlora.Factors(np.ones((2, 5)), np.zeros((3, 2)))
    >>> sorted(rlora.flatten_state(rlora.scaled_adamw().init(pair)))[:3]
    ['0.count.A', '0.count.B', '0.mu.A']
    """
    flat: dict[str, Array] = {}

    def walk(node: State, path: str) -> None:
        for key, child in _children(node):
            name = f"{path}.{key}" if path else key
            if _is_node(child):
                walk(child, name)
            elif name in flat:
                msg = (
                    f"two arrays of the state are both named {name!r}, keys joined by dots; "
                    f"rename one of the pairs, so that no name is lost"
                )
                raise PairingError(msg)
            elif child is not None:  # a factor that the method never updates has no state
                # Counters of NumPy: what its arithmetic makes of arrays without axes are none.
                flat[name] = np.asarray(child) if isinstance(child, np.generic) else child

    walk(state, "")
    return flat


def unflatten_state(flat: Mapping[str, Array], like: State) -> State:
    """The state of which `flatten_state` gave `flat`.

    Parameters
    ----------
    flat : mapping of str to array
        Named arrays, such as NumPy's from a file: they are copied into the library, dtype and
        device of `like`, and come back as they are where they have them already.
    like : State
        A state of the same method and parameters, such as ``transform.init(params)``.

    Returns
    -------
    State
        In the structure of `like`.

    Raises
    ------
    ShapeError
        When names are missing or left over, or an array has another shape than `like` has there.
    """
    expected = flatten_state(like)
    if missing := sorted(expected.keys() ^ flat.keys()):
        msg = (
            f"the saved state does not belong to this method and these parameters; "
            f"{len(missing)} names differ, such as {missing[:3]}"
        )
        raise ShapeError(msg)

    def load(name: str, old: Array) -> Array:
        new = flat[name]
        if tuple(new.shape) != tuple(old.shape):
            msg = f"saved {name} has shape {tuple(new.shape)}, expected {tuple(old.shape)}"
            raise ShapeError(msg)
        backend = get_backend(old)
        if type(new) is not type(old):
            source = get_backend(new)
            if dtype_name(new.dtype) == "bfloat16":  # which NumPy does not have
                new = source.cast(new, source.xp.float32)
            # Memory of its own: a file's may be read-only, and a donated step would write to it.
            return backend.asarray_like(np.array(source.to_numpy(new)), old)
        if device_of(new) != device_of(old):
            return backend.asarray_like(new, old)
        return backend.cast(new, old.dtype)  # a file may have a narrower one than steps need

    def walk(node: State, path: str) -> State:
        values = []
        for key, child in _children(node):
            name = f"{path}.{key}" if path else key
            if _is_node(child):
                values.append(walk(child, name))
            else:
                values.append(None if child is None else load(name, child))
        return _rebuild(node, values)

    return walk(like, "")


def _is_node(x: Any) -> bool:
    return isinstance(x, (tuple, list, Mapping))


def _children(node: State) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    names = getattr(node, "_fields", None) or [str(i) for i in range(len(node))]
    return list(zip(names, node, strict=True))


def _rebuild(node: State, values: list[Any]) -> State:
    if isinstance(node, Mapping):
        return dict(zip(node, values, strict=True))
    return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
