"""Gate G12: the trajectories of published LoRA-RITE, LoRA-Pro, LoRA-FA and LoRA+ code.

`tests/data/make_published.py` says how the numbers were made. Left out is `rite_cap`: the cap on
the update's RMS, off in the authors' code, is not in the library.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from oracles_rite import RiteOracle

import rlora
from rlora import Factors, chain
from rlora.methods.rite import clip_unmagnified
from rlora.testing import assert_close, make_problem

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "published.npz")
META = json.loads(str(GOLDEN["meta"]))

NO_SUCH_OPTION = {"rite_cap"}
WITH_THEIR_BUG = {"pro_symmetry", "pro_symmetry_decay"}
IN_BFLOAT16 = {case for case in META if "bf16" in case}
EXACT = sorted(set(META) - NO_SUCH_OPTION - WITH_THEIR_BUG - IN_BFLOAT16)

# On the inverses alone, and absolute. The coefficients of the Sylvester equation are undamped
# there as here.
DAMPING = {"damping": 1e-8, "damping_mode": "absolute"}
GAUGES = {"zero": "zero", "sylvester": "sylvester", "symmetry": "balanced"}


def of_rite(meta, **algebra):
    return rlora.lora_rite(
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        escape=meta.get("apply_escape", False),
        max_norm=meta["clip_unmagnified_grad"] or None,
        max_rms=meta["update_skipping"] or None,
        balance=meta.get("balance_param", False),
        **algebra,
    )


def of_pro_adamw(meta, **algebra):
    return rlora.lora_pro_adamw(
        mode=meta["mode"],
        gauge=GAUGES[meta["X_mode"]],
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        **DAMPING,
        **algebra,
    )


def of_pro_sgd(meta, **algebra):
    return rlora.lora_pro_sgd(gauge=GAUGES[meta["X_mode"]], **DAMPING, **algebra)


def of_fa(meta, **algebra):
    return rlora.lora_fa(**rlora.methods.fa.PEFT, weight_decay=meta["weight_decay"], **algebra)


def of_plus(meta, **algebra):
    """There is no algebra in it."""
    return rlora.lora_plus(
        ratio=meta["loraplus_lr_ratio"],
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        eps=meta["eps"],
        weight_decay=meta["loraplus_weight_decay"],
    )


FAMILIES = {
    "rite": of_rite,
    "pro_adamw": of_pro_adamw,
    "pro_sgd": of_pro_sgd,
    "fa": of_fa,
    "plus": of_plus,
}


def start(case, backend=None, dtype="float64"):
    """Lists of A, B and T of the pairs of a case."""
    xs = [GOLDEN[f"{case}.{x}"].astype(dtype) for x in ("A0", "B0", "T")]
    return [[x if backend is None else backend.asarray(x, dtype) for x in stack] for stack in xs]


def follow(case, method=None, *, backend=None, dtype="float64", **algebra):
    """Factors (pairs, ...) and state after every one of 20 steps."""
    meta = META[case]
    s = meta["s"]
    method = method or FAMILIES[meta["family"]](meta, **algebra)
    A, B, T = start(case, backend, dtype)
    params = [Factors(*pair) for pair in zip(A, B, strict=True)]
    state = method.init(params, s)
    numpy = np.asarray if backend is None else backend.to_numpy
    for _ in range(20):
        E = [s * (p.B @ p.A) - t for p, t in zip(params, T, strict=True)]
        grads = [
            Factors(s * (p.B.mT @ e), s * (e @ p.A.mT)) for p, e in zip(params, E, strict=True)
        ]
        params, state = rlora.step(method, params, grads, state, meta["lr"])
        A_t, B_t = (np.stack([numpy(p[side]) for p in params]) for side in (0, 1))
        yield Factors(A_t, B_t), state


def published(case):
    for A, B in zip(GOLDEN[f"{case}.A_path"], GOLDEN[f"{case}.B_path"], strict=True):
        yield Factors(A, B)


def worst_condition(case):
    """Worst condition number of the Grams on the published path, without the start at B = 0."""
    skip = 1 if META[case]["zero_B"] else 0
    sigma = [
        np.linalg.svd(X, compute_uv=False)
        for x in "AB"
        for X in (GOLDEN[f"{case}.{x}0"][None][skip:], GOLDEN[f"{case}.{x}_path"])
        if len(X)
    ]
    return max(float((s[..., 0] / s[..., -1]).max()) ** 2 for s in sigma)


def tolerance(case, dtype, compute_dtype=None):
    """Tolerance for two runs in one precision: the library keeps every eigenvalue of a Gram above
    10 r eps = 30 eps of the trace, which bends an inverse by 30 eps times the condition, and the
    published code has no such floor; 20 steps make up to four times that of it. The measured
    error is the same multiple of eps in float32 and float64: 20 to 120 times eps times the
    condition for LoRA-RITE, below 1 where the published damping of 1e-8 is above the floor
    already (the others in float64). With float64 algebra the floor is out of sight and the
    rounding of the factors themselves is left, through the same condition.
    """
    eps = float(np.finfo(dtype).eps)
    return (3 if compute_dtype else 200) * eps * worst_condition(case)


def compare(case, ours, theirs, rtol):
    if META[case].get("balance_param"):
        # They scale by (|A|_F + 1e-6) / (|B|_F + 1e-6), which leaves factors unequal by 1e-7.
        assert_close(ours.B @ ours.A, theirs.B @ theirs.A, rtol=rtol, what="the product")
        norms = [np.linalg.norm(x) for x in ours]
        eps = float(np.finfo(ours.A.dtype).eps)
        assert norms[0] == pytest.approx(norms[1], rel=20 * eps)  # a few roundings of the scale
        rtol = max(rtol, 1e-6)
    for letter, x, y in zip("AB", ours, theirs, strict=True):
        assert_close(x, y, rtol=rtol, what=letter)


@pytest.mark.parametrize("case", EXACT)
def test_trajectory_in_float64(case, backend):
    rtol = tolerance(case, "float64")
    assert rtol < 2e-11
    for (ours, _), theirs in zip(follow(case, backend=backend), published(case), strict=True):
        compare(case, ours, theirs, rtol)


@pytest.mark.parametrize("compute_dtype", [None, "float64"])
@pytest.mark.parametrize("case", EXACT)
def test_trajectory_in_float32(case, compute_dtype):
    """With float64 algebra: 4e-7 and, where 20 steps of 0.5 stir much more, 1e-5 for rite_skip*."""
    algebra = {"compute_dtype": compute_dtype} if compute_dtype else {}
    path = follow(case, dtype="float32", **algebra)
    for (ours, _), theirs in zip(path, published(case), strict=True):
        assert ours.A.dtype == np.float32
        compare(case, ours, theirs, tolerance(case, "float32", compute_dtype))


def test_every_case_is_here():
    assert set(EXACT) | NO_SUCH_OPTION | WITH_THEIR_BUG | IN_BFLOAT16 == set(META)
    assert len(EXACT) == 24


@pytest.mark.parametrize("case", sorted(IN_BFLOAT16))
def test_half_precision_of_theirs_is_all_that_differs(case):
    """LoRA-Pro's moments, and PEFT's product of LoRA-FA, are in bfloat16, whose eps is 2^-7: half
    of that in each entry, of which the path keeps less than a half. Nothing here is in bfloat16.
    """
    for (ours, _), theirs in zip(follow(case), published(case), strict=True):
        compare(case, ours, theirs, 2**-8)


@pytest.mark.parametrize("X", ["zero", "sylvester"])
def test_half_precision_of_theirs_moves_them_as_far(X):
    """Their float64 run, which is ours, is as far from their bfloat16 run as we are."""
    wide, half = (list(published(f"pro_full_{kind}{X}")) for kind in ("", "bf16_"))
    distance = max(np.abs(x - y).max() for a, b in zip(wide, half, strict=True) for x, y in zip(a, b, strict=True))  # fmt: skip
    assert 1e-4 < distance < 2**-7


# --- what LoRA-RITE decided ------------------------------------------------------------------------


def test_rite_rho():
    """A difference of traces: the trajectory's tolerance is relative to those."""
    case = "rite_escape"
    theirs = GOLDEN[f"{case}.escape"][:, 0]
    assert theirs.max() > 0.5
    for (_, state), expected in zip(follow(case), theirs, strict=True):
        flat = rlora.flatten_state(state)
        for letter, mass in zip("AB", expected, strict=True):
            trace = flat[f"0.spectrum.0.{letter}"].sum()
            atol = tolerance(case, "float64") * trace
            assert_close(flat[f"0.escaped.0.{letter}"], mass, atol=atol)


def guarded(case, **guard):
    """Gradients on the published path after the guards alone, and before."""
    s, T = META[case]["s"], GOLDEN[f"{case}.T"]
    link = chain(clip_unmagnified(**guard))
    points = [Factors(GOLDEN[f"{case}.A0"], GOLDEN[f"{case}.B0"]), *published(case)][:-1]
    for A, B in points:
        params = [Factors(*pair) for pair in zip(A, B, strict=True)]
        E = [s * b @ a - t for a, b, t in zip(A, B, T, strict=True)]
        G = [Factors(s * b.T @ e, s * e @ a.T) for a, b, e in zip(A, B, E, strict=True)]
        yield link.update(G, link.init(params), params)[0], G


def test_rite_skips_what_they_skip():
    for case in ("rite_skip", "rite_skip_clip"):
        skipped = GOLDEN[f"{case}.skipped"]
        assert skipped.any()
        assert not skipped.all()
        for (D, _), expected in zip(guarded(case, max_rms=3.25), skipped, strict=True):
            assert [[bool((d == 0).all()) for d in pair] for pair in D] == expected.tolist()


@pytest.mark.parametrize("case, guard", [("rite_clip", {}), ("rite_skip_clip", {"max_rms": 3.25})])
def test_rite_clips_by_the_norm_they_have(case, guard):
    """Over all pairs and both factors, without what is skipped. Exact but for the floor."""
    bound = META[case]["clip_unmagnified_grad"]
    norms = GOLDEN[f"{case}.norm"]
    assert (norms > bound).any()
    for (D, G), norm in zip(guarded(case, max_norm=bound, **guard), norms, strict=True):
        for pair, raw in zip(D, G, strict=True):
            for d, g in zip(pair, raw, strict=True):
                if (d != 0).any():
                    assert_close(d, min(1.0, bound / norm) * g, rtol=tolerance(case, "float64"))


# --- the bug of LoRA-Pro's third gauge -------------------------------------------------------------


def symmetry(A, B, G, s, *, their_way):
    """g_A and g_B with ``X = -½ s⁻² S_B⁻¹ Bᵀ G_B S_A⁻¹``, or with their S_A for S_A⁻¹."""
    damp = DAMPING["damping"] * np.eye(len(A))
    G_A, G_B = s * B.T @ G, s * G @ A.T
    S_A, inv_A = A @ A.T, np.linalg.inv(A @ A.T + damp)
    inv_B = np.linalg.inv(B.T @ B + damp)
    X = -0.5 * inv_B @ B.T @ G_B @ (S_A if their_way else inv_A) / s**2
    g_A = inv_B @ G_A / s**2 + X @ A
    g_B = (G_B - B @ inv_B @ B.T @ G_B) @ inv_A / s**2 - B @ X
    return g_A, g_B


def pro_with_symmetry(case, *, their_way):
    """AdamW on them."""
    meta = META[case]
    s, lr, (b1, b2) = meta["s"], meta["lr"], meta["betas"]
    A, B, T = (GOLDEN[f"{case}.{x}"][0] for x in ("A0", "B0", "T"))
    moments = {x: (np.zeros_like(p), np.zeros_like(p)) for x, p in (("A", A), ("B", B))}

    def adamw(letter, p, g, t):
        m, v = moments[letter]
        m, v = moments[letter] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        hat = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + meta["eps"])
        return p - lr * (hat + meta["weight_decay"] * p)

    for t in range(1, 21):
        g_A, g_B = symmetry(A, B, s * B @ A - T, s, their_way=their_way)
        A, B = adamw("A", A, g_A, t), adamw("B", B, g_B, t)
        yield Factors(A[None], B[None])


@pytest.mark.parametrize("case", sorted(WITH_THEIR_BUG))
def test_balanced_is_symmetry_without_its_bug(case):
    """Both of these are dense formulas in one precision and with one damping: 20 eps of cond."""
    rtol = 20 * float(np.finfo("float64").eps) * worst_condition(case)
    for emulated, theirs in zip(
        pro_with_symmetry(case, their_way=True), published(case), strict=True
    ):
        compare(case, emulated, theirs, rtol)
    for right, (ours, _) in zip(
        pro_with_symmetry(case, their_way=False), follow(case), strict=True
    ):
        compare(case, ours, right, rtol)
    # They part at once: what Adam hides in the norm of the step it keeps in the entries.
    assert np.abs(ours.A - theirs.A).max() > 0.1 * np.abs(theirs.A).max()


def test_the_bug_grows_with_the_imbalance():
    """The effect is the same, any X being a change of basis; but from (c A, B / c) their X is c⁴
    times what it was, and the right one what it was."""
    A, B, T = (GOLDEN[f"pro_symmetry.{x}"][0] for x in ("A0", "B0", "T"))
    G = 2.0 * B @ A - T

    def moves(c, **way):
        g_A, g_B = symmetry(c * A, B / c, G, 2.0, **way)
        # In units in which no split matters, and the damping of 1e-8 relative to Grams of order 1.
        return np.concatenate([B @ g_A / c, g_B @ A * c]), B @ g_A / c + c * g_B @ A

    right, effect = moves(1.0, their_way=False)
    for c in (1.0, 4.0):
        for their_way in (False, True):
            assert_close(moves(c, their_way=their_way)[1], effect, rtol=1e-6)
        assert_close(moves(c, their_way=False)[0], right, rtol=1e-6)
    wrong = [np.linalg.norm(moves(c, their_way=True)[0]) for c in (1.0, 4.0)]
    assert wrong[1] > 100 * wrong[0]


# --- LoRA-Pro's and LoRA+'s decay --------------------------------------------------------------------


def test_full_mode_decays_their_frozen_weight_too():
    """W0 by 1 - lr λ and B A by its square root twice: all of W. The library owns B A alone."""
    for X in ("zero", "sylvester"):
        case = f"pro_full_{X}_decay"
        keep = 1 - META[case]["lr"] * META[case]["weight_decay"]
        W = GOLDEN[f"{case}.W_path"]
        for t in range(20):
            assert_close(W[t], keep ** (t + 1) * GOLDEN[f"{case}.W0"], rtol=1e-13)  # 20 roundings


def test_the_decay_that_peft_ignores():
    """``weight_decay=0.1`` of their function does nothing; that of `lora_plus` is their own
    ``loraplus_weight_decay``."""
    for x in ("A_path", "B_path"):
        assert (GOLDEN[f"plus_ignored_decay.{x}"] == GOLDEN[f"plus.{x}"]).all()
        assert (GOLDEN[f"plus_decay.{x}"] != GOLDEN[f"plus.{x}"]).any()


# --- LoRA-RITE against its own equations -----------------------------------------------------------------

OPTIONS = [{}, {"escape": True}, {"weight_decay": 0.1}, {"b1": 0.0}, {"b2": 0.9, "eps": 1e-3}]


@pytest.mark.parametrize("shape", [(20, 16, 3), (14, 18, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rite_is_its_equations_in_orthonormal_bases(options, shape):
    """200 steps; the library stores neither a basis nor anything in the coordinates of one.

    The floor under the Grams (see `tolerance`) times their condition of about 30, 2e-13, stays
    below 3e-12 on the way to the minimum.
    """
    problem = make_problem(*shape, scaling=2.0, seed=5)
    lr = 0.02
    expected = RiteOracle(lr=lr, **options).run(problem, 200)
    method = rlora.lora_rite(**options)
    params, state = problem.params, method.init(problem.params, problem.scaling)
    for A, B in expected:
        params, state = rlora.step(method, params, problem.grads(params), state, lr)
        assert_close(params.A, A, rtol=1e-10)
        assert_close(params.B, B, rtol=1e-10)
