"""Runs of ScaledAdamW and ScaledSGD whose results are kept in tests/data/steps.npz.

The numbers are those of the two engines that version 1 had for them: torch's own optimizers over
stand-ins. ``python tests/support/golden_steps.py FILE`` writes such a file.
"""

import sys

import numpy as np
import torch

import rlora.torch
from rlora.pairing import Layout

SHAPES = [(70, 50, 5), (40, 600, 5), (70, 50, 5), (12000, 30, 4), (700, 640, 64), (30, 20, 3)]
"""(m, n, r): small and large factors, equal shapes and others."""

ADAMW = [
    {},
    {"placement": "before"},
    {"placement": "after", "weight_decay": 0.1},
    {"order": "gauss_seidel"},
    {"amsgrad": True, "maximize": True},
    {"damping_mode": "relative", "damping": 1e-3},
    {"weight_decay": 0.0, "betas": (0.9, 0.999), "compute_dtype": "float64"},
]
SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    {"order": "gauss_seidel", "damping_mode": "absolute", "momentum": 0.5},
]
LAYOUTS = [
    ((12, 40), (90, 4), Layout(blocks=(50, 20, 20))),
    ((4, 7, 3, 3), (10, 4, 1, 1), Layout()),
    ((32, 64), (128, 32), Layout("(e r) n", "m (r e)", sizes={"e": 8})),
]
CASES = (
    [("ScaledAdamW", where, options) for where in ("plain", "layouts") for options in ADAMW]
    + [("ScaledSGD", where, options) for where in ("plain", "layouts") for options in SGD]
    + [(kind, "groups", {}) for kind in ("ScaledAdamW", "ScaledSGD")]
)
STEPS = 20


def pairs_of(where):
    rng = np.random.default_rng(0)
    shapes = [((r, n), (m, r)) for m, n, r in SHAPES]
    shapes = LAYOUTS if where == "layouts" else shapes
    pairs = []
    for a, b, *layout in shapes:
        A = torch.tensor(rng.standard_normal(a) / a[1] ** 0.5, requires_grad=True)
        B = torch.zeros(b, dtype=torch.float64, requires_grad=True)
        pairs.append((A, B, *layout))
    return pairs


def trained(kind, where, options):
    """One number for each factor and each array of its state after 20 steps in float64."""
    pairs = pairs_of(where)
    params = [p for pair in pairs for p in pair[:2]]
    groups = params
    if where == "groups":  # the factors of a pair in two, each with its own rate and damping
        groups = [
            {"params": params[::2], "lr": 3e-2},
            {"params": params[1::2], "damping": 1e-2, "weight_decay": 0.1},
        ]
    optimizer = getattr(rlora.torch, kind)(groups, lr=1e-2, pairs=pairs, **options)
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        missing = {step % 6, (2 * step + 3) % 12}
        for i, p in enumerate(params):
            p.grad = torch.tensor(rng.standard_normal(p.shape))
            if i in missing and step:
                p.grad = None
        optimizer.step()
    return np.array([_seen(x) for p in params for x in (p, *_state(optimizer.state[p]))])


def _state(held):
    return [held[name] for name in sorted(held) if isinstance(held[name], torch.Tensor)]


def _seen(x):
    """The norm and a sum in which no two entries count alike: of the norm's size."""
    x = x.detach().double().reshape(-1)
    return float(x.norm() + x @ torch.arange(1, len(x) + 1).double().sin() / 2)


def name_of(case):
    kind, where, options = case
    return " ".join([kind, where, *(f"{key}={value}" for key, value in options.items())])


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **{name_of(case): trained(*case) for case in CASES})
