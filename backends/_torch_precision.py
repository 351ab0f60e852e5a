"""Products in the full precision of their dtype, whatever torch's settings are."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from rlora.core.errors import NumericsError
from rlora.core.factors import Array

EXACT = ("ieee", "none")
"""Settings under which torch rounds no inputs."""


def exact(like: Array) -> AbstractContextManager[Any]:
    """`Backend.exact`, also in a graph."""
    if torch.compiler.is_compiling():
        return _exact_graph(like)
    with _PRODUCTS.lock:  # or another thread may put its settings back between the two looks
        rounds = _rounds_inputs() or _PRODUCTS.inside
    if rounds or torch.is_autocast_enabled(like.device.type):
        return _exact(like)
    return nullcontext()


@contextmanager
def _exact(like: Array) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False), _PRODUCTS:
        yield


def _exact_graph(like: Array) -> AbstractContextManager[Any]:
    if _constant_rounds_inputs():
        msg = (
            "products of float32 are rounded under this setting, and a compiled step cannot change "
            'it; call torch.set_float32_matmul_precision("highest"), or do not compile the step'
        )
        raise NumericsError(msg)
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def _ieee_products() -> Iterator[None]:
    matmuls = _matmuls()
    if not matmuls:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    everywhere: Any = torch.backends
    saved = [(m, m.fp32_precision) for m in matmuls if m.fp32_precision not in EXACT]
    try:
        for matmul, _ in saved:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in saved:
            # One that follows the setting for all of torch is to follow it from here on too.
            inherited = precision == everywhere.fp32_precision
            matmul.fp32_precision = "none" if inherited else precision


class OfAllThreads(AbstractContextManager[None]):
    """`_ieee_products` for several threads, as the settings are those of all.

    The first one that enters changes them, the last one that leaves puts them back.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.lock, self._settings = threading.Lock(), ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self._settings.enter_context(_ieee_products())
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self._settings.close()


_PRODUCTS = OfAllThreads()


@cache
def _matmuls() -> list[Any]:
    """The places where torch keeps the precision of its products; none before torch 2.9."""
    parts = (torch.backends.cuda, torch.backends.mkldnn)
    matmuls: list[Any] = [getattr(part, "matmul", None) for part in parts]
    return matmuls if all(hasattr(matmul, "fp32_precision") for matmul in matmuls) else []


def _rounds_inputs() -> bool:
    """Return whether torch may round the inputs of a float32 product."""
    if matmuls := _matmuls():
        return any(matmul.fp32_precision not in EXACT for matmul in matmuls)
    return torch.get_float32_matmul_precision() != "highest"


# Read when a graph is made; torch makes a new one when the setting changes.
_constant: Any = torch.compiler.assume_constant_result
_constant_rounds_inputs = _constant(_rounds_inputs)
