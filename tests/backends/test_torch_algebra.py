"""Roots on a CUDA device, where an eigendecomposition would have to be waited for."""

import numpy as np
import pytest

import rlora
from rlora.backends import get
from rlora.core.backend import Backend
from rlora.testing import assert_close, make_problem, run

pytest.importorskip("torch")

import torch

from rlora.backends import torch as torch_backend
from rlora.backends._torch_algebra import (
    cholesky_pseudo_half,
    cubics,
    half_power,
    symmetric_pseudo_half,
)


@pytest.fixture
def without_eigh(monkeypatch):
    monkeypatch.setattr(torch_backend, "eigh_waits", lambda S: True)
    for name in ("eigh", "spd_power", "pseudo_power", "inverse_root_half"):  # the generic ones
        monkeypatch.setattr(Backend, name, None)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_half_power_equals_eigh(condition, dtype):
    """Eigenvalues down to the rounding of the matrix, which Cholesky's factor has in the smallest.

    The largest ones, of which the last column of the basis is one, keep the root of that: 10 eps,
    and 50 where products with 16 columns that are as far off add up.
    """
    rng, backend = np.random.default_rng(0), get("torch")
    Q = np.linalg.qr(rng.normal(size=(5, 16, 16)))[0]
    w = 7 * np.geomspace(1 / condition, 1, 16)
    S = backend.asarray((Q * w) @ Q.mT, dtype)
    eps = np.finfo(dtype).eps
    root, inverse = (backend.to_numpy(half_power(S, power)) for power in (0.5, -0.5))
    assert_close(root, (Q * w**0.5) @ Q.mT, rtol=10 * eps * condition**0.5)
    assert_close(inverse, (Q * w**-0.5) @ Q.mT, rtol=10 * eps * max(condition, 10))
    top = Q[:, :, -1:]
    assert_close(inverse @ top, w[-1] ** -0.5 * top, rtol=50 * eps * condition**0.5)


@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("power", [0.5, -0.5])
def test_half_power_of_what_is_damped(power, damping):
    """A direction of the matrix is lost; the condition number is 16 / damping at most."""
    rng, backend = np.random.default_rng(0), get("torch")
    Q = np.linalg.qr(rng.normal(size=(5, 16, 16)))[0]
    w = 7 * np.append(np.geomspace(1, 1e-3, 15), 0.0)
    S = backend.asarray((Q * w) @ Q.mT, "float64")
    expected = (Q * (w + damping * w.mean()) ** power) @ Q.mT
    found = half_power(S, power, damping)
    assert_close(found, expected, rtol=10 * np.finfo(float).eps * max(16 / damping, 100))


def test_half_power_of_nothing():
    """A zero matrix has what is left of the smallest number."""
    zero = get("torch").asarray(np.zeros((2, 4, 4)), "float64")
    assert 0 <= half_power(zero, 0.5, 1e-6).max() < 1e-150


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [0.5, -0.5])
@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_half_power_tells_what_is_not_definite(shift, power, dtype):
    """NaN all over that member, whatever its size, and in no other one.

    The damping of 1e-6 times the mean eigenvalue shifts the least one by 2e-6 of itself.
    """
    sizes = np.array([1.0, 1e30, 1e-30])[:, None, None]
    bad = sizes * np.diag([1.0, 1.0, -0.5, 1.0])
    good = sizes * np.diag([4.0, 1.0, 1.0, 1.0])
    S = get("torch").asarray(np.concatenate([bad, good, np.zeros((1, 4, 4))]), dtype)
    found = half_power(S, power, 1e-6, shift).numpy()
    assert np.isnan(found[:3]).all()
    expected = np.sqrt(sizes if power > 0 else 1 / sizes) * np.diag([4.0**power, 1, 1, 1])
    assert_close(found[3:6], expected + shift * np.eye(4), rtol=1e-5)
    assert np.isfinite(found[6]).all()


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # in inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # in inductor
@pytest.mark.parametrize("compiled", [False, True])
def test_a_later_pivot_that_fails_is_seen_too(compiled):
    """Its unit is -inf, a power of which is 0 in a graph."""
    S = torch.stack([torch.diag(torch.tensor([1.0, -0.5, 1.0])), torch.eye(3)])

    def halves(S):
        return half_power(S, -0.5), cholesky_pseudo_half(S, 1e-6), symmetric_pseudo_half(S, 1e-6)

    for bad, good in torch.compile(halves)(S) if compiled else halves(S):
        assert bad.isnan().all()
        assert (good - torch.eye(3)).abs().max() < 1e-3  # of a damping of sqrt(eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pseudo_powers_without_eigh(dtype, without_eigh):
    """Directions above rounding as they are, one below it gone; a zero, a NaN and a tiny matrix.

    Of an eigenvalue a hundred times the damping 0.15 % of the inverse is lost.
    """
    rng, backend = np.random.default_rng(0), get("torch")
    d = np.finfo(dtype).eps ** 0.5
    tiny = float(np.finfo(dtype).smallest_normal) / 4
    w = np.array([0.0, 100 * d, 1e4 * d, 0.1, 0.5, 1.0, 2.0, 4.4])  # mean 1, but for the second
    Q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    stack = np.stack([(Q * w) @ Q.T, np.zeros((8, 8)), np.full((8, 8), np.nan), np.eye(8) * tiny])
    S = backend.asarray(stack, dtype)
    W, P = (backend.to_numpy(x) for x in (backend.pseudo_half(S), backend.pseudo_power(S, -0.5)))
    for inverse in (W.mT @ W, P @ P):
        found = np.diag(Q.T @ inverse[0] @ Q)
        assert_close(found[1:] * w[1:], np.ones(7), atol=5e-3)
        assert_close(found[2:] * w[2:], np.ones(6), atol=5e-4)
        assert found[0] < 1e-2
        assert not inverse[[1, 3]].any()
        assert np.isnan(inverse[2]).all()
    assert_close(P[0], P[0].T, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "least", "count", "more"), [
    ("float32", 0.0, 11, 6), ("float64", 0.0, 22, 6), ("float32", 4e-5, 9, 3), ("float64", 1e-3, 8, 3),
])  # fmt: skip
def test_cubics_bring_all_roots_to_one(dtype, least, count, more):
    """From the root of the rounding on; (3 x - x³) / 2 is not there after some steps more."""
    eps = float(np.finfo(dtype).eps)
    x = slow = np.geomspace(max(least, 10 * eps) ** 0.5, 1, 10_001).astype(np.longdouble)
    steps = cubics(eps, least)
    for alpha, beta in steps:
        x = alpha * x - beta * x**3
    assert len(steps) == count
    # The last steps double the digits; coefficients are rounded in float64.
    assert abs(x - 1).max() < max(eps, 4 * np.finfo(float).eps)
    for _ in range(count + more):
        slow = (3 * slow - slow**3) / 2
    assert abs(slow - 1).max() > eps


@pytest.mark.parametrize("make", [
    lambda: rlora.lora_rite(), lambda: rlora.lora_muon(), lambda: rlora.ref_lora(),
])  # fmt: skip
def test_methods_without_eigh_go_the_same_way(make, without_eigh, monkeypatch):
    """The generic path is the oracle; a shift of sqrt(eps), times cond² and the filter's four."""
    problem = make_problem(seed=3, condition=10.0)
    actual, _ = run(make(), problem.on(get("torch")))
    monkeypatch.undo()
    expected, _ = run(make(), problem.on(get("numpy")))
    assert_close(actual.B @ actual.A, expected.B @ expected.A, rtol=4 * 1.5e-8 * 100 * 10)


@pytest.mark.parametrize(("make", "lr"), [
    (rlora.lora_rite, 1e-2), (rlora.ref_lora, 1e-3),
])  # fmt: skip
@pytest.mark.parametrize("zero_B", [True, False])
def test_lost_directions_without_eigh(zero_B, make, lr, without_eigh):
    """B = 0, and B with a column twice: finite, and the loss falls."""
    problem = make_problem(zero_B=zero_B)
    problem.params.B[:, 2] = problem.params.B[:, 1]
    problem = problem.on(get("torch"))
    params, _ = run(make(), problem, steps=20, lr=lr)
    assert float(problem.loss(params)) < float(problem.loss(problem.params))
