"""Make official.npz: trajectories of the authors' own optimizers, to compare ours with.

Needs a checkout of https://github.com/pilancilab/Riemannian_Preconditioned_LoRA, of which nothing
is kept here but numbers (commit c3a2c1b, torch 2.13.0, float64):

    python tests/data/make_official.py PATH_OF_THE_CHECKOUT

Each case is 20 steps on 1/2 |B A - T|^2 from a full-rank start, with the learning rate and weight
decay in CASES. The GPT-2 code works on two stacked blocks, the Mistral code on one pair; both are
stored as the pairs they stand for.
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import torch

GPT2 = "GPT2/examples/NLG/src/optimizer_custom.py"
MISTRAL = "Mistral-7B/mistral/custom_optimizer.py"
CASES = {
    "gpt2_adamw": (GPT2, "AdamWr", {"lr": 1e-2, "weight_decay": 0.1, "rank": 2}),
    "mistral_adamw": (MISTRAL, "AdamWr", {"lr": 1e-2}),
    "mistral_adamw_corrected": (MISTRAL, "AdamWr", {"lr": 1e-2, "correct_bias": True}),
    "mistral_sgd": (MISTRAL, "SGDr", {"lr": 1e-1, "optimizer_reg": 1e-6}),
}
DECAY = {"mistral_adamw": 0.1, "mistral_adamw_corrected": 0.0, "mistral_sgd": 0.05}
STEPS, M, N, R = 20, 8, 6, 2


def load(root: Path, file: str):
    spec = importlib.util.spec_from_file_location(Path(file).stem, root / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(kind, options, decay, blocks):
    rng = np.random.default_rng(0)
    A = torch.tensor(rng.normal(size=(blocks * R, N)) / 2, requires_grad=True)
    B = torch.tensor(rng.normal(size=(blocks * M, R)) / 2, requires_grad=True)
    T = torch.tensor(rng.normal(size=(blocks * M, N)))
    start = {"A": A.detach().numpy().copy(), "B": B.detach().numpy().copy(), "T": T.numpy()}
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = kind([A, B], **options)
    if decay is not None:
        optimizer.param_groups[0]["weight_decay"] = decay
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        product = torch.cat([b @ a for a, b in zip(A.split(R), B.split(M), strict=True)])
        (0.5 * (product - T).square().sum()).backward()
        with torch.no_grad():
            optimizer.step()
        path.append((A.detach().numpy().copy(), B.detach().numpy().copy()))
    return {
        **start,
        "A_path": np.stack([a for a, _ in path]),
        "B_path": np.stack([b for _, b in path]),
    }


def main(root: Path) -> None:
    arrays = {}
    for name, (file, kind, options) in CASES.items():
        blocks = 2 if file == GPT2 else 1
        result = run(getattr(load(root, file), kind), options, DECAY.get(name), blocks)
        arrays.update({f"{name}.{key}": value for key, value in result.items()})
    np.savez_compressed(Path(__file__).with_name("official.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
