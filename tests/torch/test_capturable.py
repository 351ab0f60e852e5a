"""``capturable=True`` on a device that is not there: what a CUDA graph must not meet."""

import pytest
import torch

from rlora.cli.bench import device_ops
from rlora.torch import ScaledAdamW, precondition

KINDS = {
    "before": (ScaledAdamW, {"placement": "before"}),
    "after": (ScaledAdamW, {"placement": "after"}),
    "both": (ScaledAdamW, {"placement": "both"}),
    "gauss_seidel": (ScaledAdamW, {"order": "gauss_seidel"}),
    "amsgrad": (ScaledAdamW, {"amsgrad": True}),
    "adam": (precondition(torch.optim.Adam), {}),
    "nadam": (precondition(torch.optim.NAdam), {}),
    "radam": (precondition(torch.optim.RAdam), {}),
}


def watch(kind, **options):
    """Synchronisations of a step with the device, and the devices of its counters."""
    made = []

    def make(model):
        made.append(kind(model, lr=1e-2, **options))
        return made[0]

    seen = device_ops.seen_in_a_step(make, 2)
    counters = [held["step"].device.type for held in made[0].state.values()]
    return seen, counters


@pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)
def test_a_capturable_step_reads_nothing_back(kind, options):
    seen, counters = watch(kind, capturable=True, foreach=True, **options)
    assert seen.finished
    assert not seen.waits
    assert len(counters) == 8
    assert set(counters) == {"cuda"}


def test_without_it_the_counters_stay_on_the_host():
    _, counters = watch(ScaledAdamW, foreach=True)
    assert set(counters) == {"cpu"}


RATES = (torch.tensor(0.9), torch.tensor(0.99))
REFUSED = {
    "on a CPU": ({"capturable": True}, r"capturable=True .* cuda, got some on cpu"),
    "lr": ({"lr": torch.tensor(1e-2), "foreach": True}, r"foreach=True takes lr .* numbers"),
    "betas": ({"betas": RATES, "foreach": True}, r"foreach=True takes lr and betas .* numbers"),
}


@pytest.mark.parametrize("options, match", REFUSED.values(), ids=REFUSED)
def test_what_a_kernel_refuses_is_refused_before_anything_moves(options, match):
    """Torch's own check comes within the kernel, when the group before has been stepped."""
    pairs = [[torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 16), (8, 4))] for _ in "ab"]
    groups = [{"params": pairs[0]}, {"params": pairs[1], **options}]
    optimizer = ScaledAdamW(groups, pairs=[tuple(pair) for pair in pairs])
    params = [p for pair in pairs for p in pair]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert all(map(torch.equal, params, before))
