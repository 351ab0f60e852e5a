"""What does a step of each method ask of its backend? Listens, and writes the table of the page.

python docs/explanation/what_methods_share.py
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import rlora
from rlora import methods
from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
from rlora.core.transform import apply_updates
from rlora.testing import make_problem

PAGE: Final = Path(__file__).with_suffix(".md")
START, END = "<!-- made by what_methods_share.py -->", "<!-- end of table -->"

POWERS: Final = {-1.0: "S⁻¹", -0.5: "S^-½", 0.5: "S^½"}
VERBS: Final[dict[str, Callable[..., str]]] = {
    "gram_rows": lambda *_, **__: "gram of rows",
    "gram_columns": lambda *_, **__: "gram of columns",
    "cross_rows": lambda *_, **__: "cross",
    "apply_left": lambda *_, **__: "apply to rows",
    "apply_right": lambda *_, **__: "apply to columns",
    "damped_power": lambda S, exponent, *_, **__: POWERS[exponent],
    "damped_half": lambda *_, **__: "S^-½",
    "pseudo_power": lambda S, exponent: POWERS[exponent],
    "inverse_root": lambda *_: "(V^½ + ε)⁻¹",
    "eigh": lambda *_: "eigenvectors",
    "qr": lambda *_: "QR",
    "svd": lambda *_: "SVD",
}
"""What a backend can be asked for, and its name here; a verb within another is not heard."""

ALGEBRA: Final = (*POWERS.values(), "(V^½ + ε)⁻¹", "eigenvectors", "QR", "SVD")


@contextmanager
def listening(backend: Backend) -> Iterator[Counter[str]]:
    """Count what is asked of a backend."""
    heard: Counter[str] = Counter()
    depth = 0

    def listener(verb: Callable[..., Any], word: Callable[..., str]) -> Callable[..., Any]:
        def listened(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            heard[word(*args, **kwargs)] += depth == 0
            depth += 1
            try:
                return verb(*args, **kwargs)
            finally:
                depth -= 1

        return listened

    for name, word in VERBS.items():
        setattr(backend, name, listener(getattr(backend, name), word))
    try:
        yield heard
    finally:
        for name in VERBS:
            delattr(backend, name)


class Heard(NamedTuple):
    """What a method asks for when its state is made, and in its second step."""

    once: Counter[str]
    step: Counter[str]

    def both(self, word: str) -> int:
        """How often something is done for rows and for columns, or for one of them."""
        return max(self.step[f"{word} rows"], self.step[f"{word} columns"])

    def algebra(self) -> str:
        """The r x r part in words."""
        every = ", ".join(f"{self.step[word]} {word}" for word in ALGEBRA if self.step[word])
        once = ", ".join(f"{self.once[word]} {word} once" for word in ALGEBRA if self.once[word])
        return every or once or "-"


def ask(method: rlora.Transform) -> Heard:
    """Listen to a method."""
    problem = make_problem()
    backend = get_backend(problem.params.A)
    with listening(backend) as once:
        state = method.init(problem.params)
    params, state = rlora.step(method, problem.params, problem.grads(problem.params), state, 1e-2)
    with listening(backend) as step:
        rlora.step(method, params, problem.grads(params), state, 1e-2)
    return Heard(once, step)


def moments(method: rlora.Transform) -> tuple[str, str]:
    """What a method averages over the steps: of gradients, and of their squares."""
    params = make_problem().params
    flat = rlora.flatten_state(method.init(params)).items()
    first = any(".mu." in name for name, _ in flat)
    shapes = {x.shape for name, x in flat if ".nu." in name or "norms" in name}
    if not shapes:
        second = "-"
    elif shapes <= {params.A.shape, params.B.shape} or any("inner" in name for name, _ in flat):
        second = "of each entry"
    else:
        second = "r x r" if len(shapes) == 1 else "of rows and columns"
    return ("yes" if first else "-"), second


def carries(method: rlora.Transform) -> bool:
    """Whether the state changes when the factors have moved."""
    problem = make_problem()
    old = problem.params
    direction, state = method.update(problem.grads(old), method.init(old), old)
    after = method.transport(state, old, method.apply(old, direction, 1e-2))
    pairs = zip(*(rlora.flatten_state(x).values() for x in (state, after)), strict=True)
    return not all(np.array_equal(x, y) for x, y in pairs)


def row(name: str) -> str:
    """The line of a method with its default options."""
    method = getattr(methods, name)()
    heard = ask(method)
    file = getattr(methods, name).__module__.rpartition(".")[2]
    cells = (
        f"[`{name}`](../../rlora/methods/{file}.py)",
        heard.both("gram of"),
        heard.step["cross"] // 2,
        heard.algebra(),
        heard.both("apply to"),
        *moments(method),
        "yes" if carries(method) else "-",
        "-" if method.apply is apply_updates else "yes",
    )
    return f"| {' | '.join(str(cell or '-') for cell in cells)} |"


HEAD: Final = (
    "| method | Grams | cross-Grams | r x r algebra | apply | mean of gradients | of squares"
    " | carries them along | bends its move |"
)


def rewritten(page: str) -> str:
    """The page with its table made anew."""
    head, _, rest = page.partition(START)
    tail = rest.partition(END)[2]
    rows = "\n".join((HEAD, f"|{' --- |' * (HEAD.count('|') - 1)}", *map(row, methods.__all__)))
    return f"{head}{START}\n\n{rows}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
