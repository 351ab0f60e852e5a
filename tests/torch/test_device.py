"""Steps on a CUDA device that is not there: their numbers, and what the host waits for."""

import copy

import pytest
import torch
from models import CLASSES, WITHOUT_WAIT, loss_of, make_model, values
from pretended import DEVICE, Pretended, pretended_device

from rlora import methods
from rlora.backends import get
from rlora.testing import CONTRACT, assert_close
from rlora.torch import ScaledAdamW
from rlora.torch.step.listwise import ListStep
from rlora.torch.step.stacks import StackedAdamW

OPTIONS = {
    "before": {"placement": "before"},
    "after": {"placement": "after"},
    "relative": {"damping_mode": "relative", "damping": 1e-4},
    "absolute": {"damping_mode": "absolute"},
    "float64": {"compute_dtype": "float64"},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
}
SHIFTED = ("FactorMuon", "LoRAMuon", "LoRARite")
"""Classes whose roots by products are taken under a shift of sqrt(eps), 1.5e-8 in float64: in four
steps they end 1e-6, 5e-7 and 3e-6 away from a CPU's, others 1e-14."""


FIRST_A = "0.lora_A.default.weight"


def near(name):
    """A bound for the relative distance of a class from a CPU's steps in float64.

    Ten times what was measured for those with a shift; for others 1e-16 times a condition of 1e6,
    which leaves room for another BLAS.
    """
    return 3e-5 if name in SHIFTED else 1e-10


LAWS = [check for check in CONTRACT if check.__name__ != "check_no_growth"]
"""Laws of few steps; growth takes many, which are slow here."""


@pytest.fixture
def device():
    with pretended_device() as waits:
        yield waits


class Twins:
    """A model on the host, and its parameters on a device, with an optimizer for each."""

    def __init__(self, make, dtype=torch.float64, start=None):
        self.host = make_model(dtype=dtype)
        if start is not None:
            self.host.load_state_dict(start)
        self.named = {
            name: torch.nn.Parameter(Pretended(p.detach().clone()), requires_grad=p.requires_grad)
            for name, p in self.host.named_parameters()
        }
        trained = [(name, p) for name, p in self.named.items() if p.requires_grad]
        self.optimizers = make(self.host), make(trained)

    def backward(self, t):
        """The gradients of the host's model, on both sides."""
        self.optimizers[0].zero_grad()
        loss_of(self.host, t).backward()
        for name, p in self.host.named_parameters():
            self.named[name].grad = None if p.grad is None else Pretended(p.grad.clone())

    def step(self, t, change=None):
        self.backward(t)
        if change is not None:
            change(dict(self.host.named_parameters()))
            change(self.named)
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self, rtol):
        for name, p in values(self.host).items():
            found = self.named[name].detach().held
            assert_close(found.double().numpy(), p.double().numpy(), rtol=rtol, what=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equals_a_step_on_a_cpu(name, dtype, device):
    """Random rounding of bfloat16 may go the other way, at each step, where digits differ."""
    twins = Twins(CLASSES[name], dtype)
    for t in range(4):
        twins.step(t)
    twins.check(near(name) if dtype == torch.float64 else 4 * 2**-7)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_scaled_adamw(options, device):
    twins = Twins(lambda params: ScaledAdamW(params, lr=1e-2, **options))
    for t in range(4):
        twins.step(t)
    twins.check(1e-10)


def kinds_of_work(optimizer):
    return {type(work) for plan in optimizer._plans[1] for work in plan.batches}


@pytest.mark.parametrize("change", [{"foreach": True}, {"fused": False}], ids=str)
def test_from_stacks_to_lists_and_back(change, device):
    """The counters go along, to where torch's own kernel wants them."""
    twins = Twins(lambda params: ScaledAdamW(params, lr=1e-2))
    before = {"foreach": None, "fused": None}
    for t, options in enumerate([{}, {}, change, {}, before, {}]):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0].update(options)
        twins.step(t)
        lists = t in (2, 3)
        assert kinds_of_work(twins.optimizers[1]) == {ListStep if lists else StackedAdamW}
    twins.check(1e-10)


@pytest.mark.parametrize(("shape", "dtype"), [((), torch.float32), ((1,), torch.float64)], ids=str)
@pytest.mark.parametrize("placement", ["before", "both"])
def test_a_learning_rate_on_the_device(placement, shape, dtype, device):
    """A graph reads it anew at each replay. 1e-6: it has 24 bits, the host's 53."""
    twins = Twins(lambda params: ScaledAdamW(params, lr=1e-2, placement=placement))
    rate = torch.full(shape, 1e-2, device=DEVICE, dtype=dtype)
    twins.optimizers[1].param_groups[0].update(lr=rate, capturable=True)
    for t in range(4):
        twins.optimizers[0].param_groups[0]["lr"] = 1e-2 * 0.9**t
        twins.backward(t)
        device.clear()
        for optimizer in twins.optimizers:
            optimizer.step()
        assert device == [] or t == 0
        rate.mul_(0.9)
    assert kinds_of_work(twins.optimizers[1]) == {StackedAdamW}
    twins.check(1e-6)


def test_a_learning_rate_of_the_host(device):
    twins = Twins(lambda params: ScaledAdamW(params, lr=torch.tensor(1e-2)))
    for t in range(3):
        twins.backward(t)
        device.clear()
        for optimizer in twins.optimizers:
            optimizer.step()
        assert device == [] or t == 0
    assert kinds_of_work(twins.optimizers[1]) == {StackedAdamW}
    twins.check(1e-10)


@pytest.mark.parametrize("fused", [None, True])
def test_counters_are_where_torch_has_them(fused, device):
    """So a checkpoint of ours makes torch's own AdamW wait no more than one of its own."""
    twins = Twins(lambda params: ScaledAdamW(params, lr=1e-2, fused=fused))
    for t in range(2):
        twins.step(t)
    counters = [held["step"] for held in twins.optimizers[1].state.values()]
    assert {x.device.type for x in counters} == {"cuda" if fused else "cpu"}
    assert all(float(x) == 2 for x in counters)


def test_counters_that_differ(device):
    """A factor whose gradient was missing once is a step behind the others of its stack.

    Over lists, as on the host here, each has its own counter.
    """
    torch.manual_seed(0)
    start = [(torch.randn(2, 6).double(), torch.randn(5, 2).double()) for _ in range(3)]
    both = []
    for kind, fused in ((torch.Tensor.clone, False), (lambda x: Pretended(x.clone()), None)):
        pairs = [tuple(torch.nn.Parameter(kind(x)) for x in pair) for pair in start]
        params = [p for pair in pairs for p in pair]
        both.append((params, ScaledAdamW(params, lr=1e-2, pairs=pairs, fused=fused)))
    for t in range(5):
        for (params, optimizer), kind in zip(both, (torch.Tensor.clone, Pretended), strict=True):
            for i, p in enumerate(params):
                late = (t, i) == (1, 2)
                p.grad = (
                    None
                    if late
                    else kind(torch.sin(torch.arange(p.numel()) + t).view_as(p).double())
                )
            optimizer.step()
    (host, _), (there, optimizer) = both
    assert kinds_of_work(optimizer) == {StackedAdamW}
    assert [float(optimizer.state[p]["step"]) for p in there] == [5.0, 5.0, 4.0, 5.0, 5.0, 5.0]
    for p, q in zip(host, there, strict=True):
        assert_close(q.detach().held.numpy(), p.detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITHOUT_WAIT)
def test_the_host_waits_for_nothing(name, dtype, device):
    twins = Twins(CLASSES[name], dtype)
    for t in range(2):
        twins.step(t)
    twins.backward(2)
    device.clear()
    twins.optimizers[1].step()
    assert device == []


def test_waits_are_seen(device):
    """Show that the test above can fail."""
    x = torch.ones(2, 2, device=DEVICE)
    assert device == []
    assert float(x.sum()) == 4
    assert (x.cpu() == 1).all()
    torch.tensor([1.0], device=DEVICE)
    torch.linalg.eigh(x)
    assert device == ["_local_scalar_dense", "_to_copy", "_to_copy", "_linalg_eigh"]
    with pytest.raises(RuntimeError, match="of the host and of the device"):
        x + torch.ones(2)


@pytest.mark.parametrize("name", WITHOUT_WAIT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_bad_factor_stays_alone(name, bad, device):
    """The other pair is what it is in a step without the bad one, but for a BLAS's last digit."""

    def fill(named):
        named[FIRST_A].data.fill_(bad)

    spoilt, sound = Twins(CLASSES[name]), Twins(CLASSES[name])
    for twins, change in ((spoilt, fill), (sound, None)):
        twins.step(0)
        twins.step(1, change)
    for part in ("lora_A", "lora_B"):
        found, expected = (
            twins.named[f"2.{part}.default.weight"].detach().held for twins in (spoilt, sound)
        )
        assert_close(found.numpy(), expected.numpy(), rtol=1e-14)


@pytest.mark.parametrize("name", ["adamw", "adamw-gs", "LoRARite", "LoRAProAdamW"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_missing_gradient(name, part, device):
    def drop(named):
        named[f"2.{part}.default.weight"].grad = None

    twins = Twins(CLASSES[name])
    twins.step(0)
    twins.step(1, drop)
    twins.step(2)
    twins.check(near(name))


@pytest.mark.parametrize("name", ["adamw", "LoRARite"])
def test_a_state_goes_from_a_cpu_to_a_device(name, device):
    twins = Twins(CLASSES[name])
    twins.step(0)
    twins.step(1)
    again = Twins(CLASSES[name], start=twins.host.state_dict())
    saved = twins.optimizers[0].state_dict()
    for optimizer in again.optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    again.step(2)
    again.check(near(name))


def test_pseudo_half_leaves_out_what_is_lost(device):
    """An ordinary Gram, one of rank 1, a zero and a tiny one; the shift is 1.5e-8, the condition 5."""
    good = torch.tensor([[4.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.0]], dtype=torch.float64)
    stack = [good, torch.ones_like(good), 0 * good, 1e-300 * good]
    S, backend = torch.stack(stack), get("torch")
    W = backend.pseudo_half(S.to(DEVICE)).held
    found, expected = (x.numpy() for x in (W.mT @ W, backend.pseudo_power(S, -1.0)))
    assert_close(found[0], expected[0], rtol=1e-6)
    assert_close(found[1], expected[1], rtol=1e-6)
    assert not W[2:].any()


@pytest.mark.parametrize("check", LAWS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", methods.__all__)
def test_contract(name, check, device, monkeypatch):
    kind = type(get("torch"))
    make = kind.asarray
    monkeypatch.setattr(
        kind, "asarray", lambda self, x, dtype="float32", device=None: make(self, x, dtype, DEVICE)
    )
    check(getattr(methods, name), get("torch"))
