"""kohya's sd-scripts and musubi-tuner: any dotted class, by text, on groups without names.

Reproduced from their sources: `get_optimizer` of library/train_util.py and `assemble_params` in
`prepare_optimizer_params` of networks/lora.py, sd-scripts 48d368fa557731ad0488c07304dfeba8c07910eb;
src/musubi_tuner/training/trainer_base.py and networks/lora.py, musubi-tuner
30c658c4f4b0bf05038b3346eff9670259b10fc7, which do the same.
"""

import ast
import copy
import importlib
import re
import shlex

import pytest
import torch
from pages import HOW_TO
from torch import nn

import rlora
import rlora.torch

PAGE = "trainers.md"


class LoRAModule(nn.Module):
    """The factors of one layer, of a split projection where `out` are several."""

    def __init__(self, inside, out, rank=4):
        super().__init__()
        downs = [nn.Linear(inside, rank, bias=False) for _ in out]
        ups = [nn.Linear(rank, size, bias=False) for size in out]
        self.lora_down, self.lora_up = (
            (downs[0], ups[0]) if len(out) == 1 else (nn.ModuleList(downs), nn.ModuleList(ups))
        )
        for up in ups:
            nn.init.normal_(up.weight)


def network():
    torch.manual_seed(0)
    return [LoRAModule(16, (24,)), LoRAModule(16, (16, 8, 8)), LoRAModule(12, (16,))]


def groups_of(loras, lr, ratio=None):
    """As `prepare_optimizer_params` gives them: dict views, no names, lr in each."""
    sides = {"lora": {}, "plus": {}}
    for i, lora in enumerate(loras):
        for name, p in lora.named_parameters():
            side = "plus" if ratio is not None and "lora_up" in name else "lora"
            sides[side][f"lora_unet_{i}.{name}"] = p
    rates = {"lora": lr, "plus": lr and lr * (ratio or 1)}
    return [{"params": x.values(), "lr": rates[k]} for k, x in sides.items() if x]


def get_optimizer(optimizer_type, optimizer_args, lr, groups):
    """As `get_optimizer` makes one of what is neither its own nor torch's."""
    options = {}
    for arg in optimizer_args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(groups, lr=lr, **options)


def command(title):
    """(optimizer_type, optimizer_args, lr) of a command of the page."""
    _, _, body = (HOW_TO / PAGE).read_text(encoding="utf-8").partition(f"## {title}\n")
    words = shlex.split(re.search("```bash\n(.*?)```", body, re.DOTALL)[1], comments=True)
    words = [word for word in words if word != "\n"]
    at = words.index("--optimizer_args") + 1
    until = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
    rate = float(words[words.index("--learning_rate") + 1])
    return words[words.index("--optimizer_type") + 1], words[at:until], rate


def by_hand(loras, kind=rlora.torch.ScaledAdamW, **options):
    named = [(f"{i}.{n}", p) for i, lora in enumerate(loras) for n, p in lora.named_parameters()]
    pairs = [(n, n.replace("lora_down", "lora_up")) for n, _ in named if "lora_down" in n]
    return kind(named, pairs=pairs, **options)


def step(loras, optimizer, count=3):
    for seed in range(count):
        torch.manual_seed(seed)
        for lora in loras:
            for p in lora.parameters():
                p.grad = torch.randn_like(p)
        optimizer.step()


def same(one, other):
    pairs = zip(nn.ModuleList(one).parameters(), nn.ModuleList(other).parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.works("kohya sd-scripts, musubi-tuner", '`--optimizer_type` with `pairs="by_order"`')
def test_the_command_of_the_page_steps_as_pairs_by_name_do():
    ours, theirs = network(), network()
    kind, args, lr = command("kohya, musubi-tuner")
    optimizer = get_optimizer(kind, args, lr, groups_of(ours, lr))
    reference = by_hand(theirs, lr=lr, weight_decay=0.0, betas=(0.7, 0.8))
    assert len(optimizer.report) == 5
    step(ours, optimizer)
    step(theirs, reference)
    assert same(ours, theirs)


@pytest.mark.works("kohya sd-scripts, musubi-tuner", "a LoRA+ ratio, text encoders and U-Net")
def test_factors_in_groups_of_their_own():
    """Down and up in two groups each for the text encoder and the U-Net, with four rates."""
    ours, theirs = network(), network()
    groups = groups_of(ours[:1], 1e-3, ratio=4.0) + groups_of(ours[1:], 1e-2, ratio=2.0)
    optimizer = get_optimizer("rlora.torch.ScaledAdamW", ["pairs='by_order'"], 1e-2, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3, 1e-2, 2e-2]
    named = [{**g, "params": []} for g in optimizer.param_groups]
    for i, lora in enumerate(theirs):
        for name, p in lora.named_parameters():
            named[2 * (i > 0) + ("lora_up" in name)]["params"].append((f"{i}.{name}", p))
    names = [n for group in named for n, _ in group["params"] if "lora_down" in n]
    pairs = [(n, n.replace("lora_down", "lora_up")) for n in names]
    reference = rlora.torch.ScaledAdamW(named, lr=1e-2, pairs=pairs)
    step(ours, optimizer)
    step(theirs, reference)
    assert same(ours, theirs)


def test_a_saved_state_goes_on():
    ours, theirs = network(), network()
    first, second = (
        rlora.torch.ScaledAdamW(groups_of(loras, 1e-2), pairs="by_order")
        for loras in (ours, theirs)
    )
    step(ours, first)
    for p, q in zip(
        nn.ModuleList(ours).parameters(), nn.ModuleList(theirs).parameters(), strict=True
    ):
        q.data.copy_(p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(ours, first)
    step(theirs, second)
    assert same(ours, theirs)


def test_every_class_takes_it():
    for name in ("LoRARite", "ScaledSGD", "LoRAMuon"):
        loras = network()
        start = [p.detach().clone() for lora in loras for p in lora.parameters()]
        args = ["pairs='by_order'"]
        step(loras, get_optimizer(f"rlora.torch.{name}", args, 1e-2, groups_of(loras, 1e-2)))
        now = [p for lora in loras for p in lora.parameters()]
        assert not any(torch.equal(p, q) for p, q in zip(start, now, strict=True))


@pytest.mark.refuses("kohya sd-scripts, musubi-tuner", "no `pairs`; LoRA+ for other methods")
def test_what_is_refused_says_why():
    groups = groups_of(network(), 1e-2)
    with pytest.raises(rlora.PairingError, match=r"without names.*pairs='by_order'"):
        rlora.torch.ScaledAdamW(groups, lr=1e-2)
    apart = groups_of(network(), 1e-2, ratio=4.0)
    with pytest.raises(rlora.PairingError, match=r"in two parameter groups.*LoRAPlus"):
        rlora.torch.LoRARite(apart, pairs="by_order")
    ups = [{"params": [lora.lora_up.weight for lora in network()[::2]]}]
    with pytest.raises(rlora.PairingError, match=r"by_order.*cannot read"):  # LoRA-FA: no A
        rlora.torch.ScaledAdamW(ups, pairs="by_order")
