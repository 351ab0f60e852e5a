"""Suites of runs: ``speed``, held against targets, and ``scaling``, over widths and depths."""

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import rlora.methods

from .cases import Key
from .options import RANKS, Options, make_options
from .problem import DEFAULT, is_shape
from .schema import Row
from .targets import TORCH_ADAMW, Check, Limits, Ratio, State, Temporaries, make_check

SPEED: Final = "speed"
PRESETS: Final = ("gpt2-medium", "smollm2-135m", "llama-7b", "llama-7b-quarter")

PUBLISHED: Final = "scaled_adamw:before"
"""The placement of the paper and of PEFT's wrapper; every library is timed with it."""

METHODS: Final = {
    "torch": ["scaled_adamw", PUBLISHED, "scaled_adamw:after", "lora_rite", "lora_pro_adamw"],
    "numpy": [PUBLISHED],
    "jax": [PUBLISHED],
}
OTHERS: Final = [name for name in rlora.methods.__all__ if name not in METHODS["torch"]]
"""Held against what their flops and bytes predict, at one preset, as they are many."""

WATCHED: Final = [*METHODS["torch"], *OTHERS]
"""Methods whose operations on a device are counted."""

JAX_RANK: Final = 16


def by_rank(*limits: float) -> dict[int, float]:
    """Limits at the ranks of the suite."""
    return dict(zip(RANKS, limits, strict=True))


def by_preset(*limits: tuple[float, float, float]) -> Limits:
    """Limits at the shapes of SmolLM2, of Llama, and, first, of GPT-2 and all others."""
    others, smollm2, llama = (by_rank(*three) for three in limits)
    return {None: others, "smollm2-135m": smollm2, "llama-7b": llama, "llama-7b-quarter": llama}


def anywhere(limit: float) -> Limits:
    """One limit for every shape and rank."""
    return {None: dict.fromkeys(RANKS, limit)}


DEFAULT_STEP: Final = ("torch", "scaled_adamw")
SCALED: Final = ("torch", PUBLISHED)
PEFT: Final = (
    (Ratio(("torch", "peft"), DEFAULT_STEP, anywhere(1.3), "at least"), 2.0),
    (Ratio(("torch", "peft"), SCALED, anywhere(1.7), "at least"), 2.5),
)
"""So many times faster than PEFT everywhere, and in the geometric mean."""
LARGER: Final = by_preset((5.0, 6.0, 10.0), (4.0, 6.0, 13.0), (5.0, 5.5, 9.0))
"""Limits of methods with more products."""

# The limits of scaled AdamW over torch's are what a step of list-wise operations, written alone,
# took on two CPU cores, and a little more; the rest is what the project asks of itself. Measured
# figures are in docs/reference/speed.md.
TARGETS: Final[tuple[Ratio | Temporaries | State, ...]] = (
    Ratio(DEFAULT_STEP, TORCH_ADAMW, by_preset((3.1, 3.3, 5.2), (2.1, 3.4, 5.6), (3.5, 3.2, 5.0))),
    Ratio(
        SCALED,
        TORCH_ADAMW,
        by_preset((2.3, 2.7, 3.8), (1.9, 3.0, 4.6), (2.8, 2.4, 3.6)),
        goal=by_rank(1.6, 2.0, 3.5),
    ),
    Ratio(("torch", "scaled_adamw:after"), SCALED, anywhere(1.4)),
    *(ratio for ratio, _ in PEFT),
    Ratio(("torch", "lora_rite"), TORCH_ADAMW, LARGER),
    Ratio(("torch", "lora_pro_adamw"), TORCH_ADAMW, LARGER, goal=by_rank(3.0, 4.0, 8.0)),
    Ratio(("numpy", PUBLISHED), SCALED, anywhere(2.5)),
    Ratio(("jax", PUBLISHED), ("jax", "optax.adamw"), {None: {JAX_RANK: 3.0}}),
    *(Ratio(("torch", name), TORCH_ADAMW) for name in OTHERS),
    *map(Temporaries, (PUBLISHED, "lora_rite", "lora_pro_adamw")),
    *map(State, rlora.methods.__all__),
)


def judge(rows: Sequence[Row]) -> list[Check]:
    """Hold what was measured against every target; what was not measured is left out."""
    problems: dict[Any, dict[Key, Row]] = {}
    for row in rows:
        # A target is of a model: the shapes of `--suite scaling` have none.
        if not is_shape(row["preset"]):
            found = problems.setdefault((row["preset"], row["rank"]), {})
            found[row["backend"], row["method"]] = row
    checks = [target.check(found) for target in TARGETS for found in problems.values()]
    made = [check for check in checks if check]
    for ratio, limit in PEFT:
        mine = [check for check in made if check["what"] == ratio.words]
        if mine:
            mean = statistics.geometric_mean([check["measured"] for check in mine])
            check = make_check(ratio.words, "geometric mean", None, ratio.sense, limit, mean)
            made.append(check | {"stable": all(check["stable"] for check in mine)})
    return made


def speed(given: dict[str, Any]) -> list[Options]:
    """Make the options for each preset and rank, as JAX takes part at one rank only."""
    have = [x for x in ("torch", "numpy", "jax") if importlib.util.find_spec(x)]
    if "torch" not in have:
        msg = f"--suite {SPEED} is about torch: pip install torch"
        raise ValueError(msg)
    presets = [given["preset"]] if given["preset"] is not None else PRESETS
    against = {"torch": ("peft", "peft"), "jax": ("optax", "optax.adamw")}

    def options(preset: str, rank: int) -> Options:
        backends = [x for x in have if x != "jax" or rank == JAX_RANK]
        third = [against[x] for x in backends if x in against]
        mine = {
            "backend": backends,
            "ranks": [rank],
            "preset": preset,
            "against": [name for package, name in third if importlib.util.find_spec(package)],
        }
        made = make_options(**{**given, **mine})
        methods, rounds = {x: METHODS[x] for x in backends}, made.rounds
        if len(presets) == 1 or preset == DEFAULT:
            methods["torch"] = METHODS["torch"] + OTHERS
            if rounds.seconds is not None and given["seconds"] is None:
                rounds = rounds._replace(seconds=2 * rounds.seconds)
        return made._replace(methods=methods, rounds=rounds)

    return [options(preset, rank) for preset in presets for rank in given["ranks"] or RANKS]


SCALING_METHODS: Final = ["scaled_adamw", "lora_rite", "lora_pro_adamw"]
WIDTHS: Final = (256, 512, 1024, 2048, 4096)
LAYERS: Final = (1, 4, 16, 64)
SECONDS: Final = 8.0
"""For each problem: all of them in less than two minutes."""


def scaling(given: dict[str, Any]) -> list[Options]:
    """Make the options for each width at 8 layers and each number of layers at width 1024."""
    shapes = [f"{width}x{width}*8" for width in WIDTHS]
    shapes += [f"1024x1024*{layers}" for layers in LAYERS]
    mine = {
        "backend": ["torch" if importlib.util.find_spec("torch") else "numpy"],
        "methods": SCALING_METHODS,
        "ranks": given["ranks"] or [16],
    }
    if given["seconds"] is None and given["repeat"] is None:
        mine["seconds"] = SECONDS
    presets = [given["preset"]] if given["preset"] is not None else shapes
    return [make_options(**{**given, **mine, "preset": preset}) for preset in presets]


SUITES: Final[Mapping[str, Callable[[dict[str, Any]], list[Options]]]] = {
    SPEED: speed,
    "scaling": scaling,
}
"""By the name that `--suite` takes: what makes its runs from the other options."""
