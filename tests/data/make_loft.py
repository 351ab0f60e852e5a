"""Make loft.npz: trajectories of the published LoFT code, as it is and with its transport mended.

Nothing is kept here but numbers. Needs a clone of https://github.com/tnurbek/loft at commit 148998d:

    python tests/data/make_loft.py CLONE

(torch 2.13.0 on a CPU.) Each case is 20 steps on 1/2 |B A - T|^2 in float64, with eps 1e-8. Per case:

    A0, B0, T         the start and the target
    A_path, B_path    the factors after every step, (steps, r, n) and (steps, m, r)

"published" is the code as it is; "mended" has its second moment carried by ``R C R^T``, where R
carries the first, in place of ``R^T C R``, and the moments of both factors are taken before one of
them moves: as it is, those of B see the A that has moved. "decayed" is mended with a weight decay of 0.1 times the
learning rate given as ``weight_decay``, because the code does not multiply it by the rate.
"""

import sys
from pathlib import Path

import numpy as np
import torch

STEPS, M, N, R, LR = 20, 8, 6, 3, 0.02


def mended(R, rows, lora_A):
    return R @ rows @ R.mT if lora_A else R.mT @ rows @ R


def path(loft, *, mend, weight_decay):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = torch.nn.Module()
    for name, shape in (("lora_A", (R, N)), ("lora_B", (M, R))):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.randn(shape) / 2)
        model.add_module(name, layer)
    T = torch.randn(M, N)
    A, B = model.lora_A.weight, model.lora_B.weight
    found = {"A0": A.detach().clone(), "B0": B.detach().clone(), "T": T}
    kept = loft.get_reprojected_second_moment
    loft.get_reprojected_second_moment = mended if mend else kept
    optimizer = loft.LoFTAdamW(
        model.parameters(), lr=LR, eps=1e-8, weight_decay=weight_decay, model=model
    )
    A_path, B_path = [], []
    for _ in range(STEPS):
        with torch.no_grad():
            E = B @ A - T
            A.grad, B.grad = B.mT @ E, E @ A.mT
        if mend:  # the factor that moves goes last, so that its partner's moments see the old one
            optimizer.param_groups[0]["params"] = [B, A] if optimizer.update_A else [A, B]
        optimizer.step()
        A_path.append(A.detach().clone())
        B_path.append(B.detach().clone())
    loft.get_reprojected_second_moment = kept
    return found | {"A_path": torch.stack(A_path), "B_path": torch.stack(B_path)}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from loft_optim import optimizer as loft

    cases = {
        "published": path(loft, mend=False, weight_decay=0.0),
        "mended": path(loft, mend=True, weight_decay=0.0),
        "decayed": path(loft, mend=True, weight_decay=0.1 * LR),
    }
    flat = {f"{case}.{k}": v.numpy() for case, found in cases.items() for k, v in found.items()}
    np.savez_compressed(Path(__file__).with_name("loft.npz"), **flat)
