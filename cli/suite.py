"""``--suite speed``: the targets of this project as a table of PASS and FAIL."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from .contenders import Key
from .measure import Row
from .plan import RANKS, Plan, make_plan
from .presets import is_shape
from .scaling import NAME as SCALING, scaling_plans
from .stats import median_ratio

PRESETS_OF: Final = {"speed": ("gpt2-medium", "smollm2-135m", "llama-7b", "llama-7b-quarter")}
"""By the name of the suite."""

SCALED_ADAMW: Final = ["scaled_adamw", "scaled_adamw:after", "scaled_adamw:both"]
METHODS: Final = {
    "torch": [*SCALED_ADAMW, "lora_rite", "lora_pro_adamw"],
    "numpy": ["scaled_adamw"],
    "jax": ["scaled_adamw"],
}
JAX_RANK: Final = 16


class Target(NamedTuple):
    """A ratio of two contenders' steps, and the most or least that it should be."""

    over: Key
    under: Key
    limits: dict[int, float]
    """By rank."""

    sense: str = "at most"

    @property
    def words(self) -> str:
        """Name the ratio, as in ``torch lora_rite / torch adamw``."""
        return f"{' '.join(self.over)} / {' '.join(self.under)}"


SCALED: Final = ("torch", "scaled_adamw")
PLAIN: Final = ("torch", "adamw")
TARGETS: Final = (
    Target(SCALED, PLAIN, {4: 1.6, 16: 2.0, 64: 3.5}),
    Target(("torch", "peft"), SCALED, dict.fromkeys(RANKS, 2.5), "at least"),
    Target(("torch", "scaled_adamw:after"), SCALED, dict.fromkeys(RANKS, 1.4)),
    Target(("torch", "scaled_adamw:both"), SCALED, dict.fromkeys(RANKS, 1.4)),
    Target(("torch", "lora_rite"), PLAIN, {4: 5.0, 16: 6.0, 64: 12.0}),
    Target(("torch", "lora_pro_adamw"), PLAIN, {4: 3.0, 16: 4.0, 64: 8.0}),
    Target(("numpy", "scaled_adamw"), SCALED, dict.fromkeys(RANKS, 2.5)),
    Target(("jax", "scaled_adamw"), ("jax", "optax.adamw"), {JAX_RANK: 3.0}),
)
GEOMETRIC_MEAN: Final = 4.0
"""At least so many times faster than PEFT, over all presets and ranks."""

Check = dict[str, Any]
"""One line of the verdict; `schema.SCHEMA` has its keys."""


def suite_plans(name: str, preset: str | None, ranks: Sequence[str], **options: Any) -> list[Plan]:
    """Make a plan for each preset and rank, as JAX takes part at one rank only."""
    if name == SCALING:
        return scaling_plans(preset, ranks, **options)
    if name not in PRESETS_OF:
        msg = f"--suite must be one of {', '.join((*PRESETS_OF, SCALING))}, got {name!r}"
        raise ValueError(msg)
    have = [x for x in ("torch", "numpy", "jax") if importlib.util.find_spec(x)]
    if "torch" not in have:
        msg = f"--suite {name} is about torch: pip install torch"
        raise ValueError(msg)
    rivals = [x for x in ("peft", "optax") if importlib.util.find_spec(x)]
    against = {"torch": ["peft"] * ("peft" in rivals), "jax": ["optax.adamw"] * ("optax" in rivals)}
    wanted = PRESETS_OF[name] if preset is None else (preset,)

    def plan(preset: str, rank: str) -> Plan:
        backends = [x for x in have if x != "jax" or rank == str(JAX_RANK)]
        rivals = [rival for x in backends for rival in against.get(x, ())]
        made = make_plan(
            backend=backends, methods=[], ranks=[rank], preset=preset, against=rivals, **options
        )
        return made._replace(methods={x: METHODS[x] for x in backends})

    return [plan(preset, rank) for preset in wanted for rank in ranks or map(str, RANKS)]


def judge(rows: Sequence[Row]) -> list[Check]:
    """Hold what was measured against every target; what was not measured is left out."""
    found = {(row["backend"], row["method"], row["preset"], str(row["rank"])): row for row in rows}
    # A target is of a model: the shapes of `--suite scaling` have none.
    of_models = [row for row in rows if not is_shape(row["preset"])]
    problems = list(dict.fromkeys((row["preset"], row["rank"]) for row in of_models))
    checks = []
    for target in TARGETS:
        for preset, rank in problems:
            over, under = (
                found.get((*key, preset, str(rank))) for key in (target.over, target.under)
            )
            if over and under and rank in target.limits:
                ratio = median_ratio(over["samples_s"], under["samples_s"])
                checks.append(_check(target, preset, rank, target.limits[rank], ratio))
    against_peft = [c["measured"] for c in checks if c["sense"] == "at least"]
    if against_peft:
        mean = math.exp(sum(map(math.log, against_peft)) / len(against_peft))
        checks.append(_check(TARGETS[1], "geometric mean", None, GEOMETRIC_MEAN, mean))
    return checks


def _check(
    target: Target, preset: str, rank: int | None, limit: float, measured: float | None
) -> Check:
    value = measured or 0.0
    return {
        "what": target.words,
        "preset": preset,
        "rank": rank,
        "sense": target.sense,
        "limit": limit,
        "measured": value,
        "passed": value <= limit if target.sense == "at most" else value >= limit,
    }
