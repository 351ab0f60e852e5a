"""Adapters to be saved otherwise than they were trained: rank 2r without offsets, other dtypes."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from layouts import randomize
from torch import nn

import rlora
from rlora.pairing import Layout
from rlora.torch import Offset, as_plain_lora, initialize, restore_offsets, round_adapter

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

PREFIX = "base_model.model."
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def adapt(base, r=2, alpha=6, rank_pattern=None, **targets):
    """Twice the rank with twice the alpha: s stays."""
    config = LoraConfig(r=r, lora_alpha=alpha, rank_pattern=rank_pattern or {}, **targets)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def doubled(base, state, rank_pattern=None, **targets):
    """The plain LoRA over an untouched base."""
    pattern = {key: 2 * r for key, r in (rank_pattern or {}).items()}
    model = adapt(copy.deepcopy(base), 4, 12, rank_pattern=pattern, **targets)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


# --- experts --------------------------------------------------------------------------------------

TARGETS = {
    "target_modules": ["q_proj", "embed_tokens"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
EXPERTS = [f"{PREFIX}model.layers.0.mlp.experts{inner}" for inner in ("", ".base_layer")]


def mixture(kind):
    """A language model with 3 experts, whose stacked weights PEFT targets as parameters."""
    import transformers

    sizes = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "head_dim": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
        "experts_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    base = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    return randomize(base, seed=1)


TOKENS = torch.arange(40).reshape(4, 10) * 7 % 17


def loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def offset_by_hand(model, layer, seed):
    """Take a random start out of a layer's weight, by PEFT's own product."""
    module = model.get_submodule(layer)
    embedding = "default" in module.lora_embedding_A
    words = [f"lora_{'embedding_' if embedding else ''}{letter}" for letter in "AB"]
    holders = [getattr(module, word) for word in words]
    A, B = (getattr(x["default"], "weight", x["default"]) for x in holders)
    start = []
    for i, p in enumerate((A, B)):
        generator = torch.Generator().manual_seed(seed + i)
        start.append(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    with torch.no_grad():
        A.copy_(start[0])
        B.copy_(start[1])
        name = getattr(module, "parameter_name", "weight")
        getattr(module.get_base_layer(), name).sub_(module.get_delta_weight("default"))
    start = start[::-1] if embedding else start  # as rlora calls the two
    return Offset(*start, module.scaling["default"], 0.0)


@pytest.mark.parametrize("by", ["model", "state"])
@pytest.mark.parametrize("started", ["linear layers", "experts too"])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts(kind, started, by):
    """The start's factors, or zeros, belong to each expert."""
    base = mixture(kind)
    model = adapt(copy.deepcopy(base), **TARGETS).eval()
    offsets = dict(initialize(model, [TOKENS], loss, method="lora_ga").offsets)
    assert set(offsets) == {f"{PREFIX}model.layers.0.self_attn.q_proj"}
    if started == "experts too":
        for i, layer in enumerate((*EXPERTS, f"{PREFIX}model.embed_tokens")):
            offsets[layer] = offset_by_hand(model, layer, 10 + 2 * i)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    randomize(model, seed=5)  # as if trained
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if by == "model":
        plain = as_plain_lora(model, offsets)
    else:
        with pytest.raises(rlora.PairingError, match=r"experts.*give the model"):
            as_plain_lora(state, offsets)
        layout = Layout("(e r) n", "m (r e)", sizes={"e": 3})
        plain = as_plain_lora(state, offsets, known=dict.fromkeys(EXPERTS, layout))
    assert plain.keys() == state.keys()
    assert len(plain) == len(names) == 8
    again = doubled(base, plain, **TARGETS)
    assert (logits(model) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-9, atol=1e-9)


# --- one layer of a kind --------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 6)


KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(5, 6)),
    "GPT-2's linear": (conv1d, lambda: torch.randn(5, 6)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.arange(11)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), lambda: torch.randn(2, 4, 9)),
    "one input a group": (lambda: nn.Conv2d(4, 8, 1, groups=4), lambda: torch.randn(2, 4, 3, 3)),
}


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, started):
    """The output is linear in B A: plain = trained - what the start had added."""
    torch.manual_seed(0)
    layer, inputs = KINDS[kind]
    base = Net(layer()).double()
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    options = {"target_modules": ["layer"], "fan_in_fan_out": kind.startswith("GPT")}
    if "group" in kind or kind == "depthwise":
        options["rank_pattern"] = {"layer": 4}
    with torch.no_grad():
        model = randomize(adapt(copy.deepcopy(base), **options), seed=1)
        start = get_peft_model_state_dict(model, save_embedding_layers=False)
        A, B = (v.clone() for _, v in sorted(start.items(), reverse=kind == "embedding"))
        at_start = model(x)
        trained = randomize(model, seed=2)(x)
        scaling = model.base_model.model.layer.scaling["default"]
        mine = {f"{PREFIX}layer": Offset(A, B, scaling, 0.0)}
        other = {k.replace("layer", "other"): torch.zeros_like(v) for k, v in start.items()}
        if started:
            plain = as_plain_lora(model, mine)
            expected = trained - (at_start - base(x))
        else:  # of another layer there is a start
            other_start = {f"{PREFIX}other": Offset(A, B, scaling, 0.0)}
            state = {**get_peft_model_state_dict(model, save_embedding_layers=False), **other}
            plain = as_plain_lora(state, other_start)
            plain = {k: v for k, v in plain.items() if k not in other}
            expected = trained
        again = doubled(base, plain, **options)(x)
    assert (trained - base(x)).abs().max() > 0.1
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)


def test_blocks_of_unequal_size():
    """litgpt's query, key and value: each block of r rows of A has its own rows of B."""
    rng = np.random.default_rng(0)
    shapes = ((6, 5), (14, 2))
    trained, start = ([torch.tensor(rng.normal(size=s)) for s in shapes] for _ in range(2))
    layout = Layout(blocks=(8, 3, 3))
    state = {f"attn.lora_{x}": v for x, v in zip("AB", trained, strict=True)}
    plain = as_plain_lora(state, {"attn": Offset(*start, 1.0, 0.0)}, known={"attn": layout})
    A, B = plain["attn.lora_A"], plain["attn.lora_B"]
    assert A.shape == (12, 5)
    assert B.shape == (14, 4)
    ends = (0, 8, 11, 14)
    for i, (low, high) in enumerate(pairwise(ends)):
        was = [b[low:high] @ a[2 * i : 2 * i + 2] for a, b in (trained, start)]
        got = B[low:high] @ A[4 * i : 4 * i + 4]
        torch.testing.assert_close(got, was[0] - was[1], rtol=0, atol=1e-12)


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rebalanced_factors_give_the_same_output(kind):
    """In float64, where nothing is rounded."""
    torch.manual_seed(0)
    layer, inputs = KINDS[kind]
    base = Net(layer()).double()
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    options = {"target_modules": ["layer"], "fan_in_fan_out": kind.startswith("GPT")}
    if "group" in kind or kind == "depthwise":
        options["rank_pattern"] = {"layer": 4}
    with torch.no_grad():
        model = randomize(adapt(base, **options), seed=1)
        expected = model(x)
        before = get_peft_model_state_dict(model, save_embedding_layers=False)
        after = round_adapter(model, torch.float64)
        assert after.keys() == before.keys()
        assert all((after[key] - before[key]).abs().max() > 1e-3 for key in after)
        set_peft_model_state_dict(model, after)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_rebalanced_experts_and_blocks():
    torch.manual_seed(0)
    model = randomize(adapt(mixture("Mixtral"), **TARGETS).eval(), seed=5)
    expected = logits(model)
    set_peft_model_state_dict(model, round_adapter(model, torch.float64))
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    state = {"attn.lora_A": torch.randn(6, 5), "attn.lora_B": torch.randn(14, 2)}
    known = {"attn": Layout(blocks=(8, 3, 3))}
    after = round_adapter(state, torch.float64, known=known)
    for i, (low, high) in enumerate(pairwise((0, 8, 11, 14))):
        products = [
            x["attn.lora_B"][low:high].double() @ x["attn.lora_A"][2 * i : 2 * i + 2].double()
            for x in (state, after)
        ]
        torch.testing.assert_close(*products, rtol=0, atol=1e-5)  # the state is in float32


def test_an_adapter_in_bfloat16_loses_less_rebalanced():
    """One direction at rank 8: eight times less, in the mean; a fourth leaves room for chance."""
    torch.manual_seed(0)
    lost = []
    for seed in range(8):
        torch.manual_seed(seed)
        A, B = torch.zeros(8, 48), torch.zeros(64, 8)
        A[0], B[:, 0] = torch.randn(48), torch.randn(64)
        state = {
            "q.lora_A.weight": A,
            "q.lora_B.weight": B,
            "head.weight": torch.ones(3),
            "n": torch.tensor(2),
        }
        rounded = round_adapter(state)
        assert [x.dtype for x in rounded.values()] == [torch.bfloat16] * 3 + [torch.int64]
        assert state["q.lora_A.weight"] is A
        plain = B.bfloat16().float() @ A.bfloat16().float()
        new = rounded["q.lora_B.weight"].float() @ rounded["q.lora_A.weight"].float()
        lost.append(float((new - B @ A).norm() ** 2 / (plain - B @ A).norm() ** 2))
    assert np.median(lost) < 0.25


def test_a_factor_that_two_layers_share_is_not_rebalanced_for_one():
    model = adapt(
        nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(6, 8)}), target_modules=["q", "k"]
    )
    q, k = (model.base_model.model[name].lora_A for name in "qk")
    k["default"] = q["default"]
    with pytest.raises(rlora.PairingError, match=r"cannot be rebalanced: .*round this adapter"):
        round_adapter(model)


def test_factors_with_a_diagonal_between_them_are_rounded_as_they_are():
    """Another split of B A would be another B diag(E) A."""
    shapes = {"q.lora_A": (3, 7), "q.lora_E": (3, 1), "q.lora_B": (5, 3)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    rounded = round_adapter(state)
    assert all(torch.equal(rounded[key], x.bfloat16()) for key, x in state.items())


def test_trained_heads_are_in_the_rounded_state():
    """PEFT loads it back; without them it would refuse it."""
    from peft import set_peft_model_state_dict

    base = nn.ModuleDict({"q": nn.Linear(6, 8), "head": nn.Linear(8, 2)})
    model = adapt(base, target_modules=["q"], modules_to_save=["head"])
    head = model.base_model.model["head"].modules_to_save["default"]
    with torch.no_grad():
        head.weight.fill_(3.0)
    state = round_adapter(model)
    (key,) = (key for key in state if key.endswith("head.weight"))
    assert state[key].dtype == torch.bfloat16
    with torch.no_grad():
        head.weight.zero_()
    set_peft_model_state_dict(model, state)
    assert (head.weight == 3.0).all()


def test_what_cannot_be_rounded():
    with pytest.raises(TypeError, match=r"floating-point torch.dtype.*got torch.int8"):
        round_adapter({}, torch.int8)
    model = adapt(Net(nn.Linear(6, 8)), target_modules=["layer"])
    with pytest.raises(rlora.PairingError, match="no adapter 'nope'; it has 'default'"):
        round_adapter(model, name="nope")
    with pytest.raises(rlora.PairingError, match="no adapter 'default'; it has none"):
        round_adapter(model.merge_and_unload())


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_state", [True, False])
@pytest.mark.parametrize("in_offsets", [True, False])
def test_the_prefix_of_peft(in_state, in_offsets):
    """A start before PEFT is around the model, or a state whose names lost the prefix."""
    torch.manual_seed(0)
    base = Net(nn.Linear(6, 8)).double()
    model = adapt(copy.deepcopy(base), target_modules=["layer"])
    given = model if in_offsets else model.base_model.model
    offsets = initialize(given, method="pissa").offsets
    assert set(offsets) == {f"{PREFIX if in_offsets else ''}layer"}
    randomize(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = state if in_state else {k.removeprefix(PREFIX): v for k, v in state.items()}
    plain = as_plain_lora(state, offsets)
    assert plain.keys() == state.keys()
    plain = {PREFIX + key.removeprefix(PREFIX): v for key, v in plain.items()}
    x = torch.randn(5, 6).double()
    with torch.no_grad():
        wanted = model(x)
        got = doubled(base, plain, target_modules=["layer"])(x)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        fresh = adapt(copy.deepcopy(base), target_modules=["layer"])
        restore_offsets(fresh, offsets)
        set_peft_model_state_dict(
            fresh, {PREFIX + k.removeprefix(PREFIX): v for k, v in state.items()}
        )
        torch.testing.assert_close(fresh(x), wanted, rtol=1e-10, atol=1e-10)


def test_one_adapter_of_several():
    model = adapt(Net(nn.Linear(6, 8)), target_modules=["layer"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["layer"]))
    layer = f"{PREFIX}layer"
    start = {layer: Offset(torch.ones(3, 6), torch.ones(8, 3), 1.0, 0.0)}
    assert as_plain_lora(model, start, name="second")[f"{layer}.lora_A.weight"].shape == (6, 6)
    with pytest.raises(rlora.PairingError, match=r"no adapter 'nope'; it has 'default', 'second'"):
        as_plain_lora(model, start, name="nope")
    with pytest.raises(rlora.PairingError, match="the adapters default, second"):
        as_plain_lora({k: v for k, v in model.named_parameters() if "lora" in k}, start)


def test_what_has_no_rank_2r_is_refused():
    start = {"q": Offset(torch.ones(2, 6), torch.ones(8, 2), 1.0, 0.0)}
    state = {"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(8, 2)}
    assert (
        as_plain_lora({**state, "q.lora_B.bias": torch.ones(8)}, start)["q.lora_B.bias"].ndim == 1
    )
    bad = {
        "partner": {"k.lora_A.weight": torch.ones(2, 6)},
        "between its factors": {
            "k.lora_A": torch.ones(2, 6), "k.lora_B": torch.ones(8, 2), "k.lora_E": torch.ones(2, 1),
        },
    }  # fmt: skip
    for match, more in bad.items():
        with pytest.raises(rlora.PairingError, match=match):
            as_plain_lora({**state, **more}, start)


def test_what_is_in_no_pair_is_a_copy_too():
    """The model trains on: a state that has been rounded does not change with it."""
    state = {
        "q.lora_A.weight": torch.randn(4, 16),
        "q.lora_B.weight": torch.randn(32, 4),
        "head.weight": torch.randn(3, 5, dtype=torch.bfloat16),
    }
    rounded = round_adapter(state)
    state["head.weight"].zero_()
    assert rounded["head.weight"].any()
