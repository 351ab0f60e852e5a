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
from .targets import TORCH_ADAMW, Check, Predicted, Ratio, State, Target, Temporaries, make_check

SPEED: Final = "speed"
PRESETS_OF: Final = {SPEED: ("gpt2-medium", "smollm2-135m", "llama-7b", "llama-7b-quarter")}
"""By the name of the suite."""

PUBLISHED: Final = "scaled_adamw:before"
"""The placement for which the targets were set; what the default costs is held against it."""

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
SCALED: Final = ("torch", PUBLISHED)
PEFT: Final = Ratio(("torch", "peft"), SCALED, dict.fromkeys(RANKS, 2.5), "at least")
TARGETS: Final[tuple[Target, ...]] = (
    Ratio(SCALED, TORCH_ADAMW, {4: 1.6, 16: 2.0, 64: 3.5}),
    PEFT,
    Ratio(("torch", "scaled_adamw:after"), SCALED, dict.fromkeys(RANKS, 1.4)),
    Ratio(("torch", "scaled_adamw"), SCALED, dict.fromkeys(RANKS, 1.4)),
    Ratio(("torch", "lora_rite"), TORCH_ADAMW, {4: 5.0, 16: 6.0, 64: 12.0}),
    Ratio(("torch", "lora_pro_adamw"), TORCH_ADAMW, {4: 3.0, 16: 4.0, 64: 8.0}),
    Ratio(("numpy", PUBLISHED), SCALED, dict.fromkeys(RANKS, 2.5)),
    Ratio(("jax", PUBLISHED), ("jax", "optax.adamw"), {JAX_RANK: 3.0}),
    *map(Predicted, OTHERS),
    *map(Temporaries, (PUBLISHED, "lora_rite", "lora_pro_adamw")),
    *map(State, rlora.methods.__all__),
)
GEOMETRIC_MEAN: Final = 4.0
"""At least so many times faster than PEFT, over all presets and ranks."""


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
    against_peft = [check for check in made if check["what"] == PEFT.words]
    if against_peft:
        mean = statistics.geometric_mean([check["measured"] for check in against_peft])
        where, stable = "geometric mean", all(check["stable"] for check in against_peft)
        check = make_check(PEFT.words, where, None, PEFT.sense, GEOMETRIC_MEAN, mean)
        made.append(check | {"stable": stable})
    return made
