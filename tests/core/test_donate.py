"""`rlora.step` with `donate`: the same numbers in the memory that was given."""

import numpy as np
import pytest

import rlora
import rlora.methods
from rlora import Factors
from rlora.backends import get
from rlora.core.factors import pairs_of
from rlora.core.transform import stay

SHAPES = [(3, 6, 8), (3, 6, 8), (2, 9, 4)]


@pytest.fixture(params=["numpy", "torch"])
def backend(request):
    pytest.importorskip(request.param)
    return get(request.param)


def pairs(backend, seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [
        Factors(*(backend.asarray(rng.normal(size=s), dtype) for s in ((r, n), (m, r))))
        for r, m, n in SHAPES
    ]


def copies(backend, arrays):
    return [backend.to_numpy(x).copy() for x in arrays]


def leaves(tree):
    return [x for pair in pairs_of(tree) for x in pair]


def address(x):
    return x.data_ptr() if hasattr(x, "data_ptr") else x.__array_interface__["data"][0]


def run(method, backend, donate, dtype="float64", missing=None):
    """Four steps; `missing` has (pair, factors without a gradient) by step."""
    params = pairs(backend, 0, dtype)
    state = method.init(params)
    for t in range(4):
        grads = pairs(backend, t + 1, dtype)
        for k, factors in (missing or {}).get(t, ()):
            grads[k] = grads[k]._replace(**dict.fromkeys(factors))
        params, state = rlora.step(method, params, grads, state, 1e-2, donate=donate)
    return copies(backend, [*leaves(params), *rlora.flatten_state(state).values()])


@pytest.mark.parametrize("name", rlora.methods.__all__)
def test_a_donated_step_gives_the_same_numbers(backend, name):
    """Bit for bit: the same operations, only their results lie elsewhere."""
    method = getattr(rlora.methods, name)()
    for x, y in zip(run(method, backend, False), run(method, backend, True), strict=True):
        np.testing.assert_array_equal(x, y)


MISSING = {1: [(0, "AB")], 2: [(0, "A"), (1, "AB"), (2, "AB")], 3: [(1, "B"), (2, "A")]}
METHODS = {name: getattr(rlora.methods, name)() for name in rlora.methods.__all__} | {
    "full": rlora.lora_pro_adamw(mode="full"),
    "one after the other": rlora.scaled_adamw(order="gauss_seidel"),
}


@pytest.mark.parametrize("name", METHODS)
def test_missing_gradients_of_a_donated_step(backend, name):
    """Pairs and factors, none at all in some steps."""
    runs = [run(METHODS[name], backend, donate, missing=MISSING) for donate in (False, True)]
    for x, y in zip(*runs, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_without_gradients_keeps_factors_and_state(backend, name):
    """The second of three: of its state only what a transport takes to new coordinates changes."""
    method = METHODS[name]
    params = pairs(backend, 0)
    params, state = rlora.step(method, params, pairs(backend, 1), method.init(params), 1e-2)
    grads = pairs(backend, 2)
    grads[1] = Factors(None, None)
    before = copies(backend, params[1])
    held = {k: backend.to_numpy(x).copy() for k, x in rlora.flatten_state(state).items()}
    params, state = rlora.step(method, params, grads, state, 1e-2, donate=True)
    for x, old in zip(params[1], before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(x), old)
    if method.transport is not stay:
        return
    flat = rlora.flatten_state(state)
    second = [key for key in flat if "1" in key.split(".")[-2:]]  # before the letter of a factor
    assert 3 * len(second) == len(flat)
    for key in second:
        np.testing.assert_array_equal(backend.to_numpy(flat[key]), held[key])


@pytest.mark.parametrize("options", [{"order": "gauss_seidel"}, {"weight_decay": 0.1}], ids=str)
def test_options_of_a_donated_step(backend, options):
    method = rlora.scaled_adamw(**options)
    for x, y in zip(run(method, backend, False), run(method, backend, True), strict=True):
        np.testing.assert_array_equal(x, y)


def test_float32_too(backend):
    method = rlora.lora_pro_adamw(weight_decay=0.1)
    pure, donated = (run(method, backend, donate, "float32") for donate in (False, True))
    for x, y in zip(pure, donated, strict=True):
        np.testing.assert_array_equal(x, y)


def test_parameters_and_moments_stay_where_they_were(backend):
    method = rlora.lora_pro_adamw()
    params = pairs(backend, 0)
    state = method.init(params)

    def places(params, state):
        flat = rlora.flatten_state(state)
        moments = [flat[name] for name in flat if name.split(".")[1] in ("mu", "nu")]
        return [address(x) for x in [*leaves(params), *moments]]

    before = places(params, state)
    assert len(before) == 18
    assert before == places(
        *rlora.step(method, params, pairs(backend, 1), state, 1e-2, donate=True)
    )


def test_nothing_is_written_to_without_it(backend):
    method = rlora.lora_pro_adamw()
    params, grads = pairs(backend, 0), pairs(backend, 1)
    _, state = rlora.step(method, params, grads, method.init(params), 1e-2)
    given = [*leaves(params), *leaves(grads), *rlora.flatten_state(state).values()]
    before = copies(backend, given)
    rlora.step(method, params, grads, state, 1e-2)
    for x, y in zip(before, copies(backend, given), strict=True):
        np.testing.assert_array_equal(x, y)


def test_read_only_arrays_are_left_alone():
    backend = get("numpy")
    method = rlora.lora_pro_adamw()
    params, grads = pairs(backend, 0), pairs(backend, 1)
    state = method.init(params)
    given = [*leaves(params), *rlora.flatten_state(state).values()]
    expected = rlora.step(method, params, grads, state, 1e-2)
    for x in given:
        x.flags.writeable = False
    found = rlora.step(method, params, grads, state, 1e-2, donate=True)
    for x, y in zip(leaves(found[0]), leaves(expected[0]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_page(backend):
    """The block of docs/how-to/own_loop.md: the product comes nearer to its target."""
    from pages import run

    params = pairs(backend, 0)
    targets = [pair.B @ pair.A for pair in pairs(backend, 1)]

    def errors(params):
        return [pair.B @ pair.A - W for pair, W in zip(params, targets, strict=True)]

    def gradients(params):
        both = zip(params, errors(params), strict=True)
        return [Factors(pair.B.T @ E, E @ pair.A.T) for pair, E in both]

    def loss(params):
        return sum(float((E * E).sum()) for E in errors(params))

    start = loss(params)
    space = {"params": params, "gradients": gradients}
    assert loss(run("own_loop.md", "Arrays instead of modules", space)["params"]) < 0.9 * start


@pytest.mark.parametrize("name", rlora.methods.__all__)
def test_no_two_arrays_of_a_new_state_share_memory(name):
    """Or a donated step would write over one with the other."""
    state = getattr(rlora.methods, name)().init(pairs(get("numpy"), 0))
    places = [address(x) for x in rlora.flatten_state(state).values() if x.size]
    assert len(set(places)) == len(places)


def test_a_parameter_in_two_places_is_refused():
    """It would take both steps, where without donation each place takes its own."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2, 6))
    pairs = [Factors(shared, rng.normal(size=(5, 2))) for _ in range(2)]
    method, before = rlora.scaled_adamw(), shared.copy()
    state = method.init(pairs)
    grads = [Factors(np.ones_like(A), np.ones_like(B)) for A, B in pairs]
    with pytest.raises(rlora.PairingError, match="one that is in two places"):
        rlora.step(method, pairs, grads, state, 0.1, donate=True)
    assert np.array_equal(shared, before)
    rlora.step(method, pairs, grads, state, 0.1)


def test_a_gradient_in_the_memory_of_what_is_written_over_first_is_refused():
    """The step of A would have written into the gradient of B before B's own step reads it."""
    rng = np.random.default_rng(0)
    pair = Factors(*rng.normal(size=(2, 3, 3)))
    method, before = rlora.scaled_sgd(order="gauss_seidel"), pair.A.copy()
    state = method.init(pair)
    for grads in (Factors(pair.B, pair.A), Factors(pair.B, pair.A[:])):
        with pytest.raises(rlora.PairingError, match="gradient of B in the memory of an A"):
            rlora.step(method, pair, grads, state, 0.1, donate=True)
        assert np.array_equal(pair.A, before)
    expected, _ = rlora.step(method, pair, Factors(pair.B, pair.A), state, 0.1)
    own = Factors(pair.B, pair.A.copy())  # B's memory is read before it is written
    found, _ = rlora.step(method, pair, own, state, 0.1, donate=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lr", [1, 1.0])
def test_whole_numbers_are_rates_as_others(backend, lr):
    """The parameters are written over where they lie."""
    method, params = rlora.scaled_sgd(), pairs(backend, 0)
    places = [address(x) for x in leaves(params)]
    moved, _ = rlora.step(method, params, pairs(backend, 1), method.init(params), lr, donate=True)
    assert [address(x) for x in leaves(moved)] == places


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_donated_state_is_not_the_file_that_it_came_from(tmp_path, mode):
    torch = pytest.importorskip("torch")
    method, params = rlora.scaled_adamw(), pairs(get("torch"), 0)
    flat = {}
    for i, (name, x) in enumerate(rlora.flatten_state(method.init(params)).items()):
        np.save(tmp_path / f"{i}.npy", x.numpy())
        flat[name] = np.load(tmp_path / f"{i}.npy", mmap_mode=mode if x.ndim else None)
    state = rlora.unflatten_state(flat, method.init(params))
    _, state = rlora.step(method, params, pairs(get("torch"), 1), state, 1e-2, donate=True)
    assert any(torch.count_nonzero(x) for x in rlora.flatten_state(state).values())
    assert not any(x.any() for x in flat.values())
