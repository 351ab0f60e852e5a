"""Every method, on every backend, keeps the promises of `rlora.testing.CONTRACT`."""

from functools import wraps

import numpy as np
import pytest

from rlora import BackendError, Factors, ShapeError, apply_updates, chain, methods, step
from rlora.backends import get
from rlora.core.factors import map_leaves, map_pairs, pairs_of
from rlora.core.moments import scale_by_adam
from rlora.core.placement import preconditioners
from rlora.core.transform import Transform, no_state, pass_on
from rlora.testing import CONTRACT, change_of_basis, check_method, invariance
from rlora.testing.comparisons import check_compiles
from rlora.testing.contract import check_keeps_shape_and_dtype, check_no_growth

VARIANTS = [(name, {}) for name in methods.__all__] + [
    ("scaled_sgd", {"momentum": 0.9, "damping_mode": "covariant", "damping": 1e-3}),
    ("scaled_adamw", {"placement": "both", "damping_mode": "covariant", "damping": 1e-3}),
    ("scaled_adamw", {"placement": "after", "damping_mode": "absolute", "damping": 1e-2}),
    ("scaled_adamw", {"order": "gauss_seidel", "decay": "after", "eps_form": "hf"}),
    ("lora_rite", {"escape": True, "balance": True, "weight_decay": 0.1}),
    ("lora_pro_sgd", {"gauge": "balanced", "momentum": 0.9, "damping": 1e-3}),
    ("lora_pro_adamw", {"mode": "full", "gauge": "zero", "weight_decay": 0.1}),
    ("lora_fa", {"decay": "after", "eps_form": "hf"}),
    ("alt_lora", {"first": "A", "weight_decay": 0.1}),
    ("ref_lora", {"form": "scalar", "momentum": 0.9}),
    ("rac_lora", {"adam": True}),
    ("rac_lora", {"frozen": "B"}),
]

PAIR = Factors(np.ones((2, 6)), np.ones((5, 2)))


def made(name, options):
    """Gives the method, and has its own learning rate, if it has one."""
    method = getattr(methods, name)
    return wraps(method)(lambda: method(**options))


@pytest.mark.parametrize(
    "check",
    [check for check in CONTRACT if check is not check_no_growth],
    ids=lambda c: c.__name__.removeprefix("check_"),
)
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda v: str(v))
def test_contract(name, options, check, backend):
    check(made(name, options), backend)


# Adam on the whole weight grows in null spaces: documented on its page.
BOUNDED = [(name, options) for name, options in VARIANTS if options.get("mode") != "full"]


@pytest.mark.parametrize("name, options", BOUNDED, ids=lambda v: str(v))
def test_no_growth(name, options, backend):
    """The contract's longest check, of many steps."""
    check_no_growth(made(name, options), backend)


# --- methods that break a promise -----------------------------------------------------------------


def keeps_its_momentum():
    """Momentum in the object, none in the state."""
    kept = {}

    def update(grads, state, params):
        kept["mu"] = grads if not kept else map_leaves(lambda m, g: 0.9 * m + g, kept["mu"], grads)
        return kept["mu"], state

    return Transform(no_state, update)


def keeps_what_init_saw():
    """The start, as a point to decay to."""
    kept = {}

    def init(params, scaling=1.0):
        kept["start"] = params
        return ()

    def update(grads, state, params):
        return map_leaves(lambda g, p, q: g + p - q, grads, params, kept["start"]), state

    return Transform(init, update)


def counts_for_itself():
    """A second step that differs from the first, by a count that no state has."""
    kept = []

    def update(grads, state, params):
        kept.append(1)
        return map_leaves(lambda g: g / len(kept), grads), state

    return Transform(no_state, update)


def splits_anew():
    """The product's size shared out between the factors, whatever the learning rate."""

    def apply(params, direction, lr):
        moved = apply_updates(params, direction, lr)
        return map_pairs(lambda pair: Factors(2.0 * pair.A, 0.5 * pair.B), moved)

    return Transform(no_state, pass_on, apply)


def steps_at_least_a_little():
    return Transform(no_state, pass_on, lambda p, d, lr: apply_updates(p, d, lr + 1e-8))


def leaves_zero():
    """A B that never stays zero."""

    def apply(params, direction, lr):
        moved = apply_updates(params, direction, lr)
        return map_pairs(lambda pair: Factors(pair.A, pair.B + (not pair.B.any())), moved)

    return Transform(no_state, pass_on, apply)


def fills_the_null_space():
    """Half powers around Adam, without a filter behind it."""
    halves = {"damping": 1e-4, "damping_mode": "covariant", "placement": "both"}

    def power(params):
        first = preconditioners(get("numpy"), [params], **halves).first
        return first[0]

    adam = scale_by_adam(0.7, 0.8)

    def update(grads, state, params):
        P = power(params)
        D, state = adam.update(Factors(P.A @ grads.A, grads.B @ P.B), state, params)
        return Factors(P.A @ D.A, D.B @ P.B), state

    return Transform(adam.init, update)


def broken_by(name, make):
    check = {c.__name__: c for c in CONTRACT}[name]
    with pytest.raises(AssertionError) as error:
        check(make, get("numpy"))
    return str(error.value)


@pytest.mark.parametrize("make", [keeps_its_momentum, keeps_what_init_saw, counts_for_itself])
def test_a_method_that_keeps_something_to_itself_is_found(make):
    assert "by a method used before" in broken_by("check_state_is_the_truth", make)


def test_a_method_that_leaves_the_library_is_found():
    pytest.importorskip("torch")

    def moved(p, d, lr):
        return Factors(*(np.asarray(x) - lr * np.asarray(y) for x, y in zip(p, d, strict=True)))

    leaving = chain()._replace(apply=moved)
    with pytest.raises(AssertionError, match=r"A became numpy .* was torch"):
        check_keeps_shape_and_dtype(lambda: leaving, get("torch"))
    check_keeps_shape_and_dtype(lambda: leaving, get("numpy"))


@pytest.mark.parametrize("make", [splits_anew, steps_at_least_a_little, leaves_zero])
def test_a_method_that_moves_at_a_rate_of_0_is_found(make):
    assert "at a learning rate of 0" in broken_by("check_zero_rate_moves_nothing", make)


def directed(f):
    """A method without a state whose direction is a function of gradients and parameters."""
    return Transform(no_state, lambda grads, state, params: (f(grads, params), state))


def writes_over_its_gradients(grads, params):
    for g in grads:
        g *= 2.0
    return grads


def needs_both(grads, params):
    """Nothing of one factor without a gradient of the other."""
    alone = grads.A is None or grads.B is None
    return map_leaves(lambda g: 0.0 * g if alone else g, grads)


def once_from_zero(grads, params):
    return map_leaves(lambda g: g if not params.B.any() else g * float("nan"), grads)


def by_the_sum_of_all(grads, params):
    size = sum(abs(x).sum() for pair in pairs_of(grads) for x in pair)
    return map_leaves(lambda g: g / size, grads)


def forgets_digits():
    """A state that is wider after a step than `init` makes it, as a file would bring it back."""

    def init(params, scaling=1.0):
        return map_leaves(lambda x: np.zeros_like(x, "float32"), params)

    def update(grads, state, params):
        mu = map_leaves(lambda g, m: 0.9 * m + g, grads, state)
        return mu, mu

    return Transform(init, update)


DIRECTIONS = [
    ("inputs_untouched", "an input after the step", writes_over_its_gradients),
    ("lora_start", "A outside of its rows", lambda G, p: map_leaves(np.ones_like, G)),
    ("lora_start", "the loss went from", lambda G, p: map_leaves(lambda g: 1e-3 * g, G)),
    ("lora_start", "A is not finite", once_from_zero),
    (
        "batched_equals_looped",
        "a stacked layer",
        lambda G, p: map_leaves(lambda g: g / np.linalg.norm(g), G),
    ),
    (
        "batched_equals_looped",
        "a layer of several",
        lambda G, p: map_leaves(lambda g: g / len(pairs_of(G)), G),
    ),
    ("frozen_factor", "B did not move while A is frozen", needs_both),
    ("bad_pair_stays_alone", "a healthy pair", by_the_sum_of_all),
]


@pytest.mark.parametrize("name, message, f", DIRECTIONS, ids=[x[1] for x in DIRECTIONS])
def test_a_direction_that_breaks_a_promise_is_found(name, message, f):
    with np.errstate(all="ignore"):
        assert message in broken_by(f"check_{name}", lambda: directed(f))


def test_a_method_that_moves_what_has_no_gradient_is_found():
    shrinking = Transform(no_state, pass_on, lambda p, d, lr: map_leaves(lambda x: 0.9 * x, p))
    assert "A moved without a gradient" in broken_by("check_frozen_factor", lambda: shrinking)


def test_a_state_that_a_file_does_not_bring_back_is_found():
    assert "a step after loading" in broken_by("check_state_roundtrip", forgets_digits)


def test_a_method_that_counts_outside_of_what_is_compiled_is_found():
    with pytest.raises(AssertionError, match="a compiled step"):
        check_compiles(counts_for_itself, get("jax"))


def keeps_its_start():
    """Pulls towards the parameters that it began from, in their own memory."""

    def pulled(g, p, start):
        return Factors(g.A + p.A - start.A, g.B + p.B - start.B)

    def update(grads, state, params):
        return map_pairs(pulled, grads, params, state), state

    return Transform(lambda params, scaling=1.0: params, update)


def has_one_memory_for_two():
    adam = scale_by_adam()

    def init(params, scaling=1.0):
        state = adam.init(params)
        return state._replace(nu=state.mu)

    return adam._replace(init=init)


@pytest.mark.parametrize("make", [keeps_its_start, has_one_memory_for_two])
def test_a_state_without_memory_of_its_own_is_found(make):
    with np.errstate(all="ignore"):
        assert "with donate=True" in broken_by("check_donated", make)


def test_an_update_that_loses_a_part_of_the_state_is_refused():
    adam = scale_by_adam()

    def update(grads, state, params):
        direction, new = adam.update(grads, state, params)
        return direction, new._replace(
            mu=map_pairs(lambda mu, g: Factors(g.A, mu.B), new.mu, grads)
        )

    method = chain(adam._replace(update=update))
    with pytest.raises(ShapeError, match=r"0\.mu\.A is NoneType, expected an array of shape"):
        step(method, PAIR, PAIR._replace(A=None), method.init(PAIR), 0.1)


def test_a_transport_that_loses_a_part_of_the_state_is_refused():
    adam = scale_by_adam()

    def transport(state, old, new):
        return state._replace(mu=map_pairs(lambda mu, p: Factors(mu.A, p.B), state.mu, old))

    method = chain(adam._replace(transport=transport))
    with pytest.raises(ShapeError, match=r"transport.*0\.mu\.B is NoneType, expected an array"):
        step(method, PAIR, PAIR._replace(B=None), method.init(PAIR), 0.1)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_direction_of_another_shape_is_refused(library):
    """Broadcasting would take it."""
    backend = get(library)
    pair = map_leaves(lambda x: backend.asarray(x, "float64"), PAIR)
    method = chain(Transform(no_state, lambda G, s, P: (map_leaves(lambda g: g[:1, :1], G), s)))
    with pytest.raises(ShapeError, match=r"direction of the shape .* got \(1, 1\) for A of shape"):
        step(method, pair, pair, method.init(pair), 0.1)


@pytest.mark.parametrize("order", ["gauss-seidel", "Jacobi", None])
def test_an_order_that_there_is_not_is_refused(order):
    method = scale_by_adam()._replace(order=order)
    for use in (chain, lambda method: check_method(lambda: method, get("numpy"))):
        with pytest.raises(ValueError, match="order must be 'jacobi' or 'gauss_seidel', got"):
            use(method)


def test_a_method_that_ties_pairs_together_keeps_the_rest_of_the_contract():
    check_method(lambda: methods.lora_rite(max_norm=1.0, max_rms=1.0), get("numpy"))


KEEPS_NOTHING = "A method keeps nothing from one step to the next but what is in its state."


def test_wrong_arguments_of_the_contract():
    with pytest.raises(TypeError, match=r"a function that gives the method.*got Transform"):
        check_method(methods.scaled_adamw(), get("numpy"))
    with pytest.raises(TypeError, match=r"expected a backend, as .*, got 'numpy'"):
        check_method(methods.scaled_adamw, "numpy")
    with pytest.raises(TypeError, match=r"expected a Transform.*call it: scaled_adamw"):
        invariance(methods.scaled_adamw, "rotation")
    with pytest.raises(ValueError, match=r"gauge must be one of .*got 'rotations'"):
        invariance(methods.scaled_adamw(), "rotations")
    with pytest.raises(ValueError, match=r"gauge must be one of 'scalar', .* got 'foo'"):
        change_of_basis("foo")
    with pytest.raises(AssertionError) as error:
        check_method(counts_for_itself, get("numpy"))
    assert error.value.__notes__ == ["in check_state_is_the_truth: " + KEEPS_NOTHING]


def test_a_method_that_fills_a_null_space_is_found():
    assert "times that under AdamW" in broken_by("check_no_growth", fills_the_null_space)


def test_a_chain_holds_still_at_a_rate_of_0():
    """It holds whatever `apply` a transformation of the chain brings."""
    check = {c.__name__: c for c in CONTRACT}["check_zero_rate_moves_nothing"]
    check(lambda: chain(splits_anew()), get("numpy"))


def test_the_contract_asks_for_float64():
    """JAX without x64 would round, and each correct method would seem wrong."""

    class Narrow(type(get("numpy"))):
        name = "narrow"

        def __init__(self):
            pass

        def has_float64(self):
            return False

    with pytest.raises(BackendError, match=r"'narrow' .*'jax_enable_x64'"):
        check_method(methods.scaled_sgd, Narrow())
    with pytest.raises(BackendError, match=r"'narrow' .*'jax_enable_x64'"):
        invariance(methods.scaled_sgd(), "rotation", backend=Narrow())
