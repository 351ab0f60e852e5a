"""Each method beside what theory says of it: which splits of the product it cannot tell apart."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import rlora
from rlora import Transform
from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.testing import GAUGES
from rlora.testing.invariance import invariances

ROUNDING: Final = 1e-10
"""Largest difference in float64 that counts as none: 50 steps, a basis with condition number 50."""
STEPS: Final = 50


class Theory(NamedTuple):
    """Theory of a method: the gauges that it cannot see, and how far others take it."""

    words: str
    exact: Sequence[str]
    least: float = 0.1
    most: float = float("inf")


EVERY = Theory("every change of basis", GAUGES)
RATIO = Theory("scalings, rotations", ("scalar", "signed permutation", "rotation"), 1e-2)
DAMPED = RATIO._replace(least=1e-5)  # by 1e-6 only
ROTATION = Theory("rotations", ("signed permutation", "rotation"), 1e-2)
SYLVESTER = ROTATION._replace(least=1e-3, most=1e-1)
TRIANGULAR = Theory("scalings, triangular changes", ("scalar",), 1e-5)
SCALINGS = TRIANGULAR._replace(words="scalings")
ENTRIES = Theory("signed permutations", ("signed permutation",))


class Row(NamedTuple):
    """A method with its options, the learning rate of the run, and what theory says."""

    label: str
    make: Callable[[], Transform]
    lr: float
    theory: Theory

    def measure(self, backend: Backend | None = None, steps: int = STEPS) -> list[float]:
        """The worst relative difference of the product, gauge by gauge."""
        return invariances(self.make(), lr=self.lr, steps=steps, backend=backend)

    def holds(self, gauge: str, figure: float) -> bool:
        """Return whether a figure is what theory says of the gauge."""
        if gauge in self.theory.exact:
            return figure <= ROUNDING
        return self.theory.least <= figure <= self.theory.most


def of(method: Callable[..., Transform], theory: Theory, lr: float = 0.05, **options: Any) -> Row:
    """The row of a method with these options."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Row(f"{method.__name__}({arguments})", lambda: method(**options), lr, theory)


COVARIANT: Final[dict[str, Any]] = {"damping": 1e-2, "damping_mode": "covariant"}

ROWS: Final = (
    Row("gradient descent", lambda: rlora.chain(add_decayed_weights(0.0)), 0.05, ROTATION),
    Row("AdamW", lambda: rlora.lora_plus(ratio=1.0), 0.05, ENTRIES),
    of(rlora.scaled_sgd, EVERY, damping=0.0),
    of(rlora.scaled_sgd, EVERY, damping=0.0, momentum=0.9, nesterov=True),
    of(rlora.scaled_sgd, EVERY, damping=0.0, order="gauss_seidel"),
    of(rlora.scaled_sgd, EVERY, **COVARIANT),
    of(rlora.scaled_sgd, EVERY, momentum=0.9, weight_decay=0.1, **COVARIANT),
    of(rlora.scaled_sgd, EVERY),
    of(rlora.scaled_sgd, DAMPED, damping=1e-6, damping_mode="relative"),
    of(rlora.scaled_sgd, RATIO, damping=1e-2, damping_mode="relative"),
    of(rlora.scaled_sgd, ROTATION, damping=1e-2, damping_mode="absolute"),
    of(rlora.scaled_adamw, TRIANGULAR),
    of(rlora.scaled_adamw, ENTRIES, placement="before", damping=0.0),
    of(rlora.scaled_adamw, ENTRIES, placement="after", damping=0.0),
    of(rlora.scaled_adamw, TRIANGULAR, placement="both", damping=0.0),
    of(rlora.scaled_prodigy, SCALINGS, lr=1.0),
    of(rlora.lora_rite, EVERY),
    of(rlora.lora_rite, EVERY, escape=True),
    of(rlora.lora_rite, EVERY, weight_decay=0.1),
    of(rlora.lora_rite, EVERY, balance=True),
    of(rlora.lora_rite, EVERY, max_norm=1.0, max_rms=2.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="zero", damping=0.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="balanced", damping=0.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="balanced", momentum=0.9, damping=0.0),
    of(rlora.lora_pro_sgd, SYLVESTER, gauge="sylvester", damping=0.0),
    of(rlora.lora_pro_adamw, ENTRIES, mode="efficient"),
    of(rlora.lora_pro_adamw, EVERY, mode="full", gauge="zero", damping=0.0),
    of(rlora.lora_pro_adamw, EVERY, mode="full", gauge="balanced", damping=0.0),
    of(rlora.lora_pro_adamw, SYLVESTER, mode="full", gauge="sylvester", damping=0.0),
    of(rlora.alt_lora, EVERY, lr=0.2, damping=0.0),
    of(rlora.alt_lora, DAMPED, lr=0.2),
    of(rlora.alt_lora_plus, ENTRIES, damping=0.0),
    of(rlora.loft, EVERY, damping=0.0),
    of(rlora.loft, DAMPED),
    of(rlora.ref_lora, EVERY),
    of(rlora.ref_lora, EVERY, lr=0.01, momentum=0.9),
    of(rlora.ref_lora, RATIO, form="scalar"),
    of(rlora.adapre_lora, EVERY, damping=0.0),
    of(rlora.adapre_lora, DAMPED),
    of(rlora.lora_muon, EVERY, lr=0.2),
    of(rlora.lora_muon, EVERY, lr=0.2, nesterov=True, weight_decay=0.1),
    of(rlora.riemannion, EVERY, lr=0.2),
    of(rlora.op_lora, EVERY),
    of(rlora.op_lora, EVERY, momentum=0.0, weight_decay=0.1),
    of(rlora.op_lora, DAMPED, damping=1e-6, damping_mode="relative"),
    of(rlora.lora_fa, ENTRIES),
    of(rlora.lora_plus, ENTRIES),
    Row(
        "lora_plus(scaled_sgd(damping=0.0), ratio=4.0)",
        lambda: rlora.lora_plus(rlora.scaled_sgd(damping=0.0), ratio=4.0),
        0.02,
        EVERY,
    ),
    of(rlora.graft_adamw, ENTRIES),
    of(rlora.factor_muon, ROTATION, lr=0.02),
    of(rlora.balanced_lora, ENTRIES),
    of(rlora.stable_lora, ENTRIES),
    of(rlora.trust_region, ENTRIES),
    of(rlora.rac_lora, EVERY, damping=0.0),
    of(rlora.rac_lora, ENTRIES, adam=True),
    of(rlora.lora_sb, ENTRIES),
)
