"""Two runs that go wrong, and what `diagnostics` says of them: python docs/how-to/diagnose.py."""

from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from rlora.torch import ScaledSGD, diagnostics_table, precondition

PUBLISHED = precondition(torch.optim.AdamW)  # the preconditioner before Adam, as PEFT has it
ABSOLUTE = {"damping": 1e-2, "damping_mode": "absolute"}  # PEFT's
RELATIVE = {"damping": 1e-6, "damping_mode": "relative"}
N, M, RANK = 64, 48, 8


class Adapted(nn.Module):
    """``x (W0 + B A)ᵀ``, started as PEFT does: A random, B zero."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.base_layer = nn.Linear(N, M, bias=False).requires_grad_(False)
        self.base_layer.weight.copy_(torch.randn(M, N, generator=g) / N**0.5)
        self.lora_A = nn.Parameter((2 * torch.rand(RANK, N, generator=g) - 1) / N**0.5)
        self.lora_B = nn.Parameter(torch.zeros(M, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


class Model(nn.Module):
    """Two adapted projections of one input, and data that want other weights of low rank."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.q_proj, self.v_proj = Adapted(g), Adapted(g)
        U, V = (torch.linalg.qr(torch.randn(k, RANK, generator=g))[0] for k in (2 * M, N))
        self.x = torch.randn(256, N, generator=g)
        with torch.no_grad():
            self.y = self() + self.x @ (U * torch.logspace(0, -2, RANK) @ V.T).T

    def forward(self) -> Tensor:
        return torch.cat([self.q_proj(self.x), self.v_proj(self.x)], dim=-1)

    def loss(self) -> Tensor:
        return (self() - self.y).square().sum(-1).mean()


class Shadow:
    """Plain AdamW on the gradients of another model: where it would have moved the factors."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.start = model, [p.detach().clone() for p in factors(model)]
        self.copies = [nn.Parameter(p.clone()) for p in self.start]
        self.optimizer = torch.optim.AdamW(self.copies, lr=lr, weight_decay=0.0)

    def step(self) -> None:
        for mine, theirs in zip(self.copies, factors(self.model), strict=True):
            mine.grad = theirs.grad
        self.optimizer.step()

    def distance(self) -> float:
        """Distance of A of the first layer from there, as a part of the way."""
        mine, theirs = self.copies[0], factors(self.model)[0]
        return float((theirs - mine).detach().norm() / (mine.detach() - self.start[0]).norm())


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run(kind: Any, lr: float, steps: int, **options: Any) -> tuple[dict[str, float], float]:
    """Steps from B = 0: the figures of the last one, and the distance from AdamW's way."""
    model = Model()
    optimizer, shadow = kind(model, lr=lr, weight_decay=0.0, **options), Shadow(model, lr)
    optimizer.watch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        shadow.step()
    return optimizer.diagnostics(per_pair=False), shadow.distance()


def no_effect(console: Console) -> None:
    """PEFT's damping over a B that is still small, and one that shrinks with B."""
    for title, damping in (
        ("damping=1e-2, absolute", ABSOLUTE),
        ("damping=1e-6, relative", RELATIVE),
    ):
        numbers, distance = run(PUBLISHED, 1e-4, 10, **damping)
        console.print(f"{title}: A is {distance:.1%} off AdamW's way")
        console.print(diagnostics_table(numbers))


def thrown_away(console: Console) -> None:
    """The second step from B = 0, with relative damping and with covariant."""
    numbers, _ = run(ScaledSGD, 1e-4, 2, **RELATIVE)
    console.print(diagnostics_table(numbers))
    numbers, _ = run(ScaledSGD, 1e-2, 2, damping=1e-2, damping_mode="covariant")
    console.print("covariant, lr 0.01")
    console.print(diagnostics_table(numbers))


if __name__ == "__main__":
    no_effect(Console(width=80))
    thrown_away(Console(width=80))
