"""The real DeepSpeed on CPUs, with gloo: every stage of ZeRO against the loop without it.

``pip install deepspeed`` needs torch there before (``--no-build-isolation``, DS_BUILD_OPS=0), so
these tests are skipped where it is not installed.
"""

import os
from functools import cache

import pytest
import torch
from models import METHODS
from tiny import PAIRS, adapted, same, trained

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed", exc_type=ImportError)
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import zero_runs as runs

KINDS = ["ScaledAdamW", "LoRARite"]
STAGES = [0, 1, 2, 3]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
)
kinds = pytest.mark.parametrize("kind", KINDS)
stages = pytest.mark.parametrize("stage", STAGES)

by_hand = cache(runs.by_hand)


def check(results, expected):
    """Equal on all processes, and the run by hand up to the order of sums in gradients."""
    assert len({str(losses) for _, losses in results}) == 1
    for weights, losses in results:
        assert same(weights, results[0][0])
        near(weights, expected[0])
        assert losses == pytest.approx(expected[1], rel=1e-5)


def near(weights, expected):
    """float32: Adam's first steps enlarge the rounding of gradients that are almost zero."""
    assert weights.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(weights[name], p, rtol=1e-3, atol=1e-4, msg=name)


@kinds
@stages
@pytest.mark.parametrize("world", [1, 2, 3])
def test_it_is_the_loop_without_deepspeed(world, stage, kind, groups):
    """In three processes the partitions are padded."""
    expected = by_hand(kind)
    assert not same(expected[0], trained(adapted()))
    check(groups(world).run(runs.trains, kind, stage), expected)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.works("DeepSpeed ZeRO 1 to 3", "`ZeroOptimizer` over every class, by its engine")
def test_every_class(stage, kind, groups):
    """From B away from zero, where LoRA-SB moves and nobody enlarges what rounding leaves of A."""
    start = {"zero_B": False}
    check(groups(2).run(runs.trains, kind, stage, start), runs.by_hand(kind, **start))


@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRAFA"])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_frozen_factor(stage, kind, groups):
    start = {"frozen": "lora_A"}
    check(groups(2).run(runs.trains, kind, stage, start), runs.by_hand(kind, **start))


@stages
def test_groups_of_pairs(stage, groups):
    """ZeRO steps them in turn."""
    check(groups(2).run(runs.trains_two_groups, stage), runs.by_hand_two_groups())


@kinds
@stages
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.works("DeepSpeed ZeRO 1 to 3", "checkpoints bit for bit, bf16 with float32 masters")
def test_a_checkpoint_resumes_bit_for_bit(bf16, stage, kind, groups, tmp_path):
    if bf16 and not stage:
        pytest.skip("DeepSpeed's own masters, which take their places before the first step")
    for expected, resumed in groups(2).run(runs.resumes, kind, stage, bf16, str(tmp_path)):
        assert {p.dtype for p in expected.values()} == {torch.float32}
        assert same(expected, resumed)


@kinds
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.works("DeepSpeed ZeRO 1 to 3", "accelerate")
def test_accelerate(stage, kind, groups):
    """Its loader gives the processes other rows of a batch, whose mean is the same."""
    for weights in groups(2).run(runs.by_accelerate, kind, stage):
        assert len(weights) == 2 * PAIRS
        assert not same(weights, trained(adapted()))


@kinds
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.works("DeepSpeed ZeRO 1 to 3", "transformers Trainer")
def test_the_trainer(stage, kind, groups, tmp_path):
    for (weights, losses), (again, _) in groups(2).run(runs.by_trainer, kind, stage, str(tmp_path)):
        assert sum(losses[-2:]) < sum(losses[:2])
        assert same(weights, again)


@kinds
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.works("DeepSpeed ZeRO 1 to 3", "optimizer offload to the CPU; float16")
def test_offload_of_the_optimizer(stage, kind, groups):
    """On CPUs the device is the same, but the way through DeepSpeed is that of offload."""
    check(groups(2).run(runs.trains_offloaded, kind, stage), by_hand(kind))


@pytest.mark.parametrize("kind", [*KINDS, "ScaledSGD"])  # which would not miss a wrong scale
@pytest.mark.parametrize("stage", STAGES[1:])
def test_float16(stage, kind, groups):
    """At a scale of the loss of 2^3, where nothing overflows.

    float16 has 11 bits: gradients that are summed in another order differ by some 5e-4 of them.
    """
    ((start, weights, losses, skipped),) = groups(1).run(runs.trains_in_half, kind, stage, 3)
    assert skipped == 0
    expected, expected_losses = runs.by_hand_in_half(kind)
    far = sum((p - start[n]).square().sum() for n, p in expected.items())
    off = sum((p - weights[n]).square().sum() for n, p in expected.items())
    assert off.sqrt() < 1e-2 * far.sqrt()
    assert losses == pytest.approx(expected_losses, rel=1e-3)


@kinds
@pytest.mark.parametrize("stage", STAGES[1:])
def test_float16_that_overflows(stage, kind, groups):
    """At 2^24 every gradient does: DeepSpeed skips the steps, and nothing moves."""
    for start, weights, _, skipped in groups(2).run(runs.trains_in_half, kind, stage, 24):
        assert skipped == runs.STEPS
        assert same(weights, start)


@pytest.mark.refuses("DeepSpeed ZeRO 1 to 3", "offload where accelerate takes DeepSpeed's Adam")
def test_offload_by_accelerate(groups):
    for said in groups(2).run(runs.replaced_by_accelerate):
        assert '"zero_force_ds_cpu_optimizer": false' in said
    for weights in groups(2).run(runs.by_accelerate, "ScaledAdamW", 2, True):
        assert not same(weights, trained(adapted()))


@pytest.mark.refuses(
    "DeepSpeed ZeRO 1 to 3",
    "a pair in two groups, tied parameters, a small `sub_group_size`, an optimizer built afterwards",
)
def test_refusals(groups):
    for said in groups(2).run(runs.refusals):
        assert len(said) == 4
        words = ["in two parameter groups", "share memory", "sub_group_size", "ZeroOptimizer"]
        assert all(word in text for word, text in zip(words, said, strict=True))
