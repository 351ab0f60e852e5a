"""Huge and tiny factors and gradients: finite, and near what float64 gives."""

from functools import cache

import numpy as np
import pytest

import rlora
from rlora import Factors, methods
from rlora.backends import get
from rlora.core.sizes import euclidean_norm, into_range, moderate

FACTORS = [1e-30, 1e-20, 1.0, 1e10, 1e19, 1e30]
GRADIENTS = [1e-30, 1e-23, 1.0, 1e18, 1e25]
EVERY = pytest.mark.parametrize("name", methods.__all__)

# Whose second moment is that of entries, as in AdamW, or of columns: above 1e19 it leaves float32.
# Where it is infinite the entry does not move, as in torch's AdamW.
MOMENTS = {
    "alt_lora_plus",
    "balanced_lora",
    "graft_adamw",
    "loft",
    "lora_fa",
    "lora_plus",
    "lora_pro_adamw",
    "lora_rite",
    "lora_sb",
    "scaled_adamw",
    "scaled_prodigy",
    "stable_lora",
    "trust_region",
}


def draw(size, seed):
    """A pair in which every sum over its sides has a few hundred terms."""
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=shape) * size for shape in [(2, 2, 200), (2, 300, 2)]]
    return [x.astype("float32").astype("float64") for x in draws]


def after_two_steps(method, backend, dtype, factor, gradient):
    start = pair = Factors(*(backend.asarray(x, dtype) for x in draw(factor, 0)))
    state = method.init(pair, 2.0)
    for seed in (1, 2):
        grads = Factors(*(backend.asarray(x, dtype) for x in draw(gradient, seed)))
        pair, state = rlora.step(method, pair, grads, state, lr=1e-3)
    return [[backend.to_numpy(x).astype("float64") for x in some] for some in (start, pair)]


@cache
def in_float64(name, factor, gradient):
    with np.errstate(all="ignore"):
        method = getattr(methods, name)()
        return after_two_steps(method, get("numpy"), "float64", factor, gradient)


def in_range(pair, name, factor, gradient):
    """Return whether the results of float64, and the moments on the way, fit into float32."""
    counts_as_zero = factor < 1e-16  # its Gram cannot be inverted in float32
    moments = name in MOMENTS and gradient > 1e19
    return not counts_as_zero and not moments and all(np.abs(x).max() < 1e37 for x in pair)


def seen(name, pair):
    """Riemannion's split is known up to signs: its product."""
    return [pair[1] @ pair[0]] if name == "riemannion" else pair


def check(name, backend, factor, gradient):
    method = getattr(methods, name)()
    if name == "riemannion" and factor > 1e10:
        return  # its new factors are U and ΣVᵀ, as large as the product, which is out of range
    with np.errstate(all="ignore"):
        _, found = after_two_steps(method, backend, "float32", factor, gradient)
    start, wanted = in_float64(name, factor, gradient)
    if all(np.abs(x).max() < 1e37 for x in wanted):
        assert all(np.isfinite(x).all() for x in found), (factor, gradient)
    if not in_range(wanted, name, factor, gradient):
        return
    for x, y, p in zip(*(seen(name, pair) for pair in (found, wanted, start)), strict=True):
        # 1e-3 of the move, which conditions of a few hundred cost; and the rounding of the factor.
        # LoFT: a root of a sum that cancels to less than 10 eps, as one entry in a thousand does in
        # float32, is off by as much as it is large; a row of the move has the sum of 200 of them.
        share = 2e-2 if name == "loft" else 1e-3
        bound = share * np.abs(y - p).max() + 1e-6 * np.abs(y).max()
        assert np.abs(x - y).max() <= bound, (factor, gradient)


@EVERY
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("m, n, r", [(6, 3, 5), (3, 6, 5), (3, 3, 5)])
def test_a_rank_above_a_side_at_every_size(name, library, m, n, r):
    """Products of Grams leave the range long before factors do; all that counts here is NaN."""
    backend = pytest.importorskip(library) and get(library)
    method = getattr(methods, name)()
    for size in FACTORS if name != "riemannion" else FACTORS[:4]:
        draw = np.random.default_rng(0).normal
        A, B = draw(size=(r, n)) * size, draw(size=(m, r)) * size
        pair = Factors(*(backend.asarray(x, "float32") for x in (A, B)))
        grads = Factors(*(backend.xp.ones_like(x) for x in pair))
        with np.errstate(all="ignore"):
            state = method.init(pair)
            for _ in range(2):
                pair, state = rlora.step(method, pair, grads, state, lr=1e-3)
        assert all(np.isfinite(backend.to_numpy(x)).all() for x in pair), size


@EVERY
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_every_method_at_every_size(name, library):
    backend = pytest.importorskip(library) and get(library)
    for factor in FACTORS:
        for gradient in GRADIENTS:
            check(name, backend, factor, gradient)


@EVERY
@pytest.mark.parametrize("factor, gradient", [(1e30, 1.0), (1.0, 1e18)])
def test_sizes_on_every_backend(name, factor, gradient, backend):
    check(name, backend, factor, gradient)


@pytest.mark.parametrize("sizes", [(1e30, 1.0), (1.0, 1e30), (1e25, 1e-12), (2e12, 1e12)])
@pytest.mark.parametrize(
    "name", ["lora_rite", "lora_pro_sgd", "lora_muon", "adapre_lora", "alt_lora"]
)
def test_one_huge_factor(name, sizes):
    """The moves depend on how the product is split as the method says, at 1e30 as at 1."""
    method, moves = getattr(methods, name)(), []
    for dtype in ("float32", "float64"):
        A, B = draw(1.0, 0)
        pair = Factors((A * sizes[0]).astype(dtype), (B * sizes[1]).astype(dtype))
        G_A, G_B = draw(1.0, 1)
        grads = Factors((G_A * sizes[1]).astype(dtype), (G_B * sizes[0]).astype(dtype))
        D, _ = method.update(grads, method.init(pair), pair)
        moves.append(D)
    for x, y in zip(*moves, strict=True):
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max() + 1e-37


def test_clipping_sees_huge_gradients():
    """The guards of LoRA-RITE: 1e25 is clipped to the norm that was asked for, as 1e5 is."""
    method, moves = rlora.chain(methods.rite.clip_unmagnified(max_norm=1.0)), []
    for size in (1e5, 1e25):
        pair, grads = (Factors(*(x.astype("float32") for x in draw(s, 0))) for s in (1.0, size))
        moves.append(method.update(grads, method.init(pair), pair)[0])
    for x, y in zip(*moves, strict=True):
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max()
        assert np.abs(x).max() > 0


def test_balance_of_huge_factors():
    method = rlora.lora_rite(balance=True)
    pair = Factors(
        *(x.astype("float32") * c for x, c in zip(draw(1.0, 0), (1e25, 1e-12), strict=True))
    )
    grads = Factors(*(np.zeros_like(x) for x in pair))
    new, _ = rlora.step(method, pair, grads, method.init(pair), 1e-3)
    norms = [np.sqrt((x.astype("float64") ** 2).sum((-2, -1))) for x in new]
    assert np.allclose(*norms, rtol=1e-5)
    products = [x.B.astype("float64") @ x.A.astype("float64") for x in (pair, new)]
    assert np.allclose(*products, rtol=1e-3, atol=1e-5 * np.abs(products[0]).max())


def test_into_range(backend):
    """Ordinary sizes come back bit by bit; each layer has its own number; NaN stays visible."""
    sizes = np.asarray([1.0, 1e30, 1e-30, 0.0, 1e10])
    x = np.ones((5, 2, 3)) * sizes[:, None, None]
    given = backend.asarray(x, "float32")
    (y,), (c,) = into_range(backend, [given])
    y, c = backend.to_numpy(y), backend.to_numpy(c)
    assert tuple(c.shape) == (5, 1, 1)
    assert np.array_equal(y[[0, 3, 4]], x[[0, 3, 4]].astype("float32"))
    assert np.allclose(y[[1, 2]].max((1, 2)), [2.0**36, 2.0**-36])
    assert np.allclose(c[[0, 1, 2, 4], 0, 0] * sizes[[0, 1, 2, 4]], y[[0, 1, 2, 4], 0, 0])
    ((y, _),), _ = moderate(backend, [Factors(given, given)])
    assert np.array_equal(backend.to_numpy(y)[[0, 2, 4]], x[[0, 2, 4]].astype("float32"))
    assert np.isclose(backend.to_numpy(y)[1].max(), 2.0**36)
    x[0, 0, 0], x[1, 0, 0] = np.nan, np.inf
    (y,), _ = into_range(backend, [backend.asarray(x, "float32")])
    y = backend.to_numpy(y)
    assert np.isnan(y[0]).any()
    assert np.isinf(y[1]).any()
    assert np.isfinite(y[2:]).all()


def test_ordinary_sizes_are_known_where_asking_is_free():
    for library in ("numpy", "torch"):
        pytest.importorskip(library)
        x = get(library).asarray(np.ones((2, 3)), "float32")
        (y,), numbers = into_range(get(library), [x])
        assert y is x
        assert numbers is None


def test_norm_of_what_cannot_be_squared():
    x = np.asarray([[3e30, 4e30]], dtype="float32")
    assert np.isclose(euclidean_norm(np, [x]), 5e30)


@pytest.mark.parametrize("size", [1.0, 1e15, 1e20])
def test_grafted_steps_of_huge_factors(size):
    """Adam's size does not shrink as the factors grow."""
    method, moves = methods.graft_adamw(), []
    for dtype in ("float32", "float64"):
        pair = Factors(*(x.astype(dtype) for x in draw(size, 0)))
        grads = Factors(*(x.astype(dtype) for x in draw(1.0, 1)))
        moves.append(method.update(grads, method.init(pair), pair)[0])
    for x, y in zip(*moves, strict=True):
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_loft_steps_of_huge_gradients(library):
    """Both moments take the same gradient: a step of 1e25 is as long as one of 1."""
    backend, method, moves = pytest.importorskip(library) and get(library), methods.loft(), []
    for size in (1.0, 1e25):
        pair = Factors(*(backend.asarray(x, "float32") for x in draw(1.0, 0)))
        grads = Factors(*(backend.asarray(x * size, "float32") for x in draw(1.0, 1)))
        moves.append(backend.to_numpy(method.update(grads, method.init(pair), pair)[0].B))
    assert np.abs(moves[1] - moves[0]).max() <= 0.05 * np.abs(moves[0]).max()  # see `check`


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("factor, gradient", [(1e10, 1e-20), (1e20, 1e-10)])
def test_a_tiny_momentum_beside_large_factors(library, factor, gradient):
    """From the third step on a momentum of 1e-30 is there: B in its coordinates is 1e40 or more."""
    backend = pytest.importorskip(library) and get(library)
    pair = Factors(*(backend.asarray(x, "float32") for x in draw(factor, 0)))
    method = methods.op_lora()
    state = method.init(pair)
    for seed in range(1, 5):
        grads = Factors(*(backend.asarray(x, "float32") for x in draw(gradient, seed)))
        pair, state = rlora.step(method, pair, grads, state, lr=1e-3)
    assert all(np.isfinite(backend.to_numpy(x)).all() for x in pair)


def test_momentum_of_tiny_factors(backend):
    """Before the first step it is zero, with the rows of A, which no number may lose."""
    method, moves = methods.op_lora(), []
    for dtype in ("float32", "float64"):
        pair = Factors(*(backend.asarray(x, dtype) for x in draw(1e-13, 0)))
        state = method.init(pair)
        for seed in (1, 2):
            grads = Factors(*(backend.asarray(x, dtype) for x in draw(1e-10, seed)))
            D, state = method.update(grads, state, pair)
        moves.append([backend.to_numpy(x) for x in D])
    for x, y in zip(*moves, strict=True):
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max()


def test_grafted_steps_of_tiny_factors(backend):
    """The products of squares would be subnormal, which JAX takes for 0."""
    method, moves = methods.graft_adamw(), []
    for dtype in ("float32", "float64"):
        pair, grads = (
            Factors(*(backend.asarray(x, dtype) for x in draw(1e-12, seed))) for seed in (0, 1)
        )
        D, _ = method.update(grads, method.init(pair), pair)
        moves.append([backend.to_numpy(x) for x in D])
    for x, y in zip(*moves, strict=True):
        assert np.abs(x - y).max() <= 1e-3 * np.abs(y).max()


@EVERY
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("factor, gradient", [(0.1, 1e25), (1e-4, 1e15), (1e-8, 1e15), (1e-8, 1.0)])
def test_small_factors_and_large_gradients(name, library, factor, gradient):
    """Finite in the sizes that the page of promises names, also where both come together."""
    backend = pytest.importorskip(library) and get(library)
    pair = Factors(*(backend.asarray(x, "float32") for x in draw(factor, 0)))
    method = getattr(methods, name)()
    state = method.init(pair)
    with np.errstate(all="ignore"):
        for seed in (1, 2, 3):
            grads = Factors(*(backend.asarray(x, "float32") for x in draw(gradient, seed)))
            pair, state = rlora.step(method, pair, grads, state, lr=1e-3)
    assert all(np.isfinite(backend.to_numpy(x)).all() for x in pair)
