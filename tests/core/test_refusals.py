"""Refusals of `step`, `init` and `flatten_state`, whose messages name the cause."""

import numpy as np
import pytest

import rlora
from rlora import Factors, PairingError, ShapeError, methods
from rlora.testing import assert_close

EVERY = pytest.mark.parametrize("name", methods.__all__)


def make_pair(r=2, n=5, m=4, *lead):
    rng = np.random.default_rng(r + n + m)
    return Factors(rng.normal(size=(*lead, r, n)), rng.normal(size=(*lead, m, r)))


@pytest.mark.parametrize(
    "lr, error",
    [
        *((lr, ValueError) for lr in (-1, -1e-3, float("nan"), float("inf"), np.float32(-1))),
        *((lr, TypeError) for lr in ([1e-3], True, None, "1e-3")),
    ],
)
def test_learning_rates_that_make_no_sense(lr, error):
    pair, method = make_pair(), rlora.scaled_sgd()
    with pytest.raises(error, match="lr must be"):
        rlora.step(method, pair, pair, method.init(pair), lr)


@pytest.mark.parametrize("lr", [0, 0.0, 1, np.float32(0.25), np.asarray(0.25)])
def test_learning_rates_that_do(lr):
    pair, method = make_pair(), rlora.lora_plus()
    new, _ = rlora.step(method, pair, pair, method.init(pair), lr)
    assert np.array_equal(new.A, pair.A) == (float(lr) == 0)


@pytest.mark.parametrize("lr", [np.array(True), np.bool_(True), np.array(1j), np.array("1e-3")])
def test_learning_rates_that_are_arrays_of_no_real_number(lr):
    pair, method = make_pair(), rlora.scaled_sgd()
    with pytest.raises(TypeError, match=r"lr must be real.*shape \(\) and dtype \w+"):
        rlora.step(method, pair, pair, method.init(pair), lr)


@EVERY
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_learning_rates_that_are_integers(name, kind):
    """``-lr`` of an unsigned one is near its largest number."""
    pair, method = make_pair(), getattr(methods, name)()
    expected, _ = rlora.step(method, pair, pair, method.init(pair), 1.0)
    for lr in (kind(1), np.array(1, kind)):
        found, _ = rlora.step(method, pair, pair, method.init(pair), lr)
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y, rtol=1e-13, what=name)  # the same sums in the same float64


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3, 1, 1), (1, 1, 1)])
def test_learning_rates_that_fit_no_factor(shape):
    pair, method = make_pair(), rlora.scaled_sgd()
    with pytest.raises(ShapeError, match=r"\(\.\.\., 1, 1\) with one for each layer.*\(2, 5\)"):
        rlora.step(method, pair, pair, method.init(pair), np.ones(shape))


@EVERY
def test_a_learning_rate_for_each_layer_of_a_stack(name):
    pair, method = make_pair(2, 5, 4, 3), getattr(methods, name)()
    lr = np.array([0.1, 0.0, 0.2])[:, None, None]
    moved, _ = rlora.step(method, pair, pair, method.init(pair), lr)
    for k, one in enumerate(lr[:, 0, 0]):
        expected, _ = rlora.step(method, pair, pair, method.init(pair), one)
        for x, y in zip(moved, expected, strict=True):
            assert_close(x[k], y[k], rtol=1e-13, what=name)  # the same sums in the same float64


def test_learning_rates_on_a_device_or_traced(backend):
    """The value of an array of shape () is never read, so that it may be traced."""
    pair = Factors(*(backend.asarray(x, "float64") for x in make_pair()))
    method = rlora.scaled_sgd()

    def one(lr):
        return rlora.step(method, pair, pair, method.init(pair), lr)[0]

    expected = one(0.25)
    for found in (one, backend.compile(one)):
        new = found(backend.asarray(np.asarray(0.25), "float64"))
        for x, y in zip(new, expected, strict=True):
            assert_close(backend.to_numpy(x), backend.to_numpy(y), rtol=1e-14)


@EVERY
@pytest.mark.parametrize("scaling", [0, 0.0, -1, float("nan"), float("inf"), np.array(-1.0)])
def test_scalings_that_make_no_sense(name, scaling):
    with pytest.raises(ValueError, match="scaling must be finite and positive, got"):
        getattr(methods, name)().init(make_pair(), scaling)


@pytest.mark.parametrize("scaling", [True, "2", None, [2.0]])
def test_scalings_that_are_no_numbers(scaling):
    with pytest.raises(TypeError, match="scaling must be a real number"):
        rlora.lora_pro_sgd().init(make_pair(), scaling)


@EVERY
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (2, 5, 4, 0)])
def test_empty_factors(name, shape):
    with pytest.raises(ShapeError, match="of pair 'q' is empty: A is"):
        getattr(methods, name)().init({"p": make_pair(), "q": make_pair(*shape)})


OTHERS = [
    (rlora.lora_rite, "0 is RiteState, expected AdamState"),
    (lambda: rlora.scaled_sgd(momentum=0.9), "0 is MomentumState, expected AdamState"),
    (rlora.scaled_sgd, r"0 is \(\), expected AdamState"),
    (
        lambda: rlora.chain(rlora.scaled_sgd()),
        r"it is \(\(\(\), \(\)\)\), expected \(AdamState, \(\)\)",
    ),
]


@pytest.mark.parametrize("other, match", OTHERS)
def test_the_state_of_another_method(other, match):
    pair, method = make_pair(), rlora.scaled_adamw()
    with pytest.raises(ShapeError, match=match):
        rlora.step(method, pair, pair, other().init(pair), 1e-3)


def test_more_fields_than_the_method_has():
    """The state of AdamW has all that momentum asks for, and more: not taken in silence."""
    pair, method = make_pair(), rlora.scaled_sgd(momentum=0.9)
    with pytest.raises(ShapeError, match="0 is AdamState, expected MomentumState"):
        rlora.step(method, pair, pair, rlora.scaled_adamw().init(pair), 1e-3)


@EVERY
def test_the_state_of_other_parameters(name):
    method, tree = getattr(methods, name)(), {"a": make_pair(), "b": make_pair()}
    if not rlora.flatten_state(method.init(tree)):
        pytest.skip("no state")
    for other in (
        make_pair(2, 6, 4),
        make_pair(2, 5, 3),
        make_pair(3, 5, 4),
        make_pair(2, 5, 4, 3),
    ):
        state = method.init({"a": make_pair(), "b": other})
        shapes = [
            {k: x.shape for k, x in rlora.flatten_state(s).items()}
            for s in (state, method.init(tree))
        ]
        if shapes[0] == shapes[1]:
            continue  # the state has no array of that side
        with pytest.raises(ShapeError, match=r"\.b.*an array of shape \(.*, expected an array"):
            rlora.step(method, tree, tree, state, 1e-3)
    with pytest.raises(
        ShapeError, match=r"keys \['a', 'c'\], expected a dict with keys \['a', 'b'\]"
    ):
        rlora.step(method, tree, tree, method.init({"a": make_pair(), "c": make_pair()}), 1e-3)


NO_METHOD = {
    "step": lambda x: rlora.step(x, make_pair(), make_pair(), (), 1e-3),
    "chain": lambda x: rlora.chain(x),
    "graft_adamw": rlora.graft_adamw,
    "balanced_lora": rlora.balanced_lora,
}


@pytest.mark.parametrize("door", NO_METHOD)
@pytest.mark.parametrize(
    "given, match", [(rlora.lora_rite, r"got lora_rite; call it: lora_rite\("), (3, "got int$")]
)
def test_what_is_no_method(door, given, match):
    with pytest.raises(TypeError, match=f"expected a Transform, as .*, {match}"):
        NO_METHOD[door](given)


@EVERY
@pytest.mark.parametrize("tree", [[], {}, [[], {}]], ids=str)
def test_collections_without_a_pair(name, tree):
    with pytest.raises(rlora.NamespaceError, match="the collection has no pair"):
        getattr(methods, name)().init(tree)


@pytest.mark.parametrize("state", [None, (), {}, 1.0, (1.0, 2.0)])
def test_what_is_no_state(state):
    pair, method = make_pair(), rlora.scaled_adamw()
    with pytest.raises(ShapeError, match="the state does not belong to this method"):
        rlora.step(method, pair, pair, state, 1e-3)


def test_an_error_of_another_cause_is_not_hidden():
    pair = make_pair()

    def fail(grads, state, params):
        raise RuntimeError("no memory")

    link = rlora.Transform(rlora.scaled_sgd().init, fail)
    with pytest.raises(RuntimeError, match="no memory"):
        rlora.step(rlora.chain(link), pair, pair, rlora.chain(link).init(pair), 1e-3)


# --- torch tensors with a graph ---------------------------------------------------------------------


@EVERY
def test_tensors_that_require_gradients(name):
    """The step is no part of a graph: the numbers are those without one, and none is kept."""
    torch = pytest.importorskip("torch")
    method, results = getattr(methods, name)(), []
    for graph in (True, False):
        pair = Factors(*(torch.tensor(x, requires_grad=graph) for x in make_pair()))
        grads = Factors(torch.ones_like(pair.A), torch.ones_like(pair.B))
        if graph:  # gradients of gradients have a graph too
            grads = Factors(
                *((g + 0 * p).requires_grad_() for g, p in zip(grads, pair, strict=True))
            )
        state = method.init(pair)
        for _ in range(2):
            new, state = rlora.step(method, pair, grads, state, 1e-2)
        direction, _ = method.update(grads, method.init(pair), pair)
        arrays = [*new, *rlora.flatten_state(state).values()]
        arrays += [d for d in direction if d is not None]
        assert not any(x.requires_grad for x in arrays)
        assert all(p.requires_grad == graph for p in pair)
        results.append(arrays)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_a_factor_without_a_gradient_comes_back_without_a_graph():
    torch = pytest.importorskip("torch")
    pair = Factors(*(torch.tensor(x, requires_grad=True) for x in make_pair()))
    method = rlora.scaled_sgd()
    new, _ = rlora.step(method, pair, Factors(None, pair.B.detach()), method.init(pair), 1e-2)
    assert torch.equal(new.A, pair.A)
    assert not new.A.requires_grad


# --- names ------------------------------------------------------------------------------------------


def test_two_paths_of_one_name():
    pair = make_pair()
    tree = {"a.b": pair, "a": {"b": make_pair(3)}}
    with pytest.raises(PairingError, match=r"both named '0\.mu\.a\.b\.A'.*rename"):
        rlora.flatten_state(rlora.scaled_adamw().init(tree))


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": make_pair(), "a": {"c": make_pair(3)}},
        {"layers.0.q": make_pair(), "layers.1.q": make_pair(3)},
        {"layers": [make_pair(), make_pair(3)]},
        {"a": {"b.c": make_pair(3)}, "a.b": {"d": make_pair()}},
    ],
)
def test_dots_in_keys(tree):
    """As flat dicts of torch have them: the names of before, and back again."""
    state = rlora.scaled_adamw().init(tree)
    flat = rlora.flatten_state(state)
    assert len(flat) == 6 * len(list(rlora.core.factors.pairs_of(tree)))
    back = rlora.unflatten_state({k: x + 1 for k, x in flat.items()}, state)
    assert all(np.array_equal(x, flat[k] + 1) for k, x in rlora.flatten_state(back).items())


def test_names_are_those_of_before():
    names = rlora.flatten_state(rlora.scaled_adamw().init({"layers.0": [make_pair()]}))
    assert list(names)[:2] == ["0.mu.layers.0.0.A", "0.mu.layers.0.0.B"]


def test_a_list_of_gradients_for_a_dict_of_parameters():
    params = {"q": make_pair()}
    method = rlora.scaled_sgd()
    with pytest.raises(PairingError, match=r"one structure, got dict.* and list"):
        rlora.step(method, params, [params["q"]], method.init(params), 0.1)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", [np.ma.masked_array, np.matrix])
def test_kinds_of_numpy_arrays_that_multiply_otherwise(kind):
    pair = Factors(*map(kind, make_pair()))
    with pytest.raises(rlora.NamespaceError, match=r"give np\.asarray"):
        rlora.scaled_sgd().init(pair)
