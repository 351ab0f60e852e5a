"""Try what each torch optimizer does in detail, and write the table of promises.md.

python docs/reference/promises.py
"""

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from marks import between
from torch import Tensor, nn

import rlora.torch
from rlora import methods
from rlora.torch.optimizers.factory import class_name

PAGE: Final = Path(__file__).with_suffix(".md")
M, N, R = 12, 10, 3
BASE: Final = {
    "ScaledAdamW": rlora.torch.ScaledAdamW,
    "ScaledSGD": rlora.torch.ScaledSGD,
    "precondition(NAdam)": rlora.torch.precondition(torch.optim.NAdam),
}
CLASSES: Final[dict[str, Any]] = BASE | {
    name: getattr(rlora.torch, name)
    for name in map(class_name, methods.__all__)
    if name not in BASE
}

Pair = tuple[nn.Parameter, nn.Parameter]


def make_pair(dtype: torch.dtype = torch.float64) -> Pair:
    """A with orthonormal rows and B with orthonormal columns: metrics are the identity."""
    torch.manual_seed(0)
    A, B = (torch.linalg.qr(torch.randn(k, R, dtype=torch.float64))[0] for k in (N, M))
    return nn.Parameter(A.T.contiguous().to(dtype)), nn.Parameter(B.to(dtype))


def gradients(pair: Pair) -> tuple[Tensor, Tensor]:
    """The gradients of the factors that belong to one full gradient."""
    torch.manual_seed(1)
    G = torch.randn(M, N, dtype=torch.float64)
    A, B = (p.detach().double() for p in pair)
    return (B.T @ G).to(pair[0].dtype), (G @ A.T).to(pair[1].dtype)


def options_of(kind: Any) -> set[str]:
    """Names of the options that a constructor takes."""
    made_of = (kind, kind.method) if hasattr(kind, "method") else kind.__mro__[:-1]
    return {name for part in made_of for name in signature(part).parameters}


def make(kind: Any, pair: Pair, lr: float | Tensor = 0.1, **options: Any) -> Any:
    """An optimizer of the pair; it decays and damps nothing unless told."""
    plain = {"weight_decay": 0.0, "damping": 0.0, "shrink": 0.0} | options
    chosen = {name: value for name, value in plain.items() if name in options_of(kind)}
    return kind([*pair], lr=lr, pairs=[pair], **chosen)


# --- aspects of a class ---------------------------------------------------------------------------


def decay(kind: Any) -> str:
    """Shrinking of the factors in two steps with gradients of zero, a decay of 0.1 and lr 0.5."""
    if "weight_decay" not in options_of(kind):
        return "none"
    pair = make_pair()
    optimizer = make(kind, pair, lr=0.5, weight_decay=0.1, momentum=0.5)
    before = [float(p.detach().norm()) for p in pair]
    for p in pair:
        p.grad = torch.zeros_like(p)
    left = []
    for _ in range(2):
        optimizer.step()
        left.append([float(p.detach().norm()) / old for p, old in zip(pair, before, strict=True)])
    words = {0.95: "1 - lr λ", 0.95**0.5: "√(1 - lr λ)", 1 - 0.05e-4: "1 - lr d λ"}
    found = {
        next((word for x, word in words.items() if abs(share - x) < 1e-6), None)
        or ("B: 1 - its lr λ" if share < 0.95 else "1 - t lr λ")
        for share in left[0]
        if share != 1
    }
    if "1 - t lr λ" in found:  # another t at each step
        return "1 - t lr λ"
    faster = any(one < 0.999 and two < one**2 - 1e-3 for one, two in zip(*left, strict=True))
    return ", ".join(sorted(found)) + (", through the momentum" if faster else "")


def float32_state(kind: Any) -> bool:
    """Tell if all of the state of a bfloat16 pair is in float32."""
    pair = make_pair(torch.bfloat16)
    optimizer = make(kind, pair, momentum=0.9)
    for p, g in zip(pair, gradients(pair), strict=True):
        p.grad = g
    optimizer.step()
    held = (x for p in pair for x in optimizer.state[p].values() if isinstance(x, Tensor))
    return all(x.dtype == torch.float32 for x in held)


def base(kind: Any) -> str:
    """The optimizer of torch that a class is."""
    kinds = (parent for parent in kind.__mro__ if parent.__module__.startswith("torch.optim"))
    name = next(kinds).__name__
    return "AdamW" if issubclass(kind, torch.optim.AdamW) else name


# --- one row a circumstance -----------------------------------------------------------------------


def untouched(kind: Any) -> bool:
    pair = make_pair()
    optimizer = make(kind, pair)
    given = gradients(pair)
    for p, g in zip(pair, given, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return all(bool((p.grad == g).all()) for p, g in zip(pair, given, strict=True))


def closure(kind: Any) -> bool:
    pair = make_pair()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (pair[1] @ pair[0]).square().sum()
        value.backward()
        return value

    optimizer = make(kind, pair)
    return bool(optimizer.step(loss) > 0)


def tensor_lr(kind: Any) -> bool:
    optimizer = make(kind, pair := make_pair(), lr=torch.tensor(0.1))
    for p, g in zip(pair, gradients(pair), strict=True):
        p.grad = g
    before = [p.detach().clone() for p in pair]
    optimizer.step()
    return any(bool((p != old).any()) for p, old in zip(pair, before, strict=True))


def with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Any], bool]:
    def tried(kind: Any) -> bool:
        optimizer = make(kind, pair := make_pair())
        for p, g in zip(pair, gradients(pair), strict=True):
            p.grad = change(g)
        optimizer.step()
        return True

    return tried


def with_shapes(A: tuple[int, ...], B: tuple[int, ...], dtype: Any = None) -> Callable[[Any], bool]:
    def tried(kind: Any) -> bool:
        pair = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in (A, B)]
        kind(pair, pairs=[tuple(pair)])
        return True

    return tried


def frozen(letter: str) -> Callable[[Any], bool]:
    def tried(kind: Any) -> bool:
        pair = make_pair()
        pair["AB".index(letter)].requires_grad_(requires_grad=False)
        optimizer = make(kind, pair)
        other = pair["BA".index(letter)]
        before, still = other.detach().clone(), pair["AB".index(letter)].detach().clone()
        for _ in range(2):
            other.grad = gradients(pair)["BA".index(letter)]
            optimizer.step()
        if not torch.equal(still, pair["AB".index(letter)]):
            msg = f"{letter} moved"
            raise RuntimeError(msg)
        return bool((other != before).any())

    return tried


def tied(kind: Any) -> bool:
    A, B = make_pair()
    C = nn.Parameter(B.detach().clone())
    kind([A, B, C], pairs=[(A, B), (A, C)])
    return True


def option(name: str) -> Callable[[Any], bool]:
    return lambda kind: name in options_of(kind)


WHEN: Final[dict[str, Callable[[Any], bool | str]]] = {
    "leaves `.grad`, takes a closure and lr as a tensor": lambda kind: (
        untouched(kind) and closure(kind) and tensor_lr(kind)
    ),
    "moves B where A is frozen": frozen("A"),
    "moves A where B is frozen": frozen("B"),
    "takes kernels of convolutions (4-D)": with_shapes((R, N, 3, 3), (M, R, 1, 1)),
    "takes a stack of pairs (3-D)": with_shapes((2, R, N), (2, M, R)),
    "takes one factor in two pairs": tied,
    "takes one-dimensional factors": with_shapes((R * N,), (M * R,)),
    "takes complex factors": with_shapes((R, N), (M, R), torch.complex64),
    "takes sparse gradients": with_gradient(lambda g: g.to_sparse()),
    "keeps float32 state for bfloat16 factors": float32_state,
    "updates parameters in no pair as": base,
    "decays by": lambda kind: decay(kind) if base(kind) in ("AdamW", "SGD") else "torch's own",
    "has `maximize`": option("maximize"),
}


def answer(question: Callable[[Any], bool | str], kind: Any) -> str:
    """Yes, no, another word, or refused with one of our errors."""
    try:
        said = question(kind)
        return said if isinstance(said, str) else "yes" if said else "no"
    except (rlora.RLoraError, ValueError, TypeError) as error:
        return f"refused, {type(error).__name__}"


def when_table() -> Iterator[str]:
    """A row for each answer that all classes give, and one for each question that parts them."""
    yield "| a class | answer |"
    yield "| --- | --- |"
    said: dict[str, list[str]] = {}
    parted: dict[str, dict[str, list[str]]] = {}
    for words, question in WHEN.items():
        answers: dict[str, list[str]] = {}
        for name, kind in CLASSES.items():
            answers.setdefault(answer(question, kind), []).append(name)
        if len(answers) == 1:
            said.setdefault(next(iter(answers)), []).append(words)
        else:
            parted[words] = answers
    for common, questions in said.items():
        yield f"| {'; '.join(questions)} | {common} |"
    for words, answers in parted.items():
        rare = sorted(answers.items(), key=lambda item: len(item[1]))
        *named, (usual, _) = rare
        lists = (f"{', '.join(f'`{name}`' for name in names)}: {a}" for a, names in named)
        yield f"| {words} | {'; '.join(chain(lists, [f'all others: {usual}']))} |"


def rewritten(page: str) -> str:
    """The page with the table between its marks made anew."""
    table = "\n".join(when_table())
    return between(page, "<!-- when: made by promises.py -->", "<!-- end of when -->", table)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
