"""kohya's names: a network that LyCORIS builds for sd-scripts, and shapes of files without one."""

import numpy as np
import pytest
import torch
from layouts import Layer, batch, check, randomize, squares
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("lycoris")
pytest.importorskip("diffusers")


class Denoiser(nn.Module):
    """A UNet, a text encoder, and the network around their layers."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel
        from lycoris import kohya
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=4, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=2,
            block_out_channels=(4,), cross_attention_dim=6, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=17, hidden_size=6, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=8,
            )
        )  # fmt: skip
        self.requires_grad_(False).double()
        blocks = ["Transformer2DModel", "ResnetBlock2D"]
        kohya.LycorisNetworkKohya.apply_preset(
            {"unet_target_module": blocks, "unet_target_name": ["conv_in", "conv_out"]}
        )
        network = kohya.LycorisNetworkKohya(self.text, self.unet, lora_dim=2, conv_lora_dim=2)
        network.apply_to(self.text, self.unet, True, True)
        self.network = randomize(network.double())

    def forward(self, x):
        words = self.text(torch.arange(10).reshape(2, 5)).last_hidden_state
        return self.unet(x, torch.tensor([3, 7]), encoder_hidden_states=words).sample


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.works("kohya, OneTrainer", "networks, split projections")
def test_network():
    """Linear layers and convolutions of both models, as a trainer hands them to an optimizer."""
    model = Denoiser()
    layers = [
        Layer(f"network.{name}.lora_down.weight", f"network.{name}.lora_up.weight")
        for name, _ in model.network.named_children()
    ]
    assert {layer.a.split("_")[1] for layer in layers} == {"te", "unet"}
    assert {len(model.get_parameter(layer.a).shape) for layer in layers} == {2, 4}
    for layer in layers:
        module = model.network.get_submodule(layer.a.split(".")[1])
        difference = module.get_diff_weight()[0].detach().numpy() / module.scale
        product = layer.products(model)[0]
        np.testing.assert_allclose(difference.reshape(product.shape), product, atol=1e-12)
    check(model, squares(batch(2, 3, 4, 4)), layers)
    report = rlora.find_pairs(model.network.state_dict())
    assert len(report) == len(layers)
    assert {name.rsplit(".", 1)[-1] for name in report.plain} == {"alpha"}


def test_split_projections():
    """sd-scripts' Flux: of one fused layer several pairs, in lists, told apart by their index."""

    class Split(nn.Module):
        def __init__(self, n, widths, r):
            super().__init__()
            self.lora_down = nn.ModuleList(nn.Linear(n, r, bias=False) for _ in widths)
            self.lora_up = nn.ModuleList(nn.Linear(r, m, bias=False) for m in widths)

        def forward(self, x):
            pairs = zip(self.lora_down, self.lora_up, strict=True)
            return torch.cat([up(down(x)) for down, up in pairs], -1)

    model = nn.ModuleDict({"lora_unet_double_blocks_0_img_attn_qkv": Split(6, (8, 8, 4), 2)})
    randomize(model.double())
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    layers = [Layer(f"{name}.lora_down.{i}.weight", f"{name}.lora_up.{i}.weight") for i in range(3)]
    check(model, lambda m: squares(batch(16, 6))(m[name]), layers)


def test_the_other_reading_of_down_and_up():
    """Some hold that B is the down factor; where only that fits, it is taken."""
    shapes = {"lora_unet_q.lora_down.weight": (30, 4), "lora_unet_q.lora_up.weight": (4, 20)}
    (pair,) = rlora.find_pairs({name: np.zeros(shape) for name, shape in shapes.items()})
    assert (pair.a, pair.b) == ("lora_unet_q.lora_up.weight", "lora_unet_q.lora_down.weight")
    assert (pair.shape_a, pair.shape_b) == ((4, 20), (30, 4))
