"""Names of tensors, sorted: factors by their layers, diagonals, tensors of other adapters."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlora.pairing.conventions import (
    DIAGONAL,
    NEAR_MISSES,
    SIBLINGS,
    Convention,
    Proposal,
    first_place,
    proposals,
    propose,
    registered,
)


class Candidate(NamedTuple):
    """A layer of one convention, and the names of its factors by their letters."""

    convention: Convention
    proposal: Proposal
    names: dict[str, str]


class Sorted(NamedTuple):
    """The names, sorted."""

    candidates: dict[Any, Candidate]
    diagonals: dict[Any, str]
    """By layer, the name of the diagonal between its factors."""
    others: dict[Any, str]
    """By layer, the reason why it is no product."""
    refused: dict[str, str]


def sort_names(names: Iterable[str], conventions: Sequence[Convention]) -> Sorted:
    """The names that look like those of factors, by their layers."""
    found = Sorted({}, {}, {}, {})
    others = (DIAGONAL, *(word for word, _ in (*NEAR_MISSES, *SIBLINGS)))
    words = (*others, *patterns_of(conventions))
    behind = any("(?<" in word for word in words)  # it looks at what is before the place
    places = {name: place for name in names if (place := first_place(name, words)) is not None}
    starts = dict.fromkeys(places, 0) if behind else places
    seen: dict[str, list[Way]] = {}
    ways = {name: _ways(name, start, conventions, seen) for name, start in starts.items()}
    there = {(way.place, way.letter) for name in ways for way in ways[name]}
    for name, start in starts.items():
        other = first_place(name, others, start) is not None
        if other and (near := _first(name, NEAR_MISSES)):
            found.refused[name] = near[1]
        elif other and (diagonal := propose(name, DIAGONAL)):
            found.diagonals[diagonal.layer, diagonal.adapter] = name
        elif other and (sibling := _first(name, SIBLINGS)):
            found.others[sibling[0].layer, sibling[0].adapter] = sibling[1]
        elif ways[name]:
            whole = (way for way in ways[name] if (way.place, way.other) in there)
            way = next(whole, ways[name][0])
            i, proposal = way.place
            new = Candidate(conventions[i], proposal, {})
            found.candidates.setdefault(way.place, new).names[way.letter] = name
    return found


def _first(name: str, words: Iterable[tuple[str, str]]) -> tuple[Proposal, str] | None:
    return next(((found, why) for word, why in words if (found := propose(name, word))), None)


class Way(NamedTuple):
    """One way to read a name: of which convention, whose factor, and which."""

    place: tuple[int, Proposal]
    letter: str

    @property
    def other(self) -> str:
        """The letter of the partner."""
        return "B" if self.letter == "A" else "A"


def _ways(
    name: str, start: int, conventions: Sequence[Convention], seen: dict[str, list[Way]]
) -> list[Way]:
    """Every way to read a name, as layers and adapters may be called like factors.

    No pattern begins before `start`, and most names of a model end alike: an ending is read once.
    """
    head, end = name[:start], name[start:]
    if end not in seen:
        seen[end] = list(_ways_to_end(end, conventions))
    return [
        Way((i, proposal._replace(layer=_joined(head, proposal.layer))), letter)
        for (i, proposal), letter in seen[end]
    ]


def _joined(head: str, layer: str) -> str:
    return head + layer if layer.startswith(".") else ".".join(filter(None, (head, layer)))


def _ways_to_end(name: str, conventions: Sequence[Convention]) -> Iterator[Way]:
    if name.endswith(".bias"):
        return
    for i, convention in enumerate(conventions):
        found = [
            (start, Way((i, proposal), letter))
            for letter, pattern in (("A", convention.a), ("B", convention.b))
            for start, proposal in proposals(name, pattern)
        ]
        # An adapter is a module, whose name has no dot: with dots it may be a layer with adapters.
        found.sort(key=lambda way: ("." in (way[1].place[1].adapter or ""), way[0]))
        yield from (way for _, way in found)


def patterns_of(conventions: Sequence[Convention]) -> Iterator[str]:
    return (pattern for convention in conventions for pattern in (convention.a, convention.b))


def is_factor(name: str) -> bool:
    """Return whether a name is that of a LoRA factor under a known convention.

    Parameters
    ----------
    name : str
        Of a parameter, its parts joined by dots.

    Returns
    -------
    bool
        What the name says; whether it has a partner that fits is another question.
    """
    patterns = tuple(patterns_of(registered()))
    return not name.endswith(".bias") and first_place(name, patterns) is not None
