"""Steps on a device that is not there: how many operations, and what holds up the host."""

import math

import pytest

import rlora.methods

torch = pytest.importorskip("torch")

from rlora.cli.bench import device_ops  # noqa: E402

EIGEN = {"_linalg_eigh"}
WAITS = {
    # Eigendecompositions beyond the square roots that have another way on CUDA.
    "lora_pro_sgd": EIGEN,
    "lora_pro_adamw": EIGEN,
    "balanced_lora": EIGEN,
    "op_lora": EIGEN,
    "riemannion": {"_linalg_svd"},
}
MOST = {
    "scaled_adamw": 69,
    "scaled_adamw:before": 55,
    "lora_rite": 158,
    "lora_muon": 123,
    "ref_lora": 115,
}
"""Operations of a step, of which each costs a launch: those counted and up to 3 more."""
PLACED = ["scaled_adamw:before", "scaled_adamw:after"]


@pytest.mark.parametrize("method", [*rlora.methods.__all__, *PLACED])
def test_operations_do_not_grow_with_the_layers_and_none_waits(method):
    few, many = (
        device_ops.seen_in_a_step(device_ops.optimizer_of(method), layers)
        for layers in (device_ops.FEW, device_ops.MANY)
    )
    assert few.finished
    assert many.finished
    assert 10 < few.operations <= MOST.get(method, math.inf)
    assert few.operations == many.operations
    assert {*few.waits, *many.waits} == WAITS.get(method, set())


@pytest.mark.parametrize(
    ("method", "most"),
    [("scaled_adamw", 60), ("lora_rite", 120), ("lora_muon", 88), ("ref_lora", 101)],
)
def test_a_step_of_one_shape(method, most, monkeypatch):
    monkeypatch.setattr(device_ops, "SHAPES", device_ops.SHAPES[:1])
    seen = device_ops.seen_in_a_step(device_ops.optimizer_of(method), device_ops.FEW)
    assert seen.finished
    assert seen.operations <= most


@pytest.mark.parametrize(
    "method, waits",
    [
        ("scaled_adamw", set()),
        ("scaled_adamw:before", EIGEN),
        ("scaled_adamw:after", EIGEN),
        ("scaled_sgd", EIGEN),
    ],
)
def test_waits_at_a_rank_above_a_side(method, waits, monkeypatch):
    monkeypatch.setattr(device_ops, "SHAPES", [(4, *device_ops.SHAPES[0][1:])])
    seen = device_ops.seen_in_a_step(device_ops.optimizer_of(method), device_ops.FEW)
    assert seen.finished
    assert set(seen.waits) == waits


class Curious(torch.optim.SGD):
    """Looks at its gradients, on the host."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].grad.sum().item() > 0:
            super().step(closure)


def test_what_reads_back_or_goes_from_layer_to_layer_is_seen():
    curious = device_ops.seen_in_a_step(lambda model: Curious(model.parameters()), 2)
    assert not curious.finished
    assert curious.waits == ["aten._local_scalar_dense.default"]
    one_by_one = [
        device_ops.seen_in_a_step(
            lambda model: torch.optim.SGD(model.parameters(), foreach=False), layers
        )
        for layers in (2, 8)
    ]
    assert one_by_one[1].operations == 4 * one_by_one[0].operations


class Fetching(torch.optim.SGD):
    """Brings a number from the host, and shows what Python's operators may do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                flat = p.grad[..., None][0, 1:, 0]
                assert flat.shape == (p.shape[1] - 1,)
                assert (~(flat > 0))[-1].ndim == 0
                p.detach().mul_(torch.asarray([2.0], device="cuda"))


def test_a_copy_from_the_host_is_a_wait():
    seen = device_ops.seen_in_a_step(lambda model: Fetching(model.parameters()), 1)
    assert seen.finished
    assert seen.waits == ["_to_copy"] * 4


def test_checks_say_so(monkeypatch, capsys):
    growth, waits = device_ops.device_op_checks("scaled_adamw:before")
    assert (growth["measured"], growth["passed"], waits["measured"]) == (1.0, True, 0)
    monkeypatch.setattr(
        device_ops, "optimizer_of", lambda method: lambda model: Curious(model.parameters())
    )
    (waits,) = device_ops.device_op_checks("curious")
    assert (waits["measured"], waits["passed"]) == (1, False)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_run_without_a_device_is_left_out_and_said(monkeypatch, capsys):
    def absent(model):
        raise RuntimeError("no fake of it\nand more")

    monkeypatch.setattr(device_ops, "optimizer_of", lambda method: absent)
    assert device_ops.device_op_checks("strange") == []
    assert (
        capsys.readouterr().err == "strange: no step on a device that is not there: no fake of it\n"
    )
