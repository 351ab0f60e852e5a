"""Every method against its equations, in dense float64 NumPy, on every array library."""

from functools import cache

import numpy as np
import oracles_dense as dense
import pytest

import rlora
from rlora.methods.fa import scale_by_frozen_gram
from rlora.methods.sb import scale_by_core
from rlora.testing import assert_close, make_problem

# Name of the case: the method, the oracle, options of both, options of the method only, lr.
UNDAMPED = {"damping": 0.0}
USUAL = {"b1": 0.9, "b2": 0.999}
SGD, ADAM, SIGN = 0.02, 0.02, 0.05
CASES = {
    "alt": (rlora.alt_lora, dense.Alt, {}, {}, 0.1),
    "alt first A, decay": (
        rlora.alt_lora,
        dense.Alt,
        {"first": "A", "b1": 0.5, "weight_decay": 0.1, "damping": 1e-2},
        {},
        0.1,
    ),
    "alt without momentum": (rlora.alt_lora, dense.Alt, {"b1": 0.0}, {}, 0.5),
    "alt plus": (rlora.alt_lora_plus, dense.Alt, {"b2": 0.999, "eps": 1e-8}, {}, 1e-3),
    "alt plus, A, decay": (
        rlora.alt_lora_plus,
        dense.Alt,
        {"b2": 0.9, "eps": 1e-3, "first": "A", "weight_decay": 0.1},
        {},
        1e-2,
    ),
    "loft": (rlora.loft, dense.Loft, {}, UNDAMPED, ADAM),
    "loft, A, decay": (
        rlora.loft,
        dense.Loft,
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "first": "A", "weight_decay": 0.1},
        UNDAMPED,
        ADAM,
    ),
    "ref": (rlora.ref_lora, dense.Ref, {}, {}, SGD),
    "ref momentum": (rlora.ref_lora, dense.Ref, {"momentum": 0.9, "weight_decay": 0.1}, {}, 5e-3),
    "ref scalar": (rlora.ref_lora, dense.Ref, {"form": "scalar"}, {}, SGD),
    "ref scalar momentum": (
        rlora.ref_lora,
        dense.Ref,
        {"form": "scalar", "momentum": 0.5, "weight_decay": 0.1},
        {},
        5e-3,
    ),
    "adapre": (rlora.adapre_lora, dense.AdaPre, {}, UNDAMPED, ADAM),
    "adapre decay": (
        rlora.adapre_lora,
        dense.AdaPre,
        {"b1": 0.0, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.1},
        UNDAMPED,
        ADAM,
    ),
    "muon": (rlora.lora_muon, dense.Muon, {}, {}, SIGN),
    "muon nesterov": (
        rlora.lora_muon,
        dense.Muon,
        {"b1": 0.8, "nesterov": True, "weight_decay": 0.5},
        {},
        SIGN,
    ),
    "muon without momentum": (rlora.lora_muon, dense.Muon, {"b1": 0.0}, {}, SIGN),
    "factor muon": (rlora.factor_muon, dense.FactorMuon, {}, {}, SIGN),
    "factor muon decay": (
        rlora.factor_muon,
        dense.FactorMuon,
        {"b1": 0.8, "nesterov": False, "weight_decay": 0.5},
        {},
        SIGN,
    ),
    "factor muon without momentum": (rlora.factor_muon, dense.FactorMuon, {"b1": 0.0}, {}, SIGN),
    "stable": (rlora.stable_lora, dense.Stable, {"shrink": 0.1}, {}, ADAM),
    "stable decay": (rlora.stable_lora, dense.Stable, {"weight_decay": 0.1}, {}, ADAM),
    "trust region": (rlora.trust_region, dense.TrustRegion, {}, USUAL, ADAM),
    "trust region decay": (
        rlora.trust_region,
        dense.TrustRegion,
        {"weight_decay": 0.1, "bound": 0.02},
        USUAL,
        ADAM,
    ),
    "riemannion": (rlora.riemannion, dense.Riemannion, {}, {}, SIGN),
    "riemannion decay": (
        rlora.riemannion,
        dense.Riemannion,
        {"b1": 0.5, "weight_decay": 0.5},
        {},
        SIGN,
    ),
    "op": (rlora.op_lora, dense.Op, {}, UNDAMPED, SGD),
    "op decay": (
        rlora.op_lora,
        dense.Op,
        {"momentum": 0.5, "weight_decay": 0.5},
        UNDAMPED,
        0.1,
    ),
    "op without momentum": (rlora.op_lora, dense.Op, {"momentum": 0.0}, UNDAMPED, 0.1),
    "prodigy": (rlora.scaled_prodigy, dense.Prodigy, {}, {}, 1.0),
    "prodigy decay": (
        rlora.scaled_prodigy,
        dense.Prodigy,
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "d0": 1e-2, "damping": 0.1},
        {},
        0.5,
    ),
    "graft": (rlora.graft_adamw, dense.Graft, {}, {}, ADAM),
    "graft decay": (
        rlora.graft_adamw,
        dense.Graft,
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        {},
        ADAM,
    ),
    "rac": (rlora.rac_lora, dense.Rac, {}, UNDAMPED, 0.5),
    "rac frozen B": (
        rlora.rac_lora,
        dense.Rac,
        {"frozen": "B", "weight_decay": 0.1},
        UNDAMPED,
        0.5,
    ),
    "rac adam": (
        rlora.rac_lora,
        dense.Rac,
        {"adam": True, "weight_decay": 0.1},
        UNDAMPED,
        ADAM,
    ),
    "rac adam frozen B": (
        rlora.rac_lora,
        dense.Rac,
        {"adam": True, "frozen": "B"},
        UNDAMPED,
        ADAM,
    ),
    "sb": (rlora.lora_sb, dense.Core, {}, UNDAMPED, ADAM),
    "sb decay": (
        rlora.lora_sb,
        dense.Core,
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
        UNDAMPED,
        ADAM,
    ),
}
for gauge in ("sylvester", "balanced", "zero"):
    CASES[f"pro sgd {gauge}"] = (
        rlora.lora_pro_sgd,
        dense.Pro,
        {"gauge": gauge, "momentum": 0.5, "weight_decay": 0.1},
        UNDAMPED,
        0.1,
    )
    for mode in ("efficient", "full"):
        CASES[f"pro {mode} {gauge}"] = (
            rlora.lora_pro_adamw,
            dense.Pro,
            {"gauge": gauge, "mode": mode, "weight_decay": 0.1},
            UNDAMPED,
            ADAM,
        )


# Both are exact but for rounding and one thing: the library keeps every eigenvalue of a Gram above
# 10 r eps = 30 eps of its trace. Through conditions of about 5 and the growth over 20 steps, most of
# it with momentum, that makes 10 to 1300 eps, the same in float32 and float64.
ROUNDING = 4000


@cache
def expected(case):
    _, oracle, options, _, lr = CASES[case]
    return dense.run(oracle(lr=lr, **options), make_problem(scaling=2.0, seed=3))


def signed_like(pair, model):
    """The pair with the signs of the rank's axis that bring it near the model."""
    signs = np.sign((pair[1] * model[1]).sum(axis=0))
    return signs[:, None] * pair[0], pair[1] * signs


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case, dtype, backend):
    make, _, options, more, lr = CASES[case]
    problem = make_problem(scaling=2.0, seed=3).on(backend, dtype)
    method = make(**options, **more)
    params, state = problem.params, method.init(problem.params, problem.scaling)
    rtol = ROUNDING * float(np.finfo(dtype).eps)
    for A, B in expected(case):
        params, state = rlora.step(method, params, problem.grads(params), state, lr)
        pair = tuple(backend.to_numpy(x).astype("float64") for x in params)
        if make is rlora.riemannion:  # B = U and A = Σ Vᵀ, whose signs are anybody's
            pair = signed_like(pair, (A, B))
        assert_close(pair[1] @ pair[0], B @ A, rtol=rtol, what="the product")
        assert_close(pair[0], A, rtol=rtol, what="A")
        assert_close(pair[1], B, rtol=rtol, what="B")


# --- where damping stands ------------------------------------------------------------------------------


def damped_inverses(S_A, S_B, mode, damping):
    """The preconditioners of a gradient of A, and of one of B."""
    r = len(S_A)
    if mode == "covariant":
        return np.linalg.inv(S_B + damping * np.linalg.inv(S_A)), np.linalg.inv(S_A)
    shifts = [damping * (np.trace(S) / r if mode == "relative" else 1.0) for S in (S_B, S_A)]
    return tuple(np.linalg.inv(S + c * np.eye(r)) for S, c in zip((S_B, S_A), shifts, strict=True))


def formulas(A, B, G, s, mode, damping):
    """First directions of every method with a damping, without momentum, as its docstring has it."""
    P_A, P_B = damped_inverses(A @ A.T, B.T @ B, mode, damping)
    g_A, g_B = B.T @ G, G @ A.T
    d_A, d_B = P_A @ g_A, (g_B - B @ P_A @ B.T @ g_B) @ P_B
    squares = (B @ d_A + d_B @ A) ** 2
    root = squares.sum() ** 0.25
    R, L = (np.sqrt(squares.sum(axis=axis)) / root for axis in (0, 1))  # R^½, L^½
    Q_A, Q_B = damped_inverses((A * R) @ A.T, (B.T * L) @ B, mode, damping)
    full = g_B @ P_B @ A
    return {
        "loft": (0 * A, full / (np.abs(full) + 0.5) @ A.T @ P_B / s),
        "pro": (d_A / s, d_B / s),
        "alt": (0 * A, g_B @ P_B / s),
        "fa": (None, g_B @ P_B / s),
        "rac": (None, g_B @ P_B / s),
        "rac B": ((np.linalg.inv(B.T @ B) if mode == "covariant" else P_A) @ g_A / s, None),
        "sb": (P_A @ g_A @ np.linalg.pinv(A) @ A / s, None),
        "adapre": (
            Q_A @ (g_A / R - 0.5 * g_A @ A.T @ Q_B @ A) / s,
            (g_B / L[:, None] - 0.5 * B @ Q_A @ B.T @ g_B) @ Q_B / s,
        ),
    }


LINKS = {
    "pro": lambda **d: rlora.lora_pro_sgd(gauge="zero", **d),
    "loft": lambda **d: rlora.loft(b1=0.0, b2=0.0, eps=0.5, **d),
    "alt": lambda **d: rlora.alt_lora(b1=0.0, **d),
    "fa": lambda **d: rlora.chain(scale_by_frozen_gram(**d)),
    "rac": lambda **d: rlora.rac_lora(**d),
    "rac B": lambda **d: rlora.rac_lora(frozen="B", **d),
    "sb": lambda **d: rlora.chain(scale_by_core(**d)),
    "adapre": lambda **d: rlora.adapre_lora(b1=0.0, eps=0.0, **d),
}


@pytest.mark.parametrize(
    "mode, damping", [("relative", 0.1), ("absolute", 0.2), ("covariant", 0.05)]
)
@pytest.mark.parametrize("name", LINKS)
def test_damping_is_where_the_formula_has_it(name, mode, damping):
    """One step in one precision: 1e-12 is a few hundred roundings."""
    problem = make_problem(scaling=2.0, seed=4)
    A, B = problem.params
    expected = formulas(A, B, problem.error(problem.params), 2.0, mode, damping)[name]
    undamped = formulas(A, B, problem.error(problem.params), 2.0, mode, 0.0)[name]
    method = LINKS[name](damping=damping, damping_mode=mode)
    state = method.init(problem.params, problem.scaling)
    D, _ = method.update(problem.grads(problem.params), state, problem.params)
    seen = False
    for d, x, free in zip(D, expected, undamped, strict=True):
        assert (d is None) == (x is None)
        if d is not None:
            assert_close(d, x, rtol=1e-12)
            seen |= bool(np.abs(x - free).max() > 1e-2 * np.abs(x).max())
    assert seen or (
        mode == "covariant" and name in ("loft", "alt", "fa", "rac", "rac B")
    )  # of one Gram
