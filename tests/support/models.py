"""Small torch models with LoRA pairs under real names, and a training loop."""

import torch
from torch import nn

import rlora.torch
from rlora.torch.optimizers.method_optimizer import MethodOptimizer


class LoRALinear(nn.Module):
    """``W x + s B A x`` with PEFT's parameter names."""

    def __init__(self, n, m, r, dtype=torch.float32):
        super().__init__()
        self.base = nn.Linear(n, m, dtype=dtype)
        self.base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, dtype=dtype)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def make_model(seed=0, dtype=torch.float32, bias=True, zero_B=False, r=4):
    torch.manual_seed(seed)
    model = nn.Sequential(LoRALinear(6, 10, r, dtype), nn.Tanh(), LoRALinear(10, 8, r, dtype))
    if bias:
        model.append(nn.Linear(8, 8, dtype=dtype))  # a head outside the pairs
    if not zero_B:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model


def pairs_in(model):
    return [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for layer in model
        if isinstance(layer, LoRALinear)
    ]


def batch(seed=0, dtype=torch.float32, size=16):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=g).to(dtype), torch.randn(size, 8, generator=g).to(dtype)


def loss_of(model, seed=0):
    dtype = next(model.parameters()).dtype
    x, y = batch(seed, dtype)
    return (model(x) - y).float().square().mean()


def train(model, optimizer, steps, start=0):
    losses = []
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, t % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


BEFORE = {"placement": "before", "damping": 1e-6, "damping_mode": "relative"}
CLASSES = {
    "adamw": lambda m, **k: rlora.torch.ScaledAdamW(m, lr=1e-2, **k),
    "adamw-before": lambda m, **k: rlora.torch.ScaledAdamW(m, lr=1e-2, **BEFORE, **k),
    "adamw-gs": lambda m, **k: rlora.torch.ScaledAdamW(
        m, lr=1e-2, order="gauss_seidel", **BEFORE, **k
    ),
    "sgd": lambda m, **k: rlora.torch.ScaledSGD(
        m, lr=1e-2, momentum=0.9, damping_mode="absolute", damping=1e-1, **k
    ),
    "nadam": lambda m, **k: rlora.torch.precondition(torch.optim.NAdam)(m, lr=1e-2, **k),
}
METHODS = {
    kind.__name__: kind
    for kind in (getattr(rlora.torch, name) for name in rlora.torch.__all__)
    if isinstance(kind, type) and issubclass(kind, MethodOptimizer)
}


def usual_rate(kind):
    """A learning rate at which a class learns; near 1 if it finds its own."""
    if own := getattr(kind.method, "lr", None):
        return 0.9 * own  # the rate itself is refused for a head
    return 5e-2 if issubclass(kind, torch.optim.SGD) else 1e-2


CLASSES |= {
    name: lambda m, kind=kind, **k: kind(m, lr=usual_rate(kind), **k)
    for name, kind in METHODS.items()
}

WITHOUT_WAIT = ("adamw", "sgd", "LoRARite", "LoRAMuon", "RefLoRA", "AltLoRA", "AltLoRAPlus")
"""Classes of which it is promised that the host does not wait for a device."""
