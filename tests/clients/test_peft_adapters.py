"""Adapters of PEFT that change around an optimizer: a second one, switches, padding, other tensors."""

import copy
import warnings

import pytest
import torch
from models import CLASSES, same, values
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks transformers for it
)


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def config(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options})


def adapted(seed=0, dtype=torch.float32, **options):
    """With B that is not zero, as after some training."""
    return drawn(get_peft_model(base(seed), config(**options)).to(dtype), seed)


def drawn(model, seed=0, adapter=""):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name and adapter in name:
            with torch.no_grad():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def backward(model, seed=0):
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(16, n, generator=generator).to(dtype) for n in (6, 4))
    model.zero_grad()
    (model(x) - y).float().square().mean().backward()


def steps(model, optimizer, *seeds):
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


# --- a second adapter -----------------------------------------------------------------------------


def names_of(report):
    return [pair.name for pair in report]


def test_a_second_adapter_beside_a_frozen_one(tmp_path):
    """The report names what is trained, adapter by adapter."""
    for name, seed in (("one", 1), ("two", 2)):
        adapted(seed).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name="one")
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(tmp_path / "two", "two", is_trainable=True)
    trainable = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    report = rlora.torch.ScaledAdamW(model).report
    assert names_of(report) == [
        f"base_model.model.{k} ({name})" for k in (0, 2) for name in sorted(trainable)
    ]
    assert "two" in trainable
    for name in ("one", "two"):
        model.set_adapter(name)
        report = rlora.torch.ScaledAdamW(model).report
        assert names_of(report) == [f"base_model.model.{k} ({name})" for k in (0, 2)]
    model.base_model.set_adapter(["one", "two"])
    assert "rank 2: 2 times, base_model.model.0 (one)" in str(rlora.torch.ScaledAdamW(model).report)
    report = rlora.torch.ScaledAdamW(model, adapter="two").report
    assert names_of(report) == [f"base_model.model.{k} (two)" for k in (0, 2)]


@make
def test_two_optimizers_and_set_adapter_in_turns(make):
    """Each adapter moves as if the other had never been trained."""

    def build():
        model = adapted(dtype=torch.float64)
        model.add_adapter("second", config(r=3))
        return drawn(model.double(), 5, "second")

    def optimizers_of(model, *names):
        found = {}
        for name in names:
            model.set_adapter(name)
            found[name] = make(model, adapter=name)
        return found

    model = build()
    optimizers = optimizers_of(model, "default", "second")
    start = values(model)
    for seed in range(3):
        for name, optimizer in optimizers.items():
            model.set_adapter(name)
            backward(model, seed)
            optimizer.step()
    for name in optimizers:
        twin = build()
        (alone,) = optimizers_of(twin, name).values()
        steps(twin, alone, *range(3))
        for key, p in twin.named_parameters():
            if f".{name}." in key:
                assert torch.equal(model.get_parameter(key), p)
    moved = {n for n, p in values(model).items() if not torch.equal(p, start[n])}
    assert {n.split(".")[-2] for n in moved} == {"default", "second"}


class Experts(nn.Module):
    """Three experts in one parameter, as transformers has them, and a router that picks by sum."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, x):
        which = x.sum(-1).abs().mul(7).long() % 3  # (batch,)
        return torch.einsum("boi,bi->bo", self.gate_up_proj[which], x)


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_experts_of_two_adapters_in_either_order(order, tmp_path):
    """Whichever was loaded first lies inside the other's wrapper; a step is the same."""

    def whole():
        torch.manual_seed(0)
        return nn.ModuleDict({"experts": Experts()})

    names = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    for name, r in (("one", 2), ("two", 3)):
        model = get_peft_model(whole(), LoraConfig(r=r, **names), adapter_name=name)
        drawn(model, r)
        model.save_pretrained(tmp_path)
    first, second = order
    model = PeftModel.from_pretrained(
        whole(), tmp_path / first, adapter_name=first, is_trainable=True
    )
    model.load_adapter(tmp_path / second, second, is_trainable=True)
    model.base_model.set_adapter([first, second])
    optimizer = rlora.torch.ScaledSGD(model, lr=0.1)
    found = {(p.name.split()[1], p.rank, *p.views[0][0].shape[:-2]) for p in optimizer.report}
    assert found == {("(one)", 2, 3), ("(two)", 3, 3)}
    generator = torch.Generator().manual_seed(1)
    for _, p in sorted(named(model), key=lambda item: item[0]):
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for name, r in (("one", 2), ("two", 3)):
        alone = get_peft_model(whole(), LoraConfig(r=r, **names), adapter_name=name)
        drawn(alone, r)
        mine = [p for n, p in named(model) if f".{name}." in n]
        for p, (_, q) in zip(mine, named(alone), strict=True):
            q.grad = p.grad.clone()
        rlora.torch.ScaledSGD(alone, lr=0.1).step()
        for p, (_, q) in zip(mine, named(alone), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # other neighbours on the stack


def named(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


# --- padding, and tensors that are replaced -------------------------------------------------------


@make
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_padding_of_a_hotswap_stays_zero(make, dtype):
    """In rows of A and columns of B, exactly; the rest learns."""
    model = adapted(dtype=dtype)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    model = model.to(dtype)
    model.requires_grad_(False)
    model.set_adapter("default")
    optimizer = make(model)
    assert {pair.rank for pair in optimizer.report} == {5}
    start = values(model)
    steps(model, optimizer, *range(4))
    moved = [n for n, p in values(model).items() if not torch.equal(p, start[n])]
    assert {n.split(".")[-4] for n in moved} == {"0", "2"}
    for name, p in model.named_parameters():
        if "lora_" in name:
            padding = p[2:] if "lora_A" in name else p[:, 2:]
            assert padding.numel()
            assert not padding.any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_scaling_of_a_hotswap_counts():
    """PEFT makes a tensor of it."""
    model, twin = adapted(lora_alpha=6), adapted(lora_alpha=6)
    prepare_model_for_compiled_hotswap(model)
    optimizers = [rlora.torch.LoRAProAdamW(m, lr=1e-2) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        steps(m, optimizer, 0, 1)
    assert same(values(model), values(twin))
    assert {pair.scaling for pair in optimizers[0]._pairs} == {3.0}


ORPHANS = "stand still: they are no longer those of the model.*build the optimizer afterwards"


@make
def test_an_optimizer_of_parameters_that_are_gone_says_so_once(make):
    model = adapted()
    optimizer = make(model)
    steps(model, optimizer, 0)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    model.set_adapter("default")
    optimizer.zero_grad()
    backward(model)
    with pytest.warns(RuntimeWarning, match=ORPHANS):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 1)
        fresh = make(model)
        steps(model, fresh, 2)


def test_orphans_after_a_state_that_was_assigned():
    """Some of the pairs, and an optimizer that knows its names only."""
    for by_name in (False, True):
        model = adapted()
        optimizer = rlora.torch.LoRARite(model.named_parameters() if by_name else model)
        state = {n: p.clone() for n, p in copy.deepcopy(model).state_dict().items()}
        part = state if by_name else {n: p for n, p in state.items() if ".model.2." in n}
        model.load_state_dict(part, assign=True, strict=False)
        model.set_adapter("default")
        backward(model)
        count = "2 of 2" if by_name else "1 of 2"
        if by_name:  # one step without gradients may have other reasons
            optimizer.step()
        with pytest.warns(RuntimeWarning, match=f"{count} pairs, the first base_model.model"):
            optimizer.step()


def test_pairs_that_are_idle_for_a_reason_are_no_orphans():
    """Frozen ones, ones of an adapter that is not used, and a model that is gone."""
    model = adapted()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    optimizer = rlora.torch.ScaledAdamW(model)
    model.set_adapter("second")
    steps(model, optimizer, 0)
    model.set_adapter("default", inference_mode=True)
    optimizer.zero_grad()
    optimizer.step()


def test_a_swap_of_values_is_followed(tmp_path):
    """`hotswap_adapter` writes into the tensors that are there."""
    adapted(3).save_pretrained(tmp_path)
    model = adapted()
    optimizer = rlora.torch.ScaledAdamW(model, lr=1e-2)
    steps(model, optimizer, 0)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    twin = copy.deepcopy(model)
    fresh = rlora.torch.ScaledAdamW(twin, lr=1e-2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 1)
    steps(twin, fresh, 1)
    assert same(values(model), values(twin))


def test_a_swap_for_a_higher_rank_is_refused(tmp_path):
    """PEFT exchanges the tensors under the parameters then."""
    adapted(3, r=3).save_pretrained(tmp_path)
    model = adapted()
    optimizer = rlora.torch.ScaledAdamW(model, lr=1e-2)
    steps(model, optimizer, 0)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    model.set_adapter("default")
    backward(model)
    with pytest.raises(rlora.ShardingError, match="another rank, build the optimizer anew"):
        optimizer.step()
