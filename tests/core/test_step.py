"""One step of any method: what may come in, and what comes back for it."""

from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

import rlora
from rlora import Factors, methods
from rlora.backends import get
from rlora.core.factors import leaves_of
from rlora.core.moments import clip_by_global_norm
from rlora.methods.rac import restart
from rlora.methods.rite import OFFICIAL
from rlora.testing import assert_close

EVERY = pytest.mark.parametrize("name", methods.__all__)
LIBRARIES = ["numpy", "array_api_strict", "torch", "jax"]


def random_pair(seed, dtype="float32", r=3, n=6, m=5):
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(r, n)).astype(dtype), rng.normal(size=(m, r)).astype(dtype))


def on(library, pair):
    backend = get(library)
    return Factors(*(backend.asarray(x, str(x.dtype)) for x in pair))


@EVERY
@pytest.mark.parametrize("library", LIBRARIES)
def test_gradients_have_the_dtype_of_their_parameters(name, library):
    """Those of float64 beside float32 count as float32 ones: the state does not widen either."""
    pytest.importorskip(library)
    made, params = getattr(methods, name)(), on(library, random_pair(0))
    grads = random_pair(1)
    results = []
    for dtype in ("float32", "float64"):
        if dtype == "float64" and not get(library).has_float64():
            pytest.skip("no float64 here")
        G = on(library, Factors(*(x.astype(dtype) for x in grads)))
        moved, state = rlora.step(made, params, G, made.init(params), 1e-2)
        results.append({"A": moved.A, "B": moved.B, **rlora.flatten_state(state)})
    for key, x in results[0].items():
        assert results[1][key].dtype == x.dtype, key
        # Memory may be aligned otherwise: float32's rounding, times what r x r inverses make of it.
        assert_close(x, results[1][key], rtol=1e-4, atol=1e-6)


@EVERY
def test_a_zero_gradient_of_a_wider_dtype_moves_nothing_to_nan(name):
    made = getattr(methods, name)()
    params = [random_pair(0), random_pair(1)]
    tiny = Factors(*(1e-13 * x for x in random_pair(2)))
    zero = Factors(*(0 * x.astype("float64") for x in random_pair(3)))
    moved, _ = rlora.step(made, params, [tiny, zero], made.init(params), 1e-2)
    assert all(np.isfinite(x).all() for x in leaves_of(moved))


def test_a_guard_over_two_dtypes_keeps_both():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        params = [on("jax", random_pair(0)), on("jax", random_pair(1, "float64"))]
        grads = [on("jax", random_pair(2)), on("jax", random_pair(3, "float64"))]
        made = rlora.lora_rite(**OFFICIAL)
        moved, _ = rlora.step(made, params, grads, made.init(params), 1e-2)
        for old, new in zip(leaves_of(params), leaves_of(moved), strict=True):
            assert new.dtype == old.dtype
            assert bool(jax.numpy.isfinite(new).all())


def test_factors_that_compute_in_two_dtypes_are_refused():
    A, B = random_pair(0)
    with pytest.raises(rlora.NamespaceError, match=r"pair 'q' compute in float32 and float64"):
        rlora.scaled_adamw().init({"q": Factors(A, B.astype("float64"))})


@pytest.mark.parametrize(
    "made",
    [
        rlora.lora_rite(max_norm=1.0),
        rlora.lora_rite(max_rms=1.0),
        rlora.chain(clip_by_global_norm(1.0), rlora.scaled_sgd()),
        rlora.scaled_sgd(order="gauss_seidel"),
    ],
    ids=["max_norm", "max_rms", "clip", "gauss_seidel"],
)
@pytest.mark.parametrize("sides", ["", "A", "B"])
def test_guards_without_a_gradient(made, sides):
    params, grads = random_pair(0), random_pair(1)
    grads = Factors(
        *(g if letter in sides else None for letter, g in zip("AB", grads, strict=True))
    )
    moved, _ = rlora.step(made, params, grads, made.init(params), 1e-2)
    for letter, old, new in zip("AB", params, moved, strict=True):
        assert (new is old) == (letter not in sides)


def test_a_norm_over_half_a_step_is_refused():
    with pytest.raises(ValueError, match="is none of a whole step"):
        rlora.chain(rlora.scaled_sgd(order="gauss_seidel"), clip_by_global_norm(1.0))


def named(pairs):
    return namedtuple("Named", "x y")(*pairs)


def defaults(items):
    return defaultdict(list, items)


@EVERY
@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict, named, defaults])
def test_the_structure_that_came_comes_back(name, kind):
    def collect(*pairs):
        return kind(pairs if kind in (list, tuple, named) else zip("xy", pairs, strict=True))

    made = getattr(methods, name)()
    params = collect(random_pair(0), random_pair(1))
    state = made.init(params)
    moved, new = rlora.step(made, params, collect(random_pair(2), random_pair(3)), state, 1e-2)
    assert type(moved) is type(params)

    def kinds(state):
        if not isinstance(state, (tuple, list, dict)):
            return "array"
        return type(state), list(map(kinds, state.values() if isinstance(state, dict) else state))

    assert kinds(new) == kinds(state)


def test_tuples_are_a_carry_of_jax():
    jax = pytest.importorskip("jax")
    made, params = rlora.scaled_adamw(), (on("jax", random_pair(0)), on("jax", random_pair(1)))

    def one(carry, _):
        return rlora.step(made, carry[0], carry[0], carry[1], 1e-2), None

    (moved, _), _ = jax.lax.scan(one, (params, made.init(params)), length=3)
    assert type(moved) is tuple


@EVERY
def test_a_learning_rate_in_a_graph_of_torch(name):
    torch = pytest.importorskip("torch")
    made, params = getattr(methods, name)(), on("torch", random_pair(0))
    lr = torch.tensor(1e-2, requires_grad=True)
    moved, state = rlora.step(made, params, on("torch", random_pair(1)), made.init(params), lr)
    assert not any(x.requires_grad for x in [*moved, *rlora.flatten_state(state).values()])


@pytest.mark.parametrize("name", ["lora_rite", "alt_lora", "loft", "riemannion"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_old_and_new_factors_may_have_their_keys_in_another_order(name, dtype):
    """As after a jitted update: JAX sorts the keys of a dict."""
    pytest.importorskip("torch")
    backend, made = get("torch"), getattr(methods, name)()

    def pairs(*seeds):
        found = [Factors(*(backend.asarray(x, dtype) for x in random_pair(seed))) for seed in seeds]
        return dict(zip("ba", found, strict=True))

    old, new, grads = pairs(0, 1), pairs(2, 3), pairs(4, 5)
    _, state = made.update(grads, made.init(old), old)
    turned = dict(reversed(new.items()))
    expected = rlora.flatten_state(made.transport(state, old, new))
    found = rlora.flatten_state(made.transport(state, old, turned))
    assert found.keys() == expected.keys()
    for key, x in expected.items():  # stacked in another order: rounding, as above
        assert_close(found[key].float(), x.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_views_of_one_memory_are_not_donated_twice(library):
    pytest.importorskip(library)
    made, one = rlora.scaled_sgd(), on(library, random_pair(0))
    params = [one, Factors(one.A[:], one.B[:])]  # other arrays in the same place
    grads = [on(library, random_pair(1)), on(library, random_pair(2))]
    with pytest.raises(rlora.PairingError, match="in two places"):
        rlora.step(made, params, grads, made.init(params), 0.1, donate=True)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_gradients_that_are_no_arrays_of_the_library(order, donate):
    torch = pytest.importorskip("torch")
    made, pair = rlora.scaled_sgd(order=order), random_pair(0)
    A, B = pair
    for G, error in [(torch.ones(B.shape), rlora.NamespaceError), (B.tolist(), rlora.ShapeError)]:
        with pytest.raises(error):
            rlora.step(made, pair, Factors(A, G), made.init(pair), 0.1, donate=donate)


@pytest.mark.parametrize("size", [1e10, 1e15])
def test_balance_of_factors_far_apart(size):
    """The ratio of their traces is beyond float32, its fourth root is not."""
    A, B = random_pair(0)
    params = Factors((A * size).astype("float32"), (B / size).astype("float32"))
    made = rlora.balanced_lora(rlora.scaled_sgd())
    moved, _ = rlora.step(made, params, Factors(0 * A, 0 * B), made.init(params), 1e-3)
    # Both to float32's rounding of a few products.
    assert_close(moved.B @ moved.A, B @ A, rtol=1e-5)
    assert_close(np.linalg.norm(moved.A), np.linalg.norm(moved.B), rtol=1e-5)


def test_a_merge_does_not_notice_autocast():
    torch = pytest.importorskip("torch")
    pair, weight = on("torch", random_pair(0)), torch.zeros(5, 6)
    plain, _ = restart(weight, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged, _ = restart(weight, pair)
    assert torch.equal(plain, merged)


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_a_rate_is_of_the_library_of_the_factors_or_of_numpy(name):
    """An optax schedule gives arrays of JAX, also to a loop over NumPy's."""
    pytest.importorskip(name)
    made, params, grads = rlora.scaled_adamw(), random_pair(0), random_pair(1)
    theirs, given = (Factors(*(get(name).asarray(x) for x in pair)) for pair in (params, grads))
    lr = get(name).asarray(np.asarray(1e-2))
    with pytest.raises(rlora.NamespaceError, match=f"lr is an array of {name}, .* give float"):
        rlora.step(made, params, grads, made.init(params), lr)
    expected, _ = rlora.step(made, theirs, given, made.init(theirs), 1e-2)
    for rate in (lr, np.asarray(1e-2), np.float64(1e-2)):
        moved, _ = rlora.step(made, theirs, given, made.init(theirs), rate)
        for x, y in zip(moved, expected, strict=True):
            # The rate of an array is rounded to float32, and multiplied in another order.
            np.testing.assert_allclose(
                get(name).to_numpy(x), get(name).to_numpy(y), rtol=1e-6, atol=1e-7
            )
