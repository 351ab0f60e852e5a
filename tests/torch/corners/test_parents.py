"""Optimizers in front of which `precondition` stands, with habits that those of torch do not have."""

import copy

import pytest
import torch
from models import make_model, same, train, values
from torch.optim import Optimizer

import rlora.torch
from rlora import ShapeError
from rlora.torch import precondition


class Rebinding(Optimizer):
    """Puts its results into new memory."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


class OwnList(Rebinding):
    """Has the parameters in a list too."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.everything = [{"of": p} for group in self.param_groups for p in group["params"]]


class Wrapper(Rebinding):
    """Steps by another optimizer, as those that look ahead or sharpen do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups


class Counting(Rebinding):
    """Counts its steps in the group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


class Optaxlike(Rebinding):
    """Has names in its state that methods of the library have too."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["mu"], state["count"] = torch.zeros_like(p), torch.zeros(())
                state["count"] += 1
                state["mu"].lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * state["mu"] / (1 - 0.9 ** state["count"]))


def test_any_names_in_a_state_are_saved_and_loaded():
    model, again = make_model(), make_model(seed=1)
    optimizer, resumed = (precondition(Optaxlike)(m) for m in (model, again))
    train(model, optimizer, 2)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(again, resumed, 1)
    assert same(values(model), values(again))
    of_method = rlora.torch.LoRARite(again)
    train(again, of_method, 1)
    with pytest.raises(ShapeError, match="another optimizer"):
        resumed.load_state_dict(of_method.state_dict())


class Helped(Rebinding):
    """Has a public method for each parameter, an option and counters of its own."""

    def __init__(self, params, lr=0.1, scaling=1.0):
        Optimizer.__init__(self, params, {"lr": lr, "scaling": scaling})
        self.me, self.nested = self, []
        self.nested.append(self.nested)
        self.train()

    def train(self):
        self.training = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.update(p, group)

    def update(self, p, group):
        state = self.state[p]
        if not state:
            state["mu"] = torch.zeros_like(p, dtype=torch.float32)
            state["count"] = torch.zeros((), dtype=torch.int64)
        state["count"] += 1
        state["mu"].mul_(0.9).add_(p.grad, alpha=0.1)
        p.sub_((group["lr"] * state["mu"]).to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_may_call_public_methods_of_its_own(dtype):
    """The parameters in no pair move as by the parent alone, at any step."""
    model, plain = (make_model(dtype=dtype) for _ in range(2))
    optimizer = precondition(Helped)(model)
    alone = Helped(plain[-1].parameters())
    train(model, optimizer, 1)
    for _ in range(3):
        for p, q in zip(model[-1].parameters(), plain[-1].parameters(), strict=True):
            q.data.copy_(p)
            alone.state[q] = copy.deepcopy(optimizer.state[p])
        train(model, optimizer, 1)
        for p, q in zip(model[-1].parameters(), plain[-1].parameters(), strict=True):
            q.grad = p.grad
        alone.step()
        assert same(values(model[-1]), values(plain[-1]))


def test_counters_of_a_parent_are_as_they_were_saved():
    """In bfloat16 there is no 257."""
    model = make_model(dtype=torch.bfloat16)
    optimizer = precondition(Helped)(model)
    train(model, optimizer, 1)
    counts = [state["count"] for state in optimizer.state.values()]
    for count in counts:
        count.fill_(257)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = [state["count"] for state in optimizer.state.values()]
    assert len(found) == len(counts) > 2
    assert all(x.dtype == torch.int64 and x == 257 for x in found)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_results_in_new_memory_count(dtype, atol):
    """As in place; in bfloat16 the head of one is rounded once more a step."""
    model, twin = make_model(dtype=dtype), make_model(dtype=dtype)
    options = {"lr": 0.1, "stochastic_rounding": False}
    train(model, precondition(Rebinding)(model, **options), 3)
    train(twin, precondition(torch.optim.SGD)(twin, **options), 3)
    start = values(make_model(dtype=dtype))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)
        assert "base" in name or not torch.equal(p, start[name])


@pytest.mark.parametrize(("parent", "where"), [(OwnList, "everything"), (Wrapper, "base")])
def test_parameters_elsewhere_than_in_the_groups_are_refused(parent, where):
    """They would be stepped along their own gradients."""
    with pytest.raises(TypeError, match=f"{parent.__name__} has parameters in .* '{where}'"):
        precondition(parent)(make_model())


def test_two_turns_over_a_parent_that_may_count_them_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="Counting may count that as two"):
        precondition(Counting)(model, order="gauss_seidel")
    optimizer = precondition(Counting)(model)
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["k"] == 3
    train(model, precondition(torch.optim.NAdam)(model, order="gauss_seidel"), 1)


def test_classes_that_cannot_be_preconditioned():
    for kind in (rlora.torch.LoRARite, rlora.torch.ScaledAdamW, precondition(torch.optim.NAdam)):
        with pytest.raises(TypeError, match="use it as it is"):
            precondition(kind)
    with pytest.raises(TypeError, match="Optimizer has none"):
        precondition(Optimizer)
