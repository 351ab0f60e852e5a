"""Change of the output by a step of each factor, as the layer grows wider."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from rlora import Factors, Transform
from rlora.core.algebra import mT
from rlora.core.factors import Array

from .claim import Curve, Panel, Setting

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
        return Factors(mT(pair.B) @ error @ mT(self.inputs), error @ mT(hidden))

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


def exponent(widths: Sequence[float], sizes: Sequence[float]) -> float:
    """The power of the width that fits the sizes best."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def most(widths: Sequence[int], parts: Sequence[Sequence[float]]) -> float:
    """The exponent farthest from zero among the parts, without its sign."""
    return max(abs(exponent(widths, sizes)) for sizes in parts)


def panels(widths: Sequence[int], found: Growth, when: str) -> tuple[Panel, ...]:
    """A panel for each part, with a line for each learner."""
    return tuple(
        Panel(
            f"{part}, {when}",
            "width",
            "root mean square",
            tuple(Curve(name, widths, found[name][i]) for name in found),
            log_x=True,
        )
        for i, part in enumerate(PARTS)
    )
