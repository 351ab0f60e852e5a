"""Methods in which pairs depend on one another, and parameters beside the pairs."""

import pytest
import torch
from models import make_model, pairs_in, train, values

import rlora
import rlora.torch
from rlora import Factors
from rlora.core.moments import clip_by_global_norm
from rlora.methods.rite import clip_unmagnified
from rlora.torch.step import method_batch


def lora_clipped(*, b1: float = 0.9) -> rlora.Transform:
    """Momentum over gradients whose norm over the model is at most 0.01."""
    return rlora.chain(clip_by_global_norm(1e-2), rlora.alt_lora(b1=b1))


METHODS = {
    "max_norm": (rlora.lora_rite, {"max_norm": 0.1, "eps": 1.0}),
    "chained": (lora_clipped, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_norm_is_of_all_pairs_however_many_are_stepped_at_once(name, monkeypatch):
    """Batches of one pair each against the pure step of the whole model."""
    monkeypatch.setattr(method_batch, "PORTION", 1)
    method, options = METHODS[name]
    model = make_model(bias=False, dtype=torch.float64)
    twin = {
        str(i): Factors(*(p.detach().clone() for p in x)) for i, x in enumerate(pairs_in(model))
    }
    kind = rlora.torch.optimizer_class(method)
    optimizer, transform = kind(model, lr=1e-2, **options), method(**options)
    state = transform.init(twin)
    for _ in range(4):
        train(model, optimizer, 1)
        grads = {str(i): Factors(*(p.grad for p in x)) for i, x in enumerate(pairs_in(model))}
        twin, state = rlora.step(transform, twin, grads, state, 1e-2)
    for pair, expected in zip(pairs_in(model), twin.values(), strict=True):
        torch.testing.assert_close(list(pair), list(expected), rtol=1e-12, atol=1e-14)


def test_a_chain_is_together_as_soon_as_one_of_its_transformations_is():
    assert rlora.chain(clip_unmagnified(1.0), rlora.scaled_sgd()).together
    assert rlora.lora_rite(max_rms=1.0).together
    assert not rlora.lora_rite().together


def test_a_rate_that_is_found_for_pairs_is_none_for_a_head():
    """At 1, where `ScaledProdigy` belongs, AdamW would throw a head about."""
    model = make_model()
    head = [p for name, p in model.named_parameters() if name.startswith("3.")]
    factors = [(n, p) for n, p in model.named_parameters() if "lora" in n]
    match = "2 unpaired parameters would be stepped with lr=1.0"

    class Own(rlora.torch.ScaledProdigy):
        pass

    for kind in (rlora.torch.ScaledProdigy, Own):
        with pytest.raises(ValueError, match=match):
            kind(model)
    optimizer = rlora.torch.ScaledProdigy(factors)
    optimizer.add_param_group({"params": head})
    before = values(model)
    for _ in range(2):  # not once alone
        with pytest.raises(ValueError, match=match):
            train(model, optimizer, 1)
    assert all(torch.equal(x, before[name]) for name, x in values(model).items())
    optimizer.param_groups[1]["lr"] = 1e-3
    train(model, optimizer, 1)
    moved = (values(model)["3.weight"] - before["3.weight"]).abs().max()
    assert 0 < moved < 1.1e-3


def test_a_refused_step_leaves_the_seeds_of_rounding():
    model = make_model(dtype=torch.bfloat16)
    optimizer = rlora.torch.LoRARite(model, lr=1e-2)
    train(model, optimizer, 1)
    A = pairs_in(model)[0][0]
    key = next(k for k, x in optimizer.state[A].items() if x.ndim == 2)
    optimizer.state[A][key] = torch.zeros(1, 1)
    with pytest.raises(rlora.ShapeError):
        train(model, optimizer, 1)
    assert int(optimizer.param_groups[0]["rounded"]) == 1
