"""`ZeroOptimizer` without DeepSpeed; tests/distributed/test_deepspeed.py has it with DeepSpeed."""

from types import SimpleNamespace

import pytest
import torch
from models import CLASSES, loss_of, make_model, values
from pages import run
from tiny import adapted, batches, loss_on_all, same

import rlora
from rlora.integrations.deepspeed import ZeroOptimizer, under_zero
from rlora.torch import ScaledAdamW

WHOLE = [
    (torch.float32, None),
    (torch.float32, "lora_A"),
    (torch.float32, "lora_B"),
    (torch.bfloat16, None),
    (torch.bfloat16, "lora_B"),
]


@pytest.mark.parametrize(("dtype", "frozen"), WHOLE)
@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_whole_parameters_are_stepped_as_without_it(make, dtype, frozen):
    """Bit for bit, on a schedule, saved and loaded in between; bfloat16 is rounded at random."""
    model, twin = make_model(dtype=dtype), make_model(dtype=dtype)
    for name, p in (*model.named_parameters(), *twin.named_parameters()):
        p.requires_grad_(not (frozen and frozen in name) and p.requires_grad)
    plain, wrapped = make(twin), ZeroOptimizer(make(model))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (plain, wrapped)]
    for t in range(4):
        for m, o, schedule in zip((twin, model), (plain, wrapped), schedules, strict=True):
            o.zero_grad()
            loss_of(m, t).backward()
            o.step()
            schedule.step()
        if t == 1:
            saved = wrapped.state_dict()
            first = schedules[0].base_lrs[0]
            assert saved["param_groups"][0]["lr"] == first / 4  # as the schedule has it now
            wrapped.load_state_dict(saved)
    assert same(values(model), values(twin))
    assert wrapped.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_loaded_rate_is_that_of_the_next_step():
    saved = ZeroOptimizer(ScaledAdamW(make_model(), lr=0.25)).state_dict()
    later = ZeroOptimizer(ScaledAdamW(make_model(), lr=1e-3))
    later.load_state_dict(saved)
    later.step()
    assert [o.param_groups[0]["lr"] for o in (later, later.inner)] == [0.25, 0.25]


def test_what_zero_would_tear_apart_is_refused():
    model = make_model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sides = [[x for x in named if ("lora_A" in x[0]) == first] for first in (True, False)]
    with pytest.raises(rlora.ShardingError, match="in two parameter groups"):
        ZeroOptimizer(ScaledAdamW([{"params": side} for side in sides]))
    optimizer = ScaledAdamW(model)
    first, other = optimizer.param_groups[0]["params"][:2]
    other.data = first.data
    with pytest.raises(rlora.ShardingError, match="share memory"):
        ZeroOptimizer(optimizer)


def test_an_empty_parameter_shares_no_memory():
    model = make_model()
    model.empty = torch.nn.Parameter(torch.empty(0))
    assert ZeroOptimizer(ScaledAdamW(model)).param_groups


def test_an_optimizer_without_pairs_is_refused():
    with pytest.raises(TypeError, match=r"expected an optimizer of rlora\.torch, got AdamW"):
        ZeroOptimizer(torch.optim.AdamW(make_model().parameters()))


def test_factors_that_stage_3_has_cut_are_refused_with_the_way_out():
    """DeepSpeed leaves empty tensors with an attribute in the place of parameters."""
    model = make_model()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.ds_id, p.data = 0, torch.empty(0)
    with pytest.raises(
        rlora.ShardingError, match=r"build the optimizer before, in .*ZeroOptimizer"
    ):
        ScaledAdamW(model)


def test_a_group_that_comes_later_is_refused():
    optimizer = ZeroOptimizer(ScaledAdamW(make_model()))
    with pytest.raises(rlora.ShardingError, match="a group of 1 parameters came after"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_empty_groups_stay_inside():
    """DeepSpeed would drop them, and a schedule made before would not fit."""
    optimizer = ScaledAdamW(make_model())
    optimizer.add_param_group({"params": []})
    assert len(ZeroOptimizer(optimizer).param_groups) == 1


@pytest.mark.parametrize(
    ("offload", "forced", "replaced"),
    [
        ({"device": "cpu"}, None, True),
        ({"device": "cpu"}, False, False),
        ({"device": "none"}, None, False),
        ({"device": None}, None, False),
        ({}, None, False),
        (None, None, False),
    ],
)
def test_where_accelerate_would_take_deepspeeds_adam(monkeypatch, offload, forced, replaced):
    """`Accelerator.prepare` says nothing; tests/distributed/test_deepspeed.py has the real one."""
    state = pytest.importorskip("accelerate.state")
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}
    config |= {} if forced is None else {"zero_force_ds_cpu_optimizer": forced}
    plugin = SimpleNamespace(deepspeed_config=config)
    monkeypatch.setattr(state, "is_initialized", lambda: True)
    monkeypatch.setattr(state, "AcceleratorState", lambda: SimpleNamespace(deepspeed_plugin=plugin))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    optimizer = ScaledAdamW(make_model())
    if not replaced:
        ZeroOptimizer(optimizer)
        return
    with pytest.raises(rlora.ShardingError, match='"zero_force_ds_cpu_optimizer": false'):
        ZeroOptimizer(optimizer)


def test_factories_use_it_where_accelerate_uses_deepspeed(monkeypatch):
    for word in ("true", "True"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", word)
        assert type(under_zero(ScaledAdamW(make_model()))) is ZeroOptimizer
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert type(under_zero(ScaledAdamW(make_model()))) is ScaledAdamW


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
def test_the_page_of_deepspeed_runs_without_it_too(kind):
    """accelerate's own loop in one process, where parameters are whole."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    model, accelerator = adapted(), accelerate.Accelerator(cpu=True)
    start = loss_on_all(model)
    space = {"model": model, "accelerator": accelerator, "loader": batches()}
    run("deepspeed.md", "With accelerate, or DeepSpeed alone", space, kind)
    for batch in batches():
        space["optimizer"].zero_grad()
        accelerator.backward(space["model"](**batch).loss)
        space["optimizer"].step()
    assert loss_on_all(model) < start


def test_a_step_of_no_group_moves_nothing():
    """ZeRO-3 empties the groups that it does not step now; that is no step without gradients."""
    inner = ScaledAdamW(make_model().named_parameters())
    optimizer = ZeroOptimizer(inner)
    for group in optimizer.param_groups:
        group["params"] = []
    for _ in range(3):
        optimizer.step()  # two idle ones are warned of
    assert inner._idle_steps == 0
