"""Scaled SGD and AdamW against a float64 oracle, the published code's numbers, and the theory."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from oracle import ScaledOracle

import rlora
from rlora import Factors, Transform, chain
from rlora.backends import get
from rlora.core import metric
from rlora.core.decay import add_decayed_weights, decay_weights_after
from rlora.core.moments import scale_by_adam
from rlora.methods.scaled import OFFICIAL, PEFT, scale_by_gram
from rlora.testing import assert_close, make_problem

DAMPINGS = [("relative", 1e-6), ("absolute", 1e-2), ("covariant", 1e-3)]
CASES = [
    ("adamw", {"placement": placement, "order": order})
    for placement in ("before", "after", "both")
    for order in ("jacobi", "gauss_seidel")
] + [("sgd", {"order": "jacobi"}), ("sgd", {"momentum": 0.9}), ("sgd", {"order": "gauss_seidel"})]


def products(method, problem, backend, *, lr, steps=20):
    params, state = problem.params, method.init(problem.params, problem.scaling)
    move = backend.compile(lambda p, g, s: rlora.step(method, p, g, s, lr))
    path = []
    for _ in range(steps):
        params, state = move(params, problem.grads(params), state)
        path.append(backend.to_numpy(params.B @ params.A))
    return np.stack(path)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize("mode, damping", DAMPINGS)
@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_equals_the_oracle(kind, options, mode, damping, dtype, tolerance, backend):
    """20 steps; the tolerances are those of gate G14: rounding, times the growth over the path."""
    problem = make_problem(scaling=2.0, seed=3)
    lr, decay = (0.02, 0.01) if kind == "adamw" else (0.05, 0.0)
    shared = {"damping": damping, "damping_mode": mode, "weight_decay": decay, **options}
    if kind == "adamw":
        shared |= {"b1": 0.9, "b2": 0.999}
    expected = ScaledOracle(lr=lr, kind=kind, **shared).run(problem)
    method = (rlora.scaled_adamw if kind == "adamw" else rlora.scaled_sgd)(**shared)
    actual = products(method, problem.on(backend, dtype), backend, lr=lr)
    assert_close(actual, expected, rtol=tolerance)


def test_jax_jit_equals_eager():
    problem, method = make_problem(seed=4).on(get("jax")), rlora.scaled_adamw()
    jitted = products(method, problem, get("jax"), lr=0.05)
    params, state = problem.params, method.init(problem.params)
    for _ in range(20):
        params, state = rlora.step(method, params, problem.grads(params), state, 0.05)
    assert_close(jitted[-1], params.B @ params.A, rtol=1e-12)


# --- published code -------------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "official.npz")
OFFICIAL_CASES = {
    "gpt2_adamw": (rlora.scaled_adamw(**OFFICIAL, weight_decay=0.1), 1e-2),
    "mistral_adamw": (
        rlora.scaled_adamw(**OFFICIAL | {"b2": 0.999}, bias_correction=False, weight_decay=0.1),
        1e-2,
    ),
    "mistral_adamw_corrected": (
        rlora.scaled_adamw(**OFFICIAL | {"b2": 0.999}, weight_decay=0.0),
        1e-2,
    ),
    "mistral_sgd": (
        rlora.scaled_sgd(damping=1e-6, damping_mode="absolute", weight_decay=0.05),
        1e-1,
    ),
}


@pytest.mark.parametrize("case", OFFICIAL_CASES)
@pytest.mark.parametrize(
    "dtype, tolerance",
    # Their identity times 1e-6 is rounded to float32 before it meets float64: 4e-8 relative.
    [("float64", 1e-9), ("float32", 1e-5)],
)
def test_presets_reproduce_the_official_code(case, dtype, tolerance):
    method, lr = OFFICIAL_CASES[case]
    blocks = 2 if case.startswith("gpt2") else 1
    A, B, T = (np.split(GOLDEN[f"{case}.{x}"].astype(dtype), blocks) for x in "ABT")
    params = [Factors(*pair) for pair in zip(A, B, strict=True)]
    state = method.init(params)
    for A_t, B_t in zip(GOLDEN[f"{case}.A_path"], GOLDEN[f"{case}.B_path"], strict=True):
        E = [p.B @ p.A - t for p, t in zip(params, T, strict=True)]
        grads = [Factors(p.B.T @ e, e @ p.A.T) for p, e in zip(params, E, strict=True)]
        params, state = rlora.step(method, params, grads, state, lr)
        assert_close(np.concatenate([p.A for p in params]), A_t, rtol=tolerance)
        assert_close(np.concatenate([p.B for p in params]), B_t, rtol=tolerance)


def test_peft_preset_is_its_formula():
    """Over SGD, and over torch's AdamW with its own defaults."""
    problem = make_problem(seed=5)
    sgd = rlora.scaled_sgd(damping=1e-2, damping_mode="absolute")
    A, B = problem.params
    G = problem.grads(problem.params)
    direction, _ = sgd.update(G, sgd.init(problem.params), problem.params)
    G_A = np.linalg.pinv(B.T @ B + 1e-2 * np.eye(3)) @ G.A
    G_B = G.B @ np.linalg.pinv(A @ A.T + 1e-2 * np.eye(3))
    assert_close(direction.A, G_A, rtol=1e-12)
    assert_close(direction.B, G_B, rtol=1e-12)
    adam = scale_by_adam(0.9, 0.999, 1e-8)
    expected, _ = adam.update(Factors(G_A, G_B), adam.init(problem.params), problem.params)
    method = rlora.scaled_adamw(**PEFT, weight_decay=0.0)
    direction, state = method.update(G, method.init(problem.params), problem.params)
    for x, y in zip(direction, expected, strict=True):
        assert_close(x, y, rtol=1e-10)
    # The first step says nothing of the betas; the next one, on other gradients, does.
    _, adam_state = adam.update(Factors(G_A, G_B), adam.init(problem.params), problem.params)
    expected, _ = adam.update(Factors(-G_A, 2 * G_B), adam_state, problem.params)
    direction, _ = method.update(Factors(-G.A, 2 * G.B), state, problem.params)
    for x, y in zip(direction, expected, strict=True):
        assert_close(x, y, rtol=1e-10)


# --- theory: gates G1, G4, G5 -----------------------------------------------------------------------


def test_consistency_identity():
    """G1: G_A Aᵀ = Bᵀ G_B, which every gradient of one batch fulfils."""
    problem = make_problem(scaling=1.7, seed=6)
    G, (A, B) = problem.grads(problem.params), problem.params
    assert_close(G.A @ A.T, B.T @ G.B, rtol=1e-12)


def gauge(kind, r, rng):
    Q = np.linalg.qr(rng.normal(size=(r, r)))[0]
    if kind == "scalar":
        return 3.0 * np.eye(r)
    if kind == "signed permutation":
        return np.eye(r)[rng.permutation(r)] * rng.choice([-1.0, 1.0], size=r)
    if kind == "rotation":
        return Q
    if kind == "triangular":  # of positive diagonal, up to signs
        L = np.tril(rng.normal(size=(r, r)), -1) + np.diag(np.geomspace(0.2, 5, r))
        return L * rng.choice([-1.0, 1.0], size=r)
    if kind == "diagonal":
        return np.diag(np.geomspace(5, 0.1, r))
    P = np.linalg.qr(rng.normal(size=(r, r)))[0]
    return Q @ np.diag(np.geomspace(1, 50, r)) @ P


def deviation(method, kind, *, lr, steps=50):
    """Worst relative difference of the product's path under (A, B) -> (R A, B R⁻¹)."""
    rng = np.random.default_rng(7)
    problem = make_problem(20, 16, 3, seed=8)
    R = gauge(kind, 3, rng)
    A, B = problem.params
    turned = problem._replace(params=Factors(R @ A, B @ np.linalg.inv(R)))
    numpy = get("numpy")
    plain = products(method, problem, numpy, lr=lr, steps=steps)
    other = products(method, turned, numpy, lr=lr, steps=steps)
    return np.abs(plain - other).max() / np.abs(plain).max()


EVERY_GAUGE = ("scalar", "signed permutation", "rotation", "general")
INVARIANT = [
    # Undamped, down to the rounding floor, which is no gauge-free quantity: 1e-10 is gate G4.
    ("undamped", rlora.scaled_sgd(damping=0.0), EVERY_GAUGE),
    ("covariant", rlora.scaled_sgd(damping=1e-2, damping_mode="covariant"), EVERY_GAUGE),
    ("momentum", rlora.scaled_sgd(damping=0.0, momentum=0.9), EVERY_GAUGE),
    ("relative", rlora.scaled_sgd(damping=1e-2, damping_mode="relative"), EVERY_GAUGE[:3]),
    ("absolute", rlora.scaled_sgd(damping=1e-2, damping_mode="absolute"), EVERY_GAUGE[1:3]),
    ("before", rlora.scaled_adamw(damping=0.0, placement="before"), EVERY_GAUGE[1:2]),
    ("after", rlora.scaled_adamw(damping=0.0, placement="after"), EVERY_GAUGE[1:2]),
    (
        "both",
        rlora.scaled_adamw(damping=0.0, placement="both", eps=0.0),
        ("scalar",),
    ),
]
NOT_INVARIANT = [
    ("relative", rlora.scaled_sgd(damping=1e-2, damping_mode="relative"), "general"),
    ("absolute", rlora.scaled_sgd(damping=1e-2, damping_mode="absolute"), "scalar"),
    ("before", rlora.scaled_adamw(damping=0.0, placement="before"), "rotation"),
    ("before", rlora.scaled_adamw(damping=0.0, placement="before"), "scalar"),
    ("after", rlora.scaled_adamw(damping=0.0, placement="after"), "rotation"),
    ("both", rlora.scaled_adamw(damping=0.0, placement="both"), "rotation"),
    ("both", rlora.scaled_adamw(damping=0.0, placement="both"), "signed permutation"),
]


@pytest.mark.parametrize("name, method, gauges", INVARIANT, ids=lambda v: str(v)[:20])
def test_invariant_where_theory_says_so(name, method, gauges):
    lr = 0.05 if "adam" not in name and name not in ("before", "after", "both") else 0.02
    for kind in gauges:
        assert deviation(method, kind, lr=lr) < 1e-10, kind


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_half_powers_see_no_triangular_change_of_basis(damping, monkeypatch):
    """But for the least damping, relative to a trace, that each Gram gets: 1e-6, here 1e-12."""
    method = rlora.scaled_adamw(damping=damping, eps=0.0)
    assert deviation(method, "triangular", lr=0.02) < 1e-2
    monkeypatch.setattr(metric, "LEAST", 1e-12)
    assert deviation(method, "triangular", lr=0.02) < 1e-8
    with_eigenvalues = rlora.scaled_adamw(damping=damping, placement="after")
    assert deviation(with_eigenvalues, "triangular", lr=0.02) > 0.1


def test_prodigy_sees_no_scalings_of_directions_but_other_triangular_changes(monkeypatch):
    """But for the least damping again. What it takes for noise is by entries, in no basis."""
    monkeypatch.setattr(metric, "LEAST", 1e-12)
    method = rlora.scaled_prodigy(eps=0.0)
    assert deviation(method, "diagonal", lr=1.0) < 1e-5
    assert deviation(method, "triangular", lr=1.0) > 1e-2


@pytest.mark.parametrize("name, method, kind", NOT_INVARIANT, ids=lambda v: str(v)[:20])
def test_not_invariant_where_theory_says_not(name, method, kind):
    floor = 1e-2 if name in ("absolute", "relative") else 0.1
    assert deviation(method, kind, lr=0.05) > floor


def iterations(method, kappa, *, lr, limit, start="spectral"):
    """T1.1: steps to relative error 1e-8 on a factorisation of condition number `kappa`."""
    rng = np.random.default_rng(9)
    m, n, r = 60, 50, 5
    U, V = (np.linalg.qr(rng.normal(size=(k, r)))[0] for k in (m, n))
    M = (U * np.geomspace(1, 1 / kappa, r)) @ V.T
    noise = rng.normal(size=(m, n))
    noise *= 0.1 / kappa / np.linalg.norm(noise, 2)
    u, s, vt = np.linalg.svd(M + noise)
    root = np.sqrt(s[:r])
    if start == "spectral":
        pair = Factors(root[:, None] * vt[:r], u[:, :r] * root)
    else:
        pair = Factors(rng.normal(size=(r, n)) / n**0.5, np.zeros((m, r)))
    state = method.init(pair)
    for t in range(limit):
        E = pair.B @ pair.A - M
        if np.linalg.norm(E) < 1e-8 * np.linalg.norm(M):
            return t
        pair, state = rlora.step(method, pair, Factors(pair.B.T @ E, E @ pair.A.T), state, lr)
    return limit


PLAIN_SGD = chain(add_decayed_weights(0.0))
RELATIVE = {"damping": 1e-6, "damping_mode": "relative"}


def test_condition_number_does_not_matter():
    """G5. Scaled: at most 30 steps whatever kappa; plain: proportional to kappa."""
    scaled = [iterations(rlora.scaled_sgd(damping=0.0), k, lr=0.5, limit=100) for k in (1, 10, 1e3)]
    assert max(scaled) <= 30
    method = rlora.scaled_sgd(**RELATIVE)
    assert max(iterations(method, k, lr=0.5, limit=100) for k in (1, 10, 1e3)) <= 30
    # Covariant damping compares 1e-4 with the squares of the singular values: 1 and 0.01 at k = 10.
    method = rlora.scaled_sgd()
    assert max(iterations(method, k, lr=0.5, limit=100) for k in (1, 10)) <= 30
    plain = [iterations(PLAIN_SGD, k, lr=0.5, limit=4000) for k in (1, 10, 100)]
    assert plain[1] > 5 * plain[0]
    assert plain[2] > 5 * plain[1]
    absolute = rlora.scaled_sgd(damping=1e-2, damping_mode="absolute")
    assert iterations(absolute, 1e3, lr=0.5, limit=1000) > 100  # damping brings kappa back


def test_condition_number_from_the_lora_start():
    counts = [
        iterations(rlora.scaled_sgd(**RELATIVE), k, lr=0.5, limit=100, start="lora")
        for k in (1, 100, 1e3)
    ]
    assert max(counts) <= 40


# --- hard inputs: gates G10, G11, G13; algorithms §18-P2, §19 ---------------------------------------


@pytest.mark.parametrize("lr", [1e-1, 1e-2, 1e-3])
def test_second_step_from_zero_B(lr):
    """G10: what holds A's second step back is absolute or covariant damping, not relative."""

    def second_move(**options):
        method, problem = rlora.scaled_sgd(**options), make_problem(64, 64, 8, zero_B=True)
        params, state = problem.params, method.init(problem.params)
        for _ in range(2):
            before = params
            params, state = rlora.step(method, params, problem.grads(params), state, lr)
            if before is problem.params:
                assert (params.A == before.A).all()
        return np.linalg.norm(params.A - before.A) / np.linalg.norm(before.A)

    free = second_move(damping=0.0)
    assert free > 0.5  # whatever lr is
    assert second_move(**RELATIVE) == pytest.approx(free, rel=1e-2)
    # B after the first step is lr G S_A⁻¹, so δA = lr G_A / δ at most, of second order in lr.
    for mode in ("absolute", "covariant"):
        assert second_move(damping=1.0, damping_mode=mode) < min(free, 300 * lr**2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode, damping", DAMPINGS)
def test_rank_deficient_factor(mode, damping, dtype, backend):
    """G11: a repeated column of B: finite, and the live subspace moves as without the repetition."""
    problem = make_problem(30, 20, 4, seed=10)
    A, B = (x.copy() for x in problem.params)
    B[:, 3] = B[:, 2]
    hard = problem._replace(params=Factors(A, B)).on(backend, dtype)
    method = rlora.scaled_sgd(damping=damping, damping_mode=mode)
    params, state = hard.params, method.init(hard.params)
    first, _ = rlora.step(method, params, hard.grads(params), state, 0.1)
    for _ in range(10):
        params, state = rlora.step(method, params, hard.grads(params), state, 0.1)
    assert np.isfinite(backend.to_numpy(params.B @ params.A)).all()
    if mode == "relative":
        # B δA = -lr P_B G, and the projection does not see how B spans its range.
        G = B @ A - problem.target
        projection = -0.1 * B @ np.linalg.pinv(B, rcond=1e-10) @ G
        moved = B @ (backend.to_numpy(first.A).astype(float) - A)
        # float64: damping 1e-6 of the mean eigenvalue. float32: the inverse is as large as
        # 1 / (10 r eps) in the dead direction, and rounding it leaves eps times that elsewhere.
        assert_close(moved, projection, rtol=1e-4 if dtype == "float64" else 1 / 40)


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-42, 1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e15, 1e18]),
    rank=st.integers(0, 3),
    dtype=st.sampled_from(["float32", "float64"]),
    mode=st.sampled_from(["relative", "absolute", "covariant"]),
    placement=st.sampled_from(["before", "both", "after"]),
    library=st.sampled_from(["numpy", "torch", "array_api_strict"]),
)
def test_always_finite(shape, seed, size, rank, dtype, mode, placement, library):
    """Any shape, r > min(m, n) too, any rank, any size of the factors that float32 can hold."""
    m, n, r = shape
    rng = np.random.default_rng(seed)
    k = min(rank, r)
    B = size * rng.normal(size=(m, k)) @ rng.normal(size=(k, r))
    A = rng.normal(size=(r, n))
    backend = get(library)
    G = rng.normal(size=(m, n))
    pair, grads = (
        Factors(*(backend.asarray(x.astype(dtype), dtype) for x in pair))
        for pair in ((A, B), (B.T @ G, G @ A.T))
    )
    damping = 1e-2 if mode == "absolute" else 1e-6
    method = chain(scale_by_gram(damping=damping, damping_mode=mode, placement=placement))
    direction, _ = method.update(grads, method.init(pair), pair)
    for d in direction:
        assert np.isfinite(backend.to_numpy(d)).all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy says what overflowed
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("placement", ["before", "both"])
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30, 1e37])
def test_huge_factors_are_finite(size, placement, backend):
    """Row 7: a Gram that overflows float32 stands for an inverse that is zero to its precision."""
    problem = make_problem(seed=17)
    huge = [backend.asarray((size * x).astype("float32"), "float32") for x in problem.params]
    grads = Factors(*(backend.asarray(x.astype("float32"), "float32") for x in problem.params))
    for mode in ("relative", "absolute", "covariant"):
        method = chain(scale_by_gram(damping_mode=mode, placement=placement))
        direction, _ = method.update(grads, method.init(Factors(*huge)), Factors(*huge))
        for d in direction:
            assert (np.abs(backend.to_numpy(d)) <= 1e-20).all()


@pytest.mark.parametrize("size", [1e-4, 1e-15, 1e-22, 1e-38, 1e-42])
def test_tiny_B_is_the_formula(size, backend):
    """Row 2: BᵀB underflows below 1e-19 in float32, and the answer is G_A / δ."""
    problem = make_problem(seed=11)
    A, B = problem.params.A, size * problem.params.B
    G_A = np.random.default_rng(0).normal(size=A.shape)
    pair = Factors(*(backend.asarray(x.astype("float32"), "float32") for x in (A, B)))
    grads = Factors(backend.asarray(G_A.astype("float32"), "float32"), None)
    method = rlora.scaled_sgd(damping=1e-2, damping_mode="absolute")
    direction, _ = method.update(grads, method.init(pair), pair)
    expected = np.linalg.solve(B.T @ B + 1e-2 * np.eye(3), G_A)
    assert_close(backend.to_numpy(direction.A), expected, rtol=1e-5)


@pytest.mark.parametrize("reg", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_residual_is_small_whatever_the_condition(condition, reg, r, backend):
    """Row 4: |(S + δ)X - G| <= 50 r eps (|S + δ| |X| + |G|), the Gram's own rounding included."""
    problem = make_problem(64, 48, r, seed=12, condition=condition)
    A, B = problem.params.A, problem.params.B
    G = np.random.default_rng(1).normal(size=A.shape)
    eps = np.finfo("float32").eps
    pair = Factors(*(backend.asarray(x.astype("float32"), "float32") for x in (A, B)))
    method = rlora.scaled_sgd(damping=reg, damping_mode="absolute")
    grads = Factors(backend.asarray(G.astype("float32"), "float32"), None)
    direction, _ = method.update(grads, method.init(pair), pair)
    X = backend.to_numpy(direction.A).astype(float)
    B, G = (x.astype("float32").astype(float) for x in (B, G))
    S = B.T @ B + reg * np.eye(r)
    norm = np.linalg.norm
    assert norm(S @ X - G) <= 50 * r * eps * (norm(S, 2) * norm(X) + norm(G))


def test_float64_compute_reaches_further():
    """algorithms §19: at cond 1e3 a float32 Gram loses the weak direction, a float64 one does not."""
    problem = make_problem(512, 64, 8, seed=13, condition=1e3)
    single = [x.astype("float32") for x in problem.params]
    G = np.random.default_rng(2).normal(size=(512, 64)).astype("float32")
    B = single[1].astype(float)
    exact = np.linalg.pinv(B) @ G.astype(float)
    grads = Factors((B.T @ G).astype("float32"), None)

    def error(compute_dtype):
        method = rlora.scaled_sgd(damping=0.0, compute_dtype=compute_dtype)
        direction, _ = method.update(grads, method.init(Factors(*single)), Factors(*single))
        assert direction.A.dtype == np.float32
        return np.linalg.norm(direction.A - exact) / np.linalg.norm(exact)

    assert error("float64") < 1e-5
    assert error(None) > 1e-2


def test_half_precision(backend):
    """G13: float16 and bfloat16 in and out, moments in float32, the step within their rounding."""
    problem = make_problem(16, 12, 4, seed=14)
    for dtype, eps in (("float16", 2**-11), ("bfloat16", 2**-8)):
        if not hasattr(backend.xp, dtype):
            continue
        method = rlora.scaled_adamw()
        low = problem.on(backend, dtype)
        state = method.init(low.params)
        params, state = rlora.step(method, low.params, low.grads(low.params), state, 0.01)
        assert all(str(x.dtype).endswith("float32") for x in rlora.flatten_state(state).values())
        wide = Factors(*(backend.cast(x, backend.xp.float32) for x in low.params))
        wide_grads = Factors(*(backend.cast(x, backend.xp.float32) for x in low.grads(low.params)))
        exact, _ = rlora.step(method, wide, wide_grads, method.init(wide), 0.01)
        for x, y in zip(params, exact, strict=True):
            assert str(x.dtype).endswith(dtype)
            assert_close(backend.to_numpy(backend.cast(x, backend.xp.float32)), y, rtol=eps)


def test_bfloat16_of_numpy():
    """NumPy has no bfloat16 of its own, but takes ml_dtypes'."""
    import ml_dtypes

    problem, method = make_problem(16, 12, 4, seed=14), rlora.scaled_adamw()
    low = Factors(*(x.astype(ml_dtypes.bfloat16) for x in problem.params))
    params, state = rlora.step(method, low, low, method.init(low), 0.01)
    wide = Factors(*(x.astype("float32") for x in low))
    exact, _ = rlora.step(method, wide, wide, method.init(wide), 0.01)
    for x, y in zip(params, exact, strict=True):
        assert x.dtype == ml_dtypes.bfloat16
        assert_close(x.astype("float32"), y, rtol=2**-8)
    assert all(x.dtype == np.float32 for x in rlora.flatten_state(state).values())


# --- hyperparameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        ({"damping": -1e-6}, ValueError),
        ({"damping": float("nan")}, ValueError),
        ({"damping": float("inf")}, ValueError),
        ({"damping": "1e-6"}, TypeError),
        ({"damping": None}, TypeError),
        ({"damping": True}, TypeError),
        ({"damping_mode": "trace"}, ValueError),
        ({"order": "random"}, ValueError),
        ({"compute_dtype": "float16"}, ValueError),
        ({"weight_decay": -0.1}, ValueError),
    ],
)
@pytest.mark.parametrize("method", [rlora.scaled_sgd, rlora.scaled_adamw])
def test_hyperparameters_are_validated(method, options, error):
    with pytest.raises(error, match=next(iter(options))) as caught:
        method(**options)
    assert str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"b1": 1.0}, {"b2": -0.1}, {"eps": -1.0}, {"placement": "left"}, {"eps_form": "x"},
     {"decay": "never"}],
)  # fmt: skip
def test_adam_hyperparameters_are_validated(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rlora.scaled_adamw(**options)


def test_gauss_seidel_is_never_jacobi_in_silence():
    problem, method = make_problem(), rlora.scaled_adamw(order="gauss_seidel")
    with pytest.raises(rlora.PairingError, match=r"use rlora\.step"):
        method.update(problem.params, method.init(problem.params), problem.params)


def test_chain_refuses_two_bends():
    with pytest.raises(ValueError, match="at most one"):
        chain(decay_weights_after(0.1), decay_weights_after(0.1))


def test_placements_agree_without_an_inner_transform():
    problem = make_problem(seed=15)
    grads = problem.grads(problem.params)
    before, after, both = (
        chain(scale_by_gram(placement=p)).update(grads, ((),), problem.params)[0]
        for p in ("before", "after", "both")
    )
    for other in (after, both):
        for x, y in zip(before, other, strict=True):
            assert_close(x, y, rtol=1e-9)


def test_large_absolute_damping_is_plain_adamw():
    """The no-op that users of a large absolute δ run without knowing (algorithms §1(4))."""
    problem = make_problem(seed=16)
    huge = rlora.scaled_adamw(**PEFT | {"damping": 1e8}, eps=0.0, weight_decay=0.0)
    plain: Transform = chain(scale_by_adam(eps=0.0))
    numpy = get("numpy")
    assert_close(
        products(huge, problem, numpy, lr=0.05), products(plain, problem, numpy, lr=0.05), rtol=1e-6
    )


def test_a_rank_above_a_side_whose_first_direction_is_unused(backend):
    """A live pair is not taken for a dead one where no Gram can be looked at, as in JAX."""
    rng = np.random.default_rng(0)
    A, B, *grads = (rng.normal(size=shape) for shape in [(8, 4), (12, 8), (8, 4), (12, 8)])
    A[0] = 0.0
    method = rlora.scaled_adamw(placement="after")

    def step(made):
        params, G = Factors(made(A), made(B)), Factors(*map(made, grads))
        return rlora.step(method, params, G, method.init(params), 1e-2)[0]

    wanted = step(lambda x: x)
    found = map(backend.to_numpy, step(lambda x: backend.asarray(x.astype("float32"), "float32")))
    for x, y, old in zip(wanted, found, (A, B), strict=True):
        # The floors of two precisions.
        assert np.abs(y - x).max() <= 1e-3 * np.abs(x - old).max()
