"""Stochastic rounding of bfloat16 factors: true in the mean, and reproducible."""

import pytest
import torch
from models import CLASSES, loss_of, make_model, pairs_in, same, train, values

import rlora.torch
from rlora.torch import ScaledAdamW
from rlora.torch.step.rounding import begin_count, store

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def rounded(x, times=1):
    """Results of `store` for float32 numbers, several times over."""
    p = torch.empty_like(x, dtype=torch.bfloat16)
    group = {"stochastic_rounding": True, "params": [p]}
    begin_count(group, [p])
    results = []
    for _ in range(times):
        group["rounded"].add_(1)
        store([p], [x], group)
        results.append(p.clone())
    return torch.stack(results)


def test_a_number_goes_to_either_neighbour_and_the_mean_is_the_number():
    torch.manual_seed(0)
    x = torch.randn(500) * torch.logspace(-30, 30, 500)
    results = rounded(x, times=2000).float()
    below = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)  # towards zero
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    assert ((results == below) | (results == above)).all()
    share = ((x - below) / (above - below)).double()
    # The share of 2000 draws: 5 standard deviations, over 500 numbers.
    error = (results == above).double().mean(0) - share
    assert (error.abs() <= 5 * (share * (1 - share) / 2000).sqrt() + 1e-9).all()


def test_roundings_of_neighbours_and_of_following_steps_have_nothing_in_common():
    """A number halfway between two of bfloat16 goes up half of the time."""
    up = (rounded(torch.full((200_000,), 1 + 2.0**-8), times=4) > 1).double()
    for share in (
        up.mean(),
        (up[:, 1:] == up[:, :-1]).double().mean(),
        (up[:, 64:] == up[:, :-64]).double().mean(),
        (up[1:] == up[:-1]).double().mean(),
    ):
        # 5 standard deviations, 0.5 / sqrt(N) each, of the smallest N
        assert abs(share - 0.5) < 5 * 0.5 / 600_000**0.5


def test_what_needs_no_rounding_stays():
    exact = torch.randn(100).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([exact, special])
    assert torch.equal(rounded(x, 20).float().nan_to_num(7.0), x.expand(20, -1).nan_to_num(7.0))
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert rounded(nan, 20).isnan().all()


@pytest.mark.parametrize("shapes", [[(3, 8), (3, 8)], [(3, 8), (8, 3), (3, 8), (5, 5)]], ids=str)
def test_a_result_is_rounded_as_if_it_were_alone(shapes):
    torch.manual_seed(0)
    wide = [torch.randn(shape) for shape in shapes]
    group = {"stochastic_rounding": True, "rounded": torch.tensor(7, dtype=torch.int32)}
    together, alone = ([torch.empty_like(x, dtype=torch.bfloat16) for x in wide] for _ in range(2))
    store(together, wide, group)
    for p, x in zip(alone, wide, strict=True):
        store([p], [x], group)
    assert all(map(torch.equal, together, alone))


def test_a_compiled_step_rounds_as_an_eager_one():
    """One graph, which advances the count as well."""
    torch._dynamo.reset()  # graphs of optimizers that are gone count as recompiled
    models = [make_model(dtype=torch.bfloat16, bias=False) for _ in range(2)]
    optimizers = [ScaledAdamW(model, stochastic_rounding=True) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(1, 5):
            for model, move in zip(models, (step, optimizers[1].step), strict=True):
                model.zero_grad()
                loss_of(model, t).backward()
                move()
    assert optimizers[0].param_groups[0]["rounded"] == 5
    same_as = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    # The same bits; sums in another order may have changed the last one of few float32 results.
    assert (same_as[0] == same_as[1]).double().mean() > 0.99


def test_only_bfloat16_is_rounded_at_random():
    x = torch.randn(1000, dtype=torch.float32)
    for dtype in (torch.float16, torch.float32):
        p = torch.empty_like(x, dtype=dtype)
        store([p], [x], {"stochastic_rounding": True, "rounded": torch.tensor(1)})
        assert torch.equal(p, x.to(dtype))


def test_a_tensor_is_rounded_alike_whatever_stands_beside_it():
    """So a factor that several processes hold stays equal where their other shards are not."""
    x, y = torch.randn(40, 4), torch.randn(7, 4)
    group = {"stochastic_rounding": True, "rounded": torch.tensor(3)}
    alone, beside, other = (torch.empty_like(z, dtype=torch.bfloat16) for z in (x, x, y))
    store([alone], [x], group)
    store([other, beside], [y, x], group)
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("name", ["ScaledAdamW", "LoRARite", "LoRAPlus", "ScaledSGD"])
def test_steps_below_the_last_bit_count(name):
    """200 steps of one sign on 1.0, each a fortieth of bfloat16's spacing there."""
    kind, spacing = getattr(rlora.torch, name), 2.0**-8
    moved = {}
    for stochastic in (False, True):
        A, B = torch.ones(4, 64).bfloat16(), torch.ones(64, 4).bfloat16()
        with torch.no_grad():  # Grams of full rank
            A[:, :4] += 8 * torch.eye(4)
            B[:4] += 8 * torch.eye(4)
        A, B = A.requires_grad_(), B.requires_grad_()
        start = B.detach().float().clone()
        optimizer = kind(
            [A, B], lr=1.0, weight_decay=0.0, pairs=[(A, B)], stochastic_rounding=stochastic
        )
        A.grad, B.grad = torch.zeros_like(A), torch.full_like(B, 1.0)
        probe = B.detach().float().clone()
        twin_A, twin_B = A.detach().float().requires_grad_(), probe.requires_grad_()
        wide = kind([twin_A, twin_B], lr=1.0, weight_decay=0.0, pairs=[(twin_A, twin_B)])
        twin_A.grad, twin_B.grad = A.grad.float(), B.grad.float()
        before = twin_B.detach().clone()
        wide.step()
        step = (twin_B.detach() - before).abs()[4:].mean()  # at a learning rate of 1
        optimizer.param_groups[0]["lr"] = float(spacing / 40 / step)
        for _ in range(200):
            optimizer.step()
        moved[stochastic] = float((B.detach().float() - start)[4:].abs().mean())
    assert moved[False] == 0.0
    # About five spacings; the moments of some methods change the later steps.
    assert 1.5 * spacing < moved[True] < 15 * spacing


@make
def test_random_state_is_left_alone_and_replicas_agree(make):
    results = []
    for seed in (1, 2):
        model = make_model(dtype=torch.bfloat16, bias=False)
        optimizer = make(model, stochastic_rounding=True)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(model, optimizer, 3)
        assert torch.equal(before, torch.get_rng_state())
        results.append(values(model))
    assert same(*results)


def test_a_saved_state_keeps_its_seed():
    """Steps write to the optimizer's; a file is not made at once, and two states are compared."""
    model = make_model(dtype=torch.bfloat16, bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()["param_groups"][0]
    train(model, optimizer, 1)
    assert (optimizer.param_groups[0]["rounded"], saved["rounded"]) == (2, 1)


@make
def test_the_seed_may_be_set_as_a_number(make):
    model = make_model(dtype=torch.bfloat16, bias=False)
    optimizer = make(model)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["rounded"] = 7
    train(model, optimizer, 2)
    assert optimizer.param_groups[0]["rounded"] == 9


@make
def test_resume_is_bit_exact(make, tmp_path):
    model = make_model(dtype=torch.bfloat16, bias=False)
    optimizer = make(model, stochastic_rounding=True)
    train(model, optimizer, 3)
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "c.pt")
    expected = train(model, optimizer, 3, start=3)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = make_model(seed=9, dtype=torch.bfloat16, bias=False)
    resumed = make(again)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    assert resumed.param_groups[0]["stochastic_rounding"]
    assert train(again, resumed, 3, start=3) == expected
    assert same(values(model), values(again))


@make
def test_one_step_is_within_a_spacing_of_the_step_to_nearest(make):
    """Whatever the method: both results are neighbours of the same float32 number."""
    models = [make_model(dtype=torch.bfloat16, bias=False) for _ in range(2)]
    for model, stochastic in zip(models, (False, True), strict=True):
        optimizer = make(model, stochastic_rounding=stochastic)
        if getattr(optimizer, "order", "jacobi") != "jacobi":
            pytest.skip("B's direction then rests on the rounded A")
        loss_of(model).backward()
        optimizer.step()
    different = 0
    for pair, other in zip(*map(pairs_in, models), strict=True):
        for p, q in zip(pair, other, strict=True):
            p, q = p.detach().float(), q.detach().float()
            assert ((p - q).abs() <= 2.0**-7 * torch.maximum(p.abs(), q.abs())).all()
            different += int((p != q).sum())
    assert different > 0


@pytest.mark.parametrize("value", [1, "yes", None])
def test_anything_but_yes_or_no_is_refused(value):
    with pytest.raises(TypeError, match="stochastic_rounding must be True or False"):
        ScaledAdamW(make_model(), stochastic_rounding=value)
    with pytest.raises(TypeError, match="stochastic_rounding"):
        rlora.torch.LoRARite([{"params": make_model(), "stochastic_rounding": value}])
