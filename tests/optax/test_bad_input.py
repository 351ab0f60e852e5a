"""Values that are not finite stay in their pair; wrong input is refused and changes nothing."""

from functools import cache

import numpy as np
import pytest

from rlora import NamespaceError, PairingError, ShapeError, methods

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from trees import as_factors, assert_trees_close, draw, equal, make_tree  # noqa: E402

import rlora.optax  # noqa: E402


def changed(tree, path, value):
    """A copy with another leaf in the layer q."""
    return {**tree, "q": {**tree["q"], path: value}}


@pytest.mark.parametrize("name", methods.__all__)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_gradient_does_not_touch_another_pair(name, bad):
    """Two steps: the second meets what the first has left in the state."""
    peft, _, v = two_steps(name, bad)
    good_peft, _, good_v = two_steps(name, None)
    assert_trees_close((peft, v), (good_peft, good_v), 0)


@cache
def compiled(name):
    optimizer = getattr(rlora.optax, name)(1e-2)
    return optimizer, jax.jit(optimizer.update)


def two_steps(name, bad):
    """The pairs, if an entry of a gradient of the second is `bad`."""
    optimizer, update = compiled(name)
    params = make_tree()
    state = optimizer.init(params)
    for t in range(2):
        grads = make_tree(seed=10 + t)
        if bad is not None:
            grads = changed(grads, "lora_b", grads["q"]["lora_b"].at[0, 0].set(bad))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return as_factors(params)


WRONG_GRADIENTS = [
    (lambda g: changed(g, "lora_a", draw(7, 3)), ShapeError, r"'q.lora_a' has shape \(7, 3\)"),
    (lambda g: changed(g, "lora_a", draw(8)), ShapeError, r"'q.lora_a' has shape \(8,\)"),
    (lambda g: changed(g, "lora_a", draw(8, 3) * 1j), NamespaceError, "'q.lora_a' is complex64"),
    (lambda g: {**g, "extra": jnp.ones(3)}, PairingError, "'extra' has a gradient and is not"),
    (lambda g: {k: x for k, x in g.items() if k != "q"}, PairingError, "lack q.lora_a, q.lora_b"),
    (lambda g: {**g, "q": {"lora_b": g["q"]["lora_b"]}}, PairingError, "lack q.lora_a: pass one"),
]


@pytest.mark.parametrize("change, error, match", WRONG_GRADIENTS)
def test_wrong_gradients(change, error, match):
    optimizer = rlora.optax.scaled_adamw(1e-2)
    params = make_tree()
    state = optimizer.init(params)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(error, match=match):
            update(change(make_tree(seed=10)), state, params)
    assert equal(params, make_tree())
    assert equal(state, optimizer.init(params))


def test_a_string_is_no_collection_of_names():
    """Its letters would be taken for names."""
    with pytest.raises(TypeError, match=r"hold must be .* say \['q\.lora_a'\]"):
        rlora.optax.scaled_adamw(1e-2, hold="q.lora_a").init(make_tree())


@pytest.mark.parametrize("given", [methods.lora_rite, None, 3], ids=["function", "None", "int"])
def test_what_is_no_method(given):
    with pytest.raises(TypeError, match=r"expected a Transform, as .*, got"):
        rlora.optax.transformation(given, 1e-3)


def test_pairs_are_asked_for_by_name():
    tree = {"q": jnp.ones((2, 2)), "p": jnp.ones((2, 2))}
    with pytest.raises(PairingError, match=r"pairs=\[\(name of A, name of B\), \.\.\.\]"):
        rlora.optax.scaled_adamw(1e-2).init(tree)


OTHER_STATES = {
    "another rank": lambda: rlora.optax.scaled_adamw(1e-2).init(make_tree(r=2)),
    "fewer pairs": lambda: rlora.optax.scaled_adamw(1e-2).init({"q": make_tree()["q"]}),
    "another method": lambda: rlora.optax.lora_rite(1e-2).init(make_tree()),
    "of optax": lambda: optax.adamw(1e-2).init(make_tree()),
}


@pytest.mark.parametrize("other", OTHER_STATES)
def test_the_state_of_another_tree_or_method(other):
    optimizer = rlora.optax.scaled_adamw(1e-2)
    params, state = make_tree(), OTHER_STATES[other]()
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(ShapeError, match=r"not of this transformation and these parameters"):
            update(make_tree(seed=10), state, params)


ONES = jnp.ones
BAD_TREES = [
    ({"w": ONES((3, 3))}, PairingError, "no LoRA pair among 1 parameter: w"),
    ({"lora_a": ONES((8, 3))}, PairingError, "its partner, the B of lora_a, is not among"),
    ({"lora_b": ONES((3, 8))}, PairingError, "its partner, the A of lora_b, is not among"),
    ({"lora_a": ONES((8, 3)), "lora_b": ONES((4, 6))}, PairingError, "share no rank"),
    ({"lora_a": ONES(8), "lora_b": ONES((8, 6))}, PairingError, "are not two matrices"),
    ({"lora_a": ONES((8, 0)), "lora_b": ONES((0, 6))}, PairingError, "are not two matrices"),
    (
        {"lora_a": ONES((8, 3)), "lora_b": ONES((3, 6), jnp.bfloat16)},
        NamespaceError,
        "'lora_a' is float64 and 'lora_b' bfloat16: bring both to one dtype",
    ),
    (
        {"lora_a": ONES((8, 3)) * 1j, "lora_b": ONES((3, 6)) * 1j},
        NamespaceError,
        "factors must be real floating-point arrays, got complex128 from jax",
    ),
    (
        {"x.lora_A": ONES((2, 8)), "x.lora_B": ONES((6, 2)), "x.lora_E": ONES((2, 1))},
        PairingError,
        "the diagonal x.lora_E stands between",
    ),
    (
        {"q": make_tree()["q"], "vera_lambda_b": ONES(3)},
        PairingError,
        "VeRA trains vectors",
    ),
]


@pytest.mark.parametrize("params, error, match", BAD_TREES)
def test_bad_trees(params, error, match):
    for rest in (None, optax.sgd(0.1)):
        with pytest.raises(error, match=match):
            rlora.optax.lora_rite(1e-2, rest=rest).init(params)


def test_shapes_of_pairs_given_by_name():
    params = {"x": ONES((8, 3)), "y": ONES((4, 6))}
    with pytest.raises(ShapeError, match="the pair 'x' and 'y' does not fit"):
        rlora.optax.lora_rite(1e-2, pairs=[("x", "y")]).init(params)
    with pytest.raises(PairingError, match="'z', of the pair 'x' and 'z', is not among"):
        rlora.optax.lora_rite(1e-2, pairs=[("x", "z")]).init(params)


def test_a_leaf_of_no_pair_needs_a_gradient_or_is_held():
    params = {**make_tree(), "bias": ONES(4)}
    optimizer = rlora.optax.lora_rite(1e-2, rest=optax.sgd(0.1))
    with pytest.raises(PairingError, match="'bias', in no pair, has no gradient: name it in hold="):
        optimizer.update(params | {"bias": None}, optimizer.init(params), params)


def test_missing_parameters():
    optimizer = rlora.optax.lora_rite(1e-2)
    tree = make_tree()
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        optimizer.update(tree, optimizer.init(tree))


def test_bad_options_are_refused_when_made():
    with pytest.raises(ValueError, match="b1"):
        rlora.optax.lora_rite(1e-2, b1=2.0)
    with pytest.raises(TypeError, match="nonsense"):
        rlora.optax.lora_rite(1e-2, nonsense=2.0)


def test_a_subtree_without_gradients_is_named_by_none():
    """As `optax.masked` and partitions of modules leave them: a leaf, or all below a key."""
    optimizer = rlora.optax.scaled_adamw(1e-2)
    params = make_tree()
    state = optimizer.init(params)
    grads = make_tree(seed=10)
    updates = [
        optimizer.update({**grads, "q": absent}, state, params)[0]
        for absent in (None, optax.MaskedNode(), dict.fromkeys(grads["q"]))
    ]
    for found in updates:
        assert equal({**found, "q": 0}, {**updates[0], "q": 0})


def test_two_leaves_of_one_name():
    pair = {"lora_a": draw(8, 3), "lora_b": draw(3, 6)}
    tree = {"a.b": pair, "a": {"b": pair}}
    with pytest.raises(PairingError, match=r"two leaves are named 'a\.b\.lora_a'"):
        rlora.optax.scaled_adamw(1e-2).init(tree)


def test_numbers_among_the_leaves_are_arrays_and_the_rest_is_named():
    params = {**make_tree(), "scale": 2.0}
    optimizer = rlora.optax.scaled_adamw(1e-2, rest=optax.sgd(0.5))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["scale"] == -1.0
    held = rlora.optax.scaled_adamw(1e-2, hold=["scale"])
    updates, _ = held.update(params, held.init(params), params)
    assert updates["scale"] == 0.0
    with pytest.raises(TypeError, match="'name' is a str, no array: take it out"):
        held.init({**params, "name": "relu"})


@pytest.mark.parametrize("lr", ["1e-2", None, -1e-2, float("nan")])
def test_a_learning_rate_is_refused_where_it_is_given(lr):
    with pytest.raises((TypeError, ValueError), match="lr must be") as caught:
        rlora.optax.lora_rite(lr)
    assert ("write 1.0e-3" in str(caught.value)) == isinstance(lr, str)


def test_all_that_a_mask_takes_out_and_labels_that_part_a_pair():
    params = make_tree()
    masked = optax.masked(rlora.optax.lora_rite(1e-2), jax.tree.map(lambda _: False, params))
    with pytest.raises(PairingError, match="a mask or labels may have taken out all"):
        masked.init(params)
    labels = jax.tree.map(lambda _: "one", params)
    labels["q"] = {**labels["q"], next(iter(labels["q"])): "other"}
    parts = {key: rlora.optax.lora_rite(1e-2) for key in ("one", "other")}
    with pytest.raises(
        PairingError, match=r"in optax\.partition both factors of a pair need one label"
    ):
        optax.partition(parts, labels).init(params)


def test_a_state_in_the_place_of_the_parameters():
    params = make_tree()
    optimizer = rlora.optax.lora_rite(1e-2)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        optimizer.update(params, params, optimizer.init(params))
