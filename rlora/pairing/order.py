"""Pairs among tensors without names, by their order and their shapes."""

from collections.abc import Sequence
from math import prod

from rlora.core.errors import PairingError
from rlora.core.layout import Shape

BY_ORDER = "by_order"
"""The word for it in the option ``pairs``."""


def pairs_by_order(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """Pair factors that have no names: runs of A, each followed by as many B of the same ranks.

    So trainers hand them over that give a module's factors one after the other (A B A B ..), those
    of a split projection (A A A B B B), or the two sides in groups of their own, as for LoRA+.

    Parameters
    ----------
    shapes : sequence of tuple of int
        Of all tensors, in their order. Vectors are left out; A is (r, n, ..) with r at most n ..,
        and B is (m, r, 1, ..) with r at most m.

    Returns
    -------
    list of (int, int)
        The places of A and B in `shapes`.

    Raises
    ------
    PairingError
        When the order cannot be read so, or can be read in more than one way.

    Examples
    --------
    >>> from rlora.pairing import pairs_by_order
    >>> pairs_by_order([(4, 16), (32, 4), (32,), (4, 32), (8, 4)])
    [(0, 1), (3, 4)]
    """
    places = [i for i, shape in enumerate(shapes) if len(shape) > 1]
    matrices = [shapes[i] for i in places]
    ways = [1] + [0] * len(matrices)  # of reading what stands before each place
    last = [0] * len(ways)  # the length of the last run of A in one of them
    for start in range(len(matrices)):
        for run in _runs(matrices, start) if ways[start] else ():
            ways[start + 2 * run] += ways[start]
            last[start + 2 * run] = run
    if ways[-1] != 1:
        end = max(i for i, count in enumerate(ways) if count)
        why = (
            f"tensor {places[end]} of shape {matrices[end]} and those after it are no run of A "
            f"(r, n) followed by as many B (m, r) of the same ranks"
            if not ways[-1]
            else "square tensors may be A or B, so that there is more than one way to read it"
        )
        msg = (
            f"pairs={BY_ORDER!r} cannot read the order of {len(places)} tensors: {why}; give named "
            f"parameters, or pairs=[(A, B), ...]"
        )
        raise PairingError(msg)
    found: list[tuple[int, int]] = []
    end = len(matrices)
    while end:
        run = last[end]
        found += [(places[i - run], places[i]) for i in range(end - run, end)]
        end -= 2 * run
    return sorted(found)


def _runs(shapes: Sequence[Shape], start: int) -> list[int]:
    """Lengths of a run of A from `start` on that a fitting run of B follows."""
    fitting: list[int] = []
    run = 0
    while start + 2 * run + 1 < len(shapes) and _may_be_a(shapes[start + run]):
        run += 1
        downs, ups = shapes[start : start + run], shapes[start + run : start + 2 * run]
        if all(map(_fit, downs, ups)):
            fitting.append(run)
    return fitting


def _may_be_a(shape: Shape) -> bool:
    return shape[0] <= prod(shape[1:])


def _fit(a: Shape, b: Shape) -> bool:
    return a[0] == b[1] <= b[0] and prod(b[2:]) == 1
