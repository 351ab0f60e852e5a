"""Collections, the checks of a chain, the state as a flat dict, and single transformations."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

import rlora
from rlora import Factors, NamespaceError, PairingError, ShapeError, chain
from rlora.backends import get
from rlora.core.decay import (
    add_decayed_weights,
    decay_product,
    decay_product_around,
    decay_weights_after,
)
from rlora.core.factors import map_leaves, map_pairs, pairs_of, rebuild
from rlora.core.moments import clip_by_global_norm, corrected_decays, momentum, scale_by_adam
from rlora.testing import assert_close, make_problem

PAIR = Factors(np.ones((2, 5)), np.zeros((3, 2)))


def trees():
    leaf = st.just(PAIR)
    return st.recursive(
        leaf,
        lambda t: (
            st.lists(t, min_size=1, max_size=3)
            | st.dictionaries(st.sampled_from("abc"), t, min_size=1)
        ),
        max_leaves=6,
    )


@given(trees())
def test_collections_keep_their_structure(tree):
    assert str(map_pairs(lambda pair: pair, tree)) == str(tree)
    doubled = map_leaves(lambda x: 2 * x, tree)
    assert len(pairs_of(doubled)) == len(pairs_of(tree))
    for x, y in zip(pairs_of(doubled), pairs_of(tree), strict=True):
        assert_close(x.A, 2 * y.A)
    assert str(rebuild(tree, pairs_of(tree))) == str(tree)


def test_dicts_match_by_key():
    params = {"x": PAIR, "y": Factors(3 * PAIR.A, PAIR.B)}
    grads = {"y": params["y"], "x": params["x"]}  # the other order
    moved = rlora.apply_updates(params, grads, lr=1.0)
    assert list(moved) == ["x", "y"]
    assert_close(moved["x"].A, np.zeros((2, 5)))


@pytest.mark.parametrize(
    "grads, error, match",
    [
        ([PAIR], PairingError, "one structure"),
        ({"x": PAIR, "z": PAIR}, PairingError, "keys"),
        ({"x": Factors(PAIR.B, PAIR.A)}, ShapeError, r"\(3, 2\) where its parameter has \(2, 5\)"),
        (PAIR, PairingError, "one structure"),
    ],
)
def test_gradients_must_match(grads, error, match):
    method = rlora.scaled_sgd()
    params = {"x": PAIR}
    with pytest.raises(error, match=match):
        method.update(grads, method.init(params), params)


@pytest.mark.parametrize(
    "params, error, match",
    [
        (Factors(np.ones((5, 2)), np.ones((3, 2))), ShapeError, "transpose"),
        ({"q": Factors(np.ones(5), np.ones((3, 2)))}, ShapeError, "factor A of pair 'q'"),
        (Factors(np.ones((2, 5)), None), ShapeError, "None"),
        (Factors(np.ones((7, 2, 5)), np.ones((6, 3, 2))), ShapeError, "do not fit"),
        (np.ones((2, 5)), PairingError, "got ndarray"),
        ({"a": {"b": 3}}, PairingError, "at a.b"),
        (Factors(np.ones((2, 5), int), np.ones((3, 2), int)), NamespaceError, "int64"),
        (Factors(np.ones((2, 5), complex), np.ones((3, 2), complex)), NamespaceError, "complex"),
        (Factors("A", "B"), ShapeError, "factor A"),
        ([], NamespaceError, "no array"),
    ],
)
def test_wrong_parameters_are_refused_when_the_state_is_made(params, error, match):
    with pytest.raises(error, match=match):
        rlora.scaled_adamw().init(params)


def test_two_libraries_are_refused():
    torch, numpy = get("torch"), get("numpy")
    mixed = Factors(numpy.asarray(PAIR.A), torch.asarray(PAIR.B))
    with pytest.raises(NamespaceError, match="numpy and torch"):
        rlora.scaled_sgd().init(mixed)
    with pytest.raises(NamespaceError, match="list"):
        rlora.core.dispatch.get_backend([1.0])


def test_apply_updates_rounds_last():
    params = Factors(PAIR.A.astype("float16"), PAIR.B.astype("float16"))
    direction = Factors(np.full((2, 5), 1e-3, "float32"), None)
    moved = rlora.apply_updates(params, direction, lr=1.0)
    assert moved.A.dtype == np.float16
    assert moved.B is params.B
    assert_close(moved.A, np.full((2, 5), np.float16(1 - 1e-3)))


def test_adam_is_torchs_adam():
    """The same numbers as torch.optim.AdamW over 20 steps, and the other eps by its formula."""
    import torch

    problem = make_problem(seed=1)
    method = chain(scale_by_adam(0.8, 0.95, 1e-3), add_decayed_weights(0.1))
    tensors = [torch.tensor(x, requires_grad=True) for x in problem.params]
    optimizer = torch.optim.AdamW(tensors, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    params, state = problem.params, method.init(problem.params)
    for _ in range(20):
        grads = problem.grads(params)
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(g)
        optimizer.step()
        params, state = rlora.step(method, params, grads, state, 0.05)
    for x, tensor in zip(params, tensors, strict=True):
        assert_close(x, tensor.detach(), rtol=1e-12)


@pytest.mark.parametrize("nesterov, dampening", [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_momentum_is_torchs_momentum(nesterov, dampening):
    import torch

    problem = make_problem(seed=2)
    method = chain(momentum(0.9, nesterov=nesterov, dampening=dampening))
    tensors = [torch.tensor(x, requires_grad=True) for x in problem.params]
    optimizer = torch.optim.SGD(
        tensors, lr=0.01, momentum=0.9, nesterov=nesterov, dampening=dampening
    )
    params, state = problem.params, method.init(problem.params)
    for _ in range(10):
        grads = problem.grads(params)
        for tensor, g in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(g)
        optimizer.step()
        params, state = rlora.step(method, params, grads, state, 0.01)
    for x, tensor in zip(params, tensors, strict=True):
        assert_close(x, tensor.detach(), rtol=1e-12)


def test_bias_correction_keeps_its_digits_in_float32():
    """1 - b2^t in float32 is off by 3e-5 at b2 = 0.999, t = 1; through expm1 by 1e-7."""
    pair = Factors(np.ones((1, 1), "float32"), np.ones((1, 1), "float32"))
    method = chain(scale_by_adam(0.9, 0.999, 0.0))
    direction, _ = method.update(pair, method.init(pair), pair)
    assert_close(direction.A, [[1.0]], atol=3e-7)


@pytest.mark.parametrize("traced", [False, True])
def test_corrected_decays_are_those_of_exact_numbers(traced, backend):
    """Each rounding counts as often as 1 - b is smaller than b: 1e-16 is 1e-11 at 1 - 1e-5."""
    if traced and backend.name != "jax":
        pytest.skip("only JAX traces hyperparameters")
    steps, rates = [0, 1, 2, 3, 10, 1000], [0.9, 0.0, 1e-200, 0.999, 0.5, 1 - 1e-5]
    count = backend.asarray(np.reshape(steps, (2, 3)), "float64")
    given_rates = [backend.asarray(b, "float64") for b in rates] if traced else rates
    found = corrected_decays(backend, given_rates, count)
    for b, decays in zip(map(Fraction, rates), found, strict=True):
        exact = [float(b * (1 - b**t) / (1 - b ** (t + 1))) for t in steps]
        assert_close(decays, np.reshape(exact, (2, 3)), rtol=1e-11, atol=1e-29)


def test_clipping(backend):
    pair = Factors(backend.asarray(3 * np.ones((1, 1))), backend.asarray(4 * np.ones((1, 1))))
    for limit, norm in ((1.0, 1.0), (10.0, 5.0)):
        method = chain(clip_by_global_norm(limit))
        direction, _ = method.update([pair], method.init([pair]), [pair])
        clipped = [float(x[0, 0]) for x in direction[0]]
        assert math.hypot(*clipped) == pytest.approx(norm, rel=1e-6)
    huge = Factors(*(x * 1e25 for x in pair))  # its square overflows float32
    method = chain(clip_by_global_norm(1.0))
    direction, _ = method.update(huge, method.init(pair), pair)
    assert float(direction.A[0, 0]) == pytest.approx(0.6, rel=1e-6)


def test_decay_after_the_step():
    pair = Factors(np.full((1, 1), 2.0), np.full((1, 1), 4.0))
    method = chain(decay_weights_after(0.5))
    params, _ = rlora.step(method, pair, Factors(pair.A, None), method.init(pair), 0.1)
    assert_close(params.A, [[(1 - 0.05) * (2.0 - 0.2)]], rtol=1e-15)
    assert params.B is pair.B


@pytest.mark.parametrize("decay", [decay_weights_after, decay_product, decay_product_around])
@pytest.mark.parametrize(
    "wide, size, rtol", [("float32", 2.0**-10, 3e-7), ("float64", 2.0**-18, 1e-15)]
)
def test_decay_with_a_learning_rate_of_fewer_digits(backend, decay, wide, size, rtol):
    """``1 - lr λ`` is 1 in the dtype of lr, and not in that of the factors."""
    if wide == "float64" and not backend.has_float64():
        pytest.skip("no float64 here")
    pair = Factors(*(backend.asarray(np.full((2, 2), x), wide) for x in (2.0, 4.0)))
    zeros = Factors(0 * pair.A, 0 * pair.B)
    narrow = [x for x in ("float16", "bfloat16", "float32") if hasattr(backend.xp, x)]
    method = chain(decay(size))
    expected, _ = rlora.step(method, pair, zeros, method.init(pair), 2.0**-8)
    for name in narrow:
        lr = backend.asarray(np.asarray(2.0**-8), name)  # exact in each of them
        for moved in (
            rlora.step(method, pair, zeros, method.init(pair), lr)[0],
            method.apply(pair, zeros, lr),
        ):
            # A rounding or two: the power is taken of a Python float or of an array.
            assert_close(*map(backend.to_numpy, (moved.A, expected.A)), rtol=rtol)


def test_state_is_flat_and_storable(tmp_path):
    problem = make_problem()
    params = {"layers": [problem.params, problem.params]}
    method = rlora.scaled_adamw()
    grads = {"layers": [problem.grads(problem.params)] * 2}
    _, state = rlora.step(method, params, grads, method.init(params), 0.1)
    flat = rlora.flatten_state(state)
    assert "0.mu.layers.1.B" in flat
    np.savez(tmp_path / "state.npz", **flat)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        again = rlora.unflatten_state(dict(saved), method.init(params))
    for name, x in rlora.flatten_state(again).items():
        assert_close(x, flat[name])
    with pytest.raises(ShapeError, match="names differ"):
        rlora.unflatten_state({"0.mu.A": problem.params.A}, method.init(params))
    wrong = {**flat, "0.mu.layers.1.B": np.zeros((2, 2))}
    with pytest.raises(ShapeError, match=r"layers.1.B has shape \(2, 2\), expected \(12, 3\)"):
        rlora.unflatten_state(wrong, method.init(params))


@pytest.mark.parametrize("saved", ["float16", "float64"])
def test_a_state_has_the_dtypes_of_its_method_whatever_was_saved(backend, saved):
    """Half the bytes in a file must not become half the digits of all later steps."""
    if saved == "float64" and not backend.has_float64():
        pytest.skip("no float64 here")
    pair = Factors(*(backend.asarray(np.full((2, 2), x), "float32") for x in (0.5, 0.25)))
    method = rlora.scaled_adamw()
    moved, state = rlora.step(method, pair, pair, method.init(pair), 1e-2)
    if not hasattr(backend.xp, saved):
        pytest.skip(f"no {saved} here")
    of_file = {
        name: backend.cast(x, getattr(backend.xp, saved))
        for name, x in rlora.flatten_state(state).items()
    }
    again = rlora.unflatten_state(of_file, method.init(pair))
    for name, x in rlora.flatten_state(again).items():
        assert x.dtype == rlora.flatten_state(state)[name].dtype, name
    rlora.step(method, moved, pair, again, 1e-2)


def test_a_flat_state_of_numpy_is_one_of_arrays():
    """Its arithmetic makes numbers of arrays without axes, which safetensors does not take."""
    pair = Factors(np.ones((2, 5)), np.ones((3, 2)))
    for name in rlora.methods.__all__:
        method = getattr(rlora, name)()
        _, state = rlora.step(method, pair, pair, method.init(pair), 1e-2)
        assert all(isinstance(x, np.ndarray) for x in rlora.flatten_state(state).values()), name


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_state_in_bfloat16_moves_to_another_library(backend, library):
    """NumPy, through which it goes, has no bfloat16; its values are exact in float32."""
    pytest.importorskip(library)
    source, method = get(library), rlora.scaled_adamw()
    values = 1.0 + np.arange(4.0).reshape(2, 2) / 4
    pair = Factors(*(source.asarray(values, "bfloat16") for _ in "AB"))
    flat = rlora.flatten_state(method.init(pair))
    of_file = {name: pair.A if x.ndim else x for name, x in flat.items()}
    like = Factors(*(backend.asarray(values, "float32") for _ in "AB"))
    state = rlora.unflatten_state(of_file, method.init(like))
    found = [x for x in rlora.flatten_state(state).values() if x.ndim]
    assert found
    for x in found:
        assert_close(backend.to_numpy(x), values)


def test_a_state_that_fits_is_not_copied(backend):
    pair = Factors(*(backend.asarray(np.full((2, 2), x), "float32") for x in (0.5, 0.25)))
    method = rlora.scaled_adamw()
    flat = rlora.flatten_state(method.init(pair))
    again = rlora.flatten_state(rlora.unflatten_state(flat, method.init(pair)))
    assert all(again[name] is x for name, x in flat.items())


def test_state_survives_safetensors_and_torch(tmp_path):
    import torch
    from safetensors.numpy import load_file, save_file

    problem = make_problem()
    method = rlora.scaled_adamw()
    state = method.init(problem.params)
    flat = {k: np.asarray(v) for k, v in rlora.flatten_state(state).items()}
    save_file(flat, tmp_path / "s.safetensors")
    assert load_file(tmp_path / "s.safetensors").keys() == flat.keys()
    tensors = rlora.flatten_state(method.init(problem.on(get("torch")).params))
    torch.save(tensors, tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True).keys() == flat.keys()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: momentum(1.0), "momentum"),
        (lambda: momentum(0.0, nesterov=True), "nesterov"),
        (lambda: momentum(0.9, dampening=2.0), "dampening"),
        (lambda: clip_by_global_norm(float("nan")), "max_norm"),
        (lambda: add_decayed_weights(-1.0), "weight_decay"),
        (lambda: decay_weights_after(float("inf")), "weight_decay"),
    ],
)
def test_transformations_check_their_numbers(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def named_pairs():
    rng = np.random.default_rng(0)
    return {k: Factors(rng.normal(size=(2, 5)), rng.normal(size=(4, 2))) for k in "ab"}


@pytest.mark.parametrize(
    "make",
    [rlora.scaled_adamw, lambda: rlora.scaled_sgd(momentum=0.9), rlora.scaled_prodigy,
     rlora.lora_rite, rlora.lora_plus],
)  # fmt: skip
def test_keys_in_another_order(make):
    """The parameters' beside those of their state, and the old ones' in a transport."""
    method, pairs = make(), named_pairs()
    grads = {k: Factors(np.sin(A), np.cos(B)) for k, (A, B) in pairs.items()}
    turned = dict(reversed(pairs.items()))
    state = method.init(pairs)
    for _ in range(2):
        moved, expected = rlora.step(method, pairs, grads, state, 0.1)
        again, found = rlora.step(method, turned, grads, state, 0.1)
        for key in pairs:
            assert_close(again[key].A, moved[key].A)
            assert_close(again[key].B, moved[key].B)
        direction, state = method.update(grads, state, pairs)
        new = method.apply(pairs, direction, 0.1)
        states = (method.transport(state, old, new) for old in (pairs, turned))
        for x, y in zip(*(rlora.flatten_state(s).values() for s in states), strict=True):
            assert_close(x, y)
        pairs, turned, state = moved, again, expected
        assert rlora.flatten_state(found).keys() == rlora.flatten_state(expected).keys()


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_step_gives_a_collection_of_its_own(lr):
    pairs = named_pairs()
    method = rlora.scaled_adamw()
    new, _ = rlora.step(method, pairs, named_pairs(), method.init(pairs), lr)
    assert new is not pairs
    nothing = {k: Factors(None, None) for k in pairs}
    new, _ = rlora.step(method, pairs, nothing, method.init(pairs), lr)
    assert new is not pairs


def test_a_method_that_has_not_been_called():
    pairs = named_pairs()
    with pytest.raises(TypeError, match=r"as rlora.scaled_adamw\(\) gives one, got scaled_adamw"):
        rlora.step(rlora.scaled_adamw, pairs, pairs, None, 0.1)
