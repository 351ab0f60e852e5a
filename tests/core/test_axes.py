"""Axis patterns against index arithmetic written out, and reading against writing."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rlora import ShapeError
from rlora.core.layout import Layout

SIZES = {"r": 2, "n": 5, "m": 3, "e": 4, "k": 3}
PATTERNS = {
    "linear": (Layout(), (2, 5), (3, 2)),
    "convolution": (Layout(), (2, 5, 3, 3), (3, 2, 1, 1)),
    "experts of PEFT": (Layout("(e r) n", "m (r e)", sizes={"e": 4}), (8, 5), (3, 8)),
    "groups": (Layout("(e r) n*", "(e m) r 1*"), (8, 5, 3), (12, 2, 1)),
    "experts of torchtune": (Layout("e n r", "e r m"), (4, 5, 2), (4, 2, 3)),
    "turned": (Layout("e* n r", "e* r m"), (5, 2), (2, 3)),
    "turned stack of stacks": (Layout("e* n r", "e* r m"), (2, 2, 5, 2), (2, 2, 2, 3)),
    "einsum": (Layout("n* r", "r m*"), (5, 3, 2), (2, 3, 2)),
    "blocks": (Layout(blocks=(3, 1, 2)), (6, 5), (6, 2)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_writing_is_the_inverse_of_reading(backend, name):
    layout, *shapes = PATTERNS[name]
    rng = np.random.default_rng(0)
    for side, shape in enumerate(shapes):
        stored = rng.normal(size=shape)
        x = backend.asarray(stored, "float64")
        parts = []
        for views in layout.views(*shapes):
            factor = views[side].read(x)
            assert tuple(factor.shape) == views[side].shape
            parts.append(backend.to_numpy(views[side].write(factor)))
        assert np.array_equal(np.concatenate(parts), stored)


def test_what_is_read():
    a, b = np.arange(40.0).reshape(8, 5), np.arange(24.0).reshape(3, 8)
    ((A, B),) = PATTERNS["experts of PEFT"][0].views(a.shape, b.shape)
    for expert in range(4):
        assert np.array_equal(A.read(a)[expert], a[2 * expert : 2 * expert + 2])
        assert np.array_equal(B.read(b)[expert], b[:, expert::4])
    blocks = PATTERNS["blocks"][0].views((6, 5), (6, 2))
    a, b = np.arange(30.0).reshape(6, 5), np.arange(12.0).reshape(6, 2)
    for i, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 6))):
        assert np.array_equal(blocks[i][0].read(a), a[2 * i : 2 * i + 2])
        assert np.array_equal(blocks[i][1].read(b), b[rows])
    a, b = np.arange(30.0).reshape(5, 3, 2), np.arange(12.0).reshape(2, 6)
    ((A, B),) = Layout("n* r", "r m*").views(a.shape, b.shape)
    assert np.array_equal(B.read(b) @ A.read(a), np.einsum("ijr,rm->mij", a, b).reshape(6, 15))


@given(st.permutations("erkn"), st.lists(st.booleans(), min_size=3, max_size=3))
def test_any_order_and_any_grouping_of_axes(letters, joined):
    """A pattern of any order, some of its letters sharing an axis, against an explicit einsum."""
    axes = [letters[0]]
    for letter, together in zip(letters[1:], joined, strict=True):
        axes = [*axes[:-1], axes[-1] + letter] if together else [*axes, letter]
    pattern = " ".join(f"({' '.join(axis)})" if len(axis) > 1 else axis for axis in axes)
    shape = tuple(prod(SIZES[letter] for letter in axis) for axis in axes)
    layout = Layout(pattern, "k e m r", sizes={"e": 4, "k": 3, "r": 2})
    ((A, _),) = layout.views(shape, (3, 4, 7, 2))
    x = np.arange(prod(shape), dtype=float).reshape(shape)
    split = x.reshape([SIZES[letter] for letter in letters])
    assert np.array_equal(A.read(x), np.einsum(f"{''.join(letters)}->ekrn", split))
    assert np.array_equal(A.write(A.read(x)), x)


@pytest.mark.parametrize(
    "layout, a, b, why",
    [
        (Layout(), (2, 5), (3, 4), "an axis of 4 is not"),
        (Layout(), (2,), (3, 2), "number of axes"),
        (Layout(), (2, 5), (3, 2, 3), "an axis of 3 is not"),
        (Layout(), (2, 0), (3, 2), "an axis of 0"),
        (Layout("(e r) n", "m (r e)"), (8, 5), (3, 8), "the size of e or r is not known"),
        (Layout("(e r) n", "m (r e)", sizes={"e": 3}), (8, 5), (3, 8), "an axis of 8 is not"),
        (Layout("e r n", "m r"), (4, 2, 5), (3, 2), "the stacks differ"),
        (Layout("e* r n", "e* m r"), (2, 3, 2, 5), (3, 2, 4, 2), "the stacks differ"),
        (Layout(blocks=(3, 1)), (5, 5), (4, 2), "do not have 2 blocks"),
        (Layout(blocks=(3, 1)), (4, 5), (5, 2), "do not have 2 blocks"),
    ],
)
def test_what_does_not_fit(layout, a, b, why):
    with pytest.raises(ShapeError, match=why):
        layout.views(a, b)


@pytest.mark.parametrize("patterns", [("r", "m r"), ("r n", "m"), ("r r n", "m r"), ("r m", "m r")])
def test_patterns_need_their_letters(patterns):
    with pytest.raises(ShapeError, match="once each"):
        Layout(*patterns)
