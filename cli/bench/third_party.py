"""Other people's optimizers: what `--against` takes, found before anything is timed."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rlora import BackendError

from .cases import LR

KNOWN: Final = (
    "torch.adamw",
    "torch.adamw:foreach",
    "torch.adamw:fused",
    "peft",
    "optax.adamw",
    "bitsandbytes",
    "torchao",
)
"""Beside them, ``module:Class`` of any torch optimizer."""


class ThirdParty(NamedTuple):
    """An optimizer that is not ours."""

    name: str
    framework: str
    """Library of the arrays it works on: "torch" or "jax"."""

    make: Callable[[Any], Any]
    """Make the optimizer of a torch module; optax's transformation ignores its argument."""


def find_third_party(name: str) -> ThirdParty:
    """Import the packages of a third-party optimizer; an error says what is missing."""
    if name.startswith("torch.adamw"):
        flag = name.partition(":")[2] or "fused"
        if name in KNOWN:
            return ThirdParty(name, "torch", _of("torch", "torch.optim", "AdamW", **{flag: True}))
    elif name == "peft":
        return ThirdParty(name, "torch", _riemannian())
    elif name == "optax.adamw":
        return ThirdParty(name, "jax", _optax())
    elif name == "bitsandbytes":
        return ThirdParty(name, "torch", _of(name, "bitsandbytes.optim", "AdamW8bit"))
    elif name == "torchao":
        return ThirdParty(name, "torch", _of(name, "torchao.optim", "AdamW8bit"))
    elif ":" in name:
        return ThirdParty(name, "torch", _by_path(name))
    msg = f"--against must be one of {', '.join(KNOWN)} or module:Class, got {name!r}"
    raise ValueError(msg)


def _of(package: str, module: str, attribute: str, **options: Any) -> Callable[[Any], Any]:
    kind = _found(package, module, attribute)
    return lambda model: kind(model.parameters(), lr=LR, **options)


def _found(package: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise BackendError(_too_old(package, error)) from error
        msg = f"--against {package}: {error.name} is not installed: pip install {error.name}"
        raise BackendError(msg) from error
    except Exception as error:  # a broken installation may raise anything
        raise BackendError(_too_old(package, error)) from error


def _too_old(package: str, error: Exception) -> str:
    return f"--against {package} needs a newer {package} (pip install -U {package}): {error}"


def _riemannian() -> Callable[[Any], Any]:
    create = _found("peft", "peft.optimizers", "create_riemannian_optimizer")
    AdamW = importlib.import_module("torch.optim").AdamW
    return lambda model: create(model, AdamW, lr=LR, fused=True)


def _optax() -> Callable[[Any], Any]:
    adamw = _found("optax", "optax", "adamw")
    return lambda _: adamw(LR, weight_decay=0.01)


def _by_path(path: str) -> Callable[[Any], Any]:
    """Find a class, and see on one small tensor that it can be made as all are."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # a console script does not look where it is called
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:
        msg = f"--against {path} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    torch = importlib.import_module("torch")
    try:
        step = kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=LR).step
    except Exception as error:
        msg = f"--against {path} cannot be called as {name}(params, lr={LR}): {error}"
        raise ValueError(msg) from error
    if not callable(step):
        msg = f"--against {path} has no step to call"
        raise ValueError(msg)
    return lambda model: kind(model.parameters(), lr=LR)
