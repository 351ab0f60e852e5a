"""The r x r algebra: operations of every backend against float64 NumPy, and hard members of a batch."""

from functools import partial

import numpy as np
import pytest

import rlora
from rlora import Factors, NamespaceError
from rlora.core.backend import AdamNumbers, Backend, dtype_name
from rlora.core.linalg import geometric_mean
from rlora.core.placement import preconditioners
from rlora.testing import assert_close


def factors(backend, shapes, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in shapes]
    return arrays, [backend.asarray(x.astype(dtype), dtype) for x in arrays]


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-13), ("float32", 1e-5)])
@pytest.mark.parametrize("workspace", [None, {}], ids=["fresh", "workspace"])
def test_factor_sized_operations(backend, workspace, dtype, rtol):
    """Lists of unequal shapes, stacks among them, small and large, twice with one workspace."""
    shapes = [(3, 7), (2, 3, 5), (3, 7), (3, 30000), (2, 4, 3, 6), (3, 5)]
    columns = [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]
    for seed in range(2):
        rows_np, rows = factors(backend, shapes, dtype, seed)
        cols_np, cols = factors(backend, columns, dtype, seed + 9)
        like = getattr(backend.xp, dtype)
        stack = np.concatenate([(x @ x.mT).reshape(-1, 3, 3) for x in rows_np])
        assert_close(backend.gram_rows(rows, like, workspace), stack, rtol=rtol)
        stack = np.concatenate([(x.mT @ x).reshape(-1, 3, 3) for x in cols_np])
        assert_close(backend.gram_columns(cols, like, workspace), stack, rtol=rtol)
        P_np, P = factors(backend, [(*shape[:-2], 3, 3) for shape in shapes], dtype, seed + 5)
        for x, p, y in zip(rows_np, P_np, backend.apply_left(P, rows, workspace), strict=True):
            assert_close(y, p @ x, rtol=rtol)
        for x, p, y in zip(cols_np, P_np, backend.apply_right(cols, P, workspace), strict=True):
            assert_close(y, x @ p, rtol=rtol)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrices", "stacks"])
def test_thin_columns(backend, r, lead, monkeypatch):
    """Thin factors, of which the torch backend reads several rows as one."""
    from rlora.backends import _torch_stacks

    for name in ("FOLDED_GRAM", "FOLDED_PRODUCT"):  # it does so for large ones
        monkeypatch.setattr(_torch_stacks, name, 1)
    shapes = [(*lead, 48, r), (*lead, 7, r), (*lead, 48, r)]
    (cols_np, cols), (other_np, other) = (factors(backend, shapes, seed=s) for s in (0, 1))
    stack = np.concatenate([(x.mT @ x).reshape(-1, r, r) for x in cols_np])
    assert_close(backend.gram_columns(cols, backend.xp.float64), stack, rtol=1e-13)
    stack = np.concatenate(
        [(x.mT @ y).reshape(-1, r, r) for x, y in zip(cols_np, other_np, strict=True)]
    )
    rows = [[x.mT for x in xs] for xs in (cols, other)]
    assert_close(backend.cross_rows(*rows, backend.xp.float64), stack, rtol=1e-13)
    P_np, P = factors(backend, [(*lead, r, r)] * 3, seed=2)
    for x, p, y in zip(cols_np, P_np, backend.apply_right(cols, P), strict=True):
        assert_close(y, x @ p, rtol=1e-13)


@pytest.mark.parametrize("wanted", [None, "float32", "float64"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_compute_dtype_equals_the_generic_one(backend, name, wanted):
    """At least float32, or what is wanted if that is more; what is no float is refused."""
    if not hasattr(backend.xp, name):
        pytest.skip(f"no {name} in this library")
    dtype = backend.xp.ones(1, dtype=getattr(backend.xp, name)).dtype  # as arrays have it
    if name == "int32":
        with pytest.raises(NamespaceError, match="must be real floating-point arrays, got int32"):
            backend.compute_dtype(dtype, wanted)
        return
    expected = "float64" if "float64" in (name, wanted) else "float32"
    found = backend.compute_dtype(dtype, wanted)
    assert found == Backend.compute_dtype(backend, dtype, wanted)
    assert dtype_name(backend.xp.ones(1, dtype=found).dtype) == expected


@pytest.mark.parametrize("layers", [1, 3])
def test_grams_in_more_digits_than_the_factors_have(backend, layers):
    """Cast first: products of float32 numbers are exact in float64; of 7 each sum rounds 7 times."""
    arrays, rows = factors(backend, [(3, 7), (2, 3, 7), (3, 5)][:layers], "float32")
    wide = [x.astype("float32").astype("float64") for x in arrays]
    expected = np.concatenate([(x @ x.mT).reshape(-1, 3, 3) for x in wide])
    columns = [x.mT for x in rows]
    for found in (
        backend.gram_rows(rows, backend.xp.float64),
        backend.gram_columns(columns, backend.xp.float64),
        backend.cross_rows(rows, list(rows), backend.xp.float64),
    ):
        assert_close(found, expected, rtol=2e-15)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("lead", [(), (4,)], ids=["matrices", "stacks"])
def test_products_onto_others(backend, lead, keep):
    """``P X + keep Z``: Z may be written over, P and X may not."""
    X_np, X = factors(backend, [(*lead, 3, 7), (*lead, 3, 5)])
    P_np, P = factors(backend, [(*lead, 3, 3)] * 2, seed=1)
    Z_np, Z = factors(backend, [x.shape for x in X_np], seed=2)
    found = backend.apply_left(P, X, accumulate=Z, keep=keep)
    for p, x, z, y in zip(P_np, X_np, Z_np, found, strict=True):
        assert_close(y, p @ x + keep * z, rtol=1e-13)
    _, Zt = factors(backend, [x.mT.shape for x in X_np], seed=3)
    Zt_np, _ = factors(backend, [x.mT.shape for x in X_np], seed=3)
    Xt = [x.mT for x in X]
    found = backend.apply_right(Xt, P, accumulate=Zt, keep=keep)
    for p, x, z, y in zip(P_np, X_np, Zt_np, found, strict=True):
        assert_close(y, x.mT @ p + keep * z, rtol=1e-13)
    for kept, given in zip([*P, *X], [*P_np, *X_np], strict=True):
        assert_close(kept, given, rtol=0)


@pytest.mark.parametrize("age", ["one number", "equal layers", "unequal layers"])
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "reusing"])
def test_adam_equals_the_generic_one(backend, age, again):
    """Fused kernels too, and in memory that a second step uses again."""
    lists = factors(backend, [(2, 4, 6), (2, 4, 3)] * 3)
    (mu, nu, g), (mu_b, nu_b, g_b) = ([some[i : i + 2] for i in (0, 2, 4)] for some in lists)
    nu, nu_b = ([x**2 for x in some] for some in (nu, nu_b))
    counts = {"one number": 3.0, "equal layers": [3.0, 3.0], "unequal layers": [3.0, 8.0]}
    t = np.reshape(counts[age], (-1, 1, 1)) if age != "one number" else counts[age]
    c1, root2 = 1 - 0.9**t, (1 - 0.99**t) ** 0.5
    given = (
        [c1, root2] if age == "one number" else [backend.asarray(x, "float64") for x in (c1, root2)]
    )
    given, numbers = ([[x, x] for x in (*some, 1e-3)] for some in (given, (c1, root2)))
    numpy = Backend(np, "numpy")
    workspace = {}
    for _ in range(2):
        expected = numpy.adam(mu, nu, g, AdamNumbers(0.9, 0.99, *numbers))
        if again:
            with backend.reusing(workspace):
                found = backend.adam(mu_b, nu_b, g_b, AdamNumbers(0.9, 0.99, *given))
        else:
            before = backend.to_numpy(mu_b[0]).copy()
            found = backend.adam(mu_b, nu_b, g_b, AdamNumbers(0.9, 0.99, *given))
            assert_close(mu_b[0], before, rtol=0)  # pure
        for some, right in zip(found, expected, strict=True):
            for x, y in zip(some, right, strict=True):
                assert_close(x, y, rtol=1e-12)
        (mu_b, nu_b, _), (mu, nu, _) = found, expected


def test_adam_takes_gradients_as_large_on_every_backend(backend):
    """The square of 1e20 leaves float32, but its share of 1e-3 does not: a step, not 0."""
    zero, g = (backend.asarray(np.full((2, 3), x), "float32") for x in (0.0, 1e20))
    numbers = AdamNumbers(0.9, 0.999, [1 - 0.9], [(1 - 0.999) ** 0.5], [1e-8])
    _, _, (d,) = backend.adam([zero], [zero], [g], numbers)
    assert_close(backend.to_numpy(d), np.ones((2, 3)), rtol=1e-5)  # 1 - 0.999 in float32


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5])
def test_spd_power_equals_the_generic_one(backend, power):
    """A fast path keeps the generic one as its oracle, and both float64 NumPy."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(5, 4, 9))
    S = X @ X.mT
    S = 4 * S / np.trace(S, axis1=1, axis2=2)[:, None, None]
    w, Q = np.linalg.eigh(S)
    expected = (Q * w[:, None, :] ** power) @ Q.mT
    given = backend.asarray(S, "float64")
    assert_close(backend.spd_power(given, power), expected, rtol=1e-11)
    assert_close(Backend.spd_power(backend, given, power), expected, rtol=1e-11)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_inverse_cholesky_equals_the_generic_one(backend, upper, condition):
    """Triangular, of positive diagonal, and a root of the inverse: there is only one such matrix."""
    rng = np.random.default_rng(4)
    Q = np.linalg.qr(rng.normal(size=(5, 6, 6)))[0]
    w = np.geomspace(1, 1 / condition, 6)
    S = (Q * (6 * w / w.sum())) @ Q.mT
    given = backend.asarray(S, "float64")
    for W in (
        backend.inverse_cholesky(given, upper=upper),
        Backend.inverse_cholesky(backend, given, upper=upper),
    ):
        W = backend.to_numpy(W)
        assert_close(np.triu(W) if upper else np.tril(W), W, rtol=0)
        assert (np.diagonal(W, axis1=1, axis2=2) > 0).all()
        assert_close(W @ S @ W.mT, np.broadcast_to(np.eye(6), S.shape), rtol=1e-14 * condition)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_a_root_beside_a_member_that_has_none(upper, bad):
    """NumPy's Cholesky refuses a whole stack for a negative one; the generic way gives the same W."""
    from rlora.backends import get

    numpy, good = get("numpy"), np.array([[1.0, 0.5], [0.5, 1.0]])
    alone = numpy.inverse_cholesky(good[None], upper=upper)
    beside = numpy.inverse_cholesky(np.stack([good, good * bad]), upper=upper)
    assert_close(beside[:1], alone, rtol=1e-14)  # of a condition of 3


def test_a_member_without_a_cholesky_factor_is_nan_alone():
    """torch's Cholesky does not raise: the member says so, and no other."""
    from rlora.backends import get

    torch = get("torch")
    good, indefinite = np.diag([1.0, 4.0]), np.array([[1.0, 2.0], [2.0, 1.0]])
    W = torch.to_numpy(
        torch.inverse_cholesky(torch.asarray(np.stack([good, indefinite]), "float64"))
    )
    assert_close(W[0], np.diag([1.0, 0.5]), rtol=1e-15)
    assert np.isnan(W[1]).all()


@pytest.mark.parametrize("exponent", [-1.0, -0.5, "half"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hard_members_stay_alone(backend, exponent, dtype):
    """Zero, overflowed, NaN, rank-one and ordinary Grams in one batch."""
    good = np.diag([1.0, 2.0, 4.0])
    one = np.ones((3, 3))
    overflowed, nan = np.full((3, 3), np.inf), np.full((3, 3), np.nan)
    stack = np.stack([good, 0 * good, overflowed, nan, one, 1e-20 * good, good])
    S = backend.asarray(stack.astype(dtype), dtype)
    if exponent == "half":
        exponent, P = -0.5, np.asarray(backend.damped_half(S))
    else:
        P = np.asarray(backend.damped_power(S, exponent))
    expected = np.diag(np.diag(good) ** exponent)
    for k in (0, 6):
        assert_close(P[k], expected, rtol=1e-5)
    assert_close(P[5], expected * 1e-20**exponent, rtol=1e-5)
    assert (P[1] == 0).all()
    assert (P[2] == 0).all()
    assert np.isnan(P[3]).all()
    assert np.isfinite(P[4]).all()


@pytest.mark.parametrize("call", [
    ("damped_half", ()), ("damped_half", (), {"upper": True}), ("damped_power", (-1.0,)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"damping": 0.1}, {"damping": 0.1, "relative": False}])
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-12), ("float32", 1e-4)])  # 1e3 eps
def test_damped_grams_of_every_size(backend, dtype, rtol, options, call):
    """Equal to the generic class whatever a Gram's size, and to the bit what it is alone."""
    name, exponent, *more = call
    options = {**options, **dict(*more)}
    good = np.array([[4.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.0]])
    sizes = [1.0, 1e-25, 1e-19, 1e19, 1e25, 0.0, np.inf, np.nan]
    stack = backend.asarray(np.stack([c * good for c in sizes]).astype(dtype), dtype)

    def power(S, of=backend):
        make = getattr(backend, name) if of is backend else partial(getattr(of, name), backend)
        return backend.to_numpy(make(S, *exponent, **options))

    found, expected = power(stack), power(stack, Backend)
    assert np.isnan(found[-1]).all()
    assert np.isnan(expected[-1]).all()
    for k, x in enumerate(found):
        if k < len(sizes) - 1:
            assert_close(x, expected[k], rtol=rtol)
        alone = power(stack[k : k + 1, ...])[0]
        assert np.array_equal(x, alone, equal_nan=True) or backend.name == "jax"  # it fuses


def test_pseudo_half_is_a_half_of_the_pseudo_power(backend):
    """Ordinary, rank-one, zero, tiny and nearly singular Grams in one batch."""
    good = np.array([[4.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.0]])
    stack = np.stack(
        [good, np.ones((3, 3)), 0 * good, 1e-320 * good, 1e-3 * good + 1e14, 1e30 * good]
    )
    S = backend.asarray(stack, "float64")
    W = backend.to_numpy(backend.pseudo_half(S))
    found, expected = W.mT @ W, backend.to_numpy(backend.pseudo_power(S, -1.0))
    for k in range(len(stack)):
        assert_close(found[k], expected[k], rtol=1e-13)
    assert (W[2:4] == 0).all()
    nan = backend.asarray(np.full((1, 3, 3), np.nan), "float64")
    assert np.isnan(backend.to_numpy(backend.pseudo_half(nan))).all()


def test_eigh_of_grams_with_subnormal_entries(backend):
    """MKL's eigh in float32 does not converge for some of them, and makes NaN of more."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        F = rng.normal(size=(2, 8)) * np.array([1.0, 1.0, *6 * [1e-22]])
        S = (F.T @ F)[None].astype(np.float32)
        w, Q = map(backend.to_numpy, backend.eigh(backend.asarray(S, "float32")))
        assert_close((Q * w[:, None, :]) @ Q.mT, S, rtol=1e-5)  # 80 eps


@pytest.mark.parametrize("power", [-1.0, -0.5, "half", "upper half"])
def test_a_gram_that_rounding_has_left_less_definite_than_its_damping(backend, power):
    """By 3e-6 of its trace, as one of 768 products in float32: neither NaN nor without bound."""
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    S = np.stack([(Q * np.array([1.0, *7 * [-3e-6]])) @ Q.T, np.eye(8)]).astype(np.float32)
    S = backend.asarray(S, "float32")
    if isinstance(power, str):
        W = backend.to_numpy(backend.damped_half(S, 1e-6, upper=power == "upper half"))
        P = W.mT @ W
    else:
        P = backend.to_numpy(backend.damped_power(S, power, 1e-6))
        P = P @ P if power == -0.5 else P
    floor = 10 * np.finfo(np.float32).eps  # what is added at least, for a trace of 1
    w = np.linalg.eigvalsh(P[0].astype(float))
    # As if the eigenvalue were half of it, or with ten times as much added.
    assert 1 / (20 * floor) < w[-1] < 4 / floor
    assert w[0] == pytest.approx(1.0, rel=0.3)  # eps times 2e6, which is beside it
    assert_close(P[1], np.eye(8), rtol=2e-5)  # the damping of 1e-5


def test_what_is_lost(backend):
    """Up to `least` of the mean eigenvalue, and not below what the Gram itself has rounded."""
    S = backend.asarray(np.diag([3.0, 1e-3, 1e-17])[None], "float64")
    for least, kept in ((0.0, [1, 1, 0]), (1e-6, [1, 1, 0]), (2e-3, [1, 0, 0])):
        P = backend.to_numpy(backend.pseudo_power(S, -1.0, least))[0]
        W = backend.to_numpy(backend.pseudo_half(S, least))[0]
        expected = np.diag(np.array(kept) / np.array([3.0, 1e-3, 1.0]))
        assert_close(P, expected, rtol=1e-12)
        assert_close(W.T @ W, expected, rtol=1e-12)
        V = backend.asarray(np.diag([4.0, 1.0, 1e-8])[None] ** 2, "float64")
        eye = backend.asarray(np.eye(3)[None], "float64")
        P = backend.to_numpy(backend.inverse_root_half(V, 0.5, eye, least))[0]
        floor = max(least / 3, 10 * float(np.finfo(float).eps)) * 17
        root = np.maximum([16.0, 1.0, 1e-16], floor) ** 0.5 + 0.5
        assert_close(P.T @ P, np.diag(1 / root), rtol=1e-9)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_pseudo_half_needs_no_eigenvalues_of_an_ordinary_gram(name, monkeypatch):
    from rlora.backends import get

    backend = get(name)
    monkeypatch.setattr(type(backend), "eigh", None)
    W = backend.to_numpy(backend.pseudo_half(backend.asarray(np.diag([4.0, 1.0])[None], "float64")))
    assert_close(W[0], np.diag([0.5, 1.0]), rtol=1e-15)


@pytest.mark.parametrize("n", [64, 4096, 20000])
@pytest.mark.parametrize("r", [4, 16, 64])
def test_rank_deficient_grams_never_fail(r, n):
    """The floor of 10 eps tr(S) carries the rounding of long float32 sums, on the fast paths too."""
    from rlora.backends import get

    rng = np.random.default_rng(r + n)
    for library in ("numpy", "torch"):
        backend = get(library)
        tall = []
        for rank in range(1, r, max(1, r // 4)):
            A = (rng.normal(size=(r, rank)) @ rng.normal(size=(rank, n))).astype("float32")
            tall.append(backend.asarray(A))
        S = backend.gram_rows(tall, backend.xp.float32)
        P = backend.to_numpy(backend.damped_power(S, -1.0))
        assert np.isfinite(P).all()
        # Positive definite up to rounding: the direction descends.
        assert np.linalg.eigvalsh(P.astype(float)).min() > -1e-3 * np.abs(P).max()


def test_ranks_and_dtypes_in_one_call(backend):
    """Each pair gets the preconditioner of its own Gram, whatever else is in the list."""
    shapes = [(2, 5, 7), (3, 4, 6), (2, 6, 5), (3, 4, 6), (1, 2, 2)]
    rng = np.random.default_rng(4)
    arrays = [(rng.normal(size=(r, n)), rng.normal(size=(m, r))) for r, m, n in shapes]
    pairs = [Factors(*(backend.asarray(x, "float64") for x in pair)) for pair in arrays]
    P = preconditioners(backend, pairs, damping=0.1, damping_mode="absolute").first
    for (A, B), p in zip(arrays, P, strict=True):
        eye = np.eye(A.shape[0])
        assert_close(p.A, np.linalg.inv(B.T @ B + 0.1 * eye), rtol=1e-11)
        assert_close(p.B, np.linalg.inv(A @ A.T + 0.1 * eye), rtol=1e-11)


@pytest.mark.parametrize("low", [0.0, 1e-3])
@pytest.mark.parametrize("lead", [(), (1,), (3,)], ids=str)
def test_within_knows_the_largest_magnitudes(backend, lead, low):
    """Never say that it is when it is not; NumPy, and torch on a CPU, know all of it."""
    rng = np.random.default_rng(0)
    good = rng.uniform(0.1, 1.0, (*lead, 5, 40))
    late = np.where(np.arange(200).reshape(5, 40) < 150, 0.0, good)  # beyond the first entries
    mixed = good.copy()
    mixed[-1] *= 1e-6  # a matrix of the stack, or a row
    cases = [good, late, mixed, -good, 0 * good, 1e-6 * good, 1e3 * good, -1e3 * late]
    cases += [np.full_like(good, x) for x in (low, 1e2)]  # low is within, high is not
    cases += [np.where(good == good.max(), x, good) for x in (np.nan, np.inf, -np.inf)]
    for x in cases:
        peaks = np.abs(x).max(axis=(-2, -1))
        truth = bool((((peaks >= low) | (peaks == 0)) & (peaks < 1e2)).all())
        found = backend.within([backend.asarray(x, "float64")], low, 1e2)
        knows = type(backend).within is not Backend.within
        assert found == truth if knows else found <= truth


@pytest.mark.parametrize(
    "dtype, middle, most", [("float64", 1e-9, 2.3e-8), ("float32", 2e-4, 5e-3)]
)
def test_geometric_mean(backend, dtype, middle, most):
    """``M⁻¹ # S`` of 20 pairs of Grams with a condition number of 1e4: median and largest error.

    With a symmetric root of M in the place of a Cholesky factor the median is 3e-4 and more in
    float32, here 1e-4 at most (12 seeds, all libraries), the largest 1.4e-3. In float64 no error
    is above eps times 1e8, the condition number of ``L S Lᵀ``.
    """
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(2, 20, 8, 8)))[0]
    M, S = (backend.asarray(X, dtype) for X in (Q * np.geomspace(1, 1e-4, 8)) @ Q.mT)
    floor = 10 * np.finfo(dtype).eps * np.eye(8)  # of the trace: what a root is damped by
    errors = []
    found = backend.to_numpy(geometric_mean(backend, M, S))
    for m, s, K in zip(*(backend.to_numpy(X).astype(float) for X in (M, S)), found, strict=True):
        w, Q = np.linalg.eigh(m + floor * np.trace(m))
        W = (Q * w**-0.5) @ Q.T
        inner = W @ m @ s @ m @ W
        w, Q = np.linalg.eigh(inner + floor * np.trace(inner))
        exact = W @ (Q * w**0.5) @ Q.T @ W
        errors.append(abs(K - exact).max() / abs(exact).max())
    assert np.median(errors) < middle
    assert max(errors) < most


@pytest.mark.parametrize(
    ("dtype", "damping"),
    [("float32", 0.1), ("float32", 1.0), ("float64", 1e-4), ("float64", 1.0)],
)
@pytest.mark.parametrize("m, n, r", [(8, 2, 4), (64, 4, 16), (30, 1, 2), (3, 4, 8)])
@pytest.mark.parametrize("size", [0.01, 0.3])
def test_covariant_damping_of_a_rank_above_n(backend, m, n, r, size, damping, dtype):
    """It has no bound where A can have nothing, so A moves in its own columns alone.

    There, and in B's rows, it is the usual one. The tolerance is the floor under every damping, 10
    r eps, and 40 eps for the rounding of some ten products, times the conditions of the damped Gram
    and of A: in float32 that is all of a small damping.
    """
    if dtype == "float64" and not backend.has_float64():
        pytest.skip("no float64 here")
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(r, n)) / n**0.5, size * rng.normal(size=(m, r))
    pair = Factors(*(backend.asarray(x, dtype) for x in (A, B)))
    G = backend.asarray(rng.normal(size=(m, n)), dtype)
    grads = Factors(pair.B.mT @ G, G @ pair.A.mT)
    method = rlora.scaled_sgd(damping=damping)
    direction, _ = method.update(grads, method.init(pair), pair)

    A, B, G_A = (backend.to_numpy(x).astype(float) for x in (*pair, grads.A))
    seen = np.linalg.pinv(B) @ B @ A  # the columns of A in the row space of B
    Q = np.linalg.svd(seen)[0][:, : min(m, n)]
    S_A, S_B = Q.T @ seen @ seen.T @ Q, Q.T @ B.T @ B @ Q
    expected = Q @ np.linalg.solve(S_B + damping * np.linalg.inv(S_A), Q.T @ G_A)
    condition = 1 + np.linalg.norm(B @ A, 2) ** 2 / damping
    rtol = (10 * r + 40) * np.finfo(dtype).eps * condition * np.linalg.cond(Q.T @ seen)
    assert rtol < 0.1
    assert_close(backend.to_numpy(direction.A), expected, rtol=rtol)


@pytest.mark.parametrize("m, n, r", [(8, 2, 4), (3, 4, 8), (4, 8, 6)])
@pytest.mark.parametrize("size", [2.0**-20, 2.0**26])
def test_covariant_damping_of_huge_and_tiny_factors(backend, m, n, r, size):
    """``(s A, s B)`` with ``s⁴ δ`` have ``H⁻¹ / s²``; s⁶ is out of range at 2^26, of which s is."""
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=shape) for shape in [(r, n), (m, r), (r, n), (m, r)]]
    A, B, G_A, G_B = (backend.asarray(x, "float32") for x in draws)

    def direction(s):
        pair, made = Factors(s * A, s * B), rlora.scaled_sgd(damping=1e-2 * s**4)
        return made.update(Factors(G_A, G_B), made.init(pair), pair)[0]

    for x, y in zip(direction(1.0), direction(size), strict=True):
        # Powers of two are exact; products of B and A have conditions of 100 at most.
        assert_close(backend.to_numpy(y) * size**2, backend.to_numpy(x), rtol=1e-4)


def test_a_zero_A_moves_at_a_rank_above_n(backend):
    """Embeddings of PEFT begin with it; without a Gram of A there is no damping by it."""
    pair = Factors(*(backend.asarray(x, "float32") for x in (np.zeros((4, 2)), np.eye(8, 4))))
    grads = Factors(pair.A + 1.0, 0 * pair.B)
    method = rlora.scaled_sgd()
    direction, _ = method.update(grads, method.init(pair), pair)
    assert_close(backend.to_numpy(direction.A), np.ones((4, 2)), rtol=1e-4)
