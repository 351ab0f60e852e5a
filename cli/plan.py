"""From options to a plan: every wrong name or number is refused here, before anything is timed."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import rlora.backends
import rlora.methods
from rlora import BackendError

from . import memory
from .adapters import locate, read_adapter
from .contenders import Arena, Entry, baseline_of, functional_entries
from .measure import Rounds
from .presets import DEFAULT, named
from .problem import Problem, random_problem, with_gradients
from .torch_contenders import EXTRAS, riemannian, torch_class, torch_entries

DTYPES: Final = ("float32", "float64", "float16", "bfloat16")
RANKS: Final = (4, 16, 64)
QUICK_RANKS: Final = (4, 16)
ROUNDS: Final = Rounds(least=7, most=50, seconds=5.0)
QUICK_ROUNDS: Final = Rounds(least=3, most=3)


class Plan(NamedTuple):
    """What is timed, on what, and how often."""

    arena: Arena
    extra_arena: Arena | None
    """Where the contenders of `--against` are, which are torch's."""

    methods: list[str]
    ranks: list[int] | None
    preset: str | None
    adapter: Path | None
    against: list[str]
    rounds: Rounds
    seed: int

    def source(self) -> dict[str, str | None]:
        """Where the shapes are from; of a file its name, as the folder may tell whose it is."""
        return {"preset": self.preset, "adapter": self.adapter.name if self.adapter else None}

    def as_data(self) -> dict[str, Any]:
        """Everything that decides what is measured, for the record."""
        return {
            "backend": self.arena.backend.name,
            "methods": self.methods,
            "ranks": self.ranks,
            **self.source(),
            "dtype": self.arena.dtype,
            "device": self.arena.device,
            "against": self.against,
            "rounds": self.rounds._asdict(),
            "seed": self.seed,
        }

    def problems(self) -> Iterator[Problem]:
        """One for each rank, or the adapter's."""
        if self.adapter is not None:
            yield with_gradients(read_adapter(self.adapter), self.seed)
        for rank in self.ranks or ():
            yield random_problem(named(self.preset or DEFAULT).pairs(), rank, self.seed)

    def entries(self, problem: Problem) -> list[Entry]:
        """Who takes part: plain methods first, then the methods, then other people's."""
        plains = {baseline_of(name) for name in self.methods}
        if self.against:
            plains.add("adamw")
        ordered = sorted(plains, reverse=True)
        if self.arena.backend.name == "torch":
            return torch_entries(problem, self.arena, ordered, self.methods, self.against)
        entries = functional_entries(problem, self.arena, ordered, self.methods)
        if self.extra_arena is not None:
            entries += torch_entries(problem, self.extra_arena, [], [], self.against)
        return entries


def make_plan(
    *,
    backend: str,
    methods: Sequence[str],
    ranks: Sequence[str],
    preset: str | None,
    adapter: Path | None,
    dtype: str,
    device: str | None,
    against: Sequence[str],
    repeat: int | None,
    quick: bool,
    seed: int,
) -> Plan:
    """Make the plan of the options; an error says which one is wrong and what it may be."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    if repeat is not None:
        rounds = Rounds(least=at_least("--repeat", repeat, 1), most=repeat)
    seed = at_least("--seed", seed, 0)
    wanted = among("--method", listed("--method", methods), rlora.methods.__all__)
    rivals = among("--against", listed("--against", against), EXTRAS)
    among("--dtype", [dtype], DTYPES)
    numbers = [at_least("--rank", word, 1) for word in listed("--rank", ranks)]
    if adapter is None:
        preset = preset or DEFAULT
        numbers = check_ranks(numbers or list(QUICK_RANKS if quick else RANKS), preset)
    else:
        adapter = check_adapter(adapter, preset, numbers)
    arena = make_arena(backend, dtype, device)
    return Plan(
        arena=arena,
        extra_arena=arena_of_rivals(arena, rivals),
        methods=methods_for(arena.backend.name, wanted),
        ranks=numbers or None,
        preset=preset,
        adapter=adapter,
        against=rivals,
        rounds=rounds,
        seed=seed,
    )


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


def make_arena(name: str, dtype: str, device: str | None) -> Arena:
    """Find the backend, and see that it makes arrays of the dtype on the device."""
    memory.hush_profiler()
    backend = rlora.backends.get(name)
    if not hasattr(backend.xp, dtype) or (dtype == "float64" and not backend.has_float64()):
        hint = "; set JAX_ENABLE_X64=1 for it" if (name, dtype) == ("jax", "float64") else ""
        msg = f"--dtype {dtype} is not to be had from the {name} backend{hint}"
        raise ValueError(msg)
    arena = Arena(backend, dtype, device)
    try:
        arena.array(np.ones((1, 1), np.float32))
    except Exception as error:  # every library refuses a device in its own way
        place = f" on device {device!r}" if device else ""
        msg = f"the {name} backend cannot make a {dtype} array{place}: {error}"
        raise BackendError(msg) from error
    return arena


def arena_of_rivals(arena: Arena, rivals: list[str]) -> Arena | None:
    """PyTorch on the same device, or as near to it as can be told from its name."""
    if not rivals:
        return None
    device = arena.device if arena.backend.name == "torch" else "cpu"
    if arena.backend.name == "cupy":
        device = arena.device or "cuda"
    torch_arena = make_arena("torch", arena.dtype, device)
    if "peft" in rivals:
        riemannian()  # one that is missing is refused now, not in the middle of the run
    return torch_arena


def methods_for(backend: str, wanted: list[str]) -> list[str]:
    """Choose the methods asked for, else all; of torch those with an optimizer class."""
    have = list(rlora.methods.__all__)
    if backend == "torch":
        have = [name for name in have if torch_class(name) is not None]
    for name in wanted:
        if name not in have:
            msg = f"--method {name} has no optimizer in rlora.torch; it has {', '.join(have)}"
            raise ValueError(msg)
    return wanted or have
