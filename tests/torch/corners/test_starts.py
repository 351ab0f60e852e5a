"""A start from gradients does not depend on how the batch was cut, nor on what memory it took."""

import pytest
import torch
from models import LoRALinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlora.torch import initialize

METHODS = {
    "lora_one": {"gamma": 0.1},
    "lora_ga": {},
    "loi": {"alpha": 0.1},
    "lora_sb": {"lr": 1e-2, "scaling": 1.0},
}


class Tied(nn.Module):
    """Tokens through an embedding, two blocks and a head that is the embedding."""

    def __init__(self, tie, remat):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, dtype=torch.float64)
        self.blocks = nn.ModuleList(LoRALinear(8, 8, 2, torch.float64) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(self.embed.weight)
        if tie:
            self.head.weight = self.embed.weight
        self.remat = remat

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            run = lambda h, block=block: h + torch.tanh(block(h))  # noqa: E731
            h = checkpoint(run, h, use_reentrant=False) if self.remat else run(h)
        return self.head(h)


def loss(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def factors(model):
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "base" in n
    }


def started(method, *, tie=True, remat=False, count=1):
    model = Tied(tie, remat)
    tokens = torch.randint(11, (16, 7), generator=torch.Generator().manual_seed(1))
    options = dict(METHODS[method])
    options.setdefault("scaling", 2.0)
    report = initialize(model, tokens.chunk(count), loss, method=method, **options)
    assert len(report.layers) == 2
    return factors(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("remat", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("tie", [False, True], ids=["", "tied"])
def test_one_batch_or_eight_parts_of_it(method, tie, remat):
    whole = started(method)
    parts = started(method, tie=tie, remat=remat, count=8)
    for name, x in whole.items():
        # float64: sums in another order, through a decomposition
        torch.testing.assert_close(parts[name], x, rtol=0, atol=1e-9, msg=name)
