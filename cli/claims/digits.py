"""A small real task: a network that knows the odd digits of scikit-learn learns the even ones.

The network is ``B relu(A x)``; its two weights are kept as a pair, and each has a LoRA pair of its
own. Seeds, and learning rates where they are swept, are leading axes: all runs go at once.
"""

import importlib
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

import rlora
from rlora import Factors, Transform
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array
from rlora.core.moments import scale_by_adam

from .claim import Setting

PIXELS, HIDDEN, CLASSES, RANK = 64, 64, 10, 4
BATCH, STEPS = 64, 200
PRETRAINING_STEPS, PRETRAINING_LR = 300, 3e-3
TRAINING: Final = 0.7
"""The share of the digits to learn from; the others are for validation."""

Numbers = NDArray[Any]


def probabilities(network: Factors, x: Array) -> tuple[Array, Array]:
    """The hidden units and ``softmax(B relu(A x))``, for images (..., PIXELS, N)."""
    xp = get_backend(x).xp
    hidden = xp.clip(network.A @ x, min=0.0)  # (..., HIDDEN, N)
    logits = network.B @ hidden
    odds = xp.exp(logits - xp.max(logits, axis=-2, keepdims=True))  # (..., CLASSES, N)
    return hidden, odds / xp.sum(odds, axis=-2, keepdims=True)


def loss(network: Factors, x: Array, y: Array) -> Array:
    """The mean cross-entropy (...), for one-hot labels (..., CLASSES, N)."""
    xp = get_backend(x).xp
    likelihood = xp.sum(probabilities(network, x)[1] * y, axis=-2)  # (..., N)
    # A network that is sure and wrong has a likelihood of 0 in float64: a large loss, not inf.
    return -xp.mean(xp.log(xp.clip(likelihood, min=float(np.finfo(float).tiny))), axis=-1)


def gradient(network: Factors, x: Array, y: Array) -> Factors:
    """Gradients of the loss by both weights."""
    hidden, p = probabilities(network, x)
    error = (p - y) / x.shape[-1]
    back = (network.B.mT @ error) * get_backend(x).cast(hidden > 0, x.dtype)
    return Factors(back @ x.mT, error @ hidden.mT)


def adapted(network: Factors, pairs: list[Factors]) -> Factors:
    """The network with a LoRA pair on each weight."""
    return Factors(*(W + pair.B @ pair.A for W, pair in zip(network, pairs, strict=True)))


def adapter_gradients(network: Factors, pairs: list[Factors], x: Array, y: Array) -> list[Factors]:
    """Gradients of the loss by the factors of each pair."""
    G = gradient(adapted(network, pairs), x, y)
    return [Factors(pair.B.mT @ g, g @ pair.A.mT) for pair, g in zip(pairs, G, strict=True)]


class Digits(NamedTuple):
    """Images and labels, and for each of S seeds those to learn from and those for validation."""

    images: Numbers
    """(N, PIXELS) in [0, 1]."""

    labels: Numbers
    """(N, CLASSES), one-hot."""

    training: Numbers
    """Indices (S, ...)."""

    validation: Numbers

    def pick(self, setting: Setting, indices: Numbers) -> tuple[Array, Array]:
        """Images and labels (S, ..., K) for indices (S, K)."""
        x, y = (np.swapaxes(data[indices], -1, -2) for data in (self.images, self.labels))
        return setting.array(x), setting.array(y)

    def batch(self, setting: Setting, rng: np.random.Generator) -> tuple[Array, Array]:
        """Some of each seed's digits to learn from."""
        seeds, size = self.training.shape
        chosen = rng.integers(size, size=(seeds, BATCH))
        return self.pick(setting, np.take_along_axis(self.training, chosen, axis=-1))


def read_digits(parity: int, seeds: int, rng: np.random.Generator) -> Digits:
    """The digits of a parity, split anew for each seed."""
    try:
        load = importlib.import_module("sklearn.datasets").load_digits
    except ImportError as error:
        msg = "this claim trains on the digits of scikit-learn: pip install scikit-learn"
        raise ImportError(msg) from error
    images, digits = load(return_X_y=True)
    mine = np.flatnonzero(digits % 2 == parity)
    order = np.stack([rng.permutation(mine) for _ in range(seeds)])
    cut = int(TRAINING * len(mine))
    return Digits(images / images.max(), np.eye(CLASSES)[digits], order[:, :cut], order[:, cut:])


def pretrained(setting: Setting, digits: Digits, rng: np.random.Generator) -> Factors:
    """Networks (S, ...) after Adam on both weights."""
    seeds, method = len(digits.training), rlora.chain(scale_by_adam())
    shapes = (seeds, HIDDEN, PIXELS), (seeds, CLASSES, HIDDEN)
    start = (rng.standard_normal(shape) / shape[-1] ** 0.5 for shape in shapes)
    network = Factors(*(setting.array(x) for x in start))

    def move(network: Factors, state: Any, x: Array, y: Array) -> Any:
        return rlora.step(method, network, gradient(network, x, y), state, PRETRAINING_LR)

    move, state = setting.backend.compile(move), method.init(network)
    for _ in range(PRETRAINING_STEPS):
        network, state = move(network, state, *digits.batch(setting, rng))
    return network


class DigitsTask(NamedTuple):
    """S networks that know the odd digits, and the even ones to learn."""

    setting: Setting
    network: Factors
    digits: Digits

    def final_losses(self, method: Transform, learning_rates: Numbers, label: str) -> Numbers:
        """On the validation digits (L, S), after steps whose learning rate falls to 0.

        From LoRA's start, with the same adapters and batches for every method and learning rate.
        """
        setting, rng = self.setting, np.random.default_rng(1)
        lr = setting.array(learning_rates[:, None, None, None])
        pairs = [self.start(rng, W, len(learning_rates)) for W in self.network]

        def move(pairs: list[Factors], state: Any, x: Array, y: Array, lr: Array) -> Any:
            grads = adapter_gradients(self.network, pairs, x, y)
            return rlora.step(method, pairs, grads, state, lr)

        move, state = setting.backend.compile(move), method.init(pairs)
        with np.errstate(all="ignore"):  # the largest learning rates are meant to diverge
            for t in setting.track(range(STEPS), label):
                batch = self.digits.batch(setting, rng)
                pairs, state = move(pairs, state, *batch, lr * (1.0 - t / STEPS))
            x, y = self.digits.pick(setting, self.digits.validation)
            final = setting.backend.to_numpy(loss(adapted(self.network, pairs), x, y))
        return np.where(np.isfinite(final), final, np.inf)

    def start(self, rng: np.random.Generator, weight: Array, runs: int) -> Factors:
        """A pair for each run and seed: B is zero, and A the same in all runs."""
        seeds, m, n = weight.shape
        A = rng.standard_normal((seeds, RANK, n)) / n**0.5
        B = np.zeros((runs, seeds, m, RANK))
        return Factors(self.setting.array(np.tile(A, (runs, 1, 1, 1))), self.setting.array(B))


def make_task(setting: Setting, seeds: int) -> DigitsTask:
    """Networks that know the odd digits, the same every time."""
    rng = np.random.default_rng(0)
    odd, even = (read_digits(parity, seeds, rng) for parity in (1, 0))
    return DigitsTask(setting, pretrained(setting, odd, rng), even)
