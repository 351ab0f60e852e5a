"""Python calls of one step: what a small adapter pays for, and what a reader has to follow.

The bounds are what CPython 3.11 counts today, rounded up, to be lowered with it;
later versions count fewer.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import rlora
import rlora.backends
from rlora import Factors

SHAPES = [(4, 16, 12), (4, 16, 12), (4, 20, 12)]
OURS = Path(rlora.__file__).parent, Path(rlora.backends.__file__).parent
"""Not the clone: an environment in it has the libraries of others."""


def calls_of(step):
    """Calls of the library's own functions in a step, by file; generators count at each turn."""
    seen = Counter()

    def listen(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(path.is_relative_to(folder) for folder in OURS):
            seen[path.name] += 1

    before = sys.getprofile()
    sys.setprofile(listen)
    try:
        step()
    finally:
        sys.setprofile(before)
    return seen


def factors(seed):
    rng = np.random.default_rng(seed)
    return [Factors(rng.normal(size=(r, n)), rng.normal(size=(m, r))) for r, m, n in SHAPES]


def test_numpy():
    method = rlora.scaled_adamw()
    params, grads = factors(0), factors(1)
    params, state = rlora.step(method, params, grads, method.init(params), 1e-3)
    seen = calls_of(lambda: rlora.step(method, params, grads, state, 1e-3))
    assert 0 < seen.total() <= 245, seen
    assert len(seen) <= 15, seen


def test_lora_rite_on_torch():
    torch = pytest.importorskip("torch")
    pairs = [[torch.tensor(x, requires_grad=True) for x in pair] for pair in factors(0)]
    for pair, grads in zip(pairs, factors(1), strict=True):
        for p, g in zip(pair, grads, strict=True):
            p.grad = torch.tensor(g)
    optimizer = rlora.torch.LoRARite([p for pair in pairs for p in pair], pairs=pairs)
    for _ in range(2):
        optimizer.step()
    seen = calls_of(optimizer.step)
    assert 0 < seen.total() <= 545, seen
    assert len(seen) <= 25, seen
