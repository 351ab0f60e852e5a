"""Spectral starts against their formulas, on every library, against PEFT, and against the theory.

float64 figures are compared to 1e-8: vectors of a spectrum whose neighbours differ by a third are
good to about 1e-15, and subspace iteration adds (σ_{k+1}/σ_r)^(2q+1), 1e-9 or less here.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rlora
from rlora import Factors
from rlora.backends import get
from rlora.initializers import (
    Start,
    eva,
    gaussian,
    goat,
    goat_scaling,
    init_ab,
    loi,
    lora_ga,
    lora_one,
    lora_sb,
    milora,
    olora,
    orthogonal,
    pissa,
    randomized_svd,
)
from rlora.testing import assert_close

norm, svd = np.linalg.norm, np.linalg.svd
TOLERANCES = [("float64", 1e-8), ("float32", 1e-4)]  # gate G14 for float32
R, S = 4, 2.0  # rank and scaling


def spectrum(m=40, n=30, *, seed=0, ratio=0.7, lead=()):
    """A matrix whose singular values fall by `ratio`."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(*lead, d, min(m, n))))[0] for d in (m, n))
    return U * ratio ** np.arange(min(m, n)) @ V.swapaxes(-1, -2)


def signed_svd(M):
    """NumPy's SVD with the largest entry of each u positive."""
    U, sigma, Vt = svd(M, full_matrices=False)
    sign = np.sign(np.take_along_axis(U, np.abs(U).argmax(0)[None], 0))
    return U * sign, sigma, Vt * sign.T


def numpy_pair(backend, pair):
    return Factors(*map(backend.to_numpy, pair))


def expected(name, M):
    """A and B of the papers, in NumPy."""
    U, sigma, Vt = signed_svd(-M if name.startswith("lora_one") else M)
    first, second = slice(0, R), slice(R, 2 * R)
    half = np.diag(sigma[first] ** 0.5)
    c = len(M) ** 0.25 / 4
    if name == "lora_sb":
        U, sigma, Vt = signed_svd(-0.1 * np.sign(M))
        return np.diag(sigma[first]) @ Vt[first], U[:, first]
    return {
        "lora_one": lambda: (
            half @ Vt[first] / (128 * sigma[0]) ** 0.5,
            U[:, first] @ half / (128 * sigma[0]) ** 0.5,
        ),
        "lora_one theory": lambda: (0.5 * half @ Vt[first], 0.5 * U[:, first] @ half),
        "lora_ga": lambda: (c * Vt[first], c * U[:, second]),
        "lora_ga peft": lambda: (Vt[first], c * U[:, second] * sigma[second]),
        "pissa": lambda: (half @ Vt[first] / S**0.5, U[:, first] @ half / S**0.5),
        "loi": lambda: (0.3 * Vt[second], U[:, first]),
        "milora": lambda: minor(U, sigma, Vt),
        "olora": lambda: gram_schmidt(M),
        "eva": lambda: (principal(M), np.zeros((7, R))),
    }[name]()


def minor(U, sigma, Vt):
    half = np.diag((sigma[-R:] / S) ** 0.5)
    return half @ Vt[-R:], U[:, -R:] @ half


def gram_schmidt(M):
    """Q_r and R_r column by column: orthonormal columns whose products with W0's own are positive."""
    Q = np.zeros((len(M), R))
    for j in range(R):
        q = M[:, j] - Q @ (Q.T @ M[:, j])
        q -= Q @ (Q.T @ q)  # once more, for orthogonality to the last place
        Q[:, j] = q / norm(q)
    return Q.T @ M, Q


def principal(X):
    """Eigenvectors of the covariance, most variance first, the largest entry of each positive."""
    V = np.linalg.eigh(np.cov(X.T))[1][:, ::-1][:, :R]
    return (V * np.sign(np.take_along_axis(V, np.abs(V).argmax(0)[None], 0))).T


STARTS = {
    "lora_one": lora_one,
    "lora_one theory": lambda M, r: lora_one(M, r, gamma=0.25, form="theory"),
    "lora_ga": lora_ga,
    "lora_ga peft": lambda M, r: lora_ga(M, r, form="peft"),
    "pissa": lambda M, r: pissa(M, r, scaling=S),
    "loi": lambda M, r: loi(M, r, alpha=0.3),
    # The signs of a gradient have a flat spectrum: search all of it.
    "lora_sb": lambda M, r: lora_sb(M, r, lr=0.1, oversample=40),
    "milora": lambda M, r: milora(M, r, scaling=S),
    "olora": olora,
    "eva": lambda M, r: eva(M, r, out_features=7),
}
# float32 knows the least singular values to 1e-7 of the largest: let them be no smaller than 0.05.
RATIO = {"milora": 0.9}
WITH_OFFSET = {"lora_ga", "lora_ga peft", "pissa", "loi", "milora", "olora"}


# --- formulas, on every library -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("name", STARTS)
def test_equals_its_formula_on_every_library(name, dtype, tolerance, backend):
    M = spectrum(ratio=RATIO.get(name, 0.7))
    start = STARTS[name](backend.asarray(M, dtype), R)
    assert str(start.params.A.dtype).endswith(dtype)
    pair = numpy_pair(backend, start.params)
    for actual, exact in zip(pair, expected(name, M), strict=True):
        assert_close(actual, exact, rtol=tolerance, what=name)
    assert_close(pair.B @ pair.A, np.matmul(*expected(name, M)[::-1]), rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("name", STARTS)
def test_the_function_stays_where_there_is_an_offset(name, dtype, tolerance, backend):
    M = backend.asarray(spectrum(ratio=RATIO.get(name, 0.7)), dtype)
    W0 = backend.asarray(np.random.default_rng(1).normal(size=(40, 30)), dtype)
    start = STARTS[name](M, R)
    W = start.base(W0, S)
    assert (start.offset is not None) == (name in WITH_OFFSET)
    if start.offset is None:
        assert W is W0
        return
    pair, W, W0 = numpy_pair(backend, start.params), backend.to_numpy(W), backend.to_numpy(W0)
    assert norm(W - W0) > 0.1
    assert_close(W + S * pair.B @ pair.A, W0, rtol=1e-2 * tolerance)  # one rounding, not a search


def test_goat_is_its_segments(backend):
    """Expert i has the triplets from i floor(min(m, n)/E) on, and the offset their mean."""
    W0, experts, s = spectrum(20, 13, ratio=0.8), 3, goat_scaling(13, 2)
    start = goat(backend.asarray(W0, "float64"), 6, experts=experts, scaling=s)
    stacked, offset = numpy_pair(backend, start.params), numpy_pair(backend, start.offset)
    U, sigma, Vt = signed_svd(W0)
    for i in range(experts):
        j = slice(4 * i, 4 * i + 2)
        root = np.sqrt(sigma[j] / (10.0 * s))
        assert_close(stacked.A[i], root[:, None] * Vt[j], rtol=1e-8)
        assert_close(stacked.B[i], U[:, j] * root, rtol=1e-8)
    mean = (stacked.B @ stacked.A).mean(0)
    assert_close(offset.B @ offset.A, mean, rtol=1e-12)
    W = backend.to_numpy(start.base(backend.asarray(W0, "float64"), s))
    assert_close(W + s * mean, W0, rtol=1e-12)


def test_gaussian_start(backend):
    """N(0, 1/r²): over 3000 entries the deviation is right to 1/sqrt(6000) = 1.3 %; four times that."""
    start = gaussian(backend.asarray(np.zeros((6, 500)), "float64"), 6)
    A, B = numpy_pair(backend, start.params)
    assert A.shape == (6, 500)
    assert not B.any()
    assert B.shape == (6, 6)
    assert start.offset is None
    assert abs(6 * A.std() - 1) < 0.05
    assert_close(A, np.random.default_rng(0).standard_normal((6, 500)) / 6, rtol=1e-15)


def test_init_ab(backend):
    """Uniform in ±size/√n: over 3000 entries the mean square is right to 2 %; twice that."""
    W0 = backend.asarray(spectrum(100, 30), "float64")
    start = init_ab(W0, 30, size=2.0)
    A, B = numpy_pair(backend, start.params)
    for x, shape in ((A, (30, 30)), (B, (100, 30))):
        assert x.shape == shape
        assert abs(x).max() <= 2 / 30**0.5
        assert abs(x.mean()) < 4 * 2 / (90 * x.size) ** 0.5  # of both signs: four deviations
    assert abs((B**2).mean() * 30 / 4 * 3 - 1) < 0.04
    assert start.base(W0, S) is W0
    kept = init_ab(W0, 30, size=2.0, offset=True)
    W = backend.to_numpy(kept.base(W0, S))
    assert_close(W + S * B @ A, spectrum(100, 30), rtol=1e-12)


def test_orthogonal_start(backend):
    """Two starts from zero side by side: Grams of rank r/2, and a product of zero."""
    start = orthogonal(backend.asarray(np.zeros((50, 400)), "float64"), 6)
    A, B = numpy_pair(backend, start.params)
    assert (A.shape, B.shape, start.offset) == ((6, 400), (50, 6), None)
    assert_close(B @ A, np.zeros((50, 400)), atol=1e-15)
    for gram, size in ((A @ A.T, 400), (B.T @ B, 50)):
        w = np.linalg.eigvalsh(gram)
        assert abs(w[:3]).max() < 1e-13
        # Squared singular values of a Gaussian (3, size), by 0.1²: size times (1 ± √(3/size))².
        spread = (3 / size) ** 0.5
        assert (
            0.01 * size * (1 - 2 * spread) ** 2 < w[3] < w[5] < 0.01 * size * (1 + 2 * spread) ** 2
        )


def test_the_size_of_an_orthogonal_start():
    """0.1 unless told otherwise; the double of it in both factors, which rounds nothing."""
    one, two = (orthogonal(np.zeros((5, 7)), 4, size=size).params for size in (0.1, 0.2))
    for x, y in zip(one, two, strict=True):
        assert (2 * x == y).all()
    for x, y in zip(one, orthogonal(np.zeros((5, 7)), 4).params, strict=True):
        assert (x == y).all()


def test_random_starts_of_stacks():
    W0 = np.zeros((2, 3, 8, 6), np.float32)
    for make in (init_ab, orthogonal):
        start = make(W0, 4)
        assert start.params.A.shape == (2, 3, 4, 6)
        assert start.params.B.shape == (2, 3, 8, 4)
        assert start.params.A.dtype == start.params.B.dtype == np.float32
        assert (start.params.A[0, 0] != start.params.A[1, 2]).all()
        assert (make(W0, 4, seed=1).params.A != start.params.A).all()
        assert abs(start.params.B[1, 2] @ start.params.A[0, 0]).max() > 1e-3  # each has its own Q


def test_stacks_of_layers(backend):
    """Leading axes: each layer as if it were alone."""
    M = backend.asarray(spectrum(24, 20, lead=(2, 3)), "float64")
    start, alone = lora_ga(M, R, form="peft"), lora_ga(M[1, 2, ...], R, form="peft")
    for x, y in zip(start.params, alone.params, strict=True):
        assert_close(backend.to_numpy(x)[1, 2], backend.to_numpy(y), rtol=1e-8)
    assert start.base(M, S).shape == M.shape
    experts = goat(M, 4, experts=2, scaling=1.0)
    assert experts.params.A.shape == (2, 3, 2, 2, 20)
    assert experts.offset.B.shape == (2, 3, 24, 4)
    for make in (milora, olora, lambda M, r: eva(M, r, out_features=5)):
        for x, y in zip(make(M, R).params, make(M[1, 2, ...], R).params, strict=True):
            assert_close(backend.to_numpy(x)[1, 2], backend.to_numpy(y), rtol=1e-8)
    assert gaussian(M, 4).params.B.shape == lora_one(M, 4).params.B.shape == (2, 3, 24, 4)


def test_bfloat16_weights():
    """float32 factors, equal to those of the float32 copy; the base weight stays bfloat16."""
    torch = get("torch").xp
    low = torch.asarray(spectrum()).to(torch.bfloat16)
    for name, make in STARTS.items():
        start, wide = make(low, R), make(low.float(), R)
        for x, y in zip(start.params, wide.params, strict=True):
            assert x.dtype == torch.float32
            assert_close(x, y, rtol=1e-6, what=name)
    for make in (gaussian, init_ab, orthogonal):
        assert {x.dtype for x in make(low, R).params} == {torch.float32}
    start = pissa(low, R)
    rounded = Factors(*(x.to(torch.bfloat16) for x in start.params))
    W = Start(rounded, rounded).base(low, 1.0)
    assert W.dtype == torch.bfloat16
    B, A = rounded.B.float(), rounded.A.float()
    assert_close(W.float() + B @ A, low.float(), atol=2**-8 * float(abs(low).max()))  # one rounding


def test_a_base_weight_of_fewer_digits_than_the_factors():
    """Rounded once, at the end: the terms cancel here, and float32 would lose half of the rest."""
    A, B = np.random.default_rng(0).normal(size=(2, 6, 6))
    W0 = (B @ A + 1e-4).astype(np.float32)
    W = Start(Factors(A, B), offset=Factors(A, B)).base(W0, 1.0)
    assert W.dtype == np.float32
    assert_close(W, W0.astype(np.float64) - B @ A, rtol=1e-7)


@pytest.mark.parametrize("name", ["gaussian", "init_ab", "orthogonal", "eva"])
def test_both_factors_are_where_the_weight_is(name, monkeypatch):
    """B too, of which nothing but the shape follows from the weight: torch's device without values.

    That knows of no autocast, so that no search runs there.
    """
    torch = get("torch").xp
    found = lambda M, rank: (M[..., :rank], None, None)  # noqa: E731
    monkeypatch.setattr(rlora.initializers.inputs, "randomized_svd", found)
    W0 = torch.zeros((12, 8), device="meta")
    options = {"out_features": 5} if name == "eva" else {}
    for x in getattr(rlora.initializers, name)(W0, 4, **options).params:
        assert x.device.type == "meta"


def test_torch_parameters():
    """A weight that requires a gradient, under no_grad as the docstring asks."""
    torch = get("torch").xp
    weight = torch.nn.Parameter(torch.asarray(spectrum(16, 12)))
    with torch.no_grad():
        start = pissa(weight, 3)
        W = start.base(weight, 1.0)
    assert not any(x.requires_grad for x in (*start.params, W))


def test_jax_jit():
    """No entry is read, so a start can be traced."""
    jax = get("jax")
    M = jax.asarray(spectrum(), "float64")
    jitted = jax.compile(lambda G: lora_one(G, R).params)(M)
    for x, y in zip(jitted, lora_one(M, R).params, strict=True):
        assert_close(x, y, rtol=1e-10)


def test_autocast_does_not_reach_inside():
    torch = get("torch").xp
    M = torch.asarray(spectrum(), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = pissa(M, R)
        W = start.base(M, 1.0)
    assert_close(start.params.A, pissa(M, R).params.A)
    assert_close(W, start.base(M, 1.0))


# --- the search -----------------------------------------------------------------------------------------


def test_seeds():
    M = np.random.default_rng(0).normal(size=(60, 50))
    again = [randomized_svd(M, 3, seed=7) for _ in range(2)]
    for x, y in zip(*again, strict=True):
        assert (x == y).all()
    assert (randomized_svd(M, 3, seed=8)[0] != again[0][0]).any()
    assert (gaussian(M, 3, seed=1).params.A != gaussian(M, 3).params.A).any()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 9)])
def test_the_sign_rule(shape, backend):
    """Whatever sign the library gives, the largest entry of each column of U is positive."""
    U, _, Vt = map(
        backend.to_numpy, randomized_svd(backend.asarray(spectrum(*shape), "float64"), R)
    )
    assert (np.take_along_axis(U, np.abs(U).argmax(0)[None], 0) > 0).all()
    flipped = randomized_svd(backend.asarray(-spectrum(*shape), "float64"), R)
    assert_close(backend.to_numpy(flipped[0]), U, rtol=1e-8)
    assert_close(backend.to_numpy(flipped[2]), -Vt, rtol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), st.floats(0.3, 1.0),
    st.integers(0, 9),
)  # fmt: skip
def test_orthonormal_and_close_to_the_best(m, n, rank, ratio, seed):
    """|M - U S Vᵀ|₂ <= 2.5 σ_{r+1}, and S never more than σ.

    Halko et al., theorem 9.3 and corollary 10.10: the error is at most σ_{r+1} (1 + c^(1/9)) with
    c = 1 + sqrt(r/9) + e sqrt(r + 10)/10 sqrt(50) < 10 in the mean for 10 more columns and 4
    iterations, 2.3 σ_{r+1}; the ninth root leaves little room for bad luck.
    """
    rank = min(rank, m, n)
    M = spectrum(m, n, ratio=ratio, seed=seed)
    U, sigma, Vt = randomized_svd(M, rank, seed=seed)
    rounding = 1e-13
    assert_close(U.T @ U, np.eye(rank), atol=rounding)
    assert_close(Vt @ Vt.T, np.eye(rank), atol=rounding)
    after = ratio**rank if rank < min(m, n) else 0.0
    assert norm(M - U * sigma @ Vt, 2) <= 2.5 * after + rounding
    assert (sigma <= ratio ** np.arange(rank) + rounding).all()
    assert (np.diff(sigma) <= rounding).all()


def test_more_iterations_serve_a_flat_spectrum():
    M = np.random.default_rng(0).normal(size=(120, 100))
    exact = svd(M)[1][:4]
    errors = [norm(randomized_svd(M, 4, iterations=q)[1] - exact) for q in (0, 4, 16)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert_close(randomized_svd(M, 4, oversample=96)[1], exact, rtol=1e-13)


def test_rank_deficient_and_zero(backend):
    """No NaN where σ_r = 0; a zero gradient gives zero factors for LoRA-One."""
    low = spectrum(40, 2) @ spectrum(2, 30)
    for M in (low, np.zeros((40, 30))):
        for make in STARTS.values():
            for x in numpy_pair(backend, make(backend.asarray(M, "float32"), R).params):
                assert np.isfinite(x).all()
    assert not any(x.any() for x in numpy_pair(backend, lora_one(backend.asarray(M), R).params))
    A, B = numpy_pair(backend, lora_one(backend.asarray(low), R, gamma=1.0, form="theory").params)
    assert_close(B @ A, -low, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------

GOOD = np.ones((8, 6))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lora_one(GOOD, 0), ValueError, r"rank must be in 1\.\.6 for \(8, 6\), got 0"),
        (lambda: pissa(GOOD, 7), ValueError, r"rank must be in 1\.\.6 for \(8, 6\), got 7"),
        (lambda: lora_ga(GOOD, 4), ValueError, r"rank must be in 1\.\.3"),
        (lambda: loi(GOOD, 4), ValueError, r"rank must be in 1\.\.3"),
        (lambda: milora(GOOD, 7), ValueError, r"rank must be in 1\.\.6 for \(8, 6\), got 7"),
        (lambda: milora(GOOD, 2, scaling=0.0), ValueError, "scaling"),
        (lambda: olora(GOOD, 7), ValueError, r"rank must be in 1\.\.6"),
        (lambda: eva(GOOD, 7, out_features=4), ValueError, r"rank must be in 1\.\.6"),
        (lambda: eva(GOOD, 2, out_features=0), ValueError, "out_features"),
        (lambda: orthogonal(GOOD, 3), rlora.ShapeError, "rank must be even .* got 3"),
        (lambda: orthogonal(GOOD, 2, size=0.0), ValueError, "size must be positive"),
        (lambda: init_ab(GOOD, 2, size=-1.0), ValueError, "size"),
        (lambda: init_ab(GOOD, 2, offset=1), TypeError, "offset must be True or False, got 1"),
        (lambda: init_ab(GOOD, 2, seed=-1), ValueError, "seed"),
        (lambda: lora_sb(GOOD, 2.0, lr=0.1), TypeError, "rank must be an integer, got 2.0"),
        (lambda: gaussian(GOOD, True), TypeError, "rank"),
        (lambda: gaussian(GOOD, 2, seed=-1), ValueError, "seed"),
        (lambda: randomized_svd(GOOD, 2, seed=None), TypeError, "seed"),
        (lambda: randomized_svd(GOOD, 2, oversample=-1), ValueError, "oversample"),
        (lambda: lora_one(GOOD, 2, iterations=1.5), TypeError, "iterations"),
        (lambda: lora_one(GOOD, 2, iteration=1), TypeError, "iteration"),
        (lambda: lora_one(GOOD, 2, gamma=0.0), ValueError, "gamma must be positive, got 0.0"),
        (lambda: lora_one(GOOD, 2, gamma=float("nan")), ValueError, "gamma"),
        (lambda: lora_ga(GOOD, 2, gamma=-1.0), ValueError, "gamma"),
        (lambda: lora_ga(GOOD, 2, gamma="16"), TypeError, "gamma"),
        (lambda: lora_one(GOOD, 2, form="peft"), ValueError, "form must be one of 'algorithm'"),
        (lambda: lora_ga(GOOD, 2, form="theory"), ValueError, "form must be one of 'original'"),
        (lambda: lora_sb(GOOD, 2, lr=0), ValueError, "lr must be positive"),
        (lambda: pissa(GOOD, 2, scaling=0.0), ValueError, "scaling"),
        (lambda: loi(GOOD, 2, alpha=float("inf")), ValueError, "alpha"),
        (lambda: goat(GOOD, 4, experts=3, scaling=1.0), ValueError, "multiple .* got 4 and 3"),
        (lambda: goat(GOOD, 4, experts=0, scaling=1.0), ValueError, "experts"),
        (lambda: goat(GOOD, 4, experts=2, scaling=1.0, rho=0.0), ValueError, "rho"),
        (lambda: goat_scaling(0, 1), ValueError, "n must be"),
        (lambda: goat_scaling(6, 1, eta=0.0), ValueError, "eta"),
        (lambda: lora_one(np.ones(4), 1), rlora.ShapeError, r"got shape \(4,\)"),
        (lambda: lora_one([[1.0]], 1), rlora.NamespaceError, "list"),
        (lambda: pissa(np.ones((3, 3), int), 1), rlora.NamespaceError, "int64"),
        (lambda: pissa(GOOD, 1).base(GOOD.T, 1.0), rlora.ShapeError, r"\(8, 6\), got \(6, 8\)"),
        (lambda: pissa(GOOD, 1).base(GOOD, float("nan")), ValueError, "scaling"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_to(backend):
    M = backend.asarray(spectrum(), "float64")
    before = backend.to_numpy(M).copy()
    for make in STARTS.values():
        make(M, R).base(M, S)
    goat(M, 4, experts=2, scaling=1.0).base(M, 1.0)
    assert (backend.to_numpy(M) == before).all()


# --- LoRA-One: gate G8, T4.1 to T4.3 ----------------------------------------------------------------------


def teacher(d, r, condition, N, seed=0):
    """``y = (W0 + Δ) x``: Δ (d, d) of rank r, the covariance C of N inputs, and G = -Δ C at W0."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(d, r)))[0] for _ in "UV")
    delta = U * np.linspace(1.0, 1.0 / condition, r) @ V.T
    X = rng.normal(size=(N, d))
    C = X.T @ X / N
    return delta, C, -delta @ C


def factor_grads(pair, base, delta, C):
    error = (base + pair.B @ pair.A - delta) @ C
    return Factors(pair.B.T @ error, error @ pair.A.T)


def test_alignment_from_the_usual_start():
    """T4.1: B lies in the gradient's column space at once; A aligns the better the smaller it starts."""
    delta, C, G = teacher(64, 2, 2.0, 6400)
    U, _, Vt = svd(-G)
    worst_B, best_A = 0.0, {}
    for size in (0.3, 1e-2, 1e-5):
        A = size * np.random.default_rng(5).normal(size=(8, 64))
        pair, angles = Factors(A, np.zeros((64, 8))), []
        for _ in range(250):
            pair = rlora.apply_updates(pair, factor_grads(pair, 0.0, delta, C), 0.05)
            (Q_B, _), (Q_A, _) = (top_two(x) for x in (pair.B, pair.A.T))
            worst_B = max(worst_B, norm(U[:, 2:].T @ Q_B, 2))
            angles.append(norm(Vt[2:] @ Q_A, 2))
        best_A[size] = min(angles)
    assert worst_B <= 1e-10
    assert best_A[0.3] > 0.9
    assert best_A[0.3] > 5 * best_A[1e-2] > 10 * best_A[1e-5]
    assert best_A[1e-5] < 0.05


def top_two(X):
    """The two leading left singular vectors, from the small side."""
    Q, Rt = np.linalg.qr(X)
    U, sigma, _ = svd(Rt)
    return Q @ U[:, :2], sigma


def test_one_step_suffices():
    """T4.2: the start is as close to Δ as the sample covariance to the identity."""
    errors = {}
    for N in (640, 6400, 64000):
        delta, C, G = teacher(64, 2, 2.0, N)
        A, B = lora_one(G, 2, gamma=1.0, form="theory").params
        errors[N] = norm(B @ A - delta, 2) / norm(delta, 2)
        assert errors[N] <= 2 * norm(C - np.eye(64), 2)
    assert errors[640] < 0.5
    assert errors[64000] < 0.05


def test_spectral_start_and_preconditioning():
    """T4.3: relative errors after 30 steps; LoRA-GA's B lies outside the signal and stays there."""
    delta, C, G = teacher(100, 4, 5.0, 1600)
    one = lora_one(G, 4, gamma=1.0, form="theory")
    plain = Start(
        Factors(0.01 * np.random.default_rng(1).normal(size=(4, 100)), np.zeros((100, 4)))
    )
    scaled = rlora.scaled_sgd(damping=0.0)

    def error(start, steps, method=None):
        pair, base = start.params, start.base(np.zeros((100, 100)), 1.0)
        for _ in range(steps):
            grads = factor_grads(pair, base, delta, C)
            if method:
                pair, _ = rlora.step(method, pair, grads, method.init(pair), 0.5)
            else:
                pair = rlora.apply_updates(pair, grads, 0.5)
        return norm(base + pair.B @ pair.A - delta) / norm(delta)

    assert error(one, 0) < 0.3
    assert error(one, 30) < 1e-2
    assert error(one, 30, scaled) < 1e-5
    assert error(plain, 30) > 0.1
    ga = lora_ga(G, 4, gamma=64.0)
    assert error(ga, 30) > 0.05
    assert error(ga, 300) > 0.95 * error(ga, 60) > 0.05


# --- the other theory -------------------------------------------------------------------------------------


def cosine(X, Y):
    return float((X * Y).sum() / (norm(X) * norm(Y)))


def test_lora_ga_steps_along_the_best_rank_2r():
    """algorithms §7(7): B G_A + G_B A is the truncation of G to rank 2r, but not as PEFT scales it."""
    G = spectrum(ratio=0.9)
    U, sigma, Vt = svd(G)
    best = U[:, : 2 * R] * sigma[: 2 * R] @ Vt[: 2 * R]

    def first_step(form):
        A, B = lora_ga(G, R, form=form, oversample=30).params
        return B @ (B.T @ G) + (G @ A.T) @ A

    assert cosine(first_step("original"), best) == pytest.approx(1.0, abs=1e-12)
    assert cosine(first_step("peft"), best) < 0.95


def test_loi_tangent_space_holds_the_best_rank_2r():
    G = spectrum(ratio=0.9)
    U, sigma, Vt = svd(G)
    best = U[:, : 2 * R] * sigma[: 2 * R] @ Vt[: 2 * R]
    A, B = loi(G, R, alpha=0.2, oversample=30).params
    P_A, P_B = np.linalg.pinv(A) @ A, B @ np.linalg.pinv(B)
    assert_close(P_B @ G + G @ P_A - P_B @ G @ P_A, best, rtol=1e-10)


def test_lora_sb_is_the_first_step_of_adam():
    """B orthonormal, B A the truncated sign step; every entry of the step itself is lr."""
    G = np.outer([1.0, -2.0, 3.0], [4.0, 5.0, -6.0, 7.0])
    A, B = lora_sb(G, 1, lr=0.1).params
    assert_close(B @ A, -0.1 * np.sign(G), atol=1e-14)
    A, B = lora_sb(spectrum(), R, lr=0.1).params
    assert_close(B.T @ B, np.eye(R), atol=1e-13)
    gram = A @ A.T
    assert_close(gram, np.diag(np.diag(gram)), atol=1e-12)  # R = S is diagonal


def test_goat_scaling_makes_gradients_those_of_the_full_weight():
    """E[s² AᵀA] = η I for kaiming-uniform A. The entries have deviation below 1 over 20000 draws: 1/141."""
    n, r_e, eta, draws = 6, 2, 0.5, 20000
    A = np.random.default_rng(0).uniform(-(n**-0.5), n**-0.5, size=(draws, r_e, n))
    mean = goat_scaling(n, r_e, eta=eta) ** 2 * (A.swapaxes(1, 2) @ A).mean(0)
    assert_close(mean, eta * np.eye(n), atol=4 / draws**0.5)


def test_goat_shifts_nothing_in_expectation():
    """Top-2 of 4 experts, renormalised weights, uniform routing: the mean over draws is W0."""
    W0, rng, draws = spectrum(16, 12), np.random.default_rng(0), 4000
    start = goat(W0, 8, experts=4, scaling=2.0)
    products = start.params.B @ start.params.A
    chosen = rng.random((draws, 4)).argsort(1)[:, :2]
    p = rng.random((draws, 1))
    weights = np.zeros((draws, 4))
    np.put_along_axis(weights, chosen, np.hstack([p, 1 - p]), 1)
    W = start.base(W0, 2.0) + 2.0 * np.einsum("e,emn->mn", weights.mean(0), products)
    assert norm(W - W0) <= 4 / draws**0.5 * norm(2.0 * products)
    assert norm(start.base(W0, 2.0) + 2.0 * products[0] - W0) > 0.1 * norm(2.0 * products[0])


def test_the_page_of_starts_has_every_start():
    page = Path(__file__).parents[1] / "docs" / "reference" / "starts.md"
    named = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    no_starts = {"Start", "goat_scaling", "randomized_svd"}
    assert sorted(named) == sorted(set(rlora.initializers.__all__) - no_starts)


# --- PEFT -------------------------------------------------------------------------------------------------


def peft_layer(**options):
    """PEFT's pair, its base weight, and the gradient that it was shown, for one small layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16, bias=False))
    W0 = model[0].weight.detach().clone()
    x, y = torch.randn(40, 12, requires_grad=True), torch.randn(40, 16)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **options)
    seen = []

    def backward():
        torch.nn.functional.mse_loss(model(x), y).backward()
        seen.append(model[0].weight.grad.clone())

    if options["init_lora_weights"] == "lora_ga":
        preprocess_loraga(model, config, backward)
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
    return Factors(A, B), layer.base_layer.weight.detach(), W0, seen


def test_pissa_is_peft_s():
    """float32 SVDs of a 16 x 12 weight: some tens of roundings."""
    pair, base, W0, _ = peft_layer(init_lora_weights="pissa")
    start = pissa(W0, 3, scaling=S)
    assert_close(start.params.B @ start.params.A, pair.B @ pair.A, rtol=1e-5)
    assert_close(start.base(W0, S), base, rtol=1e-5)
    for x, y in zip(start.params, pair, strict=True):
        assert_close(abs(x), abs(y), rtol=1e-4)  # PEFT leaves the signs to the library


def test_olora_is_peft_s():
    """Up to the sign of each column, which PEFT leaves to the library."""
    pair, base, W0, _ = peft_layer(init_lora_weights="olora")
    start = olora(W0, 3)
    for x, y in zip(start.params, pair, strict=True):
        assert_close(abs(x), abs(y), rtol=1e-5)
    assert_close(start.base(W0, S), base, rtol=1e-5)


def test_orthogonal_is_peft_s():
    """The same law: a product of zero, Grams of rank 1 of 2, and entries of mean square 1/200.

    12,000 entries in 2,000 independent pairs with four degrees of freedom: 2 %, and thrice that.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4000, 2000, bias=False))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="orthogonal")
    layer = get_peft_model(model, config).base_model.model[0]
    theirs = Factors(*(m["default"].weight.detach().numpy() for m in (layer.lora_A, layer.lora_B)))
    ours = orthogonal(np.zeros((2000, 4000), np.float32), 2).params
    for A, B in (theirs, ours):
        assert abs(B @ A).max() < 1e-6
        assert np.linalg.matrix_rank(A) == np.linalg.matrix_rank(B) == 1
        for x in (A, B):
            assert abs(200 * (x**2).mean() - 1) < 0.06


def test_eva_is_peft_s():
    """PEFT looks at a batch twice before it calls its directions found; float32 throughout."""
    import torch
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    torch.manual_seed(0)
    x = torch.randn(40, 12) @ torch.diag(0.7 ** torch.arange(12.0)) + 3.0
    config = LoraConfig(
        r=3, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    model = torch.nn.Sequential(torch.nn.Linear(12, 16, bias=False))
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model, [x, x], forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    layer = model.base_model.model[0]
    A, B = eva(x, 3, out_features=16).params
    assert_close(abs(A), abs(layer.lora_A["default"].weight.detach()), rtol=1e-4)
    assert not B.any()
    assert not layer.lora_B["default"].weight.any()


def test_lora_ga_is_peft_s():
    """4 r = min(m, n) here, so PEFT's random search is exact; its signs are random all the same."""
    from peft import LoraGAConfig

    pair, base, W0, (G,) = peft_layer(
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=9)
    )
    A, B = lora_ga(G, 3, gamma=9.0, form="peft").params
    A = A * (A * pair.A).sum(1, keepdim=True).sign()
    B = B * (B * pair.B).sum(0, keepdim=True).sign()
    for x, y in zip((A, B), pair, strict=True):
        assert_close(x, y, rtol=1e-4)
    assert_close(Start(pair, Factors(A, B)).base(W0, S), base, rtol=1e-5)
    original = lora_ga(G, 3, gamma=9.0).params
    assert norm(original.B) > 5 * norm(B)  # balanced, and much larger than in PEFT
