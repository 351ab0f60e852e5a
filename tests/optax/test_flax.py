"""The how-to's flax nnx model, trained for real."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")

EXAMPLE = Path(__file__).parents[2] / "docs" / "how-to" / "flax_nnx.py"


def test_the_how_to_learns():
    spec = importlib.util.spec_from_file_location("flax_nnx", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main(["lora_rite"], steps=60)
    for losses, accuracy in results.values():
        assert losses[-1] < 0.1 * losses[0]
        assert accuracy > 0.3  # a tenth is chance; 150 steps reach 0.8
