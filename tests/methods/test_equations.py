"""Promises of the equations: gates G2, G3, G7, G9 and the checkable theory of each method.

Everything is in float64. A bound of 1e-12 stands for rounding: the floor of 10 r eps under the
eigenvalues of a Gram, times conditions of at most 9, with a few hundred roundings around.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rlora
from rlora import Factors, chain
from rlora.backends import get
from rlora.core.decay import add_decayed_weights
from rlora.core.moments import scale_by_adam
from rlora.core.rank_group import RankGroup
from rlora.methods.adapre import energies
from rlora.methods.fa import scale_by_frozen_gram
from rlora.methods.pro import scale_by_full_adam
from rlora.methods.rac import restart
from rlora.methods.sb import scale_by_core
from rlora.testing import assert_close, make_problem

EXACT = 1e-12
GAUGES = ("sylvester", "balanced", "zero")
UNDAMPED = {"damping": 0.0}
PLAIN = chain(add_decayed_weights(0.0))


def frame(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def make_pair(m=12, n=10, r=3, *, condition=3.0, seed=0):
    """A pair with singular values from 1 down to 1 / condition, and a gradient of the weight."""
    rng = np.random.default_rng(seed)
    sigma = np.geomspace(1.0, 1.0 / condition, r)
    A = (frame(rng, r, r) * sigma) @ frame(rng, n, r).T
    B = (frame(rng, m, r) * sigma) @ frame(rng, r, r).T
    return Factors(A, B), rng.normal(size=(m, n))


def gradients(pair, G, s=1.0):
    return Factors(s * pair.B.T @ G, s * G @ pair.A.T)


def direction(method, pair, G, s=1.0, **frozen):
    """Direction of the first step."""
    grads = gradients(pair, G, s)._replace(**frozen)
    return method.update(grads, method.init(pair, s), pair)[0]


def effect(pair, D, s=1.0):
    """Effect of a direction on the weight, to first order; None stands for no change."""
    A, B = (0.0 * x if d is None else d for x, d in zip(pair, D, strict=True))
    return s * (pair.B @ A + B @ pair.A)


def projectors(pair):
    """On the row space of A, (n, n), and the column space of B, (m, m), also of a lower rank."""
    A, B = pair
    return np.linalg.pinv(A, rcond=1e-10) @ A, B @ np.linalg.pinv(B, rcond=1e-10)


def on_tangent_space(pair, G):
    P_A, P_B = projectors(pair)
    return P_B @ G + G @ P_A - P_B @ G @ P_A


norm = np.linalg.norm
sizes = st.tuples(st.integers(4, 14), st.integers(4, 14), st.integers(1, 4))
seeds = st.integers(0, 2**16)
scalings = st.floats(0.05, 20.0)
a_law = settings(max_examples=40, deadline=None)


# --- LoRA-Pro: gate G2 -----------------------------------------------------------------------------------


@a_law
@given(size=sizes, seed=seeds, s=scalings, gauge=st.sampled_from(GAUGES))
def test_pro_projects_on_the_tangent_space(size, seed, s, gauge):
    pair, G = make_pair(*size, seed=seed)
    D = direction(rlora.lora_pro_sgd(gauge=gauge, **UNDAMPED), pair, G, s)
    assert_close(effect(pair, D, s), on_tangent_space(pair, G), rtol=EXACT)


@pytest.mark.parametrize("gauge", GAUGES)
def test_pro_full_without_memory_projects_the_sign(gauge):
    """Adam of one step is the sign of Π(G), far above its eps; the factors take its projection."""
    pair, G = make_pair(seed=1)
    D = direction(chain(scale_by_full_adam(gauge, eps=1e-30, **UNDAMPED)), pair, G, 2.0)
    sign = np.sign(on_tangent_space(pair, G))
    assert_close(effect(pair, D, 2.0), on_tangent_space(pair, sign), rtol=EXACT)


ALONE = ["A", "B"]


def alone(pair, G, frozen):
    """The part of G that one factor alone can make: G P_A, or P_B G."""
    P_A, P_B = projectors(pair)
    return G @ P_A if frozen == "A" else P_B @ G


@pytest.mark.parametrize("frozen", ALONE)
@pytest.mark.parametrize("gauge", GAUGES)
def test_pro_with_a_frozen_partner(gauge, frozen):
    """The whole of what is left: nothing waits for the factor that cannot move."""
    pair, G = make_pair(seed=2)
    nothing = {frozen: None}
    D = direction(rlora.lora_pro_sgd(gauge=gauge, **UNDAMPED), pair, G, 2.0, **nothing)
    assert_close(effect(pair, D, 2.0), alone(pair, G, frozen), rtol=EXACT)
    full = chain(scale_by_full_adam(gauge, eps=1e-30, **UNDAMPED))
    D = direction(full, pair, G, 2.0, **nothing)
    sign = np.sign(alone(pair, G, frozen))
    assert_close(effect(pair, D, 2.0), alone(pair, sign, frozen), rtol=EXACT)


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_sylvester_equation(size, seed, s):
    pair, G = make_pair(*size, seed=seed)
    (A, B), r = pair, len(pair.A)
    X = sylvester_gauge(pair, G, s)
    S_A, S_B = A @ A.T, B.T @ B
    right = -np.linalg.inv(S_B) @ B.T @ G @ A.T / s
    residual = S_B @ X + X @ S_A - right
    assert norm(residual) <= EXACT * r * norm(right)


def sylvester_gauge(pair, G, s):
    """X out of ``g_A = S_B⁻¹ G_A / s² + X A``."""
    g_A = direction(rlora.lora_pro_sgd(**UNDAMPED), pair, G, s).A
    return (g_A - np.linalg.pinv(pair.B) @ G / s) @ np.linalg.pinv(pair.A)


def test_sylvester_gauge_is_nearest_to_the_gradients():
    """``|g_A - G_A|² + |g_B - G_B|²`` is less than with 200 other X, near and far: strictly, as
    it is quadratic with curvature S_B, S_A at least 1/9."""
    pair, G = make_pair(seed=3)
    (A, B), s = pair, 2.0
    grads = gradients(pair, G, s)
    D = direction(rlora.lora_pro_sgd(**UNDAMPED), pair, G, s)

    def distance(Z):
        return norm(D.A + Z @ A - grads.A) ** 2 + norm(D.B - B @ Z - grads.B) ** 2

    rng = np.random.default_rng(0)
    for size in np.geomspace(1e-3, 10, 200):
        Z = rng.normal(size=(3, 3))
        Z *= size / norm(Z)
        assert distance(Z) > distance(0 * Z) + size**2 / 9


@pytest.mark.parametrize("gauge", GAUGES)
def test_pro_is_optimal(gauge):
    """Nothing that two factors can do is nearer to G: 200 others, near and far."""
    pair, G = make_pair(seed=4)
    D = direction(rlora.lora_pro_sgd(gauge=gauge, **UNDAMPED), pair, G, 2.0)
    best = norm(effect(pair, D, 2.0) - G)
    rng = np.random.default_rng(0)
    for size in np.geomspace(1e-6, 10, 200):
        other = Factors(*(d + size * rng.normal(size=d.shape) for d in D))
        assert norm(effect(pair, other, 2.0) - G) >= best * (1 - EXACT)


@pytest.mark.parametrize("gauge", GAUGES)
def test_pro_descends_by_the_square_of_what_it_projects(gauge):
    """dL/dlr = -|Π(G)|². The loss is of degree 4 in lr, where this stencil has no error; 1e-11 is
    rounding of a loss of order 100 over a step of 0.01."""
    problem = make_problem(scaling=2.0, seed=5)
    method, pair = rlora.lora_pro_sgd(gauge=gauge, **UNDAMPED), problem.params
    D, _ = method.update(problem.grads(pair), method.init(pair, 2.0), pair)

    def loss(lr):
        return float(problem.loss(rlora.apply_updates(pair, D, lr)))

    h = 0.01
    slope = (loss(-2 * h) - 8 * loss(-h) + 8 * loss(h) - loss(2 * h)) / (12 * h)
    assert slope == pytest.approx(
        -(norm(on_tangent_space(pair, problem.error(pair))) ** 2), rel=1e-11
    )


@pytest.mark.parametrize("gauge", GAUGES)
def test_how_far_a_gauge_depends_on_the_split(gauge):
    """One step from two splits: the first order is the same, and the Sylvester gauge differs in
    lr² δB δA, which is all there is; the others by rounding."""
    pair, G = make_pair(seed=6)
    R = np.array([[3.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.2, 0.0, 1.0]])
    other = Factors(R @ pair.A, pair.B @ np.linalg.inv(R))
    method = rlora.lora_pro_sgd(gauge=gauge, **UNDAMPED)

    def deviation(lr):
        X, Y = (rlora.apply_updates(p, direction(method, p, G), lr) for p in (pair, other))
        return norm(X.B @ X.A - Y.B @ Y.A)

    if gauge != "sylvester":
        assert deviation(0.1) < 1e-11  # the change of basis has squared the condition of 9
        return
    assert deviation(0.1) > 1e-3
    for lr in (1e-1, 1e-2):
        assert deviation(lr) / deviation(lr / 2) == pytest.approx(4.0, rel=1e-8)


@pytest.mark.parametrize("gauge", GAUGES)
def test_pro_with_a_repeated_column(gauge):
    """G11: the live directions move as they do without the repetition. A damping of 1e-6 is 1e-6
    times the condition of 9 away from none."""
    pair, G = make_pair(30, 20, 4, seed=7)
    B = pair.B.copy()
    B[:, 3] = B[:, 2]
    pair = pair._replace(B=B)
    D = direction(rlora.lora_pro_sgd(gauge=gauge), pair, G)
    assert_close(effect(pair, D), on_tangent_space(pair, G), rtol=1e-4)


# --- AdaPreLoRA: gate G3 ---------------------------------------------------------------------------------

ADAPRE = {"b1": 0.0, "eps": 0.0, "damping": 0.0}


def metric(pair, G):
    """The diagonals of L^½ and R^½ in the first step: Adafactor's roots of what factors see of G."""
    squares = on_tangent_space(pair, G) ** 2
    return (np.sqrt(squares.sum(axis=axis) / squares.sum() ** 0.5) for axis in (1, 0))


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_adapre_normal_equations(size, seed, s):
    """The remainder of ``L^-½ G R^-½`` is H-orthogonal to the tangent space, and so is
    ``B D_A - D_B A``, the gauge, to what a change of basis can add to it. Weights differ from
    each other by factors of up to 10, and the Grams' conditions by as much."""
    pair, G = make_pair(*size, seed=seed)
    A, B = pair
    L, R = metric(pair, G)
    D = direction(rlora.adapre_lora(**ADAPRE), pair, G, s)
    target = G / np.outer(L, R)
    rest = np.outer(L, R) * (effect(pair, D, s) - target)
    assert norm(B.T @ rest) <= 100 * EXACT * norm(B.T @ G)
    assert norm(rest @ A.T) <= 100 * EXACT * norm(G @ A.T)
    difference = np.outer(L, R) * s * (B @ D.A - D.B @ A)
    assert norm(B.T @ difference @ A.T) <= 100 * EXACT * norm(G)


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_adapre_with_one_weight_is_pro_balanced(size, seed, s):
    """eps against the mean energy: with 1e15 all energies are eps times their mean, and the second
    moment is ``eps |Π(G)|² / m n`` throughout."""
    pair, G = make_pair(*size, seed=seed)
    D = direction(rlora.adapre_lora(b1=0.0, eps=1e15, damping=0.0), pair, G, s)
    balanced = direction(rlora.lora_pro_sgd(gauge="balanced", **UNDAMPED), pair, G, s)
    root = norm(on_tangent_space(pair, G)) * (1e15 / G.size) ** 0.5
    for d, x in zip(D, balanced, strict=True):
        assert_close(root * d, x, rtol=5e-12)  # energies over 1e15 among them


@a_law
@given(sizes=st.lists(sizes, min_size=1, max_size=3), seed=seeds)
def test_energies_are_sums_of_squares(sizes, seed):
    """Without the (m, n) matrix, for pairs of several shapes at once."""
    rng = np.random.default_rng(seed)
    pairs = [make_pair(m, n, 3, seed=seed + k)[0] for k, (m, n, _) in enumerate(sizes)]
    D = [Factors(*(rng.normal(size=x.shape) for x in pair)) for pair in pairs]
    found = energies(RankGroup(get("numpy"), pairs), D)
    for pair, d, (columns, rows) in zip(pairs, D, found, strict=True):
        squares = effect(pair, d) ** 2
        assert_close(columns, squares.sum(axis=0), rtol=EXACT)
        assert_close(rows, squares.sum(axis=1), rtol=EXACT)


def rescaled(pair, G, out, into):
    """The same layer in other units: W -> diag(out) W diag(into)."""
    return Factors(pair.A * into, out[:, None] * pair.B), G / np.outer(out, into)


def by_unit(method, pair, G, rng):
    """Dependence of the update Y on units: the p for which ``diag(out)^p Y diag(into)^p`` is
    nearest to the update in slightly other units, and the residual over the change for p = 1."""
    tiny = 1e-6
    u, v = (rng.uniform(-1, 1, size=k) for k in G.shape)
    other, G_other = rescaled(pair, G, np.exp(tiny * u), np.exp(tiny * v))
    Y, Z = (effect(p, direction(method, p, g)) for p, g in ((pair, G), (other, G_other)))
    change, along = (Z - Y) / tiny, np.add.outer(u, v) * Y
    p = float((change * along).sum() / (along**2).sum())
    return p, norm(change - p * along) / norm(along)


def test_adapre_in_other_units():
    """A move free of units would go with the weight, p = 1; a gradient has p = -1. AdaPreLoRA is in
    between: one unit for all rows and one for all columns leave its move as it is, p = 0, as with
    any Adam; where each has its own, p is 0 but most of the change is another, as the energies of
    rows and columns are not apart and the projection sees the units. No invariance is claimed."""
    adapre, pro = rlora.adapre_lora(**ADAPRE), rlora.lora_pro_sgd(gauge="balanced", **UNDAMPED)
    pair, G = make_pair(30, 20, 3, seed=8)
    other, G_other = rescaled(pair, G, 5 * np.ones(30), 3 * np.ones(20))
    for method, factor in ((adapre, 1.0), (pro, 1 / 15)):
        Y, Z = (effect(p, direction(method, p, g)) for p, g in ((pair, G), (other, G_other)))
        assert_close(Z, factor * Y, rtol=EXACT)

    def average(method, r):
        rng = np.random.default_rng(0)
        found = [by_unit(method, *make_pair(20, 20, r, seed=k), rng) for k in range(10)]
        return np.mean(found, axis=0)

    # Without a projection: LoRA-Pro has the gradient's units, to the second order of 1e-6.
    assert average(pro, 20) == pytest.approx([-1, 0], abs=1e-4)
    # Ten draws: 0.07 from the mean of p, which spreads by 0.05.
    p, rest = average(adapre, 20)
    assert abs(p) < 0.15
    assert 0.1 < rest < 0.5
    p, rest = average(adapre, 3)
    assert abs(p) < 0.15
    assert rest > 0.5


@pytest.mark.parametrize("frozen", ALONE)
def test_adapre_with_a_frozen_partner(frozen):
    """The energies are those of what one factor can do, and the move is the nearest of it."""
    pair, G = make_pair(seed=9)
    squares = alone(pair, G, frozen) ** 2
    L, R = (np.sqrt(squares.sum(axis=axis) / squares.sum() ** 0.5) for axis in (1, 0))
    D = direction(rlora.adapre_lora(**ADAPRE), pair, G, 2.0, **{frozen: None})
    rest = np.outer(L, R) * (effect(pair, D, 2.0) - G / np.outer(L, R))
    seen = rest @ pair.A.T if frozen == "A" else pair.B.T @ rest
    assert norm(seen) <= 100 * EXACT * norm(G)


# --- Riemannion --------------------------------------------------------------------------------------------


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_riemannion_stays_in_the_tangent_space(size, seed, s):
    """The momentum of the first step is Π(s G) and the move Π of its sign, of rank 2r or less."""
    pair, G = make_pair(*size, seed=seed)
    method = rlora.riemannion(b1=0.9)
    D, (state,) = method.update(gradients(pair, G, s), method.init(pair, s), pair)
    M = on_tangent_space(pair, s * G)
    assert_close(effect(pair, state.mu), M, rtol=EXACT)
    U, sigma, Vt = np.linalg.svd(M)
    k = min(2 * size[2], *size[:2])
    # A sign turns by the rounding of M over its least singular value.
    rtol = EXACT * max(1.0, sigma[0] / sigma[k - 1])
    sign = U[:, :k] @ Vt[:k]
    assert_close(effect(pair, D), on_tangent_space(pair, sign), rtol=rtol)


def test_riemannion_carries_its_momentum_to_the_new_tangent_space():
    problem = make_problem(scaling=2.0, seed=10)
    method, pair = rlora.riemannion(b1=0.9), problem.params
    state = method.init(pair, 2.0)
    M = on_tangent_space(pair, 2.0 * problem.error(pair))
    moved, (state,) = rlora.step(method, pair, problem.grads(pair), state, 0.1)
    # Conditions of about 5.
    assert_close(effect(moved, state.mu), on_tangent_space(moved, M), rtol=EXACT)
    assert_close(moved.B.T @ moved.B, np.eye(3), atol=1e-14)
    gram = moved.A @ moved.A.T
    assert_close(gram, np.diag(np.diag(gram)), rtol=1e-13)


def test_riemannion_retracts_to_second_order():
    """|X(lr) - (X - lr ξ)| = O(lr²): a quarter for half the step, with a third order of some 10 lr;
    and that is what is beyond rank r of the straight line."""
    pair, G = make_pair(seed=11, condition=1.5)
    method = rlora.riemannion(b1=0.9)
    D = direction(method, pair, G)

    def straight(lr):
        return pair.B @ pair.A - lr * effect(pair, D)

    def error(lr):
        moved = method.apply(pair, D, lr)
        beyond = np.linalg.svd(straight(lr), compute_uv=False)[3:]
        assert norm(moved.B @ moved.A - straight(lr)) == pytest.approx(norm(beyond), rel=1e-6)
        return norm(beyond)

    for lr in (1e-2, 1e-3):
        assert error(lr) / error(lr / 2) == pytest.approx(4.0, rel=10 * lr)


@pytest.mark.parametrize(
    "frozen",
    ALONE,
)
def test_riemannion_with_a_frozen_partner(frozen):
    """Muon on the moves that are left, Z A or B Z, along a straight line: six steps, dense."""
    problem, lr = make_problem(scaling=2.0, seed=3), 0.05
    method = rlora.riemannion(b1=0.9)
    pair, state = problem.params, method.init(problem.params, 2.0)
    M = 0.0
    for _ in range(6):
        M = 0.9 * M + alone(pair, 2.0 * problem.error(pair), frozen)
        U, _, Vt = np.linalg.svd(M)
        sign = U[:, :3] @ Vt[:3]
        grads = problem.grads(pair)._replace(**{frozen: None})
        moved, state = rlora.step(method, pair, grads, state, lr)
        assert_close(moved.B @ moved.A, pair.B @ pair.A - lr * sign, rtol=100 * EXACT)
        pair = moved


# --- LoRA-Muon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("s", [0.5, 2.0])
def test_muon_moves_the_weight_by_half_its_learning_rate_twice(condition, s):
    """In the spectral norm, and by as much in each of r directions. The floor of 10 r eps = 7e-15
    times the condition of a Gram: 7e-9 at 1e3 for a factor, as much for its momentum."""
    pair, G = make_pair(30, 20, 3, condition=condition, seed=12)
    D = direction(rlora.lora_muon(), pair, G, s)
    for half in (s * pair.B @ D.A, s * D.B @ pair.A):
        sigma = np.linalg.svd(half, compute_uv=False)
        assert sigma[:3] == pytest.approx([0.5] * 3, rel=1e-13 * condition**2)
        assert sigma[3] < 1e-12


def test_muon_bounds_the_weights_step_to_first_order():
    """From B = 0 the first step moves B alone; the product of both moves is in the second one."""
    problem = make_problem(20, 16, 3, zero_B=True)
    pair, method, lr = problem.params, rlora.lora_muon(), 1e-3
    state, moves = method.init(pair, problem.scaling), []
    for _ in range(2):
        new, state = rlora.step(method, pair, problem.grads(pair), state, lr)
        moves.append(problem.scaling * np.linalg.norm(new.B @ new.A - pair.B @ pair.A, 2) / lr)
        pair = new
    assert moves[0] <= 1 + EXACT
    assert 1.1 < moves[1] < 1.5


@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize("share, moves", [(0.8, 0.0), (1.3, 1.0)])
def test_muon_leaves_out_directions_by_the_rounding_of_the_factors(share, moves, r):
    """Beside ``(10 r eps)^½`` of the root mean square, whose rounding is a tenth of it squared."""
    rng = np.random.default_rng(14)
    U, V = frame(rng, r, r), frame(rng, 100, r)
    sigma = np.ones(r)
    rms = ((r - 1) / r) ** 0.5  # without what the weak direction adds
    sigma[-1] = share * (10 * r * np.finfo("float32").eps) ** 0.5 * rms
    grads = Factors(((U * sigma) @ V.T).astype("float32"), np.zeros((100, r), "float32"))
    pair = Factors(*(rng.normal(size=x).astype("float32") for x in ((r, 100), (100, r))))
    method = rlora.factor_muon()
    D = method.update(grads, method.init(pair), pair)[0].A
    sizes = np.diag(U.T @ D @ V)
    assert sizes[-1] / sizes[0] == pytest.approx(moves, abs=0.05)


def test_muon_decays_the_product_once():
    """Exactly, with the move in between: ``(1 - lr λ) B A - lr (B D_A + D_B A) + lr² D_B D_A / (1 -
    lr λ)``; and without a gradient there is no move."""
    pair, G = make_pair(seed=13)
    lr, decay = 0.3, 0.5
    keep = 1 - lr * decay
    method = rlora.lora_muon(weight_decay=decay)
    D = direction(method, pair, G)
    moved = method.apply(pair, D, lr)
    expected = keep * pair.B @ pair.A - lr * effect(pair, D) + lr**2 * D.B @ D.A / keep
    assert_close(moved.B @ moved.A, expected, rtol=EXACT)
    rested, _ = rlora.step(method, pair, gradients(pair, 0 * G), method.init(pair), lr)
    assert_close(rested.B @ rested.A, keep * pair.B @ pair.A, rtol=EXACT)


# --- RefLoRA ---------------------------------------------------------------------------------------------------


@a_law
@given(size=sizes, seed=seeds, condition=st.floats(1.0, 10.0))
def test_ref_steps_from_the_balanced_split(size, seed, condition):
    """K out of ``D_A = K G_A`` with G_A = A: K S_B K = S_A, so that K^-½ A and B K^½ have one Gram.
    K has the fourth power of the condition in its making."""
    (A, B), _ = make_pair(*size, condition=condition, seed=seed)
    method = rlora.ref_lora()
    D, _ = method.update(Factors(A, B), method.init(Factors(A, B)), Factors(A, B))
    K, K_inverse = D.A @ np.linalg.pinv(A), np.linalg.pinv(B) @ D.B
    rtol = EXACT * condition**4
    assert_close(K @ K_inverse, np.eye(len(A)), atol=rtol)
    assert_close(K, K.T, rtol=rtol)
    assert_close(K @ B.T @ B @ K, A @ A.T, rtol=rtol)
    w, Q = np.linalg.eigh((K + K.T) / 2)
    assert w[0] > 0
    half = Q * np.sqrt(w) @ Q.T
    balanced = Factors(np.linalg.inv(half) @ A, B @ half)
    assert_close(balanced.A @ balanced.A.T, balanced.B.T @ balanced.B, rtol=rtol)


def test_ref_is_gradient_descent_from_the_balanced_split():
    """And as the path of the product does not depend on the split, plain descent from a balanced
    split does the same as long as it stays balanced: one step."""
    (A, B), G = make_pair(seed=14)
    U, sigma, Vt = np.linalg.svd(B @ A)
    root = np.sqrt(sigma[:3])
    start = Factors(root[:, None] * Vt[:3], U[:, :3] * root)
    ends = []
    for method, pair in ((rlora.ref_lora(), Factors(A, B)), (PLAIN, start)):
        end = rlora.apply_updates(pair, direction(method, pair, G), 0.1)
        ends.append(end.B @ end.A)
    assert_close(*ends, rtol=1e-11)  # the condition of 9 to the second power


# --- LoRA-FA, RAC-LoRA -------------------------------------------------------------------------------------------


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_fa_is_the_best_step_in_the_row_space(size, seed, s):
    """Without Adam: G P_A, which leaves a residual orthogonal to the rows of A."""
    pair, G = make_pair(*size, seed=seed)
    D = direction(chain(scale_by_frozen_gram(damping=0.0)), pair, G, s)
    assert D.A is None
    move = effect(pair, D, s)
    assert_close(move, alone(pair, G, "A"), rtol=EXACT)
    assert norm((G - move) @ pair.A.T) <= EXACT * norm(G)
    Z = np.random.default_rng(seed).normal(size=pair.B.shape)
    assert norm(G - move) <= norm(G - Z @ pair.A) * (1 + EXACT)


def test_fa_keeps_an_inverse_that_stays_right():
    """Bit for bit what a fresh one would be after 20 steps, as A has not moved a bit; and the loss
    falls at every step of gradient descent up to lr = 1."""
    problem = make_problem(scaling=2.0, seed=15)
    method, pair = chain(scale_by_frozen_gram()), problem.params
    state = method.init(pair, 2.0)
    for _ in range(20):
        before = float(problem.loss(pair))
        pair, state = rlora.step(method, pair, problem.grads(pair), state, 0.1)
        assert float(problem.loss(pair)) < before
    assert (pair.A == problem.params.A).all()
    fresh = method.init(pair, 2.0)
    for x, y in zip(*(rlora.flatten_state(z).values() for z in (state, fresh)), strict=True):
        assert (x == y).all()


def chain_of_blocks(r, *, frozen, steps, redraw):
    """|W - D|² after every block of one step with lr 1, G9's problem; the loss is half of it."""
    rng = np.random.default_rng(16)
    D, W = rng.normal(size=(100, 100)), np.zeros((100, 100))
    pair = Factors(np.zeros((r, 100)), np.zeros((100, r)))
    method = rlora.rac_lora(frozen=frozen)
    losses = [norm(W - D) ** 2]
    for seed in range(steps):
        W, pair = restart(W, pair, frozen=frozen, scaling=2.0, seed=seed if redraw else 0)
        grads = gradients(pair, W - D, 2.0)
        pair, _ = rlora.step(method, pair, grads, method.init(pair, 2.0), 1.0)
        losses.append(norm(W + 2.0 * pair.B @ pair.A - D) ** 2)
    return np.array(losses)


@pytest.mark.parametrize("frozen", ["A", "B"])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_rac_contracts_by_its_rate(r, frozen):
    """G9: 1 - r/m a step on average. The standard error over 40 draws is 0.002 at most."""
    losses = chain_of_blocks(r, frozen=frozen, steps=40, redraw=True)
    ratio = float(np.mean(losses[1:] / losses[:-1]))
    assert ratio == pytest.approx(1 - r / 100, rel=0.02)


def test_one_sketch_for_ever_stops():
    """At what lies outside of its space, |(I - H) D|² = (1 - r/m) |D|², from the first step on; up
    to the damping of 1e-6 and the 2 % of a draw."""
    losses = chain_of_blocks(16, frozen="A", steps=40, redraw=False)
    assert losses[-1] == pytest.approx(losses[1], rel=1e-4)
    assert losses[-1] / losses[0] == pytest.approx(1 - 0.16, rel=0.02)


# --- LoRA-SB -------------------------------------------------------------------------------------------------------


def core_losses(method, *, lr, steps, condition=1e3, s=2.0):
    """|s B A - T|² of a target that a core can reach, between factors of this condition."""
    rng = np.random.default_rng(17)
    pair, _ = make_pair(40, 30, 4, condition=condition, seed=17)
    T = s * pair.B @ rng.normal(size=(4, 4)) @ pair.A
    start = pair
    state = method.init(pair, s)
    losses = []
    for _ in range(steps):
        E = s * pair.B @ pair.A - T
        losses.append(norm(E) ** 2)
        pair, state = rlora.step(method, pair, gradients(pair, E, s), state, lr)
    assert (pair.B == start.B).all()
    return np.array(losses) / losses[0]


def test_core_converges_whatever_the_condition():
    """The optimal gradient of the core solves the problem in its first step with lr 1, up to the
    floor of 10 r eps times the Gram's condition of 1e6: 1e-8, squared. The default damping of 1e-6
    leaves a fifth of the weakest direction each time."""
    assert core_losses(chain(scale_by_core(damping=0.0)), lr=1.0, steps=2)[1] < 1e-14
    assert core_losses(chain(scale_by_core()), lr=1.0, steps=20)[-1] < 1e-12
    assert core_losses(chain(scale_by_core()), lr=1.0, steps=20, condition=1.0)[-1] < 1e-12


def test_plain_descent_on_the_core_does_not():
    """G_R itself: A of rows A₀ moves by s Bᵀ G A₀ᵀ A₀, with lr up to 1/L = 1/s² from |B|₂ = 1."""

    def update(grads, state, params):
        V = np.linalg.svd(params.A, full_matrices=False)[2]
        return Factors(grads.A @ V.T @ V, None), state

    descent = chain(PLAIN._replace(update=update))
    assert core_losses(descent, lr=0.25, steps=500)[-1] > 1e-4
    assert core_losses(descent, lr=0.25, steps=500, condition=1.0)[-1] < 1e-12


@a_law
@given(size=sizes, seed=seeds, s=scalings)
def test_core_gradient_solves_least_squares(size, seed, s):
    """The effect is P_B G P_A, the nearest to G of all B X A₀."""
    pair, G = make_pair(*size, seed=seed)
    D = direction(chain(scale_by_core(damping=0.0)), pair, G, s)
    P_A, P_B = projectors(pair)
    assert_close(effect(pair, D, s), P_B @ G @ P_A, rtol=EXACT, atol=EXACT)


# --- what s does -----------------------------------------------------------------------------------------------------

FREE_OF_S = {
    **{f"pro {gauge}": lambda gauge=gauge: rlora.lora_pro_sgd(gauge=gauge) for gauge in GAUGES},
    "pro full": lambda: rlora.lora_pro_adamw(mode="full", eps=1e-30),
    "alt": rlora.alt_lora,
    "fa": lambda: chain(scale_by_frozen_gram()),
    "sb": lambda: chain(scale_by_core()),
    "rac": rlora.rac_lora,
    "rac frozen B": lambda: rlora.rac_lora(frozen="B"),
    "adapre": rlora.adapre_lora,
    "muon": rlora.lora_muon,
}


@settings(max_examples=20, deadline=None)
@given(seed=seeds, s=scalings)
@pytest.mark.parametrize("name", FREE_OF_S)
def test_the_effect_on_the_weight_is_free_of_s(name, seed, s):
    """The same dense gradient moves W as far to first order, whatever part of it is s. Only
    roundings differ."""
    pair, G = make_pair(seed=seed)
    one, other = (effect(pair, direction(FREE_OF_S[name](), pair, G, x), x) for x in (1.0, s))
    assert_close(other, one, rtol=EXACT)


def test_scaled_gradient_descent_is_not():
    """As its paper has it: by s²."""
    pair, G = make_pair(seed=18)
    one, other = (effect(pair, direction(rlora.scaled_sgd(), pair, G, s), s) for s in (1.0, 3.0))
    assert_close(other, 9 * one, rtol=EXACT)


# --- LoRA+ -------------------------------------------------------------------------------------------------------------


@a_law
@given(seed=seeds, c=st.floats(0.2, 5.0))
def test_a_ratio_is_a_rescaled_start(seed, c):
    """c² for Adam without eps, c⁴ for gradient descent: (A, B) with lr / c (or / c²) moves as (c A,
    B / c) with lr and ratio 1. Ten steps; 1e-9 as Adam's sign amplifies the rounding of a gradient
    that is nearly zero."""
    adam = {"b1": 0.5, "b2": 0.5, "eps": 0.0}
    problem = make_problem(scaling=2.0, seed=seed)
    A, B = problem.params
    for plain, method, lr, power in (
        (chain(scale_by_adam(**adam)), rlora.lora_plus(ratio=c**2, **adam), 0.01, 1),
        (PLAIN, rlora.lora_plus(PLAIN, ratio=c**4), 0.005 * min(c, 1 / c) ** 2, 2),
    ):
        ends = []
        for how, pair, rate in (
            (plain, Factors(c * A, B / c), lr),
            (method, Factors(A, B), lr / c**power),
        ):
            state = how.init(pair, 2.0)
            for _ in range(10):
                pair, state = rlora.step(how, pair, problem.grads(pair), state, rate)
            ends.append(pair.B @ pair.A)
        assert_close(*ends, rtol=1e-9)


def test_plus_decays_each_factor_at_its_own_rate():
    """Unlike PEFT's ``weight_decay=``, which does nothing: 1 - lr λ for A, 1 - ratio lr λ for B."""
    pair, G = make_pair(seed=19)
    method = rlora.lora_plus(ratio=16.0, weight_decay=0.5)
    moved, _ = rlora.step(method, pair, gradients(pair, 0 * G), method.init(pair), 0.01)
    assert_close(moved.A, (1 - 0.01 * 0.5) * pair.A, rtol=1e-15)
    assert_close(moved.B, (1 - 0.16 * 0.5) * pair.B, rtol=1e-15)


@pytest.mark.parametrize(
    "inner",
    [rlora.scaled_adamw(decay="after", weight_decay=0.5), rlora.lora_muon(weight_decay=0.5),
     rlora.lora_pro_adamw(mode="full", weight_decay=0.5)],
)  # fmt: skip
def test_plus_around_a_method_that_bends_its_step(inner):
    """B's direction is longer, and the step is the inner method's own, its decay at lr included."""
    pair, G = make_pair(seed=20)
    D = direction(inner, pair, G)
    method = rlora.lora_plus(inner, ratio=4.0)
    moved, _ = rlora.step(method, pair, gradients(pair, G), method.init(pair), 0.01)
    expected = inner.apply(pair, Factors(D.A, 4 * D.B), 0.01)
    assert_close(moved.A, expected.A, rtol=1e-15)
    assert_close(moved.B, expected.B, rtol=1e-15)


INNER = [name for name in rlora.methods.__all__ if name != "lora_plus"]


@pytest.mark.parametrize(
    "name, options",
    [*((name, {}) for name in INNER), ("lora_rite", {"balance": True})],
)
def test_a_ratio_of_one_changes_nothing(name, options):
    problem = make_problem(seed=23)
    inner = getattr(rlora, name)(**options)
    ends = []
    for method in (inner, rlora.lora_plus(inner, ratio=1.0)):
        pair, state = problem.params, method.init(problem.params)
        for _ in range(3):
            pair, state = rlora.step(method, pair, problem.grads(pair), state, 0.05)
        ends.append(pair)
    for x, y in zip(*ends, strict=True):
        assert (x == y).all()


# --- LoRA-RITE -----------------------------------------------------------------------------------------------------------


def curve(method, c, *, steps=100, lr=0.02):
    """The loss of every step from (c A, B / c)."""
    problem = make_problem(20, 16, 3, seed=21)
    pair = Factors(c * problem.params.A, problem.params.B / c)
    state, losses = method.init(pair), []
    for _ in range(steps):
        pair, state = rlora.step(method, pair, problem.grads(pair), state, lr)
        losses.append(float(problem.loss(pair)))
    return np.array(losses)


@pytest.mark.parametrize("options", [{}, {"escape": True}], ids=str)
def test_imbalance_costs_rite_nothing(options):
    """Curves from splits of c² up to 1e6 coincide; Adam's are worse the further it is off."""
    balanced = curve(rlora.lora_rite(**options), 1.0)
    assert balanced[-1] < 0.1 * balanced[0]
    for c in (10.0, 100.0, 1000.0):
        assert_close(curve(rlora.lora_rite(**options), c), balanced, rtol=EXACT)


def test_imbalance_costs_adam():
    ends = [curve(chain(scale_by_adam()), c)[-1] for c in (1.0, 10.0, 100.0, 1000.0)]
    assert ends == sorted(ends)
    assert ends[-1] > 10 * ends[0]


def test_escape_never_makes_a_larger_step():
    """From one state: (V + ρ I)^½ grows with ρ. Without momentum, so that it is this step's."""
    problem = make_problem(20, 16, 3, seed=22)
    on, off = (rlora.lora_rite(b1=0.0, escape=escape) for escape in (True, False))
    pair, state = problem.params, on.init(problem.params)
    shrunk = []
    for _ in range(50):
        grads = problem.grads(pair)
        rite = state[0]
        no_mass = rite._replace(escaped=Factors(*(0 * x for x in rite.escaped)))
        D, free = (
            method.update(grads, (first, *state[1:]), pair)[0]
            for method, first in ((on, rite), (off, no_mass))
        )
        halves = [(pair.B @ d.A, d.B @ pair.A) for d in (D, free)]
        for x, y in zip(*halves, strict=True):
            assert norm(x) <= norm(y) * (1 + EXACT)
            shrunk.append(norm(x) / norm(y))
        pair, state = rlora.step(on, pair, grads, state, 0.05)
    assert min(shrunk) < 0.95


# --- width: T1.4, gate G7 --------------------------------------------------------------------------------------------------

WIDTHS = [2**k for k in range(6, 12)]
NO_MEMORY = {"b1": 0.0, "b2": 0.0, "eps": 1e-30}


def learned(method, n, *, lr, seed):
    """RMS of what the fourth step's move of A, and of B, does to the output of an (n, n) layer."""
    rng = np.random.default_rng(seed)
    pair = Factors(rng.normal(size=(4, n)) / n**0.5, np.zeros((n, 4)))
    X, Y = rng.normal(size=(n, 8)), rng.normal(size=(n, 8))
    state = method.init(pair)
    for _ in range(4):
        old, E = pair, (pair.B @ (pair.A @ X) - Y) / 8
        grads = Factors((pair.B.T @ E) @ X.T, E @ (pair.A @ X).T)
        pair, state = rlora.step(method, pair, grads, state, lr)
    parts = old.B @ ((pair.A - old.A) @ X), (pair.B - old.B) @ (old.A @ X)
    return [norm(part) / part.size**0.5 for part in parts]


def slopes(method, rate=lambda n: 0.3):
    """d log(part) / d log(n), over widths from 64 to 2048 and three draws."""
    logs = [
        np.mean([np.log(learned(method, n, lr=rate(n), seed=seed)) for seed in range(3)], axis=0)
        for n in WIDTHS
    ]
    return np.polyfit(np.log(WIDTHS), logs, 1)[0]


def test_feature_learning_over_widths():
    """With one learning rate: the theorem's form, Adam first, keeps both parts as they are; Adam
    and the published form let them grow. 0.15 for three draws of four chaotic steps."""
    options = {**NO_MEMORY, "damping": 0.0, "weight_decay": 0.0}
    assert np.abs(slopes(rlora.scaled_adamw(**options, placement="after"))).max() < 0.15
    assert slopes(rlora.scaled_adamw(**options, placement="before")).min() > 0.4
    assert slopes(chain(scale_by_adam(**NO_MEMORY))).min() > 0.5
    # Half of it on each side: half of it is left.
    halves = slopes(rlora.scaled_adamw(**options, placement="both"))
    assert halves.min() > 0.15
    assert halves.max() < 0.6


def test_feature_learning_of_rite_over_widths():
    """LoRA-RITE moves both factors alike: both parts grow as n^½ with one learning rate, as its
    second moment is the authors' mean over rows and not the paper's sum. With ``lr / n^½``, which
    is the paper's form, neither does; no learning rate does that for Adam."""
    assert slopes(rlora.lora_rite()) == pytest.approx([0.5, 0.5], abs=0.15)
    assert np.abs(slopes(rlora.lora_rite(), lambda n: 2.4 / n**0.5)).max() < 0.15
    both = slopes(chain(scale_by_adam(**NO_MEMORY)))
    assert both[0] - both[1] > 0.15


def test_riemannion_leaves_a_zero_A():
    """As some embeddings begin: which directions of rank are in use B alone says."""
    rng = np.random.default_rng(0)
    pair = Factors(np.zeros((3, 7)), rng.standard_normal((9, 3)))
    method = rlora.riemannion()
    grads = Factors(pair.B.T @ rng.standard_normal((9, 7)), np.zeros((9, 3)))
    (A, B), _ = rlora.step(method, pair, grads, method.init(pair), 0.1)
    assert np.linalg.norm(B @ A) > 0.01


def test_a_merge_has_the_digits_of_the_weight():
    """The product of float32 factors is formed in float64 where the weight has that."""
    rng = np.random.default_rng(0)
    W, A, B = (rng.standard_normal(shape) for shape in ((9, 7), (3, 7), (9, 3)))
    pair = Factors(A.astype("float32"), B.astype("float32"))
    merged, _ = restart(W, pair, scaling=2.0)
    exact = W + 2.0 * (pair.B.astype("float64") @ pair.A.astype("float64"))
    np.testing.assert_allclose(merged, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("r", [3, 7, 12])
def test_entries_of_a_factor_muon_step_have_one_size_at_any_rank(r):
    rng = np.random.default_rng(0)
    pair, grads = (
        Factors(rng.standard_normal((r, 7)), rng.standard_normal((9, r))) for _ in range(2)
    )
    method = rlora.factor_muon()
    directions, _ = method.update(grads, method.init(pair), pair)
    for d in directions:
        assert np.sqrt(np.mean(d**2)) == pytest.approx(0.2)
