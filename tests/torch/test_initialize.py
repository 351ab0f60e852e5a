"""Gradients of frozen layers against autograd's, one at a time; starts, offsets and round trips."""

import copy
import gc
import json
import warnings
import weakref
import zlib

import loralib
import pytest
import torch
from models import LoRALinear, make_model, pairs_in
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rlora import Factors, PairingError, ShapeError, initializers
from rlora.core.errors import NamespaceError, NumericsError, RLoraError, ShardingError
from rlora.torch import ScaledSGD, as_plain_lora
from rlora.torch.init.gradients import full_gradients
from rlora.torch.init.initialize import initialize
from rlora.torch.init.offsets import load_offsets, overlap, restore_offsets, save_offsets

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
METHODS = {
    "lora_one": {"gamma": 0.1},
    "lora_sb": {"lr": 1e-2},
    "lora_ga": {},
    "loi": {"alpha": 0.1},
    "eva": {},
    "pissa": {},
    "milora": {},
    "olora": {},
    "gaussian": {},
    "init_ab": {},
    "orthogonal": {},
}
MOVES = ("lora_ga", "loi", "pissa", "milora", "olora")
ZERO_B = ("gaussian", "eva")


class Net(nn.Module):
    """Tokens (b, t, 6); the layer `again` is used twice; nothing is trainable."""

    def __init__(self, dtype=torch.float32, remat=None):
        super().__init__()
        self.inp, self.again = nn.Linear(6, 9, dtype=dtype), nn.Linear(9, 9, dtype=dtype)
        self.out, self.unused = nn.Linear(9, 4, dtype=dtype), nn.Linear(9, 4, dtype=dtype)
        self.drop = nn.Dropout(0.0)
        self.remat = remat
        self.requires_grad_(False)

    def middle(self, h):
        return F.relu(self.again(torch.tanh(self.again(h))), inplace=True)

    def forward(self, x):
        h = torch.tanh(self.inp(x))
        if self.remat is None:
            h = self.middle(h)
        else:
            h = checkpoint(self.middle, h, use_reentrant=self.remat)
        return self.out(self.drop(h))


def net_and_batches(dtype=torch.float32, count=3, **options):
    torch.manual_seed(0)
    net = Net(dtype, **options)
    return net, [torch.randn(2 + i, 5, 6, dtype=dtype) for i in range(count)]


def square(model, x):
    return (
        model(x).float().square().mean() if x.dtype == torch.bfloat16 else model(x).square().mean()
    )


def dense_gradients(net, batches):
    """Gradients by autograd of trainable weights; the mean over the batches."""
    net = copy.deepcopy(net).requires_grad_(True)
    for x in batches:
        (square(net, x) / len(batches)).backward()
    return {name: p.grad for name, p in net.named_parameters() if name.endswith("weight")}


NAMES = ("inp", "again", "out")
WAYS = [{}, {"layers_per_pass": 2}, {"layers_per_pass": 1}, {"offload": True}]


def close(got, expected, tolerance):
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected.to(got.dtype) / scale, rtol=0, atol=tolerance)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_dense_gradient(dtype, way):
    net, batches = net_and_batches(dtype)
    found = full_gradients(net, NAMES, batches, square, lambda name, G: G, **way)
    dense = dense_gradients(net, batches)
    for name in NAMES:
        assert found[name].dtype == dtype
        close(found[name], dense[f"{name}.weight"], TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_not_count_twice(reentrant, way):
    net, batches = net_and_batches(torch.float64, remat=reentrant)
    plain, _ = net_and_batches(torch.float64)
    for x in batches:
        x.requires_grad_(reentrant)  # as a checkpoint of this kind asks for in training, too
    found = full_gradients(net, NAMES, batches, square, lambda name, G: G, **way)
    dense = dense_gradients(plain, batches)
    for name in NAMES:
        close(found[name], dense[f"{name}.weight"], 1e-12)


def test_a_checkpoint_that_cuts_the_graph_is_refused():
    net, batches = net_and_batches(remat=True)
    with (
        pytest.warns(UserWarning, match="requires_grad"),
        pytest.raises(PairingError, match="no gradient reaches again"),
    ):
        full_gradients(net, ["again"], batches, square, lambda name, G: G)


def test_bfloat16_is_summed_in_float32():
    """The dense gradient, rounded at every call, is the coarser of the two."""
    net, batches = net_and_batches(torch.bfloat16)
    found = full_gradients(net, NAMES, batches, square, lambda name, G: G)
    dense = dense_gradients(net, batches)
    for name in NAMES:
        assert found[name].dtype == torch.float32
        close(found[name], dense[f"{name}.weight"].float(), 3e-2)


def test_conv1d_stores_the_transpose():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(4, 6)).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    found = full_gradients(model, ["0"], [x], square, lambda name, G: G)
    (dense,) = torch.autograd.grad(square(model, x), [model[0].weight])
    close(found["0"], dense.mT, 1e-12)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_never_more_than_one_gradient(way):
    net, batches = net_and_batches()
    weights = {p.data_ptr() for p in net.parameters()}
    shapes = {(9, 6), (9, 9), (4, 9)}
    made: list[weakref.ref] = []
    most: list[int] = []

    def count(out):
        if isinstance(out, torch.Tensor) and tuple(out.shape) in shapes:
            made.append(weakref.ref(out))
        alive = {x.data_ptr() for ref in made if (x := ref()) is not None} - weights
        most.append(len(alive))
        return out

    class Watch(TorchDispatchMode):
        """Counts the memory of every tensor of the shape of a gradient that is no weight."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return count(func(*args, **(kwargs or {})))

    gc.disable()  # freed at once, not when the collector comes by
    try:
        with Watch():
            found = full_gradients(
                net, NAMES, batches, square, lambda name, G: [1, count(G)][0], **way
            )
    finally:
        gc.enable()
    assert found == dict.fromkeys(NAMES, 1)
    assert max(most) == 1


@pytest.mark.parametrize("breaks", [False, True])
def test_leaves_no_trace(breaks):
    """Gradients, flags, mode, running statistics, random state and hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), LoRALinear(8, 4, 2))
    model[2].eval()
    model[0].weight.grad = torch.ones(8, 6)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    batches = [torch.randn(5, 6), torch.full((5, 6), 1e3)]
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]

    def loss(model, x):
        torch.rand(3)
        value = square(model, x)
        if breaks and x.sum() > 1e3:
            raise KeyError
        return value

    if breaks:
        with pytest.raises(KeyError):
            full_gradients(model, ["0", "3.base"], batches, loss, lambda name, G: None)
    else:
        full_gradients(model, ["0", "3.base"], batches, loss, lambda name, G: None)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert (p.grad is None) == (name != "0.weight")
    assert torch.equal(model[0].weight.grad, torch.ones(8, 6))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_a_loss_that_calls_some_layers_only():
    net, batches = net_and_batches(torch.float64)
    both = lambda model, x: square(model, x) if len(x) < 4 else model.inp(x).square().mean()  # noqa: E731
    found = full_gradients(net, ["inp", "out"], batches, both, lambda name, G: G)
    dense = dense_gradients(net, batches[:2])
    close(found["out"], dense["out.weight"] * 2 / 3, 1e-12)


@pytest.mark.parametrize(
    "error, match, change",
    [
        (PairingError, "'nope' is not in the model", {"modules": ["nope"]}),
        (PairingError, "a Dropout", {"modules": ["drop"]}),
        (PairingError, "never calls unused", {"modules": ["inp", "unused"]}),
        (PairingError, "no gradient reaches", {"loss": lambda m, x: m(x.detach()).detach().sum()}),
        (NamespaceError, "model\\(\\*\\*batch\\).loss", {"loss": lambda m, x: {"loss": m(x)}}),
        (ShapeError, "scalar", {"loss": lambda m, x: m(x)}),
        (NumericsError, "loss of batch 0 is nan", {"loss": lambda m, x: m(x).sum() * float("nan")}),
        (
            NumericsError,
            "gradient of out is not finite",
            {"loss": lambda m, x: (m(x) * 0).sqrt().sum()},
        ),
        (ValueError, "no batch", {"batches": []}),
        (ValueError, "can be read once", {"batches": iter([1]), "layers_per_pass": 1}),
        (TypeError, "got function and list", {"batches": square, "loss": [1]}),
        (TypeError, "got list and str", {"loss": "mse"}),
        (ValueError, "layers_per_pass", {"layers_per_pass": 0}),
        (ValueError, "layers_per_pass", {"layers_per_pass": 1.5}),
    ],
)
def test_refused_gradients(error, match, change):
    net, batches = net_and_batches()
    call = {
        "modules": ["out", "inp"],
        "batches": batches,
        "loss": square,
        "consume": lambda n, G: G,
    }
    with pytest.raises(error, match=match):
        full_gradients(net, **{**call, **change})
    assert not any(m._forward_hooks for m in net.modules())


def test_there_are_no_gradients_under_inference_mode():
    net, batches = net_and_batches()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call this outside of it"):
        full_gradients(net, ["out"], batches, square, lambda name, G: G)


def test_batches_may_be_a_dataset():
    """One that is read by its index alone, as a loop over it does."""

    class Dataset(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return batches[i]

    net, batches = net_and_batches(torch.float64)
    found = full_gradients(net, ["out"], Dataset(), square, lambda name, G: G)
    close(found["out"], dense_gradients(net, batches)["out.weight"], 1e-12)


def test_layers_are_no_text():
    with pytest.raises(TypeError, match=r"a list of names, as \['0'\], got the text '0'"):
        initialize(nn.Sequential(LoRALinear(6, 6, 2)), method="gaussian", layers="0")


def test_does_not_depend_on_the_contexts_around_it():
    net, batches = net_and_batches()
    expected = full_gradients(net, NAMES, batches, square, lambda name, G: G)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = full_gradients(net, NAMES, batches, square, lambda name, G: G)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)

    def mixed(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return square(model, x)

    with torch.autocast("cpu", torch.bfloat16):
        found = full_gradients(net, NAMES, batches, mixed, lambda name, G: G)
    for name in NAMES:
        assert found[name].dtype == torch.float32
        close(found[name], expected[name], 3e-2)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_refused(wrap):
    net, batches = net_and_batches()
    with pytest.raises(ShardingError, match="pass what is inside"):
        full_gradients(wrap(net), [], batches, square, lambda name, G: G)


def test_a_batch_overwritten_in_place_is_noticed():
    net, _ = net_and_batches()
    buffer = torch.randn(2, 5, 6)

    def batches():
        for _ in range(2):
            yield buffer.normal_()

    with pytest.raises(NumericsError, match="overwritten"):
        full_gradients(net, ["inp", "out"], batches(), square, lambda name, G: G)
    full_gradients(net, ["inp", "out"], batches(), square, lambda name, G: G, offload=True)


# --- starts -------------------------------------------------------------------------------------


def lora_model(dtype=torch.float32, alpha=8):
    """PEFT around a tiny GPT-2: Conv1D (n, m) and, in the head, nn.Linear (m, n)."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=29, n_positions=12, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    base = GPT2LMHeadModel(config).to(dtype)
    lora = LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["c_attn", "c_fc", "lm_head"], fan_in_fan_out=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about fan_in_fan_out and names in transformers
        model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    return model.eval()


def tokens(count=2):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(29, (3, 12), generator=g) for _ in range(count)]


def next_token(model, x):
    return model(input_ids=x, labels=x).loss


@pytest.fixture(scope="module")
def fresh():
    """A model to copy: building one takes longer."""
    return lora_model()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()[0]).logits


def factors(model, name):
    module = model.get_submodule(name)
    return module.lora_A["default"].weight, module.lora_B["default"].weight


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_peft_model(fresh, method):
    model = copy.deepcopy(fresh) if method != "lora_sb" else lora_model(alpha=4)
    kept = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in kept.items()}
    old = logits(model)
    report = initialize(model, tokens(), next_token, method=method, **METHODS[method])
    assert len(report.layers) == 5
    assert not report.skipped
    assert set(report.offsets) == (
        {layer.name for layer in report.layers} if method in MOVES else set()
    )
    # The same parameters, with other values; base weights change where there is an offset only.
    assert all(p is kept[name] for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        zero_B = method in ZERO_B and "lora_B" in name
        adapted = "base_layer.weight" in name and method in MOVES
        assert moved == (("lora_" in name and not zero_B) or adapted), name
    if method in (*MOVES, *ZERO_B, "orthogonal"):
        torch.testing.assert_close(logits(model), old, rtol=1e-5, atol=1e-5)
    else:
        assert (logits(model) - old).abs().max() > 1e-4
    assert f"{method}: 5 layers started, 0 skipped" in str(report)
    assert "layer 48 x 16, rank 4: 2 times" in str(report)


def test_the_start_is_the_initializer_of_the_dense_gradient(fresh):
    model = copy.deepcopy(fresh)
    dense = copy.deepcopy(fresh).requires_grad_(True)
    sum(next_token(dense, x) / 2 for x in tokens()).backward()
    report = initialize(model, tokens(), next_token, seed=3)
    for layer in report.layers:
        G = dense.get_submodule(layer.name).base_layer.weight.grad
        G = G if "lm_head" in layer.name else G.mT  # Conv1D
        assert layer.gradient_norm == pytest.approx(float(G.norm()), rel=1e-4)
        expected = initializers.lora_one(G, 4, seed=3).params
        for got, want in zip(factors(model, layer.name), expected, strict=True):
            close(got.detach(), want, 1e-3)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_eva_sees_the_inputs_of_every_layer(way):
    """Those of all batches and calls; running statistics, random state and hooks are as before."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(6, 8, 2), nn.BatchNorm1d(8), LoRALinear(8, 5, 3)).double()
    batches = [torch.randn(4, 6).double(), torch.randn(9, 6).double()]
    seen = torch.cat([model[:2](x).detach() for x in batches])
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    report = initialize(model, batches, square, method="eva", seed=3, **way)
    inputs = (torch.cat(batches), seen)
    for (A, B), X, (rank, m) in zip(pairs_in(model), inputs, [(2, 8), (3, 5)], strict=True):
        want = initializers.eva(X, rank, out_features=m, seed=3).params
        close(A.detach(), want.A, 1e-9)
        assert not B.any()
    assert [layer.gradient_norm for layer in report.layers] == [None, None]
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in pairs_in(model)[0])


def test_eva_of_fewer_tokens_than_its_rank_leaves_out_the_layer():
    model = make_model(zero_B=True, bias=False)
    with pytest.raises(PairingError, match="1 rows of inputs came for rank 4; give more batches"):
        initialize(model, [torch.randn(1, 6)], square, method="eva", scaling=2.0)


def test_eva_of_inputs_that_are_all_alike_leaves_out_the_layer():
    model = make_model(zero_B=True, bias=False)
    with pytest.raises(PairingError, match="its inputs are all alike"):
        initialize(model, [torch.ones(9, 6)], square, method="eva", scaling=2.0)


def test_eva_needs_no_backward_pass():
    """Not where the input asks for a gradient, nor where a checkpoint would run the layer again."""
    model, x = make_model(zero_B=True, bias=False), torch.randn(9, 6, requires_grad=True)
    rows = []

    def loss(model, x):
        h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        return h.square().mean()

    model[0].register_forward_hook(lambda *_: rows.append(1))
    initialize(model, [x], loss, method="eva")
    assert x.grad is None
    assert len(rows) == 1


@pytest.mark.parametrize("seed", ["1", True, -1])
def test_a_seed_that_is_no_count_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed must be"):
        initialize(make_model(zero_B=True, bias=False), method="gaussian", seed=seed)


def test_eva_notices_an_input_that_was_overwritten():
    """A residual added in place after the layer has read it, as some models do."""
    torch.manual_seed(0)
    model, x = nn.Sequential(LoRALinear(6, 6, 2)), torch.randn(9, 6)

    def loss(model, x):
        h = torch.tanh(x)
        return h.add_(model(h)).square().mean()

    with pytest.raises(NumericsError, match="an input of 0 was overwritten"):
        initialize(model, [x], loss, method="eva")
    initialize(model, [x], loss, method="eva", offload=True)
    close(
        pairs_in(model)[0][0].detach(),
        initializers.eva(torch.tanh(x), 2, out_features=6).params.A,
        1e-5,
    )


def test_pissa_takes_the_leading_part_out_of_the_base(fresh):
    model = copy.deepcopy(fresh)
    initialize(model, method="pissa", oversample=48)
    for name in ("lm_head", "transformer.h.0.mlp.c_fc"):
        name = f"base_model.model.{name}"
        new, old = (m.get_submodule(name).base_layer.weight.detach() for m in (model, fresh))
        close(torch.linalg.svdvals(new)[:12], torch.linalg.svdvals(old)[4:], 1e-5)


def test_the_step_of_lora_one_descends(fresh):
    model = copy.deepcopy(fresh)
    before = sum(next_token(model, x).item() for x in tokens())
    initialize(model, tokens(), next_token, gamma=0.1)
    assert sum(next_token(model, x).item() for x in tokens()) < before


@pytest.mark.parametrize("method", MOVES)
def test_the_offset_takes_up_the_rounding_of_bfloat16(method):
    model = lora_model(torch.bfloat16)
    base = copy.deepcopy(model)
    report = initialize(model, tokens(), next_token, method=method, **METHODS[method])
    for layer in report.layers:
        A, B = (x.detach().double() for x in factors(model, layer.name))
        new, old = (m.get_submodule(layer.name).base_layer.weight for m in (model, base))
        turned = (lambda W: W.mT) if "lm_head" not in layer.name else (lambda W: W)
        sum_ = turned(new.detach().double()) + layer.scaling * B @ A
        # The only error is the rounding of W itself, half a unit in its last place.
        error = (sum_ - turned(old.detach().double())).abs()
        assert (error <= 2.0**-8 * turned(new.detach().double()).abs() + 1e-6).all()


def test_noise_that_the_base_takes_up(fresh):
    model = copy.deepcopy(fresh)
    report = initialize(model, method="init_ab", offset=True)
    assert set(report.offsets) == {layer.name for layer in report.layers}
    torch.testing.assert_close(logits(model), logits(fresh), rtol=1e-5, atol=1e-5)


def test_loralib_and_plain_modules():
    torch.manual_seed(0)
    model = nn.Sequential(
        loralib.Linear(6, 8, r=2, lora_alpha=2, merge_weights=False),
        nn.Tanh(),
        loralib.Linear(8, 8, r=2, lora_alpha=2, fan_in_fan_out=True, merge_weights=False),
        LoRALinear(8, 5, 2),
    ).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    old = model(x)
    dense = copy.deepcopy(model).requires_grad_(True)
    square(dense, x).backward()
    with pytest.raises(ValueError, match=r"scaling=2.0 was given, but 0 has 1.0"):
        initialize(model, [x], square, scaling=2.0)
    with pytest.raises(ValueError, match="3 does not say its scaling"):
        initialize(model, [x], square, method="lora_ga")
    report = initialize(model, [x], square, method="lora_ga", layers=["0", "2"])
    assert [layer.name for layer in report.layers] == ["0", "2"]
    torch.testing.assert_close(model(x), old, rtol=0, atol=1e-12)
    want = initializers.lora_ga(dense[2].weight.grad.mT, 2).params
    close(model[2].lora_A.detach(), want.A, 1e-9)
    # The layer that does not say its scaling, alone.
    alone = nn.Sequential(model[3])
    h = torch.randn(7, 8, dtype=torch.float64)
    old = alone(h)
    initialize(alone, [h], square, method="lora_ga", scaling=2.0)
    torch.testing.assert_close(alone(h), old, rtol=0, atol=1e-12)


class TransposedLoRA(nn.Module):
    """A layer of one's own that keeps W as (n, m), for ``x @ W``."""

    def __init__(self, n, m, r):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, m), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.zeros(m, r))
        self.scaling = 2.0

    def forward(self, x):
        return x @ self.weight + self.scaling * x @ self.lora_A.mT @ self.lora_B.mT


@pytest.mark.parametrize("method", MOVES)
def test_a_layer_of_ones_own_that_stores_the_transpose(method):
    torch.manual_seed(0)
    model = nn.Sequential(TransposedLoRA(6, 9, 2), nn.Tanh(), TransposedLoRA(9, 5, 2)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    before, weights = model(x), [model[k].weight.clone() for k in (0, 2)]
    report = initialize(model, [x], square, method=method)
    assert [layer.shape for layer in report.layers] == [(9, 6), (5, 9)]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    for k, weight in zip((0, 2), weights, strict=True):
        assert (model[k].weight != weight).any()
        model[k].weight.copy_(weight)
    restore_offsets(model, report.offsets)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_equal_layers_start_at_random_each_by_itself():
    """A seed that is given is one for all, and moves each of them."""
    starts = []
    for options in ({}, {"seed": 3}):
        model = nn.Sequential(TransposedLoRA(6, 6, 2), TransposedLoRA(6, 6, 2))
        initialize(model, method="gaussian", **options)
        starts += [layer.lora_A.detach() for layer in model]
    for i, A in enumerate(starts):
        assert all((other != A).any() for other in starts[:i])


def test_a_start_that_its_factors_cannot_hold_is_refused():
    """The root of a singular value of 1e10 is above what float16 has; no weight has been moved."""
    model = nn.Sequential(TransposedLoRA(6, 9, 2))
    model[0].lora_A.data, model[0].lora_B.data = (
        model[0].lora_A.data.half(),
        model[0].lora_B.data.half(),
    )
    weight = model[0].weight.fill_(1e10).clone()
    with pytest.raises(NumericsError, match=r"the start of 0 is not finite in torch\.float16"):
        initialize(model, method="pissa")
    assert torch.equal(model[0].weight, weight)


class Gated(nn.Linear):
    """A linear layer with a second matrix."""

    def __init__(self, n, m):
        super().__init__(n, m)
        self.gate = nn.Parameter(torch.randn(m, n))

    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x @ self.gate.mT)


class LinearExperts(nn.Module):
    """Experts whose class has "Linear" in its name, as in some models."""

    def __init__(self, count, n, m):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, m, n))

    def forward(self, x):
        return torch.einsum("emn,tn->tm", self.up, x)


@pytest.mark.parametrize(
    ("odd", "parameter", "why"),
    [(Gated(6, 6), "gate", "it adapts 'gate'"), (LinearExperts(3, 6, 6), "up", "it adapts 'up'")],
    ids=["a second matrix", "experts"],
)
@pytest.mark.parametrize("method", ["lora_one", "pissa", "orthogonal"])
def test_another_parameter_than_the_weight_is_no_linear_layer(odd, parameter, why, method):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(6, 6), "odd": copy.deepcopy(odd)})
    model.forward = lambda x: model["odd"](model["lin"](x))
    config = LoraConfig(
        r=2, target_modules=["lin"], target_parameters=[f"odd.{parameter}"], init_lora_weights=True
    )
    peft = get_peft_model(model, config)
    x = torch.randn(5, 6)
    before = peft(x)
    factors = {name: p.clone() for name, p in peft.named_parameters() if ".odd" in name}
    report = initialize(peft, [x], square, method=method)
    after = dict(peft.named_parameters())
    assert [layer.name for layer in report.layers] == ["base_model.model.lin"]
    assert [text[: len(why)] for text in report.skipped.values()] == [why]
    assert all(torch.equal(after[name], p) for name, p in factors.items())
    if method != "lora_one":
        torch.testing.assert_close(peft(x), before, rtol=1e-4, atol=1e-4)


def test_a_hook_of_the_users_own_counts():
    """It is part of the function: the tap is on the layer's own output."""
    net, batches = net_and_batches(torch.float64)
    net.again.register_forward_hook(lambda module, args, output: 2 * output)
    found = full_gradients(net, ["again"], batches, square, lambda name, G: G)
    close(found["again"], dense_gradients(net, batches)["again.weight"], 1e-12)


def test_a_base_made_for_inference_is_refused_before_the_first_write():
    model = nn.Sequential(LoRALinear(6, 6, 2), LoRALinear(6, 6, 2))
    with torch.inference_mode():
        model[1].base.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(PairingError, match="base weight of 1 is an inference tensor"):
        initialize(model, method="pissa", scaling=1.0)
    assert all(torch.equal(x, before[key]) for key, x in model[0].state_dict().items())


def test_layers_that_are_skipped_are_named():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.ModuleDict({
        "table": nn.Embedding(7, 6), "conv": nn.Conv1d(6, 6, 1), "lin": nn.Linear(6, 6),
        "idle": nn.Linear(6, 6), "flat": nn.Linear(6, 6),
    })  # fmt: skip
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["table", "conv", "lin", "idle", "flat"])
    )
    m = peft.base_model.model

    def loss(model, x):
        h = m["conv"](m["table"](x).mT).mT
        return m["lin"](h).square().mean() + 0 * m["flat"](h).sum()

    report = initialize(peft, [torch.arange(7)[None]], loss)
    assert [layer.name for layer in report.layers] == ["base_model.model.lin"]
    why = {name.rpartition(".")[2]: text for name, text in report.skipped.items()}
    assert "embedding" in why["table"]
    assert "convolution" in why["conv"]
    assert why["idle"] == "the loss never calls it"
    assert why["flat"] == "its gradient is zero"
    assert "skipped base_model.model.idle" in str(report)
    dora = get_peft_model(
        nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    with pytest.raises(PairingError, match="DoraLinearVariant"):
        initialize(dora, [torch.randn(3, 6)], square)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_above_a_side_leaves_out_that_layer_alone(method):
    """As of a score of 3 labels among the targets; the Gaussian start needs no singular vectors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"])
    model, x = get_peft_model(base, config), torch.randn(9, 10)
    wide, narrow = (f"base_model.model.{i}" for i in (0, 2))
    before = [p.detach().clone() for p in factors(model, narrow)]
    report = initialize(model, [x], square, method=method, **METHODS[method])
    A, B = factors(model, narrow)
    if method in ("gaussian", "init_ab", "orthogonal", "eva"):
        assert [layer.name for layer in report.layers] == [wide, narrow]
        if method != "eva":
            make = getattr(initializers, method)
            want = make(torch.zeros(3, 12), 4, seed=zlib.crc32(narrow.encode())).params
            assert torch.equal(A, want.A)
            assert torch.equal(B, want.B)
        return
    assert [layer.name for layer in report.layers] == [wide]
    assert report.skipped.keys() == {narrow}
    assert "rank must be in 1.." in report.skipped[narrow]
    assert "for (3, 12), got 4" in str(report)
    assert all(torch.equal(p, q) for p, q in zip((A, B), before, strict=True))
    with pytest.raises(PairingError, match=r"no layer can be started; .*rank must be in 1\.\."):
        initialize(model, [x], square, method=method, layers=[narrow], **METHODS[method])


class Packed(nn.Linear):
    """A layer whose weight is no matrix of numbers, as bitsandbytes keeps it."""

    def __init__(self, n, m):
        super().__init__(n, m)
        self.dense = [self.weight.detach().clone()]
        self.weight = nn.Parameter(
            torch.zeros(n * m // 2, 1, dtype=torch.uint8), requires_grad=False
        )

    def forward(self, x):
        return F.linear(x, self.dense[0], self.bias)


def packed_model():
    layer = LoRALinear(6, 8, 2)
    layer.base = Packed(6, 8)
    layer.scaling = 1.0
    return nn.Sequential(layer)


def test_a_quantised_base():
    torch.manual_seed(0)
    model, x = packed_model(), torch.randn(9, 6)
    weight = model[0].base.dense[0].clone().requires_grad_(True)
    F.linear(x, weight, model[0].base.bias).square().mean().backward()
    for method in MOVES:
        with pytest.raises(PairingError, match=r"quantised or packed .*lora_one, lora_sb and eva"):
            initialize(model, [x], pytest.fail, method=method)
    initialize(model, [x], square, gamma=1.0, form="theory")
    A, B = pairs_in(model)[0]
    want = initializers.lora_one(weight.grad, 2, gamma=1.0, form="theory").params
    close((B @ A).detach(), want.B @ want.A, 1e-5)
    initialize(packed_model(), [x], square, method="lora_sb", lr=1e-3)
    initialize(packed_model(), [x], square, method="eva")
    initialize(packed_model(), method="gaussian")


def refusals(model):
    layer = model[0]

    def tie(model):
        model.head = nn.Linear(6, 10)
        model.head.weight = layer.base.weight

    def share(model):
        model[2].lora_A["default"] = nn.Linear(10, 4, bias=False)
        model[2].lora_B = layer.lora_B

    return {
        "in use": (PairingError, "B is not zero", lambda m: nn.init.ones_(layer.lora_B["default"].weight), {}),
        "tied": (PairingError, "that of head too", tie, {}),
        "two adapters": (
            PairingError,
            "under adapter other",
            lambda m: (layer.lora_A.update({"other": nn.Linear(6, 4)}), layer.lora_B.update({"other": nn.Linear(4, 10)})),
            {},
        ),
        "merged": (PairingError, "unmerge it", lambda m: setattr(layer, "merged", True), {}),
        "unknown adapter": (PairingError, "the model has default", None, {"adapter": "other"}),
        "unknown layer": (PairingError, "no adapted linear layer 7; there are 0, 2", None, {"layers": ["7"]}),
        "no layer": (PairingError, "in an empty list", None, {"layers": []}),
        "no scaling": (ValueError, "pass scaling=", None, {"scaling": None}),
        "method": (ValueError, "method must be one of", None, {"method": "corda"}),
        "no option": (TypeError, r"'lora_ga'\) has no option 'gama'; it has gamma, form, seed", None, {"gama": 1.0}),
        "no options": (TypeError, "'gama'; it has none", None, {"method": "olora", "gama": 1.0}),
        "bad option": (ValueError, "gamma", None, {"gamma": -1.0}),
        "scaling of lora_sb": (ValueError, "scaling of 1", None, {"method": "lora_sb", "lr": 0.1}),
        "lr of lora_sb": (TypeError, "lr", None, {"method": "lora_sb", "scaling": 1.0}),
        "no loss": (TypeError, r"batches and a loss, as in initialize\(.*'pissa' needs neither", None, {"loss": None}),
        "rank": (ValueError, "rank", lambda m: widen(layer), {"layers": ["0"]}),
    }  # fmt: skip


def widen(layer):
    layer.lora_A["default"], layer.lora_B["default"] = (
        nn.Linear(6, 5, bias=False),
        nn.Linear(5, 10, bias=False),
    )
    nn.init.zeros_(layer.lora_B["default"].weight)


@pytest.mark.parametrize("case", list(refusals(make_model())))
def test_refusals_come_before_the_first_write(case):
    model = make_model(zero_B=True, bias=False)
    error, match, change, options = refusals(model)[case]
    if change:
        change(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    call = {"method": "lora_ga", "scaling": 2.0, "loss": square, **options}
    with pytest.raises(error, match=match):
        initialize(model, [torch.randn(4, 6)], call.pop("loss"), **call)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_writes_nothing():
    model = make_model(zero_B=True, bias=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cut = lambda m, x: (m(x) * 0).sqrt().sum()  # noqa: E731
    with pytest.raises(NumericsError, match="not finite"):
        initialize(model, [torch.randn(4, 6)], cut)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_base_weight_that_is_not_finite_is_named(method):
    model = make_model(zero_B=True, bias=False)
    with torch.no_grad():
        model[2].base.weight[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        NumericsError, match=rf"{method} needs finite numbers.* of 2, its base weight"
    ):
        initialize(model, method=method, scaling=2.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)


def test_parameters_are_no_model():
    with pytest.raises(TypeError, match="got a generator; give the model itself"):
        initialize(make_model().parameters(), method="pissa")


def test_shared_factors_are_left_alone():
    model = make_model(zero_B=True, bias=False)
    model.append(LoRALinear(8, 8, 4))
    model[3].lora_A, model[3].lora_B = nn.ModuleDict(model[2].lora_A.items()), model[3].lora_B
    model[2].lora_A["default"] = model[3].lora_A["default"] = nn.Linear(8, 4, bias=False)
    model[2].base = nn.Linear(8, 8)
    report = initialize(
        nn.Sequential(model[0], nn.Linear(10, 8), model[2], model[3]), [torch.randn(4, 6)], square
    )
    assert report.skipped["2"] == "shares a factor with 3"
    assert report.skipped["3"] == "shares a factor with 2"


def test_nothing_depends_on_the_order_of_layers_or_of_calls(fresh):
    one, two = copy.deepcopy(fresh), copy.deepcopy(fresh)
    for method in ("gaussian", "lora_one"):
        initialize(one, tokens(), next_token, method=method)
        torch.rand(5)
        initialize(two, tokens(), next_token, method=method, layers_per_pass=5)
        same = [torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True)]
        assert all(same)
        A = [factors(one, f"base_model.model.transformer.h.{i}.attn.c_attn")[0] for i in range(2)]
        assert not torch.equal(*A)


# --- offsets, kept ------------------------------------------------------------------------------


def trained(fresh, steps=3):
    model = copy.deepcopy(fresh)
    report = initialize(model, tokens(), next_token, method="lora_ga")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for x in tokens(steps):
        optimizer.zero_grad()
        next_token(model, x).backward()
        optimizer.step()
    return model, report


def untouched_base(fresh):
    return copy.deepcopy(fresh).unload()


def load(base, path):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out again
        return PeftModel.from_pretrained(base, path).eval()


def test_autocast_does_not_reach_the_number_that_knows_a_weight():
    W, A, B = torch.randn(9, 6), torch.randn(2, 6), torch.randn(9, 2)
    expected = overlap(W, Factors(A, B))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert overlap(W, Factors(A, B)) == expected


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_saved_and_restored(fresh, tmp_path, suffix):
    model, report = trained(fresh)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    save_offsets(report.offsets, tmp_path / f"offsets.{suffix}")
    again = load(untouched_base(fresh), tmp_path)
    assert (logits(again) - logits(model)).abs().max() > 1e-2
    offsets = load_offsets(tmp_path / f"offsets.{suffix}")
    for name, offset in report.offsets.items():
        assert offsets[name][2:] == offset[2:]  # Python's numbers, to the bit
    restore_offsets(again, offsets)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(PairingError, match="taken already"):
        restore_offsets(again, offsets)
    assert torch.equal(logits(again), logits(model))
    # The same on the base before PEFT is around it.
    base = untouched_base(fresh)
    restore_offsets(base, offsets)
    assert torch.equal(logits(load(base, tmp_path)), logits(model))


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("from_model", [False, True])
def test_as_an_ordinary_adapter_of_rank_2r(fresh, tmp_path, from_model, rs):
    from safetensors.torch import load_file, save_file

    model, report = trained(fresh)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    state = load_file(tmp_path / "adapter_model.safetensors")
    plain = as_plain_lora(model if from_model else state, report.offsets)
    assert plain.keys() == state.keys()
    save_file(plain, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # s = alpha / r stays: 8 / 4 is 16 / 8, and with rsLoRA 2 sqrt(8) / sqrt(8).
    config |= {"r": 8, "lora_alpha": 2 * 8**0.5 if rs else 16, "use_rslora": rs}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = load(untouched_base(fresh), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_layers_without_an_offset_are_filled_up(fresh):
    model, report = trained(fresh, steps=1)
    one = dict([next(iter(report.offsets.items()))])
    plain = as_plain_lora(model, one)
    assert all(x.shape[0 if "lora_A" in key else 1] == 8 for key, x in plain.items())
    A = plain["base_model.model.lm_head.lora_A.weight"]
    assert torch.equal(A[4:], torch.zeros_like(A[4:]))


@pytest.mark.parametrize("method", MOVES)
def test_an_offset_knows_its_weight(fresh, method):
    """Another checkpoint's is refused, its own in another dtype is not."""
    report = initialize(copy.deepcopy(fresh), tokens(), next_token, method=method)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        restore_offsets(untouched_base(fresh).to(dtype), report.offsets)
    few = copy.deepcopy(fresh)
    with torch.no_grad():  # of few levels, all of which bfloat16 rounds to one side
        for name, p in few.named_parameters():
            if "lora_" not in name:
                p.copy_(0.0305 * p.sign())
    started = initialize(copy.deepcopy(few), tokens(), next_token, method=method)
    restore_offsets(untouched_base(few).bfloat16(), started.offsets)
    torch.manual_seed(1)
    other = untouched_base(fresh)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=float(p.std()))
    with pytest.raises(PairingError, match="is not the one its offset was made for"):
        restore_offsets(other, report.offsets)


def test_refused_offsets(fresh, tmp_path):
    model, report = trained(fresh, steps=1)
    adapter = tmp_path / "adapter.pt"
    torch.save({"lm_head.lora_A.weight": torch.ones(2, 3)}, adapter)
    name, offset = next(iter(report.offsets.items()))
    untouched = copy.deepcopy(fresh)
    before = copy.deepcopy(untouched.state_dict())
    bad = {
        "no module nope": {"nope": offset},
        "is \\(48, 15\\)": {name: offset._replace(A=offset.A[:, 1:])},
        "not the one its offset": {name: offset._replace(overlap=offset.overlap + 1e3)},
    }
    for match, change in bad.items():
        with pytest.raises(RLoraError, match=match):
            restore_offsets(untouched, {**report.offsets, **change})
        assert all(torch.equal(x, before[key]) for key, x in untouched.state_dict().items())
    packed = packed_model()
    with pytest.raises(PairingError, match="quantised or packed"):
        restore_offsets(packed, {"0": offset})
    with pytest.raises(ValueError, match=r"no file of save_offsets.*: 'lm_head"):
        load_offsets(adapter)
    A = torch.ones(2)
    for other, odd in (([A], "list"), ({0: A}, "0"), ({"q:A": A}, "q:B"), ({"q:B": A}, "q:B")):
        torch.save(other, adapter)
        with pytest.raises(ValueError, match=f"no file of save_offsets.*: '{odd}' is missing or"):
            load_offsets(adapter)
    with pytest.raises(ShapeError, match=r"is \(9, 6\), but the base weight \(6, 9\)"):
        restore_offsets(
            nn.Sequential(nn.Linear(9, 6)),
            {"0": offset._replace(A=torch.ones(2, 6), B=torch.ones(9, 2))},
        )
    with pytest.raises(PairingError, match="no factors of nope"):
        as_plain_lora(model, {"nope": offset})
    with pytest.raises(PairingError, match="there is no offset"):
        as_plain_lora(model, {})
    with pytest.raises(ShapeError, match="its start was"):
        as_plain_lora(model, {name: offset._replace(A=offset.A[:, 1:])})


# --- what it is for -----------------------------------------------------------------------------


def test_lora_one_is_ahead_of_the_default_start():
    """A linear teacher at a distance of rank 4; Scaled SGD with the same step from both starts."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    base, shift = draw(24, 32) / 6, draw(24, 4) @ draw(4, 32) / 6
    x = draw(512, 32)
    y = x @ (base + shift).mT
    loss = lambda model, _: (model(x) - y).square().mean()  # noqa: E731
    losses = {}
    for start in ("default", "lora_one"):
        torch.manual_seed(0)
        model = nn.Sequential(
            loralib.Linear(32, 24, r=4, lora_alpha=4, bias=False, merge_weights=False)
        )
        model[0].weight.data.copy_(base)
        if start == "lora_one":
            # The Hessian of the loss is about 2/24: with this γ the start is about the minimum.
            initialize(model, [None], loss, gamma=24 / 2, form="theory")
        optimizer = ScaledSGD(model, lr=2.0)
        losses[start] = [loss(model, None).item()]
        for _ in range(10):
            optimizer.zero_grad()
            loss(model, None).backward()
            optimizer.step()
            losses[start].append(loss(model, None).item())
    default, ours = losses["default"], losses["lora_one"]
    assert ours[0] < 0.1 * default[0]
    assert ours[3] < default[6]
    assert all(b < a for a, b in zip(default, ours, strict=True))
