"""Problems to time steps on: shapes of models, and factors and gradients as NumPy arrays."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlora import Factors

Shape = tuple[int, int]
"""(m, n): out_features and in_features of the adapted weight."""


class Preset(NamedTuple):
    """`layers` equal layers, each with adapters on weights of these shapes, in module order."""

    targets: str
    layers: int
    shapes: tuple[Shape, ...]

    def pairs(self) -> list[Shape]:
        """List the shape behind every pair of the adapter, layer by layer."""
        return list(self.shapes) * self.layers


def _linear(hidden: int, kv: int, mlp: int) -> tuple[Shape, ...]:
    """q, k, v, o, gate, up, down of a Llama layer."""
    square, narrow = (hidden, hidden), (kv, hidden)
    return (square, narrow, narrow, square, (mlp, hidden), (mlp, hidden), (hidden, mlp))


PRESETS: Final[dict[str, Preset]] = {
    "gpt2-medium": Preset("c_attn", 24, ((3072, 1024),)),
    "smollm2-135m": Preset("all linear", 30, _linear(576, 192, 1536)),
    "qwen2.5-0.5b": Preset("q, v", 24, ((896, 896), (128, 896))),
    "gemma-2b": Preset("q, v", 18, ((2048, 2048), (256, 2048))),
    "llama-7b": Preset("q, v", 32, ((4096, 4096), (4096, 4096))),
    "llama-7b-all": Preset("all linear", 32, _linear(4096, 4096, 11008)),
    "llama-7b-quarter": Preset("all linear, 8 of 32 layers", 8, _linear(4096, 4096, 11008)),
    "mistral-7b": Preset("q, v", 32, ((4096, 4096), (1024, 4096))),
    "llama-3.1-8b": Preset("q, v", 32, ((4096, 4096), (1024, 4096))),
    "roberta-base": Preset("query, value", 12, ((768, 768), (768, 768))),
    "vit-base": Preset("query, value", 12, ((768, 768), (768, 768))),
}

DEFAULT: Final = "gpt2-medium"

TOKENS: Final = 512
"""Length of the one sequence of a forward and backward pass."""


SHAPE: Final = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})\*([1-9]\d{0,6})", re.ASCII)
"""``MxN*K``, as in ``1024x1024*24``: K layers with one weight of m x n each."""


def named(name: str) -> Preset:
    """Find a preset, or make that of a shape; a ValueError lists what there is."""
    if name in PRESETS:
        return PRESETS[name]
    if found := SHAPE.fullmatch(name):
        m, n, layers = map(int, found.groups())
        return Preset("one weight a layer", layers, ((m, n),))
    if name[:1].isdigit():
        msg = (
            f"--preset {name[:40]!r} is no shape MxN*K, as in 1024x1024*24: three whole numbers "
            "from 1 to 9999999 without leading zeros"
        )
        raise ValueError(msg)
    msg = f"no preset called {name!r}; there are {', '.join(PRESETS)}, and shapes MxN*K"
    raise ValueError(msg)


def is_shape(name: str) -> bool:
    """Return whether a preset is a shape, and so of no model."""
    return SHAPE.fullmatch(name) is not None


Shapes = Mapping[tuple[int, int, int], int]
"""Number of pairs of each m, n, r."""

GRADIENT_SCALE = 1e-2
B_SCALE = 1e-2
"""Not zero, as B is at a start: of a zero factor every step would be the damping's alone."""


class BenchProblem(NamedTuple):
    """Equal work for every case."""

    pairs: list[Factors]
    grads: list[Factors]

    @property
    def rank(self) -> int | list[int]:
        """The rank, or every one that occurs."""
        ranks = sorted({pair.A.shape[0] for pair in self.pairs})
        return ranks[0] if len(ranks) == 1 else ranks

    @property
    def shapes(self) -> Shapes:
        """The shapes alone, for those who outlive the arrays."""
        return Counter((B.shape[0], A.shape[1], A.shape[0]) for A, B in self.pairs)

    @property
    def parameters(self) -> int:
        """Numbers in all factors together."""
        return sum(pair.A.size + pair.B.size for pair in self.pairs)


def random_problem(shapes: Sequence[Shape], rank: int, seed: int) -> BenchProblem:
    """Random factors for weights of these shapes: A ~ N(0, 1/n), B ~ N(0, 1e-4)."""
    rng = np.random.default_rng(seed)
    pairs = [
        Factors(_normal(rng, (rank, n), n**-0.5), _normal(rng, (m, rank), B_SCALE))
        for m, n in shapes
    ]
    return with_gradients(pairs, seed)


def with_gradients(pairs: Sequence[Factors], seed: int) -> BenchProblem:
    """Factors as they are, with gradients ~ N(0, 1e-4)."""
    rng = np.random.default_rng([seed, 1])
    grads = [
        Factors(*(_normal(rng, x.shape, GRADIENT_SCALE) for x in (pair.A, pair.B)))
        for pair in pairs
    ]
    return BenchProblem(list(pairs), grads)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    return np.float32(scale) * rng.standard_normal(shape, np.float32)
