"""Draw the pictures of the explanations, with the library's own steps.

python docs/explanation/drawings.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

import rlora
from rlora.cli.plots import COLORS, FAINT, INK, WIDTH, svg_of

FOLDER: Final = Path(__file__).with_suffix("")
BLUE, ORANGE, GREEN, VIOLET = COLORS[:4]

START: Final = 0.4
"""The product that all three splits of the toy begin with."""
SPLITS: Final = (0.25, 0.63, 1.8)
"""Their a."""
LARGEST: Final = 3.2
"""Limits of the axes."""
TOY: Final[dict[str, tuple[rlora.Transform, float]]] = {
    "gradient descent": (rlora.chain(), 0.25),
    "scaled gradient descent": (rlora.scaled_sgd(damping=1e-6, damping_mode="relative"), 0.25),
    "AdamW": (rlora.lora_plus(ratio=1.0, weight_decay=0.0), 0.25),
}
"""Methods and their learning rates."""
SINGULAR_VALUES: Final = np.geomspace(1e-3, 1.0, 61)
PLAIN: Final = FuncFormatter(lambda x, _: f"{x:g}")


def walk(method: rlora.Transform, lr: float, a: float, steps: int) -> list[tuple[float, float]]:
    """The way of (a, b) down ``(a b - 1)² / 2`` from the split ``(a, START / a)``."""
    pair = rlora.Factors(np.array([[a]]), np.array([[START / a]]))
    state, way = method.init(pair), [(a, START / a)]
    for _ in range(steps):
        error = pair.B @ pair.A - 1
        grads = rlora.Factors(pair.B * error, error * pair.A)
        pair, state = rlora.step(method, pair, grads, state, lr)
        way.append((pair.A.item(), pair.B.item()))
    return way


def splits() -> Figure:
    """One product, three splits: where a step of each method takes them."""
    figure = Figure((WIDTH, 4.9), layout=ConstrainedLayoutEngine(h_pad=0.08))
    *panels, corner = figure.subplots(2, 2).flat
    a = np.linspace(0.05, LARGEST, 200)
    error = np.multiply.outer(a, a) - 1
    for axes, (name, (method, lr)) in zip(panels, TOY.items(), strict=True):
        axes.contour(a, a, error**2, [0.1, 0.36, 1, 4, 12], colors=FAINT)
        axes.plot(a, 1 / a, color=INK, label="a b = 1, the minimum")
        axes.plot(a, START / a, color=INK, linestyle=":", label="a b = 0.4, the start")
        for start, color in zip(SPLITS, (BLUE, ORANGE, GREEN), strict=True):
            way = walk(method, lr, start, 1)
            product = way[1][0] * way[1][1]
            axes.plot(*way[0], "o", color=color)
            axes.plot(a, product / a, "--", color=color, linewidth=0.9)
            arrow = {"arrowstyle": "->", "color": color, "lw": 1.8}
            axes.annotate("", way[1], way[0], arrowprops=arrow)
            axes.annotate(
                f"{product:.2f}", way[1], xytext=(5, 5), textcoords="offset points", color=color
            )
        axes.set(xlim=(0, LARGEST), ylim=(0, LARGEST), xlabel="a", ylabel="b", title=name)
        axes.set(xticks=[0, 1, 2, 3], yticks=[0, 1, 2, 3], aspect="equal")
    corner.axis("off")
    axes.plot([], [], "--", color=FAINT, label="where each step ends")
    corner.legend(*axes.get_legend_handles_labels(), loc="center")
    return figure


def inverse(damping: float, mode: Any, alpha: float = 1.0) -> Any:
    """Factors of the rows of G_A in the library, with a diagonal B and ``A = alpha I``."""
    r = len(SINGULAR_VALUES)
    pair = rlora.Factors(alpha * np.eye(r), np.diag(SINGULAR_VALUES))
    method = rlora.scaled_sgd(damping=damping, damping_mode=mode)
    grads = rlora.Factors(np.eye(r), np.zeros((r, r)))
    direction, _ = method.update(grads, method.init(pair), pair)
    return np.diag(direction.A)


def damping() -> Figure:
    """The damped inverse of the Gram, and how much of a step it lets through to the product."""
    curves = {
        "undamped": (inverse(0.0, "relative"), INK, "-"),
        "relative, δ = 1e-2": (inverse(1e-2, "relative"), BLUE, "-"),
        "absolute, δ = 1e-2": (inverse(1e-2, "absolute"), ORANGE, "-"),
        "covariant, δ = 1e-2, A = I": (inverse(1e-2, "covariant"), GREEN, (0, (4, 4))),
        "covariant, δ = 1e-2, A = I / 10": (inverse(1e-2, "covariant", 0.1), VIOLET, "-."),
        "plain gradient descent": (np.ones_like(SINGULAR_VALUES), INK, ":"),
    }
    figure = Figure((WIDTH, 5.8), layout=ConstrainedLayoutEngine(h_pad=0.08))
    upper, lower = figure.subplots(2, 1)
    for label, (gain, color, dashes) in curves.items():
        upper.loglog(SINGULAR_VALUES, gain, color=color, linestyle=dashes, label=label)
        lower.semilogx(SINGULAR_VALUES, SINGULAR_VALUES**2 * gain, color=color, linestyle=dashes)
    upper.set(title="the inverse: what the gradient of A is multiplied by", ylim=(0.5, 1e6))
    lower.set(title="what arrives in B A, of what was asked for", ylim=(-0.02, 1.05))
    for axes in (upper, lower):
        axes.set_xlabel("singular value of B")
        axes.xaxis.set_major_formatter(PLAIN)
        axes.grid(visible=True)
    upper.yaxis.set_major_formatter(PLAIN)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def turned_step(degrees: float, gradient: Any) -> Any:
    """The first step of Adam in a basis of the rank axis that is turned, turned back."""
    t = np.deg2rad(degrees)
    R = np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
    pair = rlora.Factors(R @ np.ones((2, 1)), np.ones((1, 2)) @ R.T)
    adam = rlora.lora_plus(ratio=1.0, weight_decay=0.0)
    grads = rlora.Factors(R @ gradient[:, None], np.zeros((1, 2)))
    direction, _ = adam.update(grads, adam.init(pair), pair)
    return (R.T @ direction.A)[:, 0]


GRADIENT: Final = np.array([np.cos(0.4), np.sin(0.4)])
TURNS: Final = (0.0, 30.0, 60.0)


def adam() -> Figure:
    """One gradient, three bases of the rank axis, three steps."""
    figure = Figure((WIDTH, 3.8), layout=ConstrainedLayoutEngine(h_pad=0.08))
    axes = figure.subplots()
    arrows = [("the gradient", GRADIENT, INK)]
    for turn, color in zip(TURNS, (BLUE, ORANGE, GREEN), strict=True):
        arrows.append((f"Adam, basis turned by {turn:.0f}°", turned_step(turn, GRADIENT), color))
    for label, (x, y), color in arrows:
        axes.annotate(
            "", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8}
        )
        axes.plot([], [], color=color, label=label)
    axes.set(
        xlim=(-0.1, 1.5), ylim=(-0.4, 1.5), aspect="equal", xlabel="first row", ylabel="second row"
    )
    axes.axhline(0, color=FAINT, zorder=0)
    axes.axvline(0, color=FAINT, zorder=0)
    figure.legend(loc="outside lower center")
    return figure


DRAWINGS: Final[dict[str, Callable[[], Figure]]] = {
    "splits": splits,
    "damping": damping,
    "adam": adam,
}


def save(folder: Path) -> None:
    """Write every drawing, the same bytes every time."""
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(svg_of(draw), encoding="utf-8")


if __name__ == "__main__":
    save(FOLDER)
