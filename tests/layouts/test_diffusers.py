"""diffusers: a UNet with PEFT's layers in it, and the names of its older files."""

import numpy as np
import pytest
import torch
from layouts import batch, check, peft_layers, randomize

import rlora
import rlora.torch

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, get_peft_model_state_dict

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2", "conv_shortcut"]


def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=2,
        block_out_channels=(4, 8), cross_attention_dim=6, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)  # fmt: skip
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS), adapter_name="style")
    return randomize(model.double())


def denoise(model):
    x, text, noise = batch(2, 3, 8, 8), batch(2, 5, 6, seed=1), batch(2, 3, 8, 8, seed=2)
    step = torch.tensor([3, 7])
    return (model(x, step, encoder_hidden_states=text).sample - noise).square().mean()


def adapted_layers(model):
    owners = [n.removesuffix(".lora_A.style.weight") for n, _ in model.named_parameters()]
    return peft_layers(*(n for n in owners if f"{n}.lora_A.style" in dict(model.named_modules())),
                       adapter="style")  # fmt: skip


@pytest.mark.works("diffusers", "UNet; saved files of every kind of names")
def test_unet():
    """Attention, 1 x 1 and 3 x 3 convolutions of a real denoiser."""
    model = unet()
    layers = adapted_layers(model)
    kinds = {len(model.get_parameter(layer.a).shape) for layer in layers}
    assert kinds == {2, 4}
    assert len(layers) > 30
    for layer in layers:
        module = model.get_submodule(layer.a.removesuffix(".lora_A.style.weight"))
        delta = module.get_delta_weight("style").detach().numpy() / module.scaling["style"]
        product = layer.products(model)[0]
        np.testing.assert_allclose(delta.reshape(product.shape), product, atol=1e-12)
    check(model, denoise, layers)


def files(model):
    """The state of the adapter under the names of files that are around."""
    saved = get_peft_model_state_dict(model, adapter_name="style")
    saved = {f"unet.{name}": x for name, x in saved.items()}
    attention = {n: x for n, x in saved.items() if ".attn" in n}
    old = {}
    for name, x in attention.items():  # as the attention processors of 2023 had it
        owner, letter, _ = name.rsplit(".", 2)
        head, projection = owner.removesuffix(".0").rsplit(".", 1)
        side = {"lora_A": "down", "lora_B": "up"}[letter]
        old[f"{head}.processor.{projection}_lora.{side}.weight"] = x
    return {
        "PEFT": (saved, saved),
        "diffusers": (attention, convert_state_dict_to_diffusers(dict(attention))),
        "attention processors": (attention, old),
        "kohya": (saved, convert_state_dict_to_kohya(dict(saved))),
    }


@pytest.mark.parametrize("kind", ["PEFT", "diffusers", "attention processors", "kohya"])
def test_saved_files(kind):
    """Every pair of the model is found in the file, with the same tensors in the same roles."""
    original, file = files(unet())[kind]
    report = rlora.find_pairs(file)
    expected = {
        (x.tobytes(), original[name.replace("lora_A", "lora_B")].numpy().tobytes())
        for name, y in original.items()
        if "lora_A" in name
        for x in [y.numpy()]
    }
    found = {(file[pair.a].numpy().tobytes(), file[pair.b].numpy().tobytes()) for pair in report}
    assert found == expected
    assert len(report) == len(original) // 2
    assert not report.refused
    assert all(name.endswith(".alpha") for name in report.plain)


def test_the_old_names_are_what_diffusers_reads():
    """Its own converter turns our spelling of the attention processors' names to PEFT's."""
    original, old = files(unet())["attention processors"]
    converted = convert_unet_state_dict_to_peft(
        {n.replace(".processor", ""): x for n, x in old.items()}
    )
    assert {name.replace(".weight.weight", ".weight") for name in converted} == set(original)
