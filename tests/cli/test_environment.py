"""Accelerators in a record: those that the libraries of the run see."""

import sys
from types import SimpleNamespace

import pytest

from rlora.cli.environment import environment

NAMES = ["NVIDIA H200", "NVIDIA H200"]


def of_torch(count):
    cuda = {"is_available": lambda: count > 0, "device_count": lambda: count}
    return SimpleNamespace(cuda=SimpleNamespace(**cuda, get_device_name=NAMES.__getitem__))


def of_jax(count):
    devices = [SimpleNamespace(device_kind=name) for name in NAMES[:count] or ["cpu"]]
    platform = "gpu" if count else "cpu"
    return SimpleNamespace(devices=lambda: devices, default_backend=lambda: platform)


def of_cupy(count):
    runtime = SimpleNamespace(
        getDeviceCount=lambda: count, getDeviceProperties=lambda i: {"name": NAMES[i].encode()}
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, is_available=lambda: count > 0))


MADE = {"torch": of_torch, "jax": of_jax, "cupy": of_cupy}


@pytest.mark.parametrize(
    "counts",
    [{"torch": 2}, {"jax": 2}, {"cupy": 2}, {"torch": 0, "jax": 2}, {"torch": 0, "cupy": 2}],
    ids=str,
)
def test_a_library_on_a_device_names_it(monkeypatch, counts):
    for library, make in MADE.items():
        if library in counts:
            monkeypatch.setitem(sys.modules, library, make(counts[library]))
        else:
            monkeypatch.delitem(sys.modules, library, raising=False)
    assert environment()["accelerators"] == NAMES


def test_without_a_device_there_is_none(monkeypatch):
    for library, make in MADE.items():
        monkeypatch.setitem(sys.modules, library, make(0))
    assert environment()["accelerators"] == []
