"""Constants that stay in the memory of a step from one to the next."""

import pytest
import torch

import rlora.torch
from rlora.backends import _torch_cpu, get

CLASSES = [
    name
    for name in rlora.torch.__all__
    if isinstance(kind := getattr(rlora.torch, name), type)
    and issubclass(kind, torch.optim.Optimizer)
]


def made(memory, values=(1.0, 1.0, 2.0)):
    backend = get("torch")
    with backend.reusing(memory):
        return backend.constants(values, torch.float32, torch.ones(1))


def test_they_are_made_once():
    memory = {}
    assert made(memory) is made(memory)
    assert made(memory) is not made({})
    assert made(memory).flatten().tolist() == [1, 1, 2]


def test_none_is_kept_of_a_graph_that_is_being_captured(monkeypatch):
    """It is written when the graph is replayed, which may be never."""
    memory = {}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = made(memory)
    assert made(memory) is not captured
    assert made(memory) is made(memory)


@pytest.mark.parametrize("name", CLASSES)
def test_no_step_writes_to_them(name, monkeypatch):
    arenas = []

    class Recorded(_torch_cpu.Arena):
        def __init__(self):
            super().__init__()
            arenas.append(self)

    monkeypatch.setattr(_torch_cpu, "Arena", Recorded)
    monkeypatch.setattr("rlora.backends.torch.eigh_waits", lambda S: True)  # as a GPU does
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 12), (9, 3)] * 3 + [(5, 4), (8, 5)]  # the last with a rank above a side
    params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
    pairs = list(zip(params[::2], params[1::2], strict=True))
    optimizer = getattr(rlora.torch, name)(params, pairs=pairs)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    for (first, *rest), x in (item for arena in arenas for item in arena.constants.items()):
        if first == "eye":
            expected = rest[1] * torch.eye(rest[0], dtype=x.dtype)
        else:
            expected = torch.tensor(first, dtype=x.dtype).view(-1, 1, 1)
        torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    if name == "LoRARite":  # or nothing has been looked at
        assert sum(len(arena.constants) for arena in arenas) > 1


def test_a_schedule_of_betas_keeps_a_bounded_number(monkeypatch):
    """As OneCycleLR has one by default; the others are made in each step."""
    monkeypatch.setattr(_torch_cpu, "MOST_CONSTANTS", 3)
    memory = {}
    kept = [made(memory, [float(i)]) for i in range(5)]
    assert [x.item() for x in kept] == [0, 1, 2, 3, 4]
    assert len(memory["arena"].constants) == 3
    assert [made(memory, [float(i)]) is x for i, x in enumerate(kept)] == [True] * 3 + [False] * 2
