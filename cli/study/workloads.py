"""Workloads of the models, their methods, and checks of names before the first run."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .methods import METHODS
from .models import MODELS, module_of
from .preset import ExperimentPreset


class Place(NamedTuple):
    """Origin of the workloads of a study, one for each dataset."""

    model: str
    kept: Path
    """Folder for what takes long to compute."""

    quick: bool = False
    device: str = "cpu"
    weights: str | None = None
    """Weights of a large model, and its data: from the hub, unless it is said."""

    data: Path | None = None

    def load(self, dataset: str) -> Any:
        """Load a `Workload`, or a stacked one."""
        load, model = module_of(self.model).load, MODELS[self.model]
        if model.large:
            origin = {"weights": self.weights, "data": self.data, "device": self.device}
            return load(dataset, quick=self.quick, **origin)
        file = self.kept / f"{self.model}-{dataset}{'-quick' if self.quick else ''}.pt"
        device = {} if model.only_cpu else {"device": self.device}
        return load(dataset, kept=file, quick=self.quick, **device)

    def origin(self) -> dict[str, Any]:
        """Everything but its `Job` that decides about a run, for its record; None is the usual."""
        weights = self.weights
        if weights and Path(weights).is_dir():
            weights = _folder(Path(weights))
        data = None if self.data is None else _folder(self.data)
        return {"weights": weights, "data": data, "quick": self.quick or None}

    def check(self) -> None:
        """ValueError unless the options fit the model, and torch can make a tensor there."""
        if not MODELS[self.model].large:
            for option, given in (("--weights", self.weights), ("--data", self.data)):
                if given is not None:
                    msg = f"{self.model} has weights and data of its own; leave {option} out"
                    raise ValueError(msg)
        if MODELS[self.model].only_cpu and self.device != "cpu":
            msg = (
                f"{self.model} runs on a CPU alone, got device {self.device!r}: leave --device out"
            )
            raise ValueError(msg)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it is built for CUDA
            reason = str(error).partition("\n")[0]
            msg = f"torch has no device {self.device!r} here ({reason}); give another with --device"
            raise ValueError(msg) from None


def _folder(path: Path) -> str:
    """Name of a folder, and enough of a hash of its place to tell it from others of the name."""
    place = path.resolve()
    return f"{place.name} ({sha256(str(place).encode()).hexdigest()[:8]})"


def preset_of(model: str, dataset: str) -> ExperimentPreset | None:
    """Return the published settings of a large model; None for the others."""
    preset: ExperimentPreset | None = None
    if MODELS[model].large:
        preset = module_of(model).PRESETS[dataset]
    return preset


def methods_of(model: str, dataset: str) -> Mapping[str, Any]:
    """Those of the study, and for a large model the paper's own; a stacked one has others."""
    if MODELS[model].stacked:
        own: Mapping[str, Any] = module_of(model).METHODS
        return own
    preset = preset_of(model, dataset)
    return {**METHODS, **(preset.methods() if preset else {})}


def check_names(model: str, datasets: Sequence[str], methods: Sequence[str]) -> None:
    """ValueError unless the model has all of them: before the first run, not after hours."""
    check("dataset", model, datasets, module_of(model).DATASETS)
    for dataset in datasets:
        check("method", model, methods, methods_of(model, dataset))


def check(kind: str, model: str, names: Sequence[str], known: Iterable[str]) -> None:
    """ValueError unless all names are known."""
    if unknown := [name for name in names if name not in known]:
        msg = f"{model} has no {kind} {unknown[0]!r}; it has {', '.join(known)}"
        raise ValueError(msg)
