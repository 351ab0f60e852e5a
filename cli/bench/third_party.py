"""Other people's optimizers: what `--against` takes, found before anything is timed."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rlora import BackendError
from rlora.core.errors import not_installed

from .cases import LR

KNOWN: Final = {
    "torch.adamw": "torch's AdamW, fused",
    "torch.adamw:foreach": "torch's AdamW, foreach",
    "torch.adamw:fused": "torch's AdamW, fused",
    "peft": "PEFT's Riemannian wrapper over fused AdamW",
    "optax.adamw": "optax's AdamW, jitted",
    "bitsandbytes": "its 8-bit AdamW, where it is installed",
    "torchao": "its 8-bit AdamW, where it is installed",
    "module:Class": "any torch optimizer, called as Class(params, lr=...)",
}
"""Names that `--against` takes, and what they stand for."""


class ThirdParty(NamedTuple):
    """An optimizer that is not ours."""

    name: str
    framework: str
    """Library of the arrays it works on: "torch" or "jax"."""

    make: Callable[[Any], Any]
    """Make the optimizer of a torch module; optax's transformation ignores its argument."""


def find_third_party(name: str) -> ThirdParty:
    """Import the packages of a third-party optimizer; an error says what is missing."""
    package, _, rest = name.partition(":")
    if package == "torch.adamw" and name in KNOWN:
        flag = {rest or "fused": True}
        adamw = _found("torch", "torch.optim", "AdamW")
        return ThirdParty(name, "torch", lambda model: adamw(model.parameters(), lr=LR, **flag))
    if name == "peft":
        create = _found("peft", "peft.optimizers", "create_riemannian_optimizer")
        adamw = _found("torch", "torch.optim", "AdamW")
        return ThirdParty(name, "torch", lambda model: create(model, adamw, lr=LR, fused=True))
    if name == "optax.adamw":
        adamw = _found("optax", "optax", "adamw")
        return ThirdParty(name, "jax", lambda _: adamw(LR, weight_decay=0.01))
    if name in ("bitsandbytes", "torchao"):
        adamw = _found(name, f"{name}.optim", "AdamW8bit")
        return ThirdParty(name, "torch", lambda model: adamw(model.parameters(), lr=LR))
    if ":" in name and package != "torch.adamw":
        return ThirdParty(name, "torch", _by_path(name))
    msg = f"--against must be one of {', '.join(KNOWN)}, got {name!r}"
    raise ValueError(msg)


def _found(package: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise not_installed(error.name, extra="torch") from error
        if error.name != module.partition(".")[0]:
            raise BackendError(_too_old(package, error)) from error
        msg = f"--against {package}: {error.name} is not installed: pip install {error.name}"
        raise BackendError(msg) from error
    except Exception as error:  # a broken installation may raise anything
        raise BackendError(_too_old(package, error)) from error


def _too_old(package: str, error: Exception) -> str:
    return f"--against {package} needs a newer {package} (pip install -U {package}): {error}"


def _by_path(path: str) -> Callable[[Any], Any]:
    """Find a class, and see on one small tensor that it can be made as all are."""
    parameter, ones = _found("torch", "torch.nn", "Parameter"), _found("torch", "torch", "ones")
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # a console script does not look where it is called
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:
        msg = f"--against {path} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    try:
        p = parameter(ones(2, 2))
        p.grad = ones(2, 2)
        optimizer = kind([p], lr=LR)
    except Exception as error:
        msg = f"--against {path} cannot be called as {name}(params, lr={LR}): {error}"
        raise ValueError(msg) from error
    if not callable(getattr(optimizer, "step", None)):
        msg = f"--against {path} has no step to call"
        raise ValueError(msg)
    try:
        optimizer.step()
    except Exception as error:
        msg = f"--against {path} cannot be stepped as step(): {error}"
        raise ValueError(msg) from error
    return lambda model: kind(model.parameters(), lr=LR)
