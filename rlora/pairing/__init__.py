"""Discovery of pairs among tensors: names propose, shapes decide. Imports no framework.

Anything with a ``shape`` will do as a tensor: arrays, parameters, entries of a safetensors header.
"""

from rlora.core.layout import Layout, View
from rlora.pairing.conventions import Convention, Known
from rlora.pairing.find import Source, find_pairs
from rlora.pairing.names import is_factor
from rlora.pairing.order import pairs_by_order
from rlora.pairing.report import Pair, PairReport, nothing_paired

__all__ = [
    "Convention",
    "Known",
    "Layout",
    "Pair",
    "PairReport",
    "Source",
    "View",
    "find_pairs",
    "is_factor",
    "nothing_paired",
    "pairs_by_order",
]
