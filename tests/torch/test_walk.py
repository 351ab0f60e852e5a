"""The way of a step through the code: what somebody who follows a gradient has to read."""

import sys
from pathlib import Path

import pytest
import torch

import rlora.torch

OURS = Path(rlora.torch.__file__).parents[1], Path(rlora.__file__).parents[1] / "backends"


def walk_of(kind, count):
    """Python calls in our own files, and the files, of the third step of so many equal pairs."""
    pairs = [
        (torch.randn(4, 40, requires_grad=True), torch.randn(60, 4, requires_grad=True))
        for _ in range(count)
    ]
    params = [p for pair in pairs for p in pair]
    optimizer = kind(params, lr=1e-2, pairs=pairs)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append(frame.f_code)

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    paths = [Path(code.co_filename) for code in called if code.co_name[0] != "<"]
    own = [path for path in paths if any(folder in path.parents for folder in OURS)]
    return len(own), {path.name for path in own}


@pytest.mark.parametrize(
    ("kind", "most_calls", "most_files"),
    [(rlora.torch.ScaledAdamW, 105, 11), (rlora.torch.LoRARite, 250, 25)],
)
def test_a_step_of_three_pairs(kind, most_calls, most_files):
    """Comprehensions and lambdas, which some versions of Python count as calls, are left out."""
    calls, files = walk_of(kind, 3)
    assert 50 < calls <= most_calls, calls
    assert len(files) <= most_files, sorted(files)


@pytest.mark.parametrize("kind", [rlora.torch.ScaledAdamW, rlora.torch.LoRARite])
def test_more_pairs_of_one_shape_take_the_same_way(kind):
    few, files = walk_of(kind, 3)
    many, same = walk_of(kind, 24)
    assert many <= 2 * few
    assert same == files
