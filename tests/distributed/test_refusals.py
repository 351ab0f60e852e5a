"""Factors that a sharding scheme has cut or flattened are refused, with what to do instead."""

import sys
import types
from contextlib import nullcontext

import pytest
import sharded_refusals as refusals
import torch
from models import loss_of, make_model, same, values

from rlora import PairingError, ShardingError
from rlora.torch import LoRARite, ScaledAdamW, find_pairs
from rlora.torch.pairing import sharding_checks


@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
@pytest.mark.refuses("FSDP1, tensor parallelism", "FSDP1")
def test_fsdp1(groups, original):
    for said in groups(2).run(refusals.fsdp1, original):
        assert all("flattened" in message and "FSDP2" in message for message in said)


def test_a_flattened_parameter_that_is_frozen_is_no_matter():
    """The base of an adapter that FSDP does not wrap."""
    flat = torch.nn.Parameter(torch.ones(9), requires_grad=False)
    pair = refusals.pair_of(torch.ones(2, 8), torch.ones(6, 2))
    assert len(find_pairs([("base._flat_param", flat), *pair])) == 1
    with pytest.raises(ShardingError, match="flattened"):
        find_pairs([("base._flat_param", flat.requires_grad_()), *pair])


@pytest.mark.refuses("FSDP1, tensor parallelism", "factors cut along the rank")
def test_tensor_parallel(groups):
    for marked, cut in groups(2).run(refusals.tensor_parallel):
        assert "tensor-parallel" in marked
        assert "(partition_dim = 1)" in marked
        assert "2 rows and its partner 4 columns" in cut
        assert "DDP or FSDP2" in cut


def test_megatron_with_one_process_is_whole(monkeypatch):
    """It marks its parameters then too, and says how many there are where it is loaded."""
    named = refusals.pair_of(torch.ones(4, 8), torch.ones(6, 4))
    for _, p in named:
        p.tensor_model_parallel = True
    assert len(find_pairs(named)) == 1
    state = types.ModuleType("megatron.core.parallel_state")
    state.model_parallel_is_initialized = lambda: True
    state.get_tensor_model_parallel_world_size = lambda: 2
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    with pytest.raises(ShardingError, match="tensor-parallel"):
        find_pairs(named)


@pytest.mark.parametrize(
    "processes, a, b, cut",
    [
        (2, (2, 8), (6, 4), True),
        (4, (2, 8), (6, 4), True),
        (3, (2, 8), (6, 4), False),
        (2, (4, 2), (2, 8), False),
    ],
)
def test_shapes_of_a_cut_rank(monkeypatch, processes, a, b, cut):
    """Cut by a divisor of the number of processes; factors (n, r) and (r, m) are whole in any."""
    monkeypatch.setattr(sharding_checks, "_processes", lambda: processes)
    named = [("q.lora_a", torch.ones(a)), ("q.lora_b", torch.ones(b))]
    said = pytest.raises(ShardingError, match="2 rows and its partner 4 columns")
    with said if cut else nullcontext():
        sharding_checks.check_whole(named)


def test_shapes_that_do_not_fit_in_one_process_are_no_sharding():
    with pytest.raises(PairingError, match="share no rank"):
        ScaledAdamW(refusals.pair_of(torch.ones(2, 8), torch.ones(6, 4)))


def test_layouts(groups):
    for said in groups(4).run(refusals.layouts):
        assert said.pop("fine") is None
        assert "one device mesh" in said.pop("one whole")
        assert "one device mesh" in said.pop("two meshes")
        assert said.pop("kernels") is None
        assert "along their first axis" in said.pop("inside a kernel")
        assert "use DDP" in said.pop("transposed")
        assert "shard_placement" in said.pop("partial")
        assert "shard_placement" in said.pop("rank cut twice")
        assert not said


@pytest.mark.refuses("FSDP2", "`initialize` after sharding")
def test_initializers(groups):
    for said in groups(2).run(refusals.initialize):
        assert "before fully_shard" in said


def test_state_of_whole_parameters(groups):
    for said, untouched, spread in groups(2).run(refusals.whole_state):
        assert "set_optimizer_state_dict" in said
        assert untouched
        assert spread


@pytest.mark.refuses("DeepSpeed ZeRO 1 to 3", "without `ZeroOptimizer`")
def test_zero_stage_3():
    """DeepSpeed's mark; it leaves the parameter empty."""
    named = refusals.pair_of(torch.ones(4, 8), torch.ones(6, 4))
    for i, (_, p) in enumerate(named):
        p.ds_id = i
    with pytest.raises(ShardingError, match=r"ZeRO.*ZeroOptimizer"):
        ScaledAdamW(named)


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_zero_stages_1_and_2(kind):
    """DeepSpeed puts one flat partition in the place of a group's parameters."""
    model = make_model()
    optimizer = kind(model)
    before = values(model)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ShardingError, match=r"pairs are gone.*ZeroOptimizer"):
        optimizer.step()
    assert same(before, values(model))
    assert torch.equal(flat.grad, torch.ones_like(flat))


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_parameters_flattened_after_the_optimizer_was_built(kind):
    """Each parameter for a flat one in its place."""
    model = make_model()
    optimizer = kind(model)
    loss_of(model).backward()
    params = optimizer.param_groups[0]["params"]
    for i, p in enumerate(params):
        params[i] = torch.nn.Parameter(p.detach().flatten())
        params[i].grad = p.grad.flatten()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ShardingError, match="flattened or cut after the optimizer was built"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, params, strict=True))
