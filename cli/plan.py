"""From options to a plan: every wrong name or number is refused here, before anything is timed."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import rlora.backends
from rlora import BackendError

from . import memory
from .adapters import locate, read_adapter
from .contenders import PLAIN, Arena, Entry, Key, baseline_of, functional_entries, method_names
from .measure import Rounds
from .presets import DEFAULT, named
from .problem import Problem, random_problem, with_gradients
from .rivals import Rival, find_rival
from .torch_contenders import TorchArena, optax_entry, torch_class, torch_entries

DTYPES: Final = ("float32", "float64", "float16", "bfloat16")
RANKS: Final = (4, 16, 64)
QUICK_RANKS: Final = (4, 16)
WIDE: Final = 2 * 4
"""Bytes of two numbers in float32: a factor's and its gradient's, or two moments."""

END_TO_END_RANKS: Final = (32,)
ROUNDS: Final = Rounds(least=7, most=100, seconds=12.0)
QUICK_ROUNDS: Final = Rounds(least=3, most=3)


class Plan(NamedTuple):
    """Plan of a run: what is timed, on what, and how often."""

    arenas: list[Arena]
    methods: dict[str, list[str]]
    """Methods of each backend."""

    rivals: list[Rival]
    rival_arenas: dict[str, Arena]
    """Place of each library's contenders."""

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
        return self.arenas[0].dtype

    def source(self) -> dict[str, str | None]:
        """Give the source of the shapes; of a file its name, as the folder may tell whose it is."""
        return {"preset": self.preset, "adapter": self.adapter.name if self.adapter else None}

    def as_data(self) -> dict[str, Any]:
        """Give the options that decide what is measured, for the record."""
        return {
            "backends": [arena.name for arena in self.arenas],
            "methods": sorted({name for names in self.methods.values() for name in names}),
            "ranks": self.ranks,
            **self.source(),
            "dtype": self.dtype,
            "device": self.arenas[0].device,
            "against": [rival.name for rival in self.rivals],
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

    def entries(self, problem: Problem) -> list[Entry]:
        """List contenders: of each backend plain methods, then the methods; then other people's."""
        entries: list[Entry] = []
        arenas = {arena.name: arena for arena in self.arenas}
        torch_arena = arenas.get("torch") or self.rival_arenas.get("torch")
        shared = TorchArena(problem, torch_arena) if torch_arena else None
        for name, arena in arenas.items():
            plains = self._plains(name)
            names = [*plains, *(x for x in self.methods[name] if x not in plains)]
            if name == "torch" and shared:
                entries += torch_entries(shared, names, [], self._yardstick(name))
            else:
                entries += functional_entries(problem, arena, names)
        for rival in self.rivals:
            yardstick = self._yardstick(rival.framework)
            if rival.framework == "torch" and shared:
                entries += torch_entries(shared, [], [rival], yardstick)
            else:
                arena = self.rival_arenas[rival.framework]
                entries.append(optax_entry(problem, arena, rival, yardstick))
        return entries

    def least_bytes(self) -> int:
        """Estimate the main memory of a run from shapes alone; 0 for an adapter, which is a file.

        Random factors and gradients in float32; in each backend a copy of them, and of every
        contender, as all are alive at once, its parameters and two moments; one step's arrays.
        """
        if not self.ranks:
            return 0
        preset, item = named(self.preset or DEFAULT), int(self.dtype[-2:]) // 8
        numbers = preset.layers * max(self.ranks) * sum(m + n for m, n in preset.shapes)
        arenas = self.everywhere()
        here = [name for name in arenas if _in_main_memory(arenas[name])]
        contenders = sum(
            len({*self._plains(name), *self.methods[name]}) for name in self.methods if name in here
        ) + sum(rival.framework in here for rival in self.rivals)
        each = WIDE + item * len(here) + (item + WIDE) * contenders
        return numbers * (each + WIDE)

    def everywhere(self) -> dict[str, Arena]:
        """Every arena that somebody is in, by backend."""
        return {**self.rival_arenas, **{arena.name: arena for arena in self.arenas}}

    def _plains(self, backend: str) -> list[str]:
        plains = {baseline_of(name) for name in self.methods[backend]}
        if any(self._yardstick(rival.framework)[0] == backend for rival in self.rivals):
            plains.add("adamw")
        return sorted(plains, reverse=True)

    def _yardstick(self, library: str) -> Key:
        """Give AdamW of a rival's own library if that takes part, else of the first backend."""
        backends = [arena.name for arena in self.arenas]
        return library if library in backends else backends[0], "adamw"


def make_plan(
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
) -> Plan:
    """Make the plan of the options; an error says which one is wrong and what it may be."""
    seed = at_least("--seed", seed, 0)
    wanted = among("--method", listed("--method", methods), (*PLAIN, *method_names()))
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
    arenas = [make_arena(name, dtype, device) for name in names]
    if end_to_end and "torch" not in [arena.name for arena in arenas]:
        msg = "--end-to-end measures torch: add --backend torch"
        raise ValueError(msg)
    rivals = [find_rival(name) for name in listed("--against", against)]
    return Plan(
        arenas=arenas,
        methods={arena.name: methods_for(arena.name, wanted) for arena in arenas},
        rivals=rivals,
        rival_arenas={rival.framework: arena_of_rival(arenas, rival.framework) for rival in rivals},
        ranks=numbers or None,
        preset=preset,
        adapter=adapter,
        rounds=rounds,
        seed=seed,
        threads=threads,
        end_to_end=end_to_end,
    )


def _in_main_memory(arena: Arena) -> bool:
    return arena.name != "cupy" and (arena.device or "cpu").startswith("cpu")


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


def arena_of_rival(arenas: list[Arena], library: str) -> Arena:
    """A rival's library on the same device, or as near to it as can be told from its name."""
    for arena in arenas:
        if arena.name == library:
            return arena
    device = None if library == "jax" else "cpu"
    if library == "torch" and arenas[0].name == "cupy":
        device = arenas[0].device or "cuda"
    return make_arena(library, arenas[0].dtype, device)


def methods_for(backend: str, wanted: list[str]) -> list[str]:
    """Choose the methods asked for, else all; of torch those with an optimizer class."""
    have = method_names()
    if backend == "torch":
        have = [name for name in have if torch_class(name.partition(":")[0]) is not None]
    for name in wanted:
        if name not in (*PLAIN, *have):
            msg = f"--method {name} has no optimizer in rlora.torch; it has {', '.join(have)}"
            raise ValueError(msg)
    return wanted or [name for name in have if ":" not in name]
