"""PEFT's layers, against products that PEFT computes itself."""

import copy

import numpy as np
import pytest
import torch
from layouts import (
    DAMPING,
    LR,
    Layer,
    batch,
    check,
    check_report,
    check_scaled_sgd,
    columns,
    grads_of,
    interleaved,
    peft_layers,
    randomize,
    rows,
    scaled_step,
    squares,
    turned,
    values_of,
)
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("peft")
import peft
from peft import AdaLoraConfig, LoraConfig

PREFIX = "base_model.model"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks transformers for it
)


class Net(nn.Module):
    """One layer of a kind, and a head."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layer(x))


def adapt(model, config, **kw):
    model = peft.get_peft_model(model.double(), config, autocast_adapter_dtype=False, **kw)
    return randomize(model)


def delta_of(module, adapter="default"):
    return module.get_delta_weight(adapter).detach().numpy() / module.scaling[adapter]


# --- one pair a layer -----------------------------------------------------------------------------


@pytest.mark.works("PEFT", "linear, embedding, convolution, multi-head attention")
def test_linear_of_several_ranks():
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Linear(10, 4))
    config = LoraConfig(r=2, target_modules=["0", "2", "3"], rank_pattern={"2": 4, "3": 1})
    model = adapt(base, config)
    layers = peft_layers(*(f"{PREFIX}.{k}" for k in (0, 2, 3)))
    for k, layer in zip((0, 2, 3), layers, strict=True):
        np.testing.assert_allclose(
            delta_of(model.base_model.model[k]), layer.products(model)[0], atol=1e-12
        )
    check(model, squares(batch(16, 6)), layers)


def test_transposed_linear():
    """GPT-2's Conv1D keeps its weight transposed; the factors are as ever."""
    from transformers.pytorch_utils import Conv1D

    model = adapt(
        Net(Conv1D(8, 6), 8), LoraConfig(r=2, target_modules=["layer"], fan_in_fan_out=True)
    )
    (layer,) = layers = peft_layers(f"{PREFIX}.layer")
    delta = delta_of(model.base_model.model.layer)
    np.testing.assert_allclose(delta.T, layer.products(model)[0], atol=1e-12)
    check(model, squares(batch(16, 6)), layers)


def test_embedding():
    base = Net(nn.Embedding(11, 6), 6)
    model = adapt(base, LoraConfig(r=2, target_modules=["layer"]))
    owner = f"{PREFIX}.layer.lora_embedding"
    layer = Layer(f"{owner}_B.default", f"{owner}_A.default", turned, turned)
    delta = delta_of(model.base_model.model.layer)
    np.testing.assert_allclose(delta, layer.products(model)[0], atol=1e-12)
    check(model, squares(torch.arange(22).reshape(2, 11) % 11), [layer])


@pytest.mark.parametrize("name", ["ScaledAdamW", "OPLoRA"])
def test_the_random_factor_of_an_embedding_keeps_its_size(name):
    """PEFT starts A at zero there: as the A of a pair it would let B grow by its length a step."""
    torch.manual_seed(0)
    base = Net(nn.Embedding(50, 16), 16)
    model = peft.get_peft_model(base, LoraConfig(r=4, target_modules=["layer"]))
    random = model.base_model.model.layer.lora_embedding_B["default"]
    start = random.detach().abs().max()
    optimizer = getattr(rlora.torch, name)(model)
    loss = squares(torch.arange(50))
    first = loss(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model) < first
    # 1.04 and 1.00 times; with the roles that PEFT's letters say 28 and 64 times.
    assert random.detach().abs().max() < 2 * start


class Convolution(nn.Module):
    def __init__(self, dimensions, kernel, groups):
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.layer = kind(4, 8, kernel, groups=groups, padding=1)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions(dimensions, kernel, groups):
    """With groups the up-projection is block-diagonal: each group is a pair of rank r / groups."""
    config = LoraConfig(r=4, target_modules=["layer"], lora_alpha=4)
    model = adapt(Convolution(dimensions, kernel, groups), config)
    (layer,) = layers = peft_layers(f"{PREFIX}.layer", cut_a=rows(groups), cut_b=rows(groups))
    x = batch(2, 4, *[5] * dimensions)
    module = model.base_model.model.layer
    base = module.base_layer
    # The same function as a convolution without groups whose kernel is the products.
    kernels = np.vstack(layer.products(model)).reshape(8, 4, *[kernel] * dimensions)
    convolve = getattr(torch.nn.functional, f"conv{dimensions}d")
    expected = convolve(x, torch.tensor(kernels), padding=base.padding)
    torch.testing.assert_close((module(x) - base(x)).detach(), expected, rtol=0, atol=1e-12)
    check(model, squares(x), layers)


def test_multihead_attention():
    """Queries, keys and values are one pair, of the fused projection; the output has its own."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.layer(x, x, x)[0]

    model = adapt(Attention(), LoraConfig(r=2, target_modules=["layer"]))
    layers = peft_layers(f"{PREFIX}.layer", f"{PREFIX}.layer.base_layer.out_proj")
    module = model.base_model.model.layer
    for part, layer in zip((module, module.base_layer.out_proj), layers, strict=True):
        np.testing.assert_allclose(delta_of(part), layer.products(model)[0], atol=1e-12)
    assert layers[0].products(model)[0].shape == (24, 8)
    check(model, squares(batch(3, 5, 8)), layers)


def test_a_targeted_parameter_that_is_a_matrix():
    """No experts: an ordinary pair."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model = adapt(base, LoraConfig(r=2, target_modules=["2"], target_parameters=["0.weight"]))
    layers = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2")
    np.testing.assert_allclose(
        delta_of(model.base_model.model[0]), layers[0].products(model)[0], atol=1e-12
    )
    check(model, squares(batch(16, 6)), layers)


# --- experts --------------------------------------------------------------------------------------


def mixture(kind):
    """A small language model whose experts' weights PEFT targets as parameters."""
    import transformers

    sizes = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "head_dim": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 32,
        "experts_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = adapt(base, config)
    layer = f"{PREFIX}.model.layers.0"
    stacks = peft_layers(
        f"{layer}.mlp.experts.base_layer",
        f"{layer}.mlp.experts",
        cut_a=rows(3),
        cut_b=interleaved(3),
    )
    return model, stacks, peft_layers(f"{layer}.self_attn.q_proj")


def language_loss(model):
    tokens = torch.arange(40).reshape(4, 10) * 7 % 17
    return model(input_ids=tokens, labels=tokens).loss


KINDS = pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
"""Experts as (E, out, in), and as (E, in, out), which PEFT calls transposed."""


@KINDS
@pytest.mark.works("PEFT", "experts (`target_parameters`)")
def test_experts(kind):
    """A is stored expert by expert and B rank by rank: the step is that of E pairs."""
    model, stacks, others = mixture(kind)
    wrappers = dict(model.named_modules())
    for layer in stacks:
        wrapper = wrappers[layer.a.removesuffix(".lora_A.default.weight")]
        delta = delta_of(wrapper)
        assert len(delta) == 3
        for dense, product in zip(delta, layer.products(model), strict=True):
            stored = product if kind == "Mixtral" else product.T
            np.testing.assert_allclose(dense, stored, atol=1e-12)
    check(model, language_loss, stacks + others)
    assert "3 of 24 x 8, rank 2: 1 time," in str(rlora.torch.find_pairs(model))


@KINDS
def test_one_pair_of_all_experts_is_wrong(kind):
    """PEFT's own wrapper has one Gram that couples the experts, and rows of A with other ranks.

    That it agrees with ours on the attention's pair shows that nothing else differs.
    """
    from peft.optimizers import create_riemannian_optimizer

    model, stacks, others = mixture(kind)
    theirs = copy.deepcopy(model)
    optimizers = [
        rlora.torch.ScaledSGD(model, lr=LR, damping=DAMPING, damping_mode="absolute"),
        create_riemannian_optimizer(theirs, torch.optim.SGD, lr=LR, reg=DAMPING),
    ]
    start = values_of(model)
    for m, optimizer in zip((model, theirs), optimizers, strict=True):
        language_loss(m).backward()
        optimizer.step()
    ours, wrong = values_of(model), values_of(theirs)
    for layer in others:
        for name in layer[:2]:
            np.testing.assert_allclose(ours[name], wrong[name], rtol=1e-7, atol=1e-10)
    for layer in stacks:
        for name in layer[:2]:
            step, other = ours[name] - start[name], wrong[name] - start[name]
            assert np.linalg.norm(step - other) > 0.1 * np.linalg.norm(step)


@KINDS
@pytest.mark.refuses("PEFT", "experts without the model")
def test_experts_by_name_alone_are_refused(kind):
    """Neither named parameters nor a saved file say how many experts there are."""
    model, _, others = mixture(kind)
    saved = peft.get_peft_model_state_dict(model)
    for named, tail in ((dict(model.named_parameters()), ".default.weight"), (saved, ".weight")):
        report = rlora.find_pairs(named)
        assert [pair.a for pair in report] == [x.a.replace(".default.weight", tail) for x in others]
        assert len(report.refused) == 4
        assert all("experts" in why for why in report.refused.values())


@KINDS
def test_experts_of_several_adapters(kind):
    model, stacks, others = mixture(kind)
    config = model.peft_config["default"]
    model.add_adapter("second", LoraConfig(
        r=3, target_modules=config.target_modules, target_parameters=config.target_parameters,
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    second = [
        x._replace(a=x.a.replace("default", "second"), b=x.b.replace("default", "second"))
        for x in stacks + others
    ]
    check(randomize(model.double()), language_loss, stacks + others + second)


# --- a diagonal between the factors, one frozen factor, parameters beside the pairs ------------------------------


@pytest.mark.works(
    "PEFT",
    "AdaLoRA (ScaledAdamW, ScaledSGD), DoRA, several adapters, tied embeddings, a frozen factor",
)
def test_adalora():
    """B diag(E) A: the Grams are those of A and of B, and E itself is plain."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    config = AdaLoraConfig(init_r=3, target_modules=["0", "2"], total_step=100, lora_alpha=1)
    model = adapt(base, config)
    for module in (model.base_model.model[0], model.base_model.model[2]):
        # A count, which PEFT leaves trainable in a model that is not of float32.
        nn.init.constant_(module.ranknum["default"].requires_grad_(False), 3)
    names = [[f"{PREFIX}.{k}.lora_{letter}.default" for letter in "ABE"] for k in (0, 2)]
    layers = [Layer(*three[:2]) for three in names]
    values, module = values_of(model), model.base_model.model[0]
    a, b, e = (values[name] for name in names[0])
    np.testing.assert_allclose(
        module.get_delta_weight("default").detach() * (3 + 1e-5), b @ np.diag(e.ravel()) @ a,
        atol=1e-10,
    )  # fmt: skip
    check_scaled_sgd(model, squares(batch(16, 6)), layers)
    # A method's state knows no diagonal: refused by name, and trained by AdamW beside a head.
    with pytest.raises(rlora.PairingError, match=r"lora_E\.default stands between"):
        rlora.torch.LoRARite(model)


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
def test_adalora_trains(lr):
    """From E = 0, with PEFT's loss that holds A and B orthonormal and does not pass through E."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 16))
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=20, tfinal=50, deltaT=1, total_step=150,
        target_modules=["0", "2"],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    x, optimizer = torch.randn(64, 64), rlora.torch.ScaledAdamW(model, lr=lr)
    goal = (x @ torch.randn(64, 16)).argmax(1)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        loss, spread = nn.functional.cross_entropy(model(x), goal), torch.zeros(())
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                S = p @ p.T if "lora_A" in name else p.T @ p
                spread = spread + (S - torch.eye(len(S))).norm()
        (loss + 0.5 * spread / 4).backward()
        losses.append((loss.item(), spread.item()))
        optimizer.step()
        model.base_model.update_and_allocate(step)
    (first, start), (last, end) = losses[0], losses[-1]
    assert last < first
    assert end < start
    assert max(spread for _, spread in losses) < 1.1 * start


def test_dora():
    """The magnitudes are plain; the gradient of a factor is what DoRA's forward pass gives it."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model = adapt(base, LoraConfig(r=2, target_modules=["0", "2"], use_dora=True))
    layers = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2")
    assert any("lora_magnitude_vector" in name for name in rlora.torch.find_pairs(model).plain)
    check(model, squares(batch(16, 6)), layers)


def test_bias_of_b_and_saved_modules_are_plain():
    base = Net(nn.Linear(6, 10), 10)
    config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"], lora_bias=True)
    model = adapt(base, config)
    report = rlora.torch.find_pairs(model)
    assert set(report.plain) == {
        f"{PREFIX}.layer.lora_B.default.bias",
        f"{PREFIX}.head.modules_to_save.default.weight",
        f"{PREFIX}.head.modules_to_save.default.bias",
    }
    check(model, squares(batch(16, 6)), peft_layers(f"{PREFIX}.layer"))


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_of_experts(frozen):
    model, stacks, others = mixture("Mixtral")
    for layer in stacks:
        model.get_parameter(getattr(layer, frozen)).requires_grad_(False)
    check_scaled_sgd(model, language_loss, stacks + others)


def test_experts_by_order():
    """The order of a model's tensors does not say that one is a stack, the model does."""
    model, _, _ = mixture("Mixtral")
    with pytest.raises(
        rlora.PairingError, match=r"experts.* has a layout of its own; leave pairs out"
    ):
        rlora.torch.ScaledAdamW(model, lr=1e-2, pairs="by_order")
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "experts" not in name)
    assert len(rlora.torch.ScaledAdamW(model, lr=1e-2, pairs="by_order").report) == 1


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor(frozen):
    """LoRA-FA trains B alone and MiCA A alone: the frozen one stays and preconditions the other."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model = adapt(base, LoraConfig(r=2, target_modules=["0", "2"]))
    layers = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2")
    for layer in layers:
        model.get_parameter(getattr(layer, frozen)).requires_grad_(False)
    check_scaled_sgd(model, squares(batch(16, 6)), layers)


def test_mica():
    """PEFT's own variant with a frozen B."""
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="mica")
    model = randomize(peft.get_peft_model(base, config).double())
    layers = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2")
    assert not model.get_parameter(layers[0].b).requires_grad
    check_scaled_sgd(model, squares(batch(16, 6)), layers)


@pytest.mark.parametrize("name", ["ScaledAdamW", "ScaledSGD"])
@pytest.mark.parametrize("compiled", [False, True])
def test_mica_learns_from_its_own_start(name, compiled):
    """A of zero, and a B that never grows: covariant damping is not to wait for it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="mica")
    model, loss = peft.get_peft_model(base, config).double(), squares(batch(16, 6))
    losses = {}
    for mode in ("covariant", "relative"):
        copied, lr = copy.deepcopy(model), 0.1 if name == "ScaledSGD" else 1e-2
        optimizer = getattr(rlora.torch, name)(copied, lr=lr, damping_mode=mode)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(60):
            optimizer.zero_grad()
            loss(copied).backward()
            step()
        losses[mode] = loss(copied).item() / loss(model).item()
    assert losses["covariant"] < 0.9
    # B is orthonormal, so that relative damping takes a share of 1 % off a step, or less.
    assert losses["covariant"] == pytest.approx(losses["relative"], rel=0.02)


# --- several adapters, tied layers ----------------------------------------------------------------


def several():
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    config = LoraConfig(r=2, target_modules=["0", "2"])
    model = adapt(base, config, adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "2"]))
    model.add_adapter("lora_A", LoraConfig(r=3, target_modules=["2"]))
    model.base_model.set_adapter(["first", "second", "lora_A"])
    return randomize(model)


def test_several_adapters_never_cross():
    """Equal shapes, one of them under a name that looks like a factor's."""
    model = several()
    layers = [
        *peft_layers(f"{PREFIX}.0", f"{PREFIX}.2", adapter="first"),
        *peft_layers(f"{PREFIX}.0", f"{PREFIX}.2", adapter="second"),
        *peft_layers(f"{PREFIX}.2", adapter="lora_A"),
    ]
    check(model, squares(batch(16, 6)), layers)


@pytest.mark.parametrize("adapter", ["first", "second"])
def test_one_adapter_of_several(adapter):
    model = several()
    mine = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2", adapter=adapter)
    names = {name for layer in mine for name in layer[:2]}
    others = [n for n, p in model.named_parameters() if p.requires_grad and n not in names]
    check_scaled_sgd(model, squares(batch(16, 6)), mine, refused=others, adapter=adapter)


def test_an_inactive_adapter_is_left_alone():
    model = several()
    model.set_adapter("second")
    layers = peft_layers(f"{PREFIX}.0", f"{PREFIX}.2", adapter="second")
    check(model, squares(batch(16, 6)), layers)


def tied():
    """PEFT gives the head transposed views of the embedding's factors, as parameters of their own."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model = adapt(base, LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True))
    owner = f"{PREFIX}.model.embed_tokens.lora_embedding"
    embedding = Layer(f"{owner}_B.default", f"{owner}_A.default", turned, turned)
    head = peft_layers(f"{PREFIX}.lm_head")[0]
    for one, other in zip(head[:2], embedding[:2], strict=True):
        assert model.get_parameter(one).data_ptr() == model.get_parameter(other).data_ptr()
    return model, embedding, head, peft_layers(f"{PREFIX}.model.layers.0.self_attn.q_proj")


def both_gradients(model, embedding, head):
    """Gradients of the factors' memory, as embedding and as head, as A and B lie in the head."""
    (mine,), grads = embedding.cut(grads_of(model)), grads_of(model)
    return [x + grads[name] for x, name in zip(mine, head[:2], strict=True)]


def test_tied_embeddings_are_updated_once():
    """The memory moves by one step with the gradients of both, and the report says so."""
    model, embedding, head, others = tied()
    optimizer = rlora.torch.ScaledSGD(model, lr=LR, damping=DAMPING, damping_mode="absolute")
    check_report(model, optimizer.report, [embedding, *others], tied=head[:2])
    assert optimizer.report.tied == {head.a: embedding.a, head.b: embedding.b}
    language_loss(model).backward()
    old, total = values_of(model), both_gradients(model, embedding, head)
    optimizer.step()
    new = values_of(model)
    wanted = scaled_step(old[head.a], old[head.b], *total, "absolute")
    for name, twin, expected in zip(embedding[:2], head[:2], wanted, strict=True):
        np.testing.assert_allclose(new[twin], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(new[twin], new[name].T)
        assert np.abs(new[name] - old[name]).max() > 1e-6


def test_tied_embeddings_under_a_method():
    """LoRA-RITE, against itself on ordinary pairs that get the sums of the gradients."""
    model, embedding, head, others = tied()
    optimizer = rlora.torch.LoRARite(model, lr=LR)
    old = values_of(model)
    pairs = [
        tuple(torch.tensor(old[name], requires_grad=True) for name in layer[:2])
        for layer in (head, *others)
    ]
    alone = rlora.torch.LoRARite([p for pair in pairs for p in pair], lr=LR, pairs=pairs)
    for _ in range(3):
        optimizer.zero_grad()
        language_loss(model).backward()
        grads = grads_of(model)
        totals = both_gradients(model, embedding, head), (grads[x] for x in others[0][:2])
        for pair, total in zip(pairs, totals, strict=True):
            for p, g in zip(pair, total, strict=True):
                p.grad = torch.tensor(g)
        optimizer.step()
        alone.step()
    new = values_of(model)
    for pair, layer in zip(pairs, (head, *others), strict=True):
        for p, name in zip(pair, layer[:2], strict=True):
            np.testing.assert_allclose(new[name], p.detach(), rtol=1e-7, atol=1e-9)
            assert np.abs(new[name] - old[name]).max() > 1e-6


# --- other variants of LoRA in PEFT ---------------------------------------------------------------


@pytest.mark.parametrize("side", ["a", "b"])
def test_block_diagonal_lora(side):
    """BD-LoRA stores the blocks of one factor below each other: each is a pair with its part of
    the other factor, which no shape tells."""
    base = Net(nn.Linear(6, 8), 8)
    blocks = peft.BdLoraConfig(nblocks=2, **{f"target_modules_bd_{side}": ["layer"]})
    config = LoraConfig(r=4, target_modules=["layer"], use_bdlora=blocks, lora_alpha=4)
    model = adapt(base, config)
    (layer,) = layers = peft_layers(
        f"{PREFIX}.layer", cut_a=rows(2), cut_b=columns(2) if side == "a" else rows(2)
    )
    products = layer.products(model)
    dense = np.hstack(products) if side == "a" else np.vstack(products)
    x, module = batch(16, 6), model.base_model.model.layer
    low_rank = (module(x) - module.base_layer(x)).detach()
    np.testing.assert_allclose(low_rank, x.numpy() @ dense.T, atol=1e-12)
    check(model, squares(x), layers)


@pytest.mark.refuses("PEFT", "KaSA")
def test_kasa_is_refused_by_name():
    base = Net(nn.Linear(6, 8), 8)
    config = LoraConfig(r=2, target_modules=["layer"], kasa_config=peft.KasaConfig())
    model = adapt(base, config)
    report = rlora.torch.find_pairs(model)
    assert len(report) == 0
    assert set(report.refused) == set(peft_layers(f"{PREFIX}.layer")[0][:2])
    assert all("KaSA" in why for why in report.refused.values())


def test_convolution_of_adalora():
    base = Convolution(2, 3, 1)
    model = adapt(base, AdaLoraConfig(init_r=3, target_modules=["layer"], total_step=100))
    module = model.base_model.model.layer
    nn.init.constant_(module.ranknum["default"].requires_grad_(False), 3)
    layer = Layer(*(f"{PREFIX}.layer.lora_{letter}.default" for letter in "AB"))
    check_scaled_sgd(model, squares(batch(2, 4, 5, 5)), [layer])


# --- saved files ----------------------------------------------------------------------------------


def test_saved_file():
    """Without the adapter's name, all pairs are there with the shapes they had."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.conv = nn.Conv1d(6, 8, 3, groups=2)
            self.linear = nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(self.conv(self.embed(x).mT).mT)

    with pytest.warns(UserWarning, match="groups > 1"):
        model = adapt(Mixed(), LoraConfig(r=4, target_modules=["embed", "conv", "linear"]))
    loaded = rlora.torch.find_pairs(model)
    saved = rlora.find_pairs(peft.get_peft_model_state_dict(model))
    assert len(saved) == 3
    assert [(x.shape_a, x.shape_b) for x in saved] == [(x.shape_a, x.shape_b) for x in loaded]
    assert not saved.refused
