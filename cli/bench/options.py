"""Options of a run: every wrong name or number is refused here, before anything is timed."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import rlora.backends
from rlora import BackendError

from . import memory
from .adapters import locate, read_adapter
from .cases import BASELINES, ArraySpec, Case, Key, baseline_of, functional_cases, method_names
from .presets import DEFAULT, named
from .problem import Problem, random_problem, with_gradients
from .third_party import ThirdParty, find_third_party
from .timing import Rounds
from .torch_cases import SharedTensors, optax_case, torch_cases, torch_class

DTYPES: Final = ("float32", "float64", "float16", "bfloat16")
RANKS: Final = (4, 16, 64)
QUICK_RANKS: Final = (4, 16)
WIDE: Final = 2 * 4
"""Bytes of two numbers in float32: a factor's and its gradient's, or two moments."""

END_TO_END_RANKS: Final = (32,)
ROUNDS: Final = Rounds(least=7, most=100, seconds=12.0)
QUICK_ROUNDS: Final = Rounds(least=3, most=3)


class Options(NamedTuple):
    """Options of a run: what is timed, on what, and how often."""

    specs: list[ArraySpec]
    methods: dict[str, list[str]]
    """Methods of each backend."""

    others: list[ThirdParty]
    other_specs: dict[str, ArraySpec]
    """Arrays of each library that a third-party optimizer works on."""

    ranks: list[int] | None
    preset: str | None
    adapter: Path | None
    rounds: Rounds
    seed: int
    threads: int | None
    end_to_end: bool

    @property
    def dtype(self) -> str:
        """Dtype of factors and gradients, in all backends."""
        return self.specs[0].dtype

    def source(self) -> dict[str, str | None]:
        """Give the source of the shapes; of a file its name, as the folder may tell whose it is."""
        return {"preset": self.preset, "adapter": self.adapter.name if self.adapter else None}

    def as_data(self) -> dict[str, Any]:
        """Give the options that decide what is measured, for the record."""
        return {
            "backends": [spec.name for spec in self.specs],
            "methods": sorted({name for names in self.methods.values() for name in names}),
            "ranks": self.ranks,
            **self.source(),
            "dtype": self.dtype,
            "device": self.specs[0].device,
            "against": [other.name for other in self.others],
            "rounds": self.rounds._asdict(),
            "seed": self.seed,
            "threads": self.threads,
            "suite": None,
        }

    def problems(self) -> Iterator[Problem]:
        """One for each rank, or the adapter's."""
        if self.adapter is not None:
            yield with_gradients(read_adapter(self.adapter), self.seed)
        for rank in self.ranks or ():
            yield random_problem(named(self.preset or DEFAULT).pairs(), rank, self.seed)

    def cases(self, problem: Problem) -> list[Case]:
        """List baselines and methods of each backend, then third-party optimizers."""
        cases: list[Case] = []
        specs = {spec.name: spec for spec in self.specs}
        torch_spec = specs.get("torch") or self.other_specs.get("torch")
        shared = SharedTensors(problem, torch_spec) if torch_spec else None
        for name, spec in specs.items():
            plains = self._plains(name)
            names = [*plains, *(x for x in self.methods[name] if x not in plains)]
            if name == "torch" and shared:
                cases += torch_cases(shared, names, [], self._baseline(name))
            else:
                cases += functional_cases(problem, spec, names)
        for other in self.others:
            baseline = self._baseline(other.framework)
            if other.framework == "torch" and shared:
                cases += torch_cases(shared, [], [other], baseline)
            else:
                spec = self.other_specs[other.framework]
                cases.append(optax_case(problem, spec, other, baseline))
        return cases

    def least_bytes(self) -> int:
        """Estimate the main memory of a run from shapes alone; 0 for an adapter, which is a file.

        Random factors and gradients in float32; in each backend a copy of them, and of every
        case, as all are alive at once, its parameters and two moments; one step's arrays.
        """
        if not self.ranks:
            return 0
        preset, item = named(self.preset or DEFAULT), int(self.dtype[-2:]) // 8
        numbers = preset.layers * max(self.ranks) * sum(m + n for m, n in preset.shapes)
        specs = self.everywhere()
        here = [name for name in specs if _in_main_memory(specs[name])]
        cases = sum(
            len({*self._plains(name), *self.methods[name]}) for name in self.methods if name in here
        ) + sum(other.framework in here for other in self.others)
        each = WIDE + item * len(here) + (item + WIDE) * cases
        return numbers * (each + WIDE)

    def everywhere(self) -> dict[str, ArraySpec]:
        """Every spec that somebody is in, by backend."""
        return {**self.other_specs, **{spec.name: spec for spec in self.specs}}

    def _plains(self, backend: str) -> list[str]:
        plains = {baseline_of(name) for name in self.methods[backend]}
        if any(self._baseline(other.framework)[0] == backend for other in self.others):
            plains.add("adamw")
        return sorted(plains, reverse=True)

    def _baseline(self, library: str) -> Key:
        """Give AdamW of the third party's library if that takes part, else of the first backend."""
        backends = [spec.name for spec in self.specs]
        return library if library in backends else backends[0], "adamw"


def make_options(
    *,
    backend: Sequence[str],
    methods: Sequence[str],
    ranks: Sequence[str],
    preset: str | None,
    adapter: Path | None,
    dtype: str,
    device: str | None,
    against: Sequence[str],
    repeat: int | None,
    seconds: float | None,
    quick: bool,
    seed: int,
    threads: int | None,
    end_to_end: bool,
) -> Options:
    """Check the options of a command line; an error says which is wrong and what it may be."""
    seed = at_least("--seed", seed, 0)
    wanted = among("--method", listed("--method", methods), (*BASELINES, *method_names()))
    among("--dtype", [dtype], DTYPES)
    numbers = [at_least("--rank", word, 1) for word in listed("--rank", ranks)]
    rounds = rounds_for(repeat, seconds, quick=quick)
    if adapter is None:
        preset = preset or DEFAULT
        usual = END_TO_END_RANKS if end_to_end else QUICK_RANKS if quick else RANKS
        numbers = check_ranks(numbers or list(usual), preset)
    else:
        adapter = check_adapter(adapter, preset, numbers)
    names = listed("--backend", backend) or ["numpy"]
    specs = [make_spec(name, dtype, device) for name in names]
    if end_to_end and "torch" not in [spec.name for spec in specs]:
        msg = "--end-to-end measures torch: add --backend torch"
        raise ValueError(msg)
    others = [find_third_party(name) for name in listed("--against", against)]
    return Options(
        specs=specs,
        methods={spec.name: methods_for(spec.name, wanted) for spec in specs},
        others=others,
        other_specs={other.framework: spec_of_other(specs, other.framework) for other in others},
        ranks=numbers or None,
        preset=preset,
        adapter=adapter,
        rounds=rounds,
        seed=seed,
        threads=threads,
        end_to_end=end_to_end,
    )


def _in_main_memory(spec: ArraySpec) -> bool:
    return spec.name != "cupy" and (spec.device or "cpu").startswith("cpu")


def rounds_for(repeat: int | None, seconds: float | None, *, quick: bool) -> Rounds:
    """So many samples of each, or as many as precision asks and time allows."""
    if seconds is not None and not 0 < seconds < float("inf"):
        msg = f"--seconds must be a positive number, got {seconds}"
        raise ValueError(msg)
    if repeat is not None:
        return Rounds(least=at_least("--repeat", repeat, 1), most=repeat, seconds=seconds)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return rounds if seconds is None else rounds._replace(seconds=seconds)


def listed(option: str, words: Sequence[str]) -> list[str]:
    """Split an option that may be repeated, or hold several with commas between."""
    parts = [part.strip() for word in words for part in word.split(",")]
    if words and not any(parts):
        msg = f"{option} was given without a value; name one or leave it out"
        raise ValueError(msg)
    return list(dict.fromkeys(part for part in parts if part))


def among(option: str, words: Sequence[str], choices: Iterable[str]) -> list[str]:
    """Check that all words are choices."""
    choices = list(choices)
    for word in words:
        if word not in choices:
            msg = f"{option} must be one of {', '.join(choices)}, got {word!r}"
            raise ValueError(msg)
    return list(words)


def at_least(option: str, value: str | int, least: int) -> int:
    """Check that it is a whole number and not too small."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        msg = f"{option} must be a whole number of at least {least}, got {str(value)[:40]!r}"
        raise ValueError(msg)
    return number


def check_ranks(ranks: list[int], preset: str) -> list[int]:
    """Check that no rank is above the narrowest weight of a preset."""
    narrowest = min(min(shape) for shape in named(preset).shapes)
    if max(ranks) > narrowest:
        msg = f"--rank must be at most {narrowest}, the narrowest of {preset}, got {max(ranks)}"
        raise ValueError(msg)
    return ranks


def check_adapter(path: Path, preset: str | None, ranks: list[int]) -> Path:
    """Find an adapter's file, and read it once to see that it can be."""
    if preset or ranks:
        msg = "--adapter brings its own shapes and ranks; leave out --preset and --rank"
        raise ValueError(msg)
    path = locate(path)
    read_adapter(path)
    return path


def make_spec(name: str, dtype: str, device: str | None) -> ArraySpec:
    """Find the backend, and see that it makes arrays of the dtype on the device."""
    memory.hush_profiler()
    backend = rlora.backends.get(name)
    if not hasattr(backend.xp, dtype) or (dtype == "float64" and not backend.has_float64()):
        hint = "; set JAX_ENABLE_X64=1 for it" if (name, dtype) == ("jax", "float64") else ""
        msg = f"--dtype {dtype} is not to be had from the {name} backend{hint}"
        raise ValueError(msg)
    spec = ArraySpec(backend, dtype, device)
    try:
        spec.array(np.ones((1, 1), np.float32))
    except Exception as error:  # every library refuses a device in its own way
        place = f" on device {device!r}" if device else ""
        msg = f"the {name} backend cannot make a {dtype} array{place}: {error}"
        raise BackendError(msg) from error
    return spec


def spec_of_other(specs: list[ArraySpec], library: str) -> ArraySpec:
    """Third party's library on the same device, or as near to it as its name tells."""
    for spec in specs:
        if spec.name == library:
            return spec
    device = None if library == "jax" else "cpu"
    if library == "torch" and specs[0].name == "cupy":
        device = specs[0].device or "cuda"
    return make_spec(library, specs[0].dtype, device)


def methods_for(backend: str, wanted: list[str]) -> list[str]:
    """Choose the methods asked for, else all; of torch those with an optimizer class."""
    have = method_names()
    if backend == "torch":
        have = [name for name in have if torch_class(name.partition(":")[0]) is not None]
    for name in wanted:
        if name not in (*BASELINES, *have):
            msg = f"--method {name} has no optimizer in rlora.torch; it has {', '.join(have)}"
            raise ValueError(msg)
    return wanted or [name for name in have if ":" not in name]
