"""Make published.npz: trajectories of published LoRA-RITE, LoRA-Pro, LoRA-FA and LoRA+ code.

Nothing is kept here but numbers. Needs one folder with two files, and PEFT 0.21.2 installed:

    lora_rite.py        of https://github.com/gkevinyen5418/LoRA-RITE at commit c9bb451
    lora_pro_optim.py   peta/optim.py of https://github.com/mrflogs/LoRA-Pro at commit 2d8f44a

    python tests/data/make_published.py FOLDER

(torch 2.13.0 on a CPU, transformers 5.23.0; wandb, which the second file imports, need not be
there.) Each case is 20 steps on the sum over pairs of 1/2 |s B A - T|^2, with the gradients
s Bᵀ E and s E Aᵀ, E = s B A - T, computed from the current factors and not by autograd. Per case:

    A0, B0, T         the start and the target, (pairs, r, n), (pairs, m, r) and (pairs, m, n)
    A_path, B_path    the factors after every step, (steps, pairs, r, n) and (steps, pairs, m, r)
    W0, W_path        the frozen weight beside the pair, where the optimizer changes it
    skipped           rite_skip*: whether A's and B's gradient was skipped, (steps, pairs, 2)
    norm              rite_*clip: the norm that is clipped, (steps,)
    escape            rite_escape: the escape ρ of A's and B's moment, (steps, pairs, 2)

and `meta`, a JSON text with s, the start and the arguments of the optimizer of every case.
Everything is float64 but for two kinds of case: LoRA-Pro's full mode keeps its moments in bfloat16
(`pro_full_bf16_*`; the other `pro_full_*` are the same code with bfloat16 read as float64), and
PEFT's LoRA-FA multiplies float32 in bfloat16 (`fa_bf16`), but leaves float64 alone.
"""

import contextlib
import importlib.util
import io
import json
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa

STEPS, M, N, R, SCALING = 20, 8, 6, 3, 2.0

RITE = {
    "family": "rite",
    "lr": 0.05,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "clip_unmagnified_grad": 0.0,
    "update_skipping": 0.0,
}
# Skips some gradients, at the start and later, and not others: see `skipped`.
SKIP = {"lr": 0.5, "update_skipping": 3.25, "pairs": 2}
PRO = {
    "family": "pro_adamw",
    "lr": 0.02,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "scaling_factor": SCALING,
    "mode": "efficient",
    "X_mode": "zero",
}
SGD = {"family": "pro_sgd", "lr": 0.1, "scaling_factor": SCALING}
FA = {
    "family": "fa",
    "r": R,
    "lora_alpha": int(R * SCALING),
    "lr": 0.05,
    "weight_decay": 0.0,
}
PLUS = {"family": "plus", "lr": 2e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.0}

CASES = {
    "rite": RITE,
    "rite_escape": RITE | {"apply_escape": True},
    "rite_clip": RITE | {"clip_unmagnified_grad": 1.0, "pairs": 2},
    "rite_skip": RITE | SKIP,
    "rite_skip_clip": RITE | SKIP | {"clip_unmagnified_grad": 6.0},
    "rite_decay": RITE | {"weight_decay": 0.1},
    "rite_balance": RITE | {"balance_param": True, "weight_decay": 0.1},
    "rite_cap": RITE | {"update_capping": 0.5},
    "rite_zero_B": RITE | {"zero_B": True},
    **{
        f"pro_{X}{end}": PRO | {"X_mode": X, "weight_decay": decay}
        for X in ("zero", "sylvester", "symmetry")
        for end, decay in (("", 0.0), ("_decay", 0.1))
    },
    "pro_zero_B": PRO | {"X_mode": "sylvester", "zero_B": True},
    **{
        f"pro_full_{kind}{X}{end}": PRO
        | {"mode": "full", "X_mode": X, "weight_decay": decay, "moments": moments}
        for kind, moments in (("", "float64"), ("bf16_", "bfloat16"))
        for X in ("zero", "sylvester")
        for end, decay in (("", 0.0), ("_decay", 0.1))
    },
    "pro_sgd_zero": SGD | {"X_mode": "zero"},
    "pro_sgd_sylvester": SGD | {"X_mode": "sylvester"},
    "fa": FA,
    "fa_decay": FA | {"weight_decay": 0.1},
    "fa_bf16": FA | {"weight_decay": 0.1, "dtype": "float32"},
    "plus": PLUS,
    "plus_decay": PLUS | {"loraplus_weight_decay": 0.1},
    "plus_ignored_decay": PLUS | {"weight_decay": 0.1},
}
WATCHED = {"update_skipping": "skipped", "clip_unmagnified_grad": "norm", "apply_escape": "escape"}
OURS = ("family", "pairs", "zero_B", "moments", "dtype")


class Wide:
    """The torch module, with float64 in place of the types that are narrower."""

    bfloat16 = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def load(file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, wandb=types.ModuleType("wandb")):
        spec.loader.exec_module(module)
    return module


def peft_model(A, B, W):
    """A model of one adapted layer, and its own tensors in place of A and B."""
    model = torch.nn.Sequential(torch.nn.Linear(N, M, bias=False))
    config = LoraConfig(r=R, lora_alpha=int(R * SCALING), target_modules=["0"])
    model = get_peft_model(model, config).to(A.dtype)
    parameters = dict(model.named_parameters())
    prefix = "base_model.model.0."
    ours = [
        parameters[prefix + name]
        for name in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
    ]
    with torch.no_grad():
        for parameter, value in zip(ours, (A, B, W), strict=True):
            parameter.copy_(value)
    return model, *ours


def build(root: Path, spec: dict, A, B, W):
    """The optimizer, the factors it works on, and what must hold while it steps."""
    options = {key: value for key, value in spec.items() if key not in OURS}
    family, during = spec["family"], contextlib.nullcontext()
    if family == "rite":
        pairs = [p for pair in zip(A, B, strict=True) for p in pair]
        return load(root / "lora_rite.py").LoRARite(pairs, **options), A, B, W, during
    if family.startswith("pro"):
        module = load(root / "lora_pro_optim.py")
        kind = module.AdamW if family == "pro_adamw" else module.SGD
        names = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
        named = zip([f"layer.{name}" for name in names], (W, A[0], B[0]), strict=True)
        if spec.get("moments") == "float64":
            during = mock.patch.object(module, "torch", Wide())
        return kind(named, **options), A, B, W, during
    model, A, B, W = peft_model(A[0], B[0], W)
    if family == "plus":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    else:
        optimizer = create_lorafa_optimizer(model, **options)
        during = mock.patch.multiple(
            lorafa, is_bf16_available=lambda: True, infer_device=lambda: "cpu"
        )
    return optimizer, [A], [B], W, during


def watch(optimizer, A) -> dict:
    """Decisions of LoRA-RITE in its last step."""
    states = [optimizer.state[p]["attr"] for p in A]
    gradients = [(state.update_l, state.update_r) for state in states]
    return {
        "skipped": [[bool((g == 0).all()) for g in pair] for pair in gradients],
        "norm": sum(float(g.square().sum()) for pair in gradients for g in pair) ** 0.5,
        "escape": [[float(state.escape_l), float(state.escape_r)] for state in states],
    }


def residual(A, B, T):
    return SCALING * B @ A - T


def loss(A, B, T) -> float:
    """Loss of stacks of pairs, which may be a whole path's last entry."""
    return 0.5 * float(np.square(residual(A, B, T)).sum())


def run(root: Path, spec: dict) -> tuple[dict, dict]:
    """The arrays of a case, and its arguments."""
    rng = np.random.default_rng(0)
    pairs = spec.get("pairs", 1)
    dtype = getattr(torch, spec.get("dtype", "float64"))
    shapes = {"A0": (pairs, R, N), "B0": (pairs, M, R), "T": (pairs, M, N), "W0": (M, N)}
    tensors = {key: torch.tensor(rng.normal(size=shape)) for key, shape in shapes.items()}
    tensors["A0"] /= 2
    tensors["B0"] *= 0.0 if spec.get("zero_B") else 0.5
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    A = [torch.nn.Parameter(a.clone()) for a in tensors["A0"]]
    B = [torch.nn.Parameter(b.clone()) for b in tensors["B0"]]
    W = torch.nn.Parameter(tensors["W0"].clone(), requires_grad=False)
    result = {key: value.numpy() for key, value in tensors.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer, A, B, W, during = build(root, spec, A, B, W)
    path = []
    with during, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            for a, b, t in zip(A, B, tensors["T"], strict=True):
                with torch.no_grad():
                    E = residual(a, b, t)
                    b.grad = SCALING * E @ a.T
                    if a.requires_grad:
                        a.grad = SCALING * b.T @ E
            optimizer.step()
            after = {"A_path": A, "B_path": B, "W_path": W}
            path.append(
                {key: np.array([p.detach().numpy() for p in value]) for key, value in after.items()}
                | (watch(optimizer, A) if spec["family"] == "rite" else {})
            )
    result.update({key: np.array([step[key] for step in path]) for key in path[0]})
    kept = ("A0", "B0", "T", "A_path", "B_path")
    if spec["family"] == "rite":
        kept += tuple(key for option, key in WATCHED.items() if spec.get(option))
    if (result["W_path"] != result["W0"]).any():
        kept += ("W0", "W_path")
    group = optimizer.param_groups[0]
    meta = {"s": SCALING, "pairs": pairs, "zero_B": False, "dtype": "float64"}
    meta |= {key: group[key] for key in ("betas", "eps") if key in group} | spec
    return {key: value for key, value in result.items() if key in kept}, meta


def main(root: Path) -> None:
    arrays, meta = {}, {}
    for name, spec in CASES.items():
        result, meta[name] = run(root, spec)
        arrays.update({f"{name}.{key}": value for key, value in result.items()})
        first = loss(result["A0"], result["B0"], result["T"])
        last = loss(result["A_path"][-1], result["B_path"][-1], result["T"])
        if not last < first:
            raise SystemExit(f"{name}: the loss goes from {first} to {last}")
        print(f"{name:32s} {first:10.4f} -> {last:10.4f}")
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez_compressed(Path(__file__).with_name("published.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
