"""Names propose pairs, shapes decide."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

from rlora.core.errors import PairingError, ShapeError
from rlora.core.layout import Layout, Shape, Views
from rlora.pairing.conventions import Convention, Known, is_low_rank, registered
from rlora.pairing.names import Candidate, sort_names
from rlora.pairing.report import Pair, PairReport

ByName: TypeAlias = tuple[str, str] | tuple[str, str, Layout]
"""The names of A and B, and how they lie where that is not (r, n) and (m, r)."""

Source: TypeAlias = (
    Convention
    | Sequence[Convention]
    | Sequence[ByName]
    | Callable[[Mapping[str, Any]], Iterable[ByName]]
)
"""Pairs from outside the registry: conventions, or the pairs themselves."""


def find_pairs(
    named: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    adapter: str | None = None,
    pairs: Source | None = None,
    known: Known | None = None,
) -> PairReport:
    """Find the LoRA pairs among named tensors.

    Known names: PEFT, loralib and litgpt; kohya, OneTrainer and LyCORIS; diffusers old and new;
    torchtune; NeMo and Megatron; flax, mlx, Keras and qwix. The order of the names does not matter.

    Parameters
    ----------
    named : mapping of str to array, or iterable of (str, array)
        Names with anything that has a ``shape``.
    adapter : str, optional
        Only pairs of this adapter, where names carry one (``...lora_A.<adapter>.weight``).
    pairs : Convention or several, sequence of (str, str) or (str, str, Layout), or callable
        Conventions come before the known ones. Names of pairs, or a callable that gives them for
        the mapping of names to tensors, replace them.
    known : mapping of str to Layout or str, optional
        Of layers by name, or by ``"layer (adapter)"``: how their factors lie where the shapes do
        not tell, or why they are no pair.

    Returns
    -------
    PairReport
        Print it to see what was found.

    Raises
    ------
    PairingError
        When two tensors have one name, one of a pair given by name is missing, factors have other
        adapters than the one asked for, or `pairs` is a string.
    ShapeError
        When a pair given by name does not fit together.
    TypeError
        When `named` is a model of torch.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> q = "model.layers.0.self_attn.q_proj"
    >>> report = rlora.find_pairs({
    ...     f"{q}.lora_B.default.weight": np.zeros((576, 8)),
    ...     f"{q}.lora_A.default.weight": np.ones((8, 576)),
    ...     "score.weight": np.zeros((2, 576)),
    ... })
    >>> print(report)
    1 pair, 1 unpaired parameter, 0 refused
      pair 576 x 576, rank 8: 1 time, model.layers.0.self_attn.q_proj (default)
      unpaired, so updated without preconditioning: score.weight
    """
    if hasattr(named, "named_parameters"):  # a model of torch, which is not imported here
        msg = (
            f"expected names with arrays, got a {type(named).__name__}; give a model to "
            f"rlora.torch.find_pairs, or its dict(model.named_parameters()) here"
        )
        raise TypeError(msg)
    items = list(named.items() if isinstance(named, Mapping) else named)
    tensors = dict(items)
    if len(tensors) != len(items):
        doubled = min(name for name, times in Counter(n for n, _ in items).items() if times > 1)
        msg = f"two tensors have the name {doubled!r}; give each its own"
        raise PairingError(msg)
    check_source(pairs)
    if callable(pairs):
        return _given(tensors, pairs(tensors))
    given = [pairs] if isinstance(pairs, Convention) else list(pairs or ())
    extra = [convention for convention in given if isinstance(convention, Convention)]
    if len(extra) < len(given):
        return _given(tensors, given)
    shapes = {name: tuple(tensor.shape) for name, tensor in items}
    return _search(shapes, (*extra, *registered()), adapter, known)


def check_source(pairs: Any) -> None:
    """Refuse a string: it would be taken letter by letter.

    Parameters
    ----------
    pairs : object
        The option `pairs` of whoever searches for pairs.

    Raises
    ------
    PairingError
        When it is a string, or has one among its entries.
    """
    words = [pairs] if isinstance(pairs, str) else pairs if isinstance(pairs, (list, tuple)) else ()
    if word := next((x for x in words if isinstance(x, str)), None):
        msg = (
            f"pairs must be Conventions, (name of A, name of B) for each pair, or a callable, and "
            f"for an optimizer of torch pairs of tensors or 'by_order' too, got the string "
            f"{word!r}; the names of PEFT and the other known libraries need no pairs="
        )
        raise PairingError(msg)


def _given(tensors: Mapping[str, Any], pairs: Iterable[Any]) -> PairReport:
    """Pairs by their names: every one must be right."""
    found: list[Pair] = []
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) in (2, 3)):
            msg = f"a pair by name must be (A, B) or (A, B, Layout), got {pair!r}"
            raise PairingError(msg)
        a, b, *layout = pair
        if missing := [name for name in (a, b) if name not in tensors]:
            msg = f"{missing[0]!r}, of the pair {a!r} and {b!r}, is not among the parameters"
            raise PairingError(msg)
        shapes = (tuple(tensors[name].shape) for name in (a, b))
        try:
            views = (layout[0] if layout else Layout()).views(*shapes)
        except ShapeError as error:
            msg = f"the pair {a!r} and {b!r} does not fit: {error}"
            raise ShapeError(msg) from error
        found.append(Pair(a, a, b, views))
    used = {name for pair in found for name in (pair.a, pair.b)}
    return PairReport(tuple(found), tuple(name for name in tensors if name not in used))


def _search(
    shapes: Mapping[str, Shape],
    conventions: Sequence[Convention],
    adapter: str | None,
    known: Known | None,
) -> PairReport:
    candidates, diagonals, others, refused = sort_names(shapes, conventions)
    if adapter is not None and candidates:
        _check_adapter(adapter, {candidate.proposal.adapter for candidate in candidates.values()})
    pairs: list[Pair] = []
    fits: Fits = {}
    for candidate in candidates.values():
        proposal = candidate.proposal
        place = (proposal.layer, proposal.adapter)
        found: Pair | str
        if adapter is not None and proposal.adapter != adapter:
            found = f"belongs to adapter {proposal.adapter!r}, not {adapter!r}"
        elif place in others:
            found = others[place]
        else:
            found = _fit(candidate, shapes, known, diagonals.get(place), fits)
        if isinstance(found, Pair):
            pairs.append(replace(found, layer=proposal.layer, adapter=proposal.adapter))
        else:
            refused |= dict.fromkeys(candidate.names.values(), found)
    factors = {name for candidate in candidates.values() for name in candidate.names.values()}
    seen = factors | refused.keys()
    return PairReport(tuple(pairs), tuple(name for name in shapes if name not in seen), refused)


def _check_adapter(wanted: str, there: set[str | None]) -> None:
    if wanted in there:
        return
    names = ", ".join(sorted(repr(name) for name in there if name is not None))
    msg = (
        f"no LoRA factor belongs to an adapter {wanted!r}; "
        f"{f'there are {names}' if names else 'their names have no adapter, leave it out'}"
    )
    raise PairingError(msg)


Fits: TypeAlias = dict[tuple[Any, ...], tuple[Views, ...] | None]
"""The views of the layout that fits, by convention and shapes, of which a model has few."""


def _fit(
    candidate: Candidate,
    shapes: Mapping[str, Shape],
    known: Known | None,
    diagonal: str | None,
    fits: Fits,
) -> Pair | str:
    """The pair, or why the two are none."""
    convention, proposal, names = candidate
    if len(names) < 2:
        (letter,) = names
        partner = f"the {'B' if letter == 'A' else 'A'} of {proposal.label or names[letter]}"
        return f"its partner, {partner}, is not among the parameters"
    told = known and (known.get(proposal.label) or known.get(proposal.layer))
    if isinstance(told, str):
        return told
    a, b = names["A"], names["B"]
    if PARAMETRIZED.search(a) or PARAMETRIZED.search(b):
        return (
            "a parametrization, such as spectral_norm, makes a factor out of it, and it is none "
            "itself; take that off by torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(told, Layout):
        try:
            return Pair(proposal.label or a, a, b, told.views(shapes[a], shapes[b]))
        except ShapeError as error:
            return str(error)
    if 0 in (*shapes[a], *shapes[b]) or min(len(shapes[a]), len(shapes[b])) < 2:
        return f"shapes {shapes[a]} and {shapes[b]} are not two matrices or convolution kernels"
    if known is None and EXPERTS.search(proposal.layer) and len(shapes[a]) == 2:
        return (
            "it may be a stack of experts, whose number its shapes do not tell: give the model, "
            "not only its parameters, or known={layer: Layout('(e r) n', 'm (r e)', sizes=...)}"
        )
    pair = _by_shape(convention, proposal.label or a, (a, shapes[a]), (b, shapes[b]), fits)
    if pair is None:
        return (
            f"shapes {shapes[a]} and {shapes[b]} share no rank: A must be (r, n) and B (m, r); "
            f"for blocks and other layouts give known={{layer: Layout(...)}}, or to an optimizer "
            f"pairs=[(A, B, Layout(...))]"
        )
    if diagonal is not None and prod(shapes[diagonal]) != pair.rank:
        return f"the diagonal {diagonal} of shape {shapes[diagonal]} does not fit rank {pair.rank}"
    return pair if diagonal is None else replace(pair, diagonal=diagonal)


EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)*$")
"""Names of the modules in which PEFT has adapted the stacked weights of all experts at once."""

PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.[^.]+\.original\d*$")
"""Names of tensors of which torch computes a parameter."""

Named = tuple[str, Shape]


def _by_shape(convention: Convention, label: str, A: Named, B: Named, fits: Fits) -> Pair | None:
    """The pair by its shapes; the roles of the names turned where only that gives a low rank."""
    for turned, ((a, shape_a), (b, shape_b)) in enumerate(((A, B), (B, A))):
        key = (id(convention), shape_a, shape_b)
        if key not in fits:
            fits[key] = convention.fit(shape_a, shape_b)
        views = fits[key]
        if views and not (turned and (len(views) > 1 or not is_low_rank(views))):
            return Pair(label, a, b, views)
    return None
