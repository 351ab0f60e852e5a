"""Every method, on every backend, keeps the promises of `rlora.testing.CONTRACT`."""

import pytest

from rlora import methods
from rlora.testing import CONTRACT

VARIANTS = [(name, {}) for name in methods.__all__] + [
    ("scaled_sgd", {"momentum": 0.9, "damping_mode": "covariant", "damping": 1e-3}),
    ("scaled_adamw", {"placement": "both", "damping_mode": "covariant", "damping": 1e-3}),
    ("scaled_adamw", {"placement": "after", "damping_mode": "absolute", "damping": 1e-2}),
    ("scaled_adamw", {"order": "gauss_seidel", "decay": "after", "eps_form": "hf"}),
    ("lora_rite", {"escape": True, "balance": True, "weight_decay": 0.1}),
    ("lora_pro_sgd", {"gauge": "balanced", "momentum": 0.9, "damping": 1e-3}),
    ("lora_pro_adamw", {"mode": "full", "gauge": "zero", "weight_decay": 0.1}),
    ("lora_fa", {"decay": "after", "eps_form": "hf"}),
    ("alt_lora", {"first": "A", "weight_decay": 0.1}),
    ("ref_lora", {"form": "scalar", "momentum": 0.9}),
    ("rac_lora", {"adam": True}),
    ("rac_lora", {"frozen": "B"}),
]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda v: str(v))
def test_contract(name, options, check, backend):
    check(lambda: getattr(methods, name)(**options), backend)
