"""LoFT: the published code with its transport mended, full rank, and s."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import rlora
from rlora import Factors
from rlora.backends import get
from rlora.testing import assert_close, make_problem, run

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "loft.npz")


def follow(case, **options):
    A, B, T = (GOLDEN[f"{case}.{x}"] for x in ("A0", "B0", "T"))
    method = rlora.loft(damping=0.0, **options)
    params = Factors(A, B)
    state = method.init(params)
    for A, B in zip(GOLDEN[f"{case}.A_path"], GOLDEN[f"{case}.B_path"], strict=True):
        E = params.B @ params.A - T
        grads = Factors(params.B.T @ E, E @ params.A.T)
        params, state = rlora.step(method, params, grads, state, 0.02)
        yield params, Factors(A, B)


@pytest.mark.parametrize("case, decay", [("mended", 0.0), ("decayed", 0.1)])
def test_the_published_code_with_its_transport_mended(case, decay):
    """They add 1e-6 to B's Gram and 1e-8 to A's, whose least eigenvalues are above 0.1 here, and
    do so in every transport: 1e-5 a step, twenty times."""
    for ours, theirs in follow(case, weight_decay=decay):
        for letter, x, y in zip("AB", ours, theirs, strict=True):
            assert_close(x, y, rtol=2e-4, what=letter)


def test_the_published_code_as_it_is_goes_elsewhere():
    """Twice transposed, the transport of the second moment is another one: beyond the second round."""
    distance = [np.abs(x.B - y.B).max() for x, y in follow("published")]
    assert max(distance[:2]) < 1e-5
    assert distance[-1] > 1e-2


def test_of_full_rank_a_lone_factor_is_adamw_on_the_weight():
    """B orthogonal and frozen: A moves as a weight does in Adam, seen in another basis."""
    rng = np.random.default_rng(0)
    problem = make_problem(5, 7, 5, seed=1)
    Q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    params = Factors(problem.params.A, Q)
    method = rlora.loft(damping=0.0)
    state = method.init(params)
    W, M, V = Q @ params.A, 0.0, 0.0
    for t in range(1, 11):
        G = W - problem.target
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        W = W - 0.05 * (M / (1 - 0.9**t)) / (np.sqrt(V / (1 - 0.999**t)) + 1e-8)
        E = Q @ params.A - problem.target
        params, state = rlora.step(method, params, Factors(Q.T @ E, None), state, 0.05)
        assert_close(Q @ params.A, W, rtol=1e-10)


def test_the_scaling_does_not_change_the_path_of_the_weight():
    """The paper's point: no alpha to tune. The same weight from s = 1 and s = 4, eps apart."""
    ends = []
    for s in (1.0, 4.0):
        problem = make_problem(scaling=s, seed=2)
        start = Factors(problem.params.A, problem.params.B / s)
        params, _ = run(rlora.loft(damping=0.0), problem._replace(params=start), steps=10, lr=0.02)
        ends.append(s * params.B @ params.A)
    assert_close(*ends, rtol=1e-6)


def test_a_factor_that_joins_late_has_moments_without_bias():
    """Its own count: in its first step an entry of the full update is 1 in size."""
    problem = make_problem(seed=3)
    method, params = rlora.loft(damping=0.0, first="A"), problem.params
    state = method.init(params)
    for _ in range(2):
        grads = problem.grads(params)._replace(A=None)
        params, state = rlora.step(method, params, grads, state, 0.01)
    D, _ = method.update(problem.grads(params), state, params)
    g = np.linalg.pinv(params.B) @ problem.error(params)
    assert_close(D.A, np.linalg.pinv(params.B) @ np.sign(params.B @ g), rtol=1e-4)


@pytest.mark.parametrize("piece", [1, 50, 1000])
def test_the_update_in_pieces_is_that_as_a_whole(piece, monkeypatch):
    """A stack of layers, in both turns: single rows, rows that do not divide m, and all at once."""
    rng = np.random.default_rng(0)
    numpy, ends = get("numpy"), []
    start = [rng.normal(size=shape) for shape in [(2, 3, 5), (2, 17, 3)]]
    draws = [[rng.normal(size=x.shape) for x in start] for _ in range(4)]
    for entries in (piece, 10**6):
        monkeypatch.setattr(type(numpy), "piece", lambda self, like, entries=entries: entries)
        method, params = rlora.loft(), Factors(*start)
        state = method.init(params)
        for grads in draws:
            params, state = rlora.step(method, params, Factors(*grads), state, 0.01)
        ends.append(params)
    for x, y in zip(*ends, strict=True):
        assert_close(x, y, rtol=1e-12)  # sums of 17 rows in another order


def test_the_memory_is_not_that_of_the_weight():
    rng = np.random.default_rng(0)
    side, method = 2048, rlora.loft()
    params = Factors(rng.normal(size=(2, side)), rng.normal(size=(side, 2)))
    state = method.init(params)
    for _ in range(2):  # a turn of each factor
        tracemalloc.start()
        params, state = rlora.step(method, params, params, state, 1e-3)
        assert tracemalloc.get_traced_memory()[1] < side * side * 8 / 2
        tracemalloc.stop()
