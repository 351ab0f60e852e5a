"""Change of the output by a step of each factor, as the layer grows wider.

Two layers: one with one output under gradient descent, a square one under Adam, by where the
preconditioner stands: before Adam in the published code, after it in the theorem.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.cli.chart import Panel
from rlora.core.factors import Array
from rlora.core.metric import Placement

from .claim import Check, Claim, Outcome, Setting, lines
from .papers import LORA_PLUS, PRECONDITIONED
from .problems import exponent

PARTS: Final = ("Step of A", "Step of B", "Output")
"""``|B δA X|``, ``|δB A X|`` in the last step, and ``|B A X|`` after it."""

STABLE: Final = 0.2
"""Largest exponent of the width that counts as none. A step of the wrong size shows as the width's
root or the width itself; drifts of a fit over few widths are a tenth."""


class Layer(NamedTuple):
    """``½ |B A X - Y|² / batch``, for several seeds at once: every array has a leading axis."""

    inputs: Array
    outputs: Array
    start: Factors

    def grads(self, pair: Factors) -> Factors:
        """The factors' gradients, by products no larger than a factor."""
        hidden = pair.A @ self.inputs
        error = (pair.B @ hidden - self.outputs) / self.inputs.shape[-1]
        return Factors(pair.B.mT @ error @ self.inputs.mT, error @ hidden.mT)

    def parts(self, old: Factors, new: Factors) -> list[Array]:
        """Changes of the output, in the order of `PARTS`."""
        return [
            old.B @ ((new.A - old.A) @ self.inputs),
            (new.B - old.B) @ (old.A @ self.inputs),
            new.B @ (new.A @ self.inputs),
        ]


class Learner(NamedTuple):
    """A method, and the learning rate that it gets at each width."""

    method: Callable[[int], Transform]
    lr: Callable[[int], float]


Growth = dict[str, list[list[float]]]
"""Learner -> for each part its sizes over the widths."""


def grow(
    setting: Setting,
    learners: Mapping[str, Learner],
    layer: Callable[[Setting, int], Layer],
    widths: Sequence[int],
    steps: int,
) -> Growth:
    """The sizes of the parts in the last of some steps, at each width."""
    found: Growth = {}
    for name in setting.track(list(learners), "methods"):
        sizes = [_sizes(setting, learners[name], layer(setting, n), n, steps) for n in widths]
        found[name] = [list(part) for part in zip(*sizes, strict=True)]
    return found


def _sizes(setting: Setting, learner: Learner, layer: Layer, width: int, steps: int) -> list[float]:
    path = setting.path(learner.method(width), layer.start, layer.grads, learner.lr(width))
    *_, old, new = islice(path, steps + 1)
    return [size(setting.backend.to_numpy(part)) for part in layer.parts(old, new)]


def size(x: Any) -> float:
    """The root mean square of a seed, then the geometric mean over seeds: no seed outweighs."""
    each = np.mean(x**2, axis=(1, 2))
    return float(np.exp(np.mean(np.log(each)) / 2))


def most(widths: Sequence[int], parts: Sequence[Sequence[float]]) -> float:
    """The exponent farthest from zero among the parts, without its sign."""
    return max(abs(exponent(widths, sizes)) for sizes in parts)


def panels(widths: Sequence[int], found: Growth, when: str) -> tuple[Panel, ...]:
    """A panel for each part, with a line for each learner."""
    parts = [{name: found[name][i] for name in found} for i in range(len(PARTS))]
    return tuple(
        lines(f"{part}, {when}", ("width", widths), "root mean square", sizes)
        for part, sizes in zip(PARTS, parts, strict=True)
    )


# --- one output ---------------------------------------------------------------------------------

LR: Final = 0.5
"""Over the width: the A step of both methods is then as large as the missing output."""
STILL: Final = -0.8
"""Largest exponent of GD's B step, which by theory is -1: B does not learn in a wide layer."""
SEEDS: Final = 64

RELATIVE: Final[dict[str, Any]] = {"damping": 1e-6, "damping_mode": "relative"}
"""The singular value of BA is here one over the root of the width: in a wide layer covariant
damping would be felt."""


def thin_layer(setting: Setting, width: int) -> Layer:
    """One output, rank one: ``f = b a x`` with a = 0, b of order one, and 1 to be learnt."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(SEEDS, width, 1))
    b = rng.uniform(0.5, 1.5, size=(SEEDS, 1, 1)) * rng.choice([-1.0, 1.0], size=(SEEDS, 1, 1))
    start = setting.arrays(Factors(np.zeros((SEEDS, 1, width)), b))
    return Layer(setting.array(inputs), setting.array(np.ones((SEEDS, 1, 1))), start)


def run_descent(setting: Setting) -> Outcome:
    """Exponents of the width in the third step."""
    widths = [2**k for k in range(6, 11 if setting.quick else 15)]
    learners = {
        "scaled GD": Learner(lambda n: rlora.scaled_sgd(**RELATIVE), lambda n: LR / n),
        "GD": Learner(lambda n: rlora.chain(), lambda n: LR / n),
    }
    found = grow(setting, learners, thin_layer, widths, steps=3)
    scaled = most(widths, found["scaled GD"])
    plain = [exponent(widths, sizes) for sizes in found["GD"]]
    return Outcome(
        (
            Check("scaled GD: largest exponent of the width, any part", scaled, "<=", STABLE),
            Check("GD: exponent of the step of A", abs(plain[0]), "<=", STABLE),
            Check("GD: exponent of the step of B", plain[1], "<=", STILL),
        ),
        panels(widths, found, "third step"),
    )


# --- Adam ---------------------------------------------------------------------------------------

ADAM_LR: Final = 0.3
"""Not small: widths are large only beside 1 / lr²."""
RITE_LR: Final = 0.05
"""LoRA-RITE's steps have a size of their own; at this one its output is near one in four steps."""
NARROWEST: Final = 64
RANK, BATCH = 4, 8
GROWS: Final = 0.4
"""Least exponent that counts as growth: theory has one half or one."""

SIGNS: Final[dict[str, Any]] = {"b1": 0.0, "b2": 0.0, "weight_decay": 0.0}
"""Adam without memory, so that a few steps show its normalisation and nothing else."""


def scaled(placement: Placement) -> Learner:
    """Scaled AdamW without memory, one learning rate for all widths."""
    method = rlora.scaled_adamw(placement=placement, **SIGNS, **RELATIVE)
    return Learner(lambda n: method, lambda n: ADAM_LR)


ADAM: Final = Learner(lambda n: rlora.lora_plus(ratio=1.0, **SIGNS), lambda n: ADAM_LR)
AFTER: Final = scaled("after")
PLUS: Final = Learner(lambda n: rlora.lora_plus(ratio=float(n), **SIGNS), lambda n: ADAM_LR / n)
"""LoRA+ as its theory has it: A's learning rate is n times smaller than B's."""
RITE: Final = Learner(
    lambda n: rlora.lora_rite(b1=0.0, b2=0.0), lambda n: RITE_LR * (NARROWEST / n) ** 0.5
)
"""The second moment is a mean over the rows, where the theorem has their sum: that is a root of the
width in the learning rate."""

STEADY: Final = {
    "after Adam": AFTER,
    "LoRA+, A's rate over the width": PLUS,
    "LoRA-RITE, rate over the root": RITE,
}
GROWING: Final = {"Adam": ADAM, "half on both sides": scaled("both")}
PUBLISHED: Final = {
    "before Adam, as published": scaled("before"),
    "after Adam, as proved": AFTER,
    "Adam": ADAM,
}


def square_layer(setting: Setting, width: int) -> Layer:
    """A square layer as fine-tuning starts: A ~ N(0, 1/n) and B = 0."""
    rng = np.random.default_rng(0)
    seeds = 8 if setting.quick else 32
    inputs, outputs = rng.normal(size=(2, seeds, width, BATCH))
    A = rng.normal(size=(seeds, RANK, width)) / width**0.5
    start = setting.arrays(Factors(A, np.zeros((seeds, width, RANK))))
    return Layer(setting.array(inputs), setting.array(outputs), start)


def measure(setting: Setting, learners: dict[str, Learner]) -> tuple[list[int], Growth]:
    """The widths, and what was found in the fourth step."""
    widths = [2**k for k in range(6, 11 if setting.quick else 13)]
    return widths, grow(setting, learners, square_layer, widths, steps=4)


def run_adam(setting: Setting) -> Outcome:
    """Exponents of the width in the fourth step."""
    widths, found = measure(setting, STEADY | GROWING)
    steady = {name: most(widths, found[name]) for name in STEADY}
    growing = {name: exponent(widths, found[name][0]) for name in GROWING}
    checks = [Check(f"{name}: largest exponent", x, "<=", STABLE) for name, x in steady.items()]
    checks += [
        Check(f"{name}: exponent of step of A", x, ">=", GROWS) for name, x in growing.items()
    ]
    return Outcome(tuple(checks), panels(widths, found, "fourth step"))


def run_published(setting: Setting) -> Outcome:
    """Exponents of the width in the fourth step: what the claim would need, part by part."""
    widths, found = measure(setting, PUBLISHED)
    exponents = [abs(exponent(widths, x)) for x in found["before Adam, as published"]]
    checks = [
        Check(f"{part}: exponent of the width", x, "<=", STABLE)
        for part, x in zip(PARTS, exponents, strict=True)
    ]
    return Outcome(tuple(checks), panels(widths, found, "fourth step"))


CLAIMS: Final = (
    Claim(
        "feature-learning",
        "In a layer with one output, with a learning rate of order 1 / width, scaled gradient "
        "descent moves the output as much through B as through A at every width; gradient descent "
        "only through A.",
        f"{PRECONDITIONED}. Section 4, the one-layer example.",
        run_descent,
    ),
    Claim(
        "feature-learning-adam",
        "From B = 0 with one learning rate for all widths, Adam with the preconditioner after it "
        "moves the output by an amount that does not depend on the width; plain Adam's steps grow "
        "with it.",
        f"{PRECONDITIONED}. Theorem 4.1. For LoRA+: {LORA_PLUS}.",
        run_adam,
    ),
    Claim(
        "feature-learning-published",
        "Scaled AdamW as published, with the preconditioner before Adam, moves the output by an "
        "amount that does not depend on the width.",
        f"{PRECONDITIONED}. Theorem 4.1 read for Algorithm 1; its proof has the preconditioner "
        "after Adam, as the authors say.",
        run_published,
        holds=False,
    ),
)
