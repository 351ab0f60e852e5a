"""Result of a search for pairs, in names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from rlora.core.errors import PairingError
from rlora.core.factors import Array, Factors
from rlora.core.layout import Shape, Views, read_pairs
from rlora.pairing.conventions import registered


@dataclass(frozen=True)
class Pair:
    """Two parameters that form a product B A, or a stack of products.

    Parameters
    ----------
    name : str
        The layer, and the adapter if it has a name.
    a, b : str
        Names of the parameters in the roles of A and B.
    views : tuple of (View, View)
        Where the factors lie in them: one for most, several for blocks of unequal size.
    diagonal : str, optional
        Name of a diagonal between the factors (AdaLoRA): the product is ``B diag(e) A``. It is in
        no Gram matrix.
    layer : str
        The layer alone; empty for the model itself, and for a pair given by its names.
    adapter : str, optional
        The adapter alone.
    """

    name: str
    a: str
    b: str
    views: tuple[Views, ...]
    diagonal: str | None = None
    layer: str = ""
    adapter: str | None = None

    @property
    def shape_a(self) -> Shape:
        """(..., r, n), of the first of several."""
        return self.views[0][0].shape

    @property
    def shape_b(self) -> Shape:
        """(..., m, r), of the first of several."""
        return self.views[0][1].shape

    @property
    def rank(self) -> int:
        """The r of both factors."""
        return self.shape_a[-2]

    def read(self, a: Array, b: Array) -> list[Factors]:
        """The pairs that the two stored arrays hold, as a method takes them."""
        return read_pairs(self.views, a, b)


@dataclass(frozen=True)
class PairReport:
    """The pairs, the parameters in no pair, and the refused names with reasons.

    Parameters
    ----------
    pairs : tuple of Pair
        In the order in which the first of their names came.
    plain : tuple of str
        Names that belong to no LoRA layout; of torch parameters only those that are not frozen.
    refused : dict of str to str
        Names that look like LoRA factors but are not a pair, with the reason. They get the plain
        update too, unless they are frozen.
    tied : dict of str to str
        Names of tensors that share their memory with another one, which is updated for both.
    frozen : tuple of str
        Names of factors of these pairs that are not updated.
    """

    pairs: tuple[Pair, ...] = ()
    plain: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        lines = [
            f"{number_of(len(self.pairs), 'pair')}, "
            f"{number_of(len(self.plain), 'unpaired parameter')}, "
            f"{len(self.refused)} refused"
        ]
        kinds: dict[str, list[str]] = {}
        for pair in self.pairs:
            kinds.setdefault(" + ".join(map(_kind, pair.views)), []).append(pair.name)
        for kind, names in kinds.items():
            lines.append(f"  pair {kind}: {number_of(len(names), 'time')}, {first_of(names)}")
        if self.plain:
            lines.append(f"  unpaired, so updated without preconditioning: {first_of(self.plain)}")
        if self.frozen:
            lines.append(f"  frozen, so not updated: {first_of(self.frozen)}")
        lines += [f"  refused {name}: {why}" for name, why in self.refused.items()]
        if self.refused:
            lines.append("  what is refused, unless frozen, is updated without preconditioning")
        lines += [f"  tied {name}: updated with {twin}" for name, twin in self.tied.items()]
        return "\n".join(lines)


def nothing_paired(names: Iterable[str], report: PairReport) -> PairingError:
    """The error for parameters among which there is no pair; it shows the names it saw.

    Parameters
    ----------
    names : iterable of str
        Of all parameters.
    report : PairReport
        What was refused, and why.

    Returns
    -------
    PairingError
        To be raised by the caller.
    """
    names = list(names)
    plain = (f"{c.a}/{c.b}".replace("\\", "").replace("$", "") for c in registered())
    words = dict.fromkeys(word for word in plain if "(" not in word)
    why = "".join(f"\n  refused {name}: {w}" for name, w in list(report.refused.items())[:5])
    msg = (
        f"no LoRA pair among {number_of(len(names), 'parameter')}: "
        f"{first_of(names) or 'none given'}; known names are {', '.join(words)}; give the model "
        f"its adapters first (in PEFT by get_peft_model), check that they are trainable, and give "
        f"pairs=[(name of A, name of B), ...] for other names{why}"
    )
    return PairingError(msg)


def number_of(number: int, noun: str) -> str:
    """A number of things in English: "1 pair", "2 pairs".

    Parameters
    ----------
    number : int
        How many there are.
    noun : str
        In the singular.

    Returns
    -------
    str
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_of(names: Iterable[str]) -> str:
    """The first three names of many, and the number of the others: "a, b, c and 2 more"."""
    names = list(names)
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _kind(views: Views) -> str:
    (*stack, r, n), (*_, m, _) = (view.shape for view in views)
    return f"{f'{prod(stack)} of ' if stack else ''}{m} x {n}, rank {r}"
