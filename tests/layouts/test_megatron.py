"""Megatron-Bridge's adapter, unsharded: linear_in and linear_out, with an activation or none.

Its package imports CUDA libraries; the adapter's own file needs none, so only that is loaded.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import Layer, batch, check, randomize, squares
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")


@pytest.fixture(scope="module")
def adapter_class():
    spec = importlib.util.find_spec("megatron.bridge")
    if spec is None:
        pytest.skip("megatron-bridge is not installed")
    root = Path(spec.origin).parent
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".peft", ".utils"):
            package = types.ModuleType(f"megatron.bridge{name}")
            package.__path__ = [str(root / name.strip("."))]
            patch.setitem(sys.modules, package.__name__, package)
        from megatron.bridge.peft.utils import ParallelLinearAdapter
        from megatron.core import parallel_state
        from torch import distributed

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield ParallelLinearAdapter
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


class Adapted(nn.Module):
    """A frozen linear layer with an adapter beside it, named as Megatron-Bridge's wrapper does."""

    def __init__(self, adapter_class, n, m, activation, **options):
        from megatron.core.model_parallel_config import ModelParallelConfig

        super().__init__()
        self.to_wrap = nn.Linear(n, m, dtype=torch.float64).requires_grad_(False)
        config = ModelParallelConfig(use_cpu_initialization=True, params_dtype=torch.float64)
        self.adapter = adapter_class(
            n, m, 3, "q", activation=activation, model_parallel_config=config, **options
        )

    def forward(self, x):
        return self.to_wrap(x) + self.adapter(x)


def layers(*owners):
    return [
        Layer(f"{x}.adapter.linear_in.weight", f"{x}.adapter.linear_out.weight") for x in owners
    ]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.works("Megatron, NeMo", "adapters, not sharded")
def test_identity(adapter_class, parallel):
    """Both kinds of base layer, those cut by columns and those cut by rows."""
    torch.manual_seed(0)
    options = {"input_is_parallel": parallel}
    model = nn.Sequential(
        Adapted(adapter_class, 6, 10, "identity", **options),
        nn.Tanh(),
        Adapted(adapter_class, 10, 4, "identity", **options),
    )
    randomize(model)
    x = batch(16, 6)
    product = layers("0")[0].products(model)[0]
    np.testing.assert_allclose(
        model[0].adapter(x).detach(), x.numpy() @ product.T * model[0].adapter.alpha / 3, atol=1e-12
    )
    check(model, squares(x), layers("0", "2"))


@pytest.mark.parametrize("activation, name", [("swish", "SiLU"), ("relu", "ReLU")])
@pytest.mark.refuses("Megatron, NeMo", "an activation between the factors")
def test_an_activation_between_the_factors_is_refused_by_name(adapter_class, activation, name):
    model = nn.Sequential(
        Adapted(adapter_class, 6, 10, "identity"), Adapted(adapter_class, 10, 4, activation)
    )
    (near,) = layers("1")
    report = rlora.torch.find_pairs(randomize(model))
    assert [(pair.a, pair.b) for pair in report] == [layers("0")[0][:2]]
    assert set(report.refused) == set(near[:2])
    assert f"{name} stands between" in report.refused[near.a]
    check(model, squares(batch(16, 6)), layers("0"), refused=near[:2])
