"""Models, and the modules that load them."""

import importlib
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

LARGE: Final = {"gpt2": ".gpt2", "mistral": ".mistral", "diffusion": ".diffusion"}
"""Those that want a GPU, and weights and data from elsewhere; they have `PRESETS` too."""

STACKED: Final = {"strings": ".stacks"}
"""Those whose runs are trained many at once: they have a `run` and `METHODS` of their own."""

ON_A_CPU: Final = ("digits",)
"""Those that know no other device."""

MODELS: Final = {"digits": ".digits", "smollm2": ".smollm2", **STACKED, **LARGE}
"""Model -> the module with its `load` and its `DATASETS`; imported when it is asked for."""


class Origin(NamedTuple):
    """Origin of a large model and its data, from the hub unless it is said; device of any."""

    weights: str | None = None
    data: Path | None = None
    device: str = "cpu"


def module_of(model: str) -> Any:
    """Import the module of a model; all that a small one reads is installed."""
    if model not in LARGE:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return importlib.import_module(MODELS[model], __package__)


def datasets_of(model: str) -> tuple[str, ...]:
    """List the datasets of a model; ValueError if there is no such model."""
    if model not in MODELS:
        msg = f"there is no model {model!r}; there are {', '.join(MODELS)}"
        raise ValueError(msg)
    return tuple(module_of(model).DATASETS)


def check_dataset(model: str, dataset: str) -> None:
    """ValueError unless there is such a model, and it has the dataset."""
    known = datasets_of(model)
    if dataset not in known:
        msg = f"{model} has no dataset {dataset!r}; it has {', '.join(known)}"
        raise ValueError(msg)


def check_device(model: str, device: str) -> None:
    """ValueError unless the model runs there, and torch can make a tensor."""
    import torch  # not for `rlora --help`

    if model in ON_A_CPU and device != "cpu":
        msg = f"{model} runs on a CPU alone, got device {device!r}: leave --device out"
        raise ValueError(msg)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it is built for CUDA
        reason = str(error).partition("\n")[0]
        msg = f"torch has no device {device!r} here ({reason}); give another with --device"
        raise ValueError(msg) from None


def load_workload(model: str, dataset: str, kept: Path, quick: bool, origin: Origin) -> Any:
    """Load a `Workload`, or a stacked one; `kept` is a folder for what takes long to compute."""
    if model in LARGE:
        return module_of(model).load(dataset, quick=quick, **origin._asdict())
    device = {} if model in ON_A_CPU else {"device": origin.device}
    file = kept / f"{model}-{dataset}{'-quick' if quick else ''}.pt"
    return module_of(model).load(dataset, kept=file, quick=quick, **device)
