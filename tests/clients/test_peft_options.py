"""Options of PEFT that share, repeat or add weights, each under an optimizer.

Saved modules, biases of B, DoRA and ranks by layer are in tests/layouts/test_peft.py.
"""

import pytest
import torch
from layouts import LR, batch, check_scaled_sgd, grads_of, peft_layers, squares, values_of
from torch import nn

import rlora.torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers
from peft import LoraConfig, get_peft_model

PREFIX = "base_model.model"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT about weights that are tied in the base and not in the adapter, and the other way round.
    pytest.mark.filterwarnings("ignore:.*(tie|tied|tying).*:UserWarning"),
]


def language_model(config, *, tied=True, layers=1):
    sizes = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=layers,
        num_attention_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(sizes).double()
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


def language_loss(model):
    tokens = torch.arange(40).reshape(4, 10) * 7 % 17
    return model(input_ids=tokens, labels=tokens).loss


def losses_of(model, optimizer, steps=6):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = language_loss(model)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


FOUR = [
    pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"]),
    pytest.mark.parametrize("ensure", [False, True], ids=["", "ensure"]),
]


@FOUR[0]
@FOUR[1]
@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
def test_adapters_on_both_ends(tied, ensure, kind):
    """One pair that is moved once where PEFT ties the adapters, else a pair for each end."""
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model = language_model(
        LoraConfig(r=2, target_modules=targets, ensure_weight_tying=ensure), tied=tied
    )
    named = dict(model.named_parameters())
    memory = {p.data_ptr() for name, p in named.items() if "lora_" in name}
    assert len(memory) == (4 if tied and ensure else 6)
    optimizer = getattr(rlora.torch, kind)(model, lr=2e-2)
    assert len(optimizer.report) == len(memory) // 2
    assert len(optimizer.report.tied) == (2 if tied and ensure else 0)
    assert not optimizer.report.refused
    assert not optimizer.report.plain
    losses = losses_of(model, optimizer)
    assert losses[-1] < losses[0]
    assert {p.data_ptr() for name, p in named.items() if "lora_" in name} == memory


@FOUR[0]
@FOUR[1]
def test_saved_modules_on_both_ends(tied, ensure):
    """Plain parameters; one that stands at both ends moves once, by the sum of its gradients."""
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=ensure,
    )
    model = language_model(config, tied=tied)
    check_scaled_sgd(model, language_loss, peft_layers(f"{PREFIX}.model.layers.0.self_attn.q_proj"))
    saved = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(saved) == (1 if tied and ensure else 2)


@FOUR[0]
@FOUR[1]
def test_trainable_tokens(tied, ensure):
    """The rows of some tokens are a plain parameter beside the pairs."""
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [1, 5, 16]},
        ensure_weight_tying=ensure,
    )
    model = language_model(config, tied=tied)
    report = rlora.torch.find_pairs(model)
    assert report.plain
    assert all("trainable_tokens_delta" in name for name in report.plain)
    check_scaled_sgd(model, language_loss, peft_layers(f"{PREFIX}.model.layers.0.self_attn.q_proj"))
    losses = losses_of(model, rlora.torch.LoRARite(model, lr=2e-2))
    assert losses[-1] < losses[0]


@pytest.mark.works("PEFT", "trainable tokens, replicated layers, hotswap's padding")
def test_repeated_layers_have_pairs_of_their_own():
    """`layer_replication` shares the base weights of layers 0, 1, 0, 1, not the adapters."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    model = language_model(config, layers=2)
    layers = [f"{PREFIX}.model.layers.{k}.self_attn.q_proj" for k in range(4)]
    weights = {model.get_submodule(x).base_layer.weight.data_ptr() for x in layers}
    assert len(weights) == 2
    check_scaled_sgd(model, language_loss, peft_layers(*layers))


def test_everything_at_once():
    """Ranks and alphas by layer, magnitudes of DoRA and a saved head."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Linear(10, 4)).double()
    config = LoraConfig(
        r=2,
        target_modules=["0", "2"],
        rank_pattern={"2": 3},
        alpha_pattern={"0": 6, "2": 1},
        modules_to_save=["3"],
        use_dora=True,
        use_rslora=True,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            with torch.no_grad():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    check_scaled_sgd(model, squares(batch(16, 6)), peft_layers(f"{PREFIX}.0", f"{PREFIX}.2"))
    optimizer = rlora.torch.LoRAProAdamW(model, lr=LR)
    expected = [6 / 2**0.5, 1 / 3**0.5]
    assert [pair.scaling for pair in optimizer._pairs] == pytest.approx(expected)
    start, loss = values_of(model), squares(batch(16, 6))
    loss(model).backward()
    optimizer.step()
    moved = values_of(model)
    for name in grads_of(model):
        trains = model.get_parameter(name).requires_grad
        assert (start[name] != moved[name]).any() == trains, name
