"""The numbers of the engines of version 1, which this one replaced."""

from pathlib import Path

import golden_steps
import numpy as np
import pytest

KEPT = np.load(Path(__file__).parents[1] / "data" / "steps.npz")


@pytest.mark.parametrize("case", golden_steps.CASES, ids=golden_steps.name_of)
def test_kept_numbers(case):
    """20 steps in float64, gradients that come and go: only the order of sums differs."""
    found = golden_steps.trained(*case)
    np.testing.assert_allclose(found, KEPT[golden_steps.name_of(case)], rtol=1e-12, atol=1e-15)
