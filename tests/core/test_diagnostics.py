"""The figures of a pair against brute force: full products, singular values, inverses."""

import numpy as np
import pytest

from rlora import Factors
from rlora.core.diagnostics import Damping, gram_figures, step_norms
from rlora.core.rank_group import RankGroup
from rlora.testing import assert_close

FLOAT32 = np.finfo("float32")


def pairs(seed=0, r=3):
    """One pair of matrices and one stack of two, B and A of different sizes."""
    rng = np.random.default_rng(seed)
    shapes = [((r, 7), (5, r)), ((2, r, 4), (2, 9, r))]
    return [Factors(rng.normal(size=a), rng.normal(size=b)) for a, b in shapes]


def layers(trees):
    """Every layer of the pairs as matrices."""
    return [
        Factors(A, B)
        for pair in trees
        for A, B in zip(
            pair.A.reshape(-1, *pair.A.shape[-2:]),
            pair.B.reshape(-1, *pair.B.shape[-2:]),
            strict=True,
        )
    ]


def group_of(backend, trees):
    arrays = [Factors(*(backend.asarray(x, "float64") for x in pair)) for pair in trees]
    return RankGroup(backend, arrays, dtype=backend.xp.float64), arrays


def figures(backend, Grams, relative=0.0, absolute=0.0, covariant=0.0, info=FLOAT32):
    """`covariant` is for the second half, as the metric of A has it."""
    half = len(Grams) // 2
    numbers = (
        [relative] * 2 * half,
        [absolute] * 2 * half,
        [0.0] * half + [covariant] * half,
        [0.0] * 2 * half,
        *([float(x)] * 2 * half for x in (info.eps, info.smallest_normal, info.max)),
    )
    damping = Damping(*(backend.asarray(np.array(x), "float64") for x in numbers))
    S = backend.asarray(np.array(Grams), "float64")
    with np.errstate(all="ignore"):  # inf and NaN are among the Grams
        found = gram_figures(backend, S, damping)
    return {name: backend.to_numpy(x) for name, x in found._asdict().items()}


def anisotropy(P):
    return np.linalg.norm(P - np.trace(P) / len(P) * np.eye(len(P))) / np.linalg.norm(P)


@pytest.mark.parametrize("mode", ["relative", "absolute", "covariant"])
def test_figures_of_grams(backend, mode):
    """Condition numbers from the factors' singular values, the preconditioner by an inverse."""
    trees = pairs()
    found = figures(backend, grams_of(trees), **{mode: 0.3})
    for i, (A, B) in enumerate(layers(trees)):
        S_A, S_B = A @ A.T, B.T @ B
        added = {
            "relative": [0.3 * np.trace(S) / 3 * np.eye(3) for S in (S_A, S_B)],
            "absolute": [0.3 * np.eye(3)] * 2,
            "covariant": [np.zeros((3, 3)), 0.3 * np.linalg.inv(S_A)],
        }[mode]
        for k, F, H in ((i, A, S_A + added[0]), (i + 3, B, S_B + added[1])):
            P = np.linalg.inv(H)
            # The floor of float32 stands beside no damping at all: a part in 1e5 of it.
            rtol = 1e-4 if mode == "covariant" else 1e-11
            assert_close(found["cond"][k], np.linalg.cond(F) ** 2, rtol=1e-11)
            assert_close(found["damped_cond"][k], np.linalg.cond(H), rtol=rtol)
            assert_close(found["anisotropy"][k], anisotropy(P), rtol=rtol)
            low = np.linalg.svd(F, compute_uv=False)[-1] ** 2
            assert found["damped"][k] == (np.linalg.eigvalsh(H)[0] > 2 * low)
    assert not found["skipped"].any()
    assert not found["nan"].any()


def grams_of(trees):
    return [A @ A.T for A, _ in layers(trees)] + [B.T @ B for _, B in layers(trees)]


def test_anisotropy_sees_small_differences(backend):
    """An inverse that differs from I by a part in 1e10 has some; the identity has none."""
    nearly = np.diag([1.0, 1.0, 1.0 + 1e-10])
    found = figures(backend, [nearly, np.eye(3)])
    # Of P = diag(1, 1, 1 - e) the distance is e sqrt(2/3) and the norm sqrt(3).
    assert_close(found["anisotropy"], [1e-10 * np.sqrt(2) / 3, 0.0], rtol=1e-5, atol=1e-18)


def test_hard_grams(backend):
    """Zero, lost rank, too small and too large for float32, NaN: each says what it is."""
    eye = np.eye(3)
    hard = [
        0 * eye,
        np.ones((3, 3)),
        1e-36 * eye,
        1e39 * eye,
        np.full((3, 3), np.nan),
        np.full((3, 3), np.inf),
        eye,
        np.diag([1.0, 1.0, 1e-8]),
    ]
    found = figures(backend, hard, relative=1e-6)
    nan, inf = np.nan, np.inf
    np.testing.assert_allclose(found["cond"], [nan, inf, 1, 1, nan, nan, 1, 1e8], rtol=1e-7)
    assert found["skipped"].tolist() == [1, 0, 1, 1, 0, 1, 0, 0]
    assert found["nan"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert found["damped"].tolist() == [0, 1, 0, 0, 0, 0, 0, 1]
    floor = 10 * 3 * float(FLOAT32.eps)  # above 1e-6: what the rounding of float32 can carry
    assert_close(found["damped_cond"][1], (3 + floor) / floor, rtol=1e-6)
    assert np.isnan(found["anisotropy"][[0, 2, 3, 4, 5]]).all()
    floor = 10 * 3 * float(np.finfo("float64").eps)
    wide = figures(backend, hard, info=np.finfo("float64"))
    assert_close(wide["damped_cond"][1], (3 + floor) / floor, rtol=1e-3)
    assert wide["skipped"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
    absolute = figures(backend, hard, absolute=1e-2)
    assert absolute["skipped"].tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    assert_close(absolute["damped_cond"][[0, 1]], [1, (3 + 1e-2) / 1e-2], rtol=1e-12)
    assert_close(absolute["anisotropy"][[0, 2]], [0, 0], atol=1e-15)


def test_a_bad_partner_touches_only_what_is_made_of_it(backend):
    """S_A is NaN: with covariant damping so is the preconditioner that S_B gives, without it not."""
    S = [np.full((2, 2), np.nan), np.diag([1.0, 4.0])]
    assert figures(backend, S)["damped_cond"][1] == pytest.approx(4, rel=1e-4)  # float32's floor
    assert np.isnan(figures(backend, S, covariant=0.1)["damped_cond"][1])
    zero = [np.zeros((2, 2)), np.diag([1.0, 4.0])]
    assert figures(backend, zero, covariant=0.1)["damped_cond"][1] == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_norms_of_a_step(backend, size):
    """Against full products; a step of a part in 1e9 is right to six digits too."""
    old = pairs()
    new = [
        Factors(*(x + size * d for x, d in zip(pair, move, strict=True)))
        for pair, move in zip(old, pairs(1), strict=True)
    ]
    start = group_of(backend, old)[1]
    found = backend.to_numpy(step_norms(group_of(backend, new)[0], start))
    expected = [
        [(B - B0) @ A + B0 @ (A - A0), A - A0, B - B0, B0 @ A0, A0, B0]
        for (A, B), (A0, B0) in zip(layers(new), layers(old), strict=True)
    ]
    expected = np.array([[np.linalg.norm(x) for x in row] for row in expected]).T
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if size == 1.0:
        full = [
            np.linalg.norm(x.B @ x.A - y.B @ y.A)
            for x, y in zip(layers(new), layers(old), strict=True)
        ]
        assert_close(found[0], full, rtol=1e-12)


def test_a_change_of_basis_moves_no_product(backend):
    """B T⁻¹ and T A: the factors have moved and the product has not, but for rounding."""
    old = pairs()
    T = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    new = [Factors(T @ pair.A, pair.B @ np.linalg.inv(T)) for pair in old]
    moved = backend.to_numpy(step_norms(group_of(backend, new)[0], group_of(backend, old)[1]))
    # The root of a rounded sum of squares of the parts, which are of size ten.
    assert moved[0].max() < 1e-6
    assert moved[1:3].min() > 0.1
