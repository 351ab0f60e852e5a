"""Axis patterns: how a stored tensor holds a factor, or a stack of them.

A pattern names the axes of a tensor in their order. ``r``, ``n`` and ``m`` are the rank, the input
and the output side; any other letter is a stack of layers, experts or blocks. In parentheses stand
letters that share an axis, the slowest first. A star lets the last letter of its token take any
number of axes: ``n*`` is a kernel's input side, ``1*`` are axes of length one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

from rlora.core.dispatch import get_backend
from rlora.core.errors import ShapeError
from rlora.core.factors import Array, Factors

Shape = tuple[int, ...]
Views = tuple["View", "View"]


class View(NamedTuple):
    """A factor, or a stack of them, as it lies in a stored tensor.

    Parameters
    ----------
    stored : tuple of int
        The shape of the tensor, or of the rows of it that are meant.
    split : tuple of int
        The shape it is seen with, an axis for each letter.
    order : tuple of int
        The order of these axes in which they are (..., r, n) or (..., m, r).
    rows : (int, int), optional
        First and last row, where the factor is not the whole tensor.
    rank_axis : int
        The axis of the tensor in which the rank lies.
    """

    stored: Shape
    split: Shape
    order: Shape
    rows: tuple[int, int] | None = None
    rank_axis: int = 0

    @property
    def shape(self) -> Shape:
        """The shape of the factor that `read` gives."""
        return tuple(self.split[i] for i in self.order)

    @property
    def is_plain(self) -> bool:
        """True if the stored tensor is the factor itself."""
        return (
            self.rows is None
            and self.split == self.stored
            and self.order == tuple(range(len(self.order)))
        )

    def of_rank(self, rank: int, side: int) -> "View":
        """The view of an A (side 0) or a B (1) of another rank in the same layout."""
        place = self.order[side - 2]
        old, split, stored = self.split[place], list(self.split), list(self.stored)
        split[place] = rank
        stored[self.rank_axis] = stored[self.rank_axis] // old * rank
        rows = self.rows
        if rows is not None and self.rank_axis == 0:
            rows = (rows[0] // old * rank, rows[1] // old * rank)
        return self._replace(stored=tuple(stored), split=tuple(split), rows=rows)

    def part(self, x: Array) -> Array:
        """The rows of the stored tensor that are meant."""
        return x if self.rows is None else x[self.rows[0] : self.rows[1], ...]

    def read(self, x: Array) -> Array:
        """The factor in a stored tensor: (..., r, n) or (..., m, r)."""
        if self.is_plain:
            return x
        xp = get_backend(x).xp
        return xp.permute_dims(xp.reshape(self.part(x), self.split), self.order)

    def write(self, factor: Array) -> Array:
        """The inverse of `read`: the values of `part` of a stored tensor that hold this factor."""
        if self.is_plain:
            return factor
        xp = get_backend(factor).xp
        back = tuple(self.order.index(i) for i in range(len(self.order)))
        return xp.reshape(xp.permute_dims(factor, back), self.stored)


@dataclass(frozen=True)
class Layout:
    """Layout of the factors of one pair, or of a stack of pairs, in two stored tensors.

    Parameters
    ----------
    a, b : str
        Axis patterns: letters are sizes, ``r`` the rank, ``n`` and ``m`` the outer sides, others
        stacks; ``(e r)`` is one axis with the rank fastest; ``n*`` takes several axes.
    sizes : mapping of str to int
        Sizes of stacks that do not follow from the shapes.
    blocks : tuple of int
        Rows of B in each block, where A has that many blocks of r rows and B has them of unequal
        size. `a` and `b` are then the patterns of a block.

    Examples
    --------
    >>> from rlora.pairing import Layout
    >>> experts = Layout("(e r) n", "m (r e)", sizes={"e": 8})  # as PEFT stores them
    >>> [view.shape for view in experts.views((32, 64), (128, 32))[0]]
    [(8, 4, 64), (8, 128, 4)]
    >>> query_key_value = Layout(blocks=(64, 16, 16))
    >>> [[view.shape for view in pair] for pair in query_key_value.views((12, 64), (96, 4))]
    [[(4, 64), (64, 4)], [(4, 64), (16, 4)], [(4, 64), (16, 4)]]
    """

    a: str = "r n*"
    b: str = "m r 1*"
    sizes: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for letter, size in self.sizes.items():
            if size < 1:
                msg = f"sizes of a layout must be at least 1, got {letter}={size}"
                raise ShapeError(msg)
        for pattern, letters in ((self.a, "rn"), (self.b, "mr")):
            if any(pattern.count(letter) != 1 for letter in letters):
                msg = (
                    f"the pattern {pattern!r} must have {letters[0]} and {letters[1]} once each: "
                    f"A has the axes r and n, B has m and r"
                )
                raise ShapeError(msg)

    def views(self, shape_a: Shape, shape_b: Shape) -> tuple[Views, ...]:
        """Views of the factors of each pair in tensors of these shapes.

        Raises
        ------
        ShapeError
            When the patterns do not fit the shapes.
        """
        if not self.blocks:
            return (self._pair(shape_a, shape_b),)
        count = len(self.blocks)
        if not shape_a or not shape_b or shape_a[0] % count or shape_b[0] != sum(self.blocks):
            msg = (
                f"A of shape {shape_a} and B of shape {shape_b} do not have {count} blocks of "
                f"{self.blocks} rows of B"
            )
            raise ShapeError(msg)
        r = shape_a[0] // count
        ends = pairwise(accumulate(self.blocks, initial=0))
        pairs = []
        for i, (start, stop) in enumerate(ends):
            a, b = self._pair((r, *shape_a[1:]), (stop - start, *shape_b[1:]))
            rows_a, rows_b = (i * r, (i + 1) * r), (start, stop)
            pairs.append((a._replace(rows=rows_a), b._replace(rows=rows_b)))
        return tuple(pairs)

    def _pair(self, shape_a: Shape, shape_b: Shape) -> Views:
        fits = f"A of shape {shape_a} as '{self.a}' and B of shape {shape_b} as '{self.b}'"
        axes_a, axes_b = _axes(self.a, shape_a), _axes(self.b, shape_b)
        if axes_a is None or axes_b is None:
            msg = f"the number of axes is wrong: {fits}"
            raise ShapeError(msg)
        sizes = _solve([*axes_a, *axes_b], {"1": 1, **self.sizes})
        if isinstance(sizes, str):
            msg = f"{sizes}: {fits}"
            raise ShapeError(msg)
        a, b = _view(shape_a, axes_a, sizes, "rn"), _view(shape_b, axes_b, sizes, "mr")
        a = a._replace(rank_axis=_axis_of_rank(self.a, shape_a))
        b = b._replace(rank_axis=_axis_of_rank(self.b, shape_b))
        if a.shape[:-2] != b.shape[:-2] or _front(self.a, shape_a) != _front(self.b, shape_b):
            msg = f"the stacks differ: {fits}"
            raise ShapeError(msg)
        return a, b


def read_pairs(views: Sequence[Views], a: Array, b: Array) -> list[Factors]:
    """The pairs that two stored tensors hold."""
    return [Factors(view_a.read(a), view_b.read(b)) for view_a, view_b in views]


def _axes(pattern: str, shape: Shape) -> list[tuple[str, int]] | None:
    """The letters of each axis with its length, the star's axes as one; None if they are too few.

    A stack or ``1`` with a star may be missing.
    """
    tokens = _tokens(pattern)
    spare = len(shape) - len(tokens)
    starred = [i for i, token in enumerate(tokens) if token.endswith("*")]
    if (spare and not starred) or spare < -1:
        return None
    axes, place = [], 0
    for i, token in enumerate(tokens):
        letters = token.strip("()*").replace(" ", "")
        count = 1 + (spare if [i] == starred else 0)
        if count == 0 and letters in ("r", "n", "m"):
            return None
        if count:
            axes.append((letters, prod(shape[place : place + count])))
        place += count
    return axes


def _tokens(pattern: str) -> list[str]:
    return re.findall(r"\([^)]*\)\*?|\S+", pattern)


def _axis_of_rank(pattern: str, shape: Shape) -> int:
    tokens = _tokens(pattern)
    place = next(i for i, token in enumerate(tokens) if "r" in token)
    starred = any(token.endswith("*") for token in tokens[:place])
    return place + (len(shape) - len(tokens) if starred else 0)


def _front(pattern: str, shape: Shape) -> Shape:
    """Lengths of the axes that a stack with a star takes at the front."""
    first, *rest = _tokens(pattern)
    return shape[: len(shape) - len(rest)] if re.fullmatch(r"[^rnm1]\*", first) else ()


def _solve(axes: Sequence[tuple[str, int]], known: Mapping[str, int]) -> dict[str, int] | str:
    """The size of every letter, or why there is none."""
    sizes, waiting = dict(known), list(axes)
    while waiting:
        later = []
        for letters, length in waiting:
            unknown = [letter for letter in letters if letter not in sizes]
            rest = prod(sizes[letter] for letter in letters if letter in sizes)
            if len(unknown) > 1:
                later.append((letters, length))
            elif length == 0 or length % rest or (not unknown and length != rest):
                return f"an axis of {length} is not ({' '.join(letters)})"
            elif unknown:
                sizes[unknown[0]] = length // rest
        if len(later) == len(waiting):
            return f"the size of {' or '.join(later[0][0])} is not known"
        waiting = later
    return sizes


def _view(
    shape: Shape, axes: Sequence[tuple[str, int]], sizes: Mapping[str, int], last: str
) -> View:
    letters = [letter for group, _ in axes for letter in group if letter != "1"]
    stacks = sorted(letter for letter in letters if letter not in "rnm")
    order = tuple(letters.index(letter) for letter in [*stacks, *last])
    return View(shape, tuple(sizes[letter] for letter in letters), order)
