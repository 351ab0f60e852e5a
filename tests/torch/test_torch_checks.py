"""Our classes under the configurations and errors that torch tests its own optimizers with."""

import copy
import io

import pytest
import torch

from rlora.torch import ScaledAdamW, ScaledSGD

pytest.importorskip("expecttest")  # of which torch's own tests are made

from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFOS = {info.optim_cls: info for info in optim_db}
OURS = {ScaledAdamW: INFOS[torch.optim.AdamW], ScaledSGD: INFOS[torch.optim.SGD]}
INPUTS = [
    pytest.param(kind, config.kwargs, id=f"{kind.__name__}, {config.desc}")
    for kind, info in OURS.items()
    for config in info.optim_inputs_func(device="cpu", dtype=torch.float64)
]
ERRORS = [
    pytest.param(kind, error, id=f"{kind.__name__}, {error.optimizer_error_input.desc}")
    for kind, info in OURS.items()
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float64)
]
SCHEDULERS = [
    pytest.param(kind, config, id=f"{kind.__name__}, {i}")
    for kind, info in OURS.items()
    for i, config in enumerate(info.scheduler_inputs)
]
inputs = pytest.mark.parametrize("kind, config", INPUTS)


def parameters(contiguous=True, dtype=torch.float64):
    """A weight and a bias in no pair, and a pair."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 5), (10,), (2, 5), (10, 2)]
    made = []
    for shape in shapes:
        wide = torch.randn(*shape, 2, generator=generator, dtype=dtype)
        p = wide[..., 0].contiguous() if contiguous else wide[..., 0]
        made.append(p.detach().requires_grad_())
    return made


def build(kind, params, config):
    config = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in config.items()}
    return kind(params, pairs=[tuple(params[2:])], **config)


def loss_of(params):
    """Squared distance of the layer with its pair from mapping ones to zeros."""
    weight, bias, A, B = params
    x = torch.ones(5, dtype=weight.dtype)
    return ((weight + B @ A) @ x + bias).square().sum()


def step(optimizer, params):
    optimizer.zero_grad()
    loss = loss_of(params)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("contiguous", [True, False])
@inputs
def test_goes_the_right_way(kind, config, contiguous):
    params = parameters(contiguous)
    optimizer = build(kind, params, config)
    losses = [step(optimizer, params) for _ in range(20)]
    losses.append(loss_of(params).item())
    assert (losses[-1] > losses[0]) == config.get("maximize", False)


@pytest.mark.parametrize("kind, makers", SCHEDULERS)
def test_goes_the_right_way_with_schedulers(kind, makers):
    params = parameters()
    optimizer = build(kind, params, {"lr": 1e-2})
    schedulers = [make(optimizer) for make in makers]
    first = step(optimizer, params)
    for _ in range(20):
        loss = step(optimizer, params)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss) if plateau else scheduler.step()
    assert loss_of(params).item() < first


@pytest.mark.parametrize("form", ["foreach", "fused"])
@inputs
def test_forms_agree_with_the_loop(kind, config, form):
    if form == "foreach" and isinstance(config.get("lr"), torch.Tensor) and kind is ScaledAdamW:
        pytest.skip("refused by torch without capturable")
    runs = []
    for flag in ({"foreach": False, "fused": False}, {form: True}):
        params = parameters()
        optimizer = build(kind, params, {**config, **flag})
        for _ in range(5):
            step(optimizer, params)
        runs.append([params, optimizer.state_dict()["state"]])
    # float64: another order of operations in five steps
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-10, check_dtype=form != "fused")


@inputs
def test_a_saved_state_goes_on(kind, config):
    """Through a file without pickled code; twice the same state dict; a copy goes the same way."""
    params = parameters()
    optimizer = build(kind, params, config)
    for _ in range(3):
        step(optimizer, params)
    first, second = (optimizer.state_dict() for _ in range(2))
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["param_groups"] == second["param_groups"]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [p.detach().clone().requires_grad_() for p in params]
    other = build(kind, twins, config)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    for _ in range(3):
        for who, its in ((optimizer, params), (other, twins), (copied, copies)):
            step(who, its)
    for p, q, r in zip(params, twins, copies, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@inputs
def test_a_state_dict_of_before_the_flags(kind, config):
    """Groups saved before torch had some of its flags take their defaults."""
    params = parameters()
    optimizer = build(kind, params, config)
    step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in OURS[kind].not_og_supported_flags:
            group.pop(flag, None)
    other = build(kind, parameters(), config)
    other.load_state_dict(saved)
    step(other, [p for group in other.param_groups for p in group["params"]])
    assert {"foreach", "maximize"} <= other.param_groups[0].keys()


@inputs
def test_can_be_printed(kind, config):
    optimizer = build(kind, parameters(), config)
    text = repr(optimizer)
    assert text.startswith(kind.__name__)
    assert "Parameter Group 0" in text
    assert f"damping: {optimizer.defaults['damping']}" in text
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)


@pytest.mark.parametrize("kind, error", ERRORS)
def test_errors(kind, error):
    """Errors of torch are raised here too, in its words but for a single tensor."""
    config = error.optimizer_error_input
    params = parameters() if config.params is None else config.params
    pairs = [tuple(params[2:])] if config.params is None else []
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    refused = (error.error_type, TypeError)  # torch 2.15 still warns of a set
    with pytest.raises(refused, match=f"{error.error_regex}|got one Tensor"):
        kind(params, pairs=pairs, **config.kwargs)
