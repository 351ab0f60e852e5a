"""``--suite speed``: the targets of this project as a table of PASS and FAIL."""

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any, Final

import rlora.methods

from .cases import Key
from .options import RANKS, Options, make_options
from .presets import DEFAULT, is_shape
from .scaling import NAME as SCALING, scaling_options
from .schema import Row
from .targets import (
    TORCH_ADAMW,
    Check,
    Limits,
    Predicted,
    Ratio,
    State,
    Target,
    Temporaries,
    make_check,
)

SPEED: Final = "speed"
PRESETS_OF: Final = {SPEED: ("gpt2-medium", "smollm2-135m", "llama-7b", "llama-7b-quarter")}
"""By the name of the suite."""

PUBLISHED: Final = "scaled_adamw:before"
"""The placement of the paper and of PEFT's wrapper; every library is timed with it."""

SCALED_ADAMW: Final = ["scaled_adamw", PUBLISHED, "scaled_adamw:after"]
METHODS: Final = {
    "torch": [*SCALED_ADAMW, "lora_rite", "lora_pro_adamw"],
    "numpy": [PUBLISHED],
    "jax": [PUBLISHED],
}
OTHERS: Final = [name for name in rlora.methods.__all__ if name not in METHODS["torch"]]
"""Held against what their flops and bytes predict, at one preset, as they are many."""

WATCHED: Final = [*METHODS["torch"], *OTHERS]
"""Methods whose operations on a device are counted."""

JAX_RANK: Final = 16
DEFAULT_STEP: Final = ("torch", "scaled_adamw")
SCALED: Final = ("torch", PUBLISHED)
RITE, PRO = ("torch", "lora_rite"), ("torch", "lora_pro_adamw")


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
TARGETS: Final[tuple[Target, ...]] = (
    Ratio(DEFAULT_STEP, TORCH_ADAMW, by_preset((3.1, 3.3, 5.2), (2.1, 3.4, 5.6), (3.5, 3.2, 5.0))),
    Ratio(
        SCALED,
        TORCH_ADAMW,
        by_preset((2.3, 2.7, 3.8), (1.9, 3.0, 4.6), (2.8, 2.4, 3.6)),
        goal=by_rank(1.6, 2.0, 3.5),
    ),
    Ratio(("torch", "scaled_adamw:after"), SCALED, anywhere(1.4)),
    *(ratio for ratio, _ in PEFT),
    Ratio(RITE, TORCH_ADAMW, LARGER),
    Ratio(PRO, TORCH_ADAMW, LARGER, goal=by_rank(3.0, 4.0, 8.0)),
    Ratio(("numpy", PUBLISHED), SCALED, anywhere(2.5)),
    Ratio(("jax", PUBLISHED), ("jax", "optax.adamw"), {None: {JAX_RANK: 3.0}}),
    *map(Predicted, OTHERS),
    *map(Temporaries, (PUBLISHED, "lora_rite", "lora_pro_adamw")),
    *map(State, rlora.methods.__all__),
)


def suite_options(
    name: str, preset: str | None, ranks: Sequence[str], **given: Any
) -> list[Options]:
    """Make the options for each preset and rank, as JAX takes part at one rank only."""
    if name == SCALING:
        return scaling_options(preset, ranks, **given)
    if name not in PRESETS_OF:
        msg = f"--suite must be one of {', '.join((*PRESETS_OF, SCALING))}, got {name!r}"
        raise ValueError(msg)
    have = [x for x in ("torch", "numpy", "jax") if importlib.util.find_spec(x)]
    if "torch" not in have:
        msg = f"--suite {name} is about torch: pip install torch"
        raise ValueError(msg)
    others = [x for x in ("peft", "optax") if importlib.util.find_spec(x)]
    against = {"torch": ["peft"] * ("peft" in others), "jax": ["optax.adamw"] * ("optax" in others)}
    wanted = PRESETS_OF[name] if preset is None else (preset,)

    def options(preset: str, rank: str) -> Options:
        backends = [x for x in have if x != "jax" or rank == str(JAX_RANK)]
        others = [other for x in backends for other in against.get(x, ())]
        made = make_options(
            backend=backends, methods=[], ranks=[rank], preset=preset, against=others, **given
        )
        methods, rounds = {x: METHODS[x] for x in backends}, made.rounds
        if len(wanted) == 1 or preset == DEFAULT:
            methods["torch"] = METHODS["torch"] + OTHERS
            if rounds.seconds is not None and given["seconds"] is None:
                rounds = rounds._replace(seconds=2 * rounds.seconds)
        return made._replace(methods=methods, rounds=rounds)

    return [options(preset, rank) for preset in wanted for rank in ranks or map(str, RANKS)]


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
        against_peft = [check for check in made if check["what"] == ratio.words]
        if against_peft:
            mean = statistics.geometric_mean([check["measured"] for check in against_peft])
            stable = all(check["stable"] for check in against_peft)
            check = make_check(ratio.words, "geometric mean", None, ratio.sense, limit, mean)
            made.append(check | {"stable": stable})
    return made
