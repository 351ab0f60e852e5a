"""Options of a run: every wrong name or number is refused here, before anything is timed."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import rlora.backends
from rlora import BackendError
from rlora.cli.console import printable

from . import memory
from .adapters import locate, read_adapter
from .cases import BASELINES, ArraySpec, Case, Key, baseline_of, functional_cases, method_names
from .problem import DEFAULT, BenchProblem, named, random_problem, with_gradients
from .third_party import ThirdParty, find_third_party
from .timing import Rounds
from .torch_cases import SharedTensors, TorchCase, optax_case, torch_class

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

    specs: dict[str, ArraySpec]
    """Arrays of each library that takes part, those of third-party optimizers too."""

    methods: dict[str, list[str]]
    """Methods of each backend."""

    others: list[ThirdParty]
    ranks: list[int] | None
    preset: str | None
    adapter: Path | None
    dtype: str
    device: str | None
    rounds: Rounds
    seed: int
    threads: int | None
    end_to_end: bool

    def source(self) -> dict[str, str | None]:
        """Give the source of the shapes; of a file its name, as the folder may tell whose it is."""
        name = printable(self.adapter.name) if self.adapter else None
        return {"preset": self.preset, "adapter": name}

    def as_data(self) -> dict[str, Any]:
        """Give the options that decide what is measured, for the record."""
        return {
            "backends": list(self.methods),
            "methods": sorted({name for names in self.methods.values() for name in names}),
            "ranks": self.ranks,
            **self.source(),
            "dtype": self.dtype,
            "device": self.device,
            "against": [other.name for other in self.others],
            "rounds": self.rounds._asdict(),
            "seed": self.seed,
            "threads": self.threads,
            "suite": None,
        }

    def problems(self) -> Iterator[BenchProblem]:
        """One for each rank, or the adapter's."""
        if self.adapter is not None:
            yield with_gradients(read_adapter(self.adapter), self.seed)
        for rank in self.ranks or ():
            yield random_problem(named(self.preset or DEFAULT).pairs(), rank, self.seed)

    def cases(self, problem: BenchProblem) -> Iterator[Case]:
        """Build baselines and methods of each backend, then others, one by one."""
        shared = SharedTensors(problem, self.specs["torch"]) if "torch" in self.specs else None

        def of_backend(backend: str) -> Iterator[Case]:
            if shared and backend == "torch":
                return (TorchCase.of_method(name, shared) for name in self.names(backend))
            return functional_cases(problem, self.specs[backend], self.names(backend))

        def of(other: ThirdParty) -> Case:
            if shared and other.framework == "torch":
                return TorchCase(other.name, self.baseline(other), other.make, shared)
            spec = self.specs[other.framework]
            return optax_case(problem, spec, other.make(None), self.baseline(other))

        return chain(*map(of_backend, self.methods), map(of, self.others))

    def names(self, backend: str) -> list[str]:
        """List the methods of a backend, its baselines first."""
        plain = {baseline_of(name) for name in self.methods[backend]}
        plain |= {name for home, name in map(self.baseline, self.others) if home == backend}
        methods = (name for name in self.methods[backend] if name not in plain)
        return [*sorted(plain, reverse=True), *methods]

    def baseline(self, other: ThirdParty) -> Key:
        """Give AdamW of the third party's library if that takes part, else of the first backend."""
        home = other.framework if other.framework in self.methods else next(iter(self.methods))
        return home, "adamw"

    def least_bytes(self) -> int:
        """Estimate the main memory of a run from shapes alone; 0 for an adapter, which is a file.

        Random factors and gradients in float32; in each backend the gradients, which its cases
        share; of every case, as all are alive at once, its parameters and two moments; one step's
        arrays.
        """
        if not self.ranks:
            return 0
        preset, item = named(self.preset or DEFAULT), int(self.dtype[-2:]) // 8
        numbers = preset.layers * max(self.ranks) * sum(m + n for m, n in preset.shapes)
        here = [name for name, spec in self.specs.items() if _in_main_memory(spec)]
        cases = sum(len(self.names(name)) for name in self.methods if name in here)
        cases += sum(other.framework in here for other in self.others)
        return numbers * (2 * WIDE + item * len(here) + (item + WIDE) * cases)


def make_options(
    *,
    backend: Sequence[str],
    methods: Sequence[str],
    ranks: Sequence[int],
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
    among("--method", methods, (*BASELINES, *method_names()))
    if adapter is None:
        preset = DEFAULT if preset is None else preset
        usual = END_TO_END_RANKS if end_to_end else QUICK_RANKS if quick else RANKS
        ranks = check_ranks(ranks or usual, preset)
    elif preset is not None or ranks:
        msg = "--adapter brings its own shapes and ranks; leave out --preset and --rank"
        raise ValueError(msg)
    else:
        adapter = locate(adapter)
        read_adapter(adapter)  # to see that it can be
    specs = {name: make_spec(name, dtype, device) for name in backend or ["numpy"]}
    if end_to_end and "torch" not in specs:
        msg = "--end-to-end measures torch: add --backend torch"
        raise ValueError(msg)
    others = [find_third_party(name) for name in against]
    chosen = {name: methods_for(name, methods) for name in specs}
    # JAX chooses for itself; torch goes where CuPy's arrays are.
    near = (device or "cuda") if next(iter(specs)) == "cupy" else "cpu"
    for framework in (other.framework for other in others):
        place = None if framework == "jax" else near
        specs[framework] = specs.get(framework) or make_spec(framework, dtype, place)
    return Options(
        specs=specs,
        methods=chosen,
        others=others,
        ranks=list(ranks) or None,
        preset=preset,
        adapter=adapter,
        dtype=dtype,
        device=device,
        rounds=rounds_for(repeat, seconds, quick=quick),
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
        return Rounds(least=repeat, most=repeat, seconds=seconds)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return rounds if seconds is None else rounds._replace(seconds=seconds)


def among(option: str, words: Sequence[str], choices: Iterable[str]) -> list[str]:
    """Check that all words are choices."""
    choices = list(choices)
    for word in words:
        if word not in choices:
            near = difflib.get_close_matches(word, choices, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            msg = f"{option} must be one of {', '.join(choices)}, got {word!r}{hint}"
            raise ValueError(msg)
    return list(words)


def check_ranks(ranks: Sequence[int], preset: str) -> Sequence[int]:
    """Check that no rank is above the narrowest weight of a preset."""
    narrowest = min(min(shape) for shape in named(preset).shapes)
    if max(ranks) > narrowest:
        msg = f"--rank must be at most {narrowest}, the narrowest of {preset}, got {max(ranks)}"
        raise ValueError(msg)
    return ranks


def make_spec(name: str, dtype: str, device: str | None) -> ArraySpec:
    """Find the backend, and see that it makes arrays of the dtype on the device."""
    memory.hush_profiler()
    backend = rlora.backends.get(name)
    if not hasattr(backend.xp, dtype) or (dtype == "float64" and not backend.has_float64()):
        x64 = (name, dtype) == ("jax", "float64")
        hint = "set JAX_ENABLE_X64=1 for it" if x64 else "take another --backend"
        msg = f"--dtype {dtype}: the {name} backend has none here; {hint}"
        raise ValueError(msg)
    spec = ArraySpec(backend, dtype, device)
    try:
        spec.array(np.ones((1, 1), np.float32))
    except Exception as error:  # every library refuses a device in its own way
        place = f" on device {device!r}" if device else ""
        why = str(error).partition("\n")[0].partition(". ")[0]  # torch goes on for pages
        msg = f"the {name} backend cannot make a {dtype} array{place}: {why}"
        raise BackendError(msg) from error
    return spec


def methods_for(backend: str, wanted: Sequence[str]) -> list[str]:
    """Choose the methods asked for, else all; of torch those with an optimizer class."""
    have = method_names()
    if backend == "torch":
        have = [name for name in have if torch_class(name.partition(":")[0]) is not None]
    for name in wanted:
        if name not in (*BASELINES, *have):
            msg = f"--method {name} has no optimizer in rlora.torch; it has {', '.join(have)}"
            raise ValueError(msg)
    return list(wanted) or [name for name in have if ":" not in name]
