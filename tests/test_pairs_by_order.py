"""Pairs of factors without names, by their order and shapes."""

import pytest

import rlora
from rlora.pairing import pairs_by_order

A, B = (4, 16), (32, 4)


@pytest.mark.parametrize(
    ("shapes", "pairs"),
    [
        ([A, B, A, B], [(0, 1), (2, 3)]),
        ([A, A, A, B, (8, 4), B], [(0, 3), (1, 4), (2, 5)]),  # a split projection
        ([A, B, A, A, B, B], [(0, 1), (2, 4), (3, 5)]),
        ([A, (32,), B, ()], [(0, 2)]),  # vectors and scalars are in no pair
        ([(4, 16, 3, 3), (32, 4, 1, 1)], [(0, 1)]),  # kernels
        ([(2, 9), (4, 9), (9, 2), (9, 4)], [(0, 2), (1, 3)]),  # ranks that differ
        ([(4, 4), (4, 4)], [(0, 1)]),  # square, and still one way to read it
        ([A] * 700 + [B] * 700, [(i, 700 + i) for i in range(700)]),
        ([(32,)], []),
    ],
)
def test_runs_of_a_and_as_many_b(shapes, pairs):
    assert pairs_by_order(shapes) == pairs


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ([B, A], r"tensor 0 of shape \(32, 4\)"),  # the sides swapped
        ([A, B, (50, 16)], r"tensor 2 of shape \(50, 16\)"),  # a head that is trained too
        ([A, (32, 8)], "tensor 0"),  # ranks that do not fit
        ([A, (3, 4)], "tensor 0"),  # a rank above the outputs
        ([A, A, B], "tensor 0"),
        ([(4, 16, 3, 3), (32, 4, 3, 3)], "tensor 0"),  # Tucker's and other kernels
        ([(2, 9), (4, 9), (9, 4), (9, 2)], "tensor 0"),  # another order
        ([A, (4, 4), (4, 4), B], "more than one way"),
    ],
)
def test_what_cannot_be_read_in_one_way_is_refused_with_the_reason(shapes, why):
    with pytest.raises(rlora.PairingError, match=rf"by_order.*{why}.*give named parameters"):
        pairs_by_order(shapes)
