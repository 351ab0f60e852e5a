"""LoRA layers of real libraries as independent pairs of matrices, and what a step does to those.

A test writes down how the library stores its pairs, proves it with the library's own products, and
hands the layers to the checks here, which know nothing of how rlora finds or views them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlora.torch import LoRARite, ScaledSGD

LR, DAMPING = 0.05, 1e-2

Cut = Callable[[np.ndarray], list[np.ndarray]]
"""From a stored array to the (r, n) or (m, r) matrices of the pairs in it."""


def whole(x):
    """One matrix; a kernel's axes belong to the second one."""
    return [x.reshape(len(x), -1)]


def turned(x):
    """One matrix, transposed."""
    return [x.T]


def rows(count):
    """Matrices of one height below each other."""
    return lambda x: [part.reshape(len(part), -1) for part in np.split(x, count)]


def heights(*heights):
    """Matrices of these heights below each other."""
    return lambda x: np.split(x, np.cumsum(heights)[:-1])


def columns(count):
    """Matrices side by side."""
    return lambda x: np.split(x, count, axis=1)


def interleaved(count):
    """Matrices whose columns alternate: the first of each, then the second of each."""
    return lambda x: [x[:, k::count] for k in range(count)]


def stacked(x):
    """The matrices of a leading axis."""
    return list(x)


def stacked_turned(x):
    """The transposed matrices of a leading axis."""
    return [matrix.T for matrix in x]


class Layer(NamedTuple):
    """The names of a layer's parameters and where its pairs lie in them."""

    a: str
    b: str
    cut_a: Cut = whole
    cut_b: Cut = whole

    def cut(self, values):
        """(A, B) for each pair, of parameters or of whatever has their shapes."""
        pairs = zip(self.cut_a(values[self.a]), self.cut_b(values[self.b]), strict=True)
        return list(pairs)

    def products(self, model):
        """B A of each pair."""
        return [b @ a for a, b in self.cut(values_of(model))]


def peft_layers(*owners, adapter="default", cut_a=whole, cut_b=whole):
    """Layers with PEFT's names."""
    return [Layer(*(f"{o}.lora_{f}.{adapter}.weight" for f in "AB"), cut_a, cut_b) for o in owners]


def values_of(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def grads_of(model):
    return {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy()
        for name, p in model.named_parameters()
    }


def set_back(model, values):
    """The model as it was; no copy, as some modules hold what cannot be copied."""
    model.zero_grad()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(values[name]))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every trainable parameter random, so that no factor is zero and no Gram singular."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def damped(gram, mode):
    size = np.trace(gram) / len(gram) if mode == "relative" else 1.0
    return gram + DAMPING * size * np.eye(len(gram))


def scaled_step(a, b, grad_a, grad_b, mode):
    """A and B after one step of scaled gradient descent on B A."""
    new_a = a - LR * np.linalg.solve(damped(b.T @ b, mode), grad_a)
    new_b = b - LR * np.linalg.solve(damped(a @ a.T, mode), grad_b.T).T
    return new_a, new_b


def check_report(model: nn.Module, report, layers: Sequence[Layer], refused=(), tied=()) -> None:
    """These layers, of these ranks, and everything else that is trained is plain."""
    named = dict(model.named_parameters())
    values = values_of(model)
    expected = {(x.a, x.b): {len(a) for a, _ in x.cut(values)} for x in layers}
    found: dict = {}
    for pair in report:
        found.setdefault((pair.a, pair.b), set()).add(pair.rank)
    assert found == expected
    trained = {name for name, p in named.items() if p.requires_grad}
    factors = {name for x in layers for name in (x.a, x.b)}
    assert set(report.refused) == set(refused)
    assert set(report.tied) == set(tied)
    assert set(report.plain) == trained - factors - set(refused) - set(tied)


def check_scaled_sgd(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], layers: Sequence[Layer], refused=(), **kw
) -> None:
    """One step of ScaledSGD is one of each pair by itself, and the plain one of all the rest."""
    old = values_of(model)
    for mode in ("absolute", "relative"):
        optimizer = ScaledSGD(model, lr=LR, damping=DAMPING, damping_mode=mode, **kw)
        check_report(model, optimizer.report, layers, refused)
        loss(model).backward()
        grads = grads_of(model)
        optimizer.step()
        new = values_of(model)
        set_back(model, old)
        for layer in layers:
            trained = [model.get_parameter(name).requires_grad for name in layer[:2]]
            triples = zip(layer.cut(old), layer.cut(grads), layer.cut(new), strict=True)
            for pair, gradient, result in triples:
                expected = scaled_step(*pair, *gradient, mode)
                for was, wanted, got, moves in zip(pair, expected, result, trained, strict=True):
                    # float64; Grams of a condition of at most 1e3 or so
                    np.testing.assert_allclose(got, wanted if moves else was, 1e-9, 1e-12)
                    assert not moves or np.abs(got - was).max() > 1e-8
        factors = {name for layer in layers for name in (layer.a, layer.b)}
        for name in old.keys() - factors:
            expected = old[name] - LR * grads[name]
            np.testing.assert_allclose(new[name], expected, 1e-12, 1e-14, err_msg=name)


def check_method(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], layers: Sequence[Layer], steps: int = 3
) -> None:
    """LoRA-RITE moves the model as it moves ordinary pairs that lie in tensors of their own."""
    optimizer = LoRARite(model, lr=LR)
    start = values_of(model)
    pairs = [
        tuple(torch.tensor(x, requires_grad=True) for x in pair)
        for layer in layers
        for pair in layer.cut(start)
    ]
    alone = LoRARite([p for pair in pairs for p in pair], lr=LR, pairs=pairs)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        grads = grads_of(model)
        for pair, gradient in zip(pairs, (g for x in layers for g in x.cut(grads)), strict=True):
            for p, g in zip(pair, gradient, strict=True):
                p.grad = torch.tensor(g)
        optimizer.step()
        alone.step()
    end = values_of(model)
    set_back(model, start)
    for pair, result in zip(pairs, (p for x in layers for p in x.cut(end)), strict=True):
        for p, got in zip(pair, result, strict=True):
            # float64, three steps through an eigendecomposition and two QR
            np.testing.assert_allclose(got, p.detach().numpy(), 1e-7, 1e-9)
    for layer in layers:
        for name in (layer.a, layer.b):
            assert np.abs(end[name] - start[name]).max() > 1e-6


def check(model, loss, layers, **kw) -> None:
    """Both of the above."""
    check_scaled_sgd(model, loss, layers, **kw)
    check_method(model, loss, layers)


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(*inputs):
    """A loss that no layer's gradient escapes: mean squared distance of the output from noise."""

    def loss(model):
        out = model(*inputs)
        return (out - batch(*out.shape, seed=1)).square().mean()

    return loss
