"""Adapters that look like LoRA and are not: PEFT's other tuners, adapters with an activation."""

import pytest
import torch
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("peft")
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

OPTIONS = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 10},
}
LORA = {"LORA", "ADALORA", "XLORA"}
NEEDS_A_LANGUAGE_MODEL = {"SHADOW", "ADAPTION_PROMPT"}
TUNERS = sorted(
    str(kind.value)
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if "target_modules" in config.__dataclass_fields__
    and kind.value not in LORA | NEEDS_A_LANGUAGE_MODEL
)
REFUSED = {
    "VERA": "VeRA", "LOHA": "LoHa", "LOKR": "LoKr", "POLY": "Poly", "RANDLORA": "RandLoRA",
    "VBLORA": "VB-LoRA",
}  # fmt: skip


def tuned(kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    return peft.get_peft_model(base, config(target_modules=["0", "2"], **OPTIONS.get(kind, {})))


def test_the_list_is_not_empty():
    assert len(TUNERS) >= 20
    assert set(REFUSED) <= set(TUNERS)


@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.filterwarnings("ignore")  # of PEFT, about its own options
@pytest.mark.refuses("PEFT", "VeRA, LoHa, LoKr, Poly, RandLoRA, VB-LoRA")
def test_no_other_tuner_is_paired(kind):
    model = tuned(kind)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    report = rlora.torch.find_pairs(model)
    assert len(report) == 0
    if kind in REFUSED:
        own = {name for name in report.refused if REFUSED[kind] in report.refused[name]}
        assert own
        assert all("router" in name for name in trained - own)  # of Poly: which skills are mixed
    with pytest.raises(rlora.PairingError, match=REFUSED.get(kind, "no LoRA pair")):
        rlora.torch.ScaledAdamW(model)


def test_lora_beside_another_tuner():
    """A mixed model: the LoRA adapter is paired, the LoHa adapter of the same layers refused."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["2"]))
    model.set_adapter(["default", "other"])
    report = rlora.torch.find_pairs(model)
    assert len(report) == 2
    assert {name for name, p in model.named_parameters() if "hada" in name} == set(report.refused)
    assert all("LoHa" in why for why in report.refused.values())


@pytest.mark.parametrize("activation, paired", [
    (nn.Identity(), True), (None, True), (nn.SiLU(), False), (nn.functional.silu, False),
])  # fmt: skip
def test_bottleneck_adapters(activation, paired):
    """NeMo's names; the real class, which needs Megatron, is in test_megatron.py."""
    adapter = nn.Module()
    adapter.linear_in, adapter.linear_out = nn.Linear(6, 3, False), nn.Linear(3, 8, False)
    adapter.activation = activation
    report = rlora.torch.find_pairs(nn.ModuleDict({"adapter": adapter}))
    assert len(report) == paired
    assert len(report.refused) == (0 if paired else 2)
    assert paired or "silu" in report.refused["adapter.linear_in.weight"].lower()
