"""The experiments' own pieces, against something that is not them."""

import importlib

import numpy as np
import pytest
import torch

import rlora
from rlora import Factors
from rlora.backends import get
from rlora.cli.claims import (
    digits,
    gradient_rank,
    learning_rates,
    lora_ga_first_step,
    lora_one,
    lora_pro_optimality,
    problems,
    rac_lora_rate,
    splits,
)
from rlora.cli.claims.claim import Setting

QUICK = Setting(get("numpy"), quick=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def small_network(rng, seeds=2):
    network = Factors(rng.normal(size=(seeds, 7, 5)), rng.normal(size=(seeds, 10, 7)))
    x = rng.random((seeds, 5, 9))
    y = np.eye(10)[:, rng.integers(10, size=9)]  # (10, 9), the same for all seeds
    return network, x, np.stack([y] * seeds)


# --- the network ------------------------------------------------------------------------------------


def torch_loss(W1, W2, x, y):
    """By torch's own layers, one seed at a time, summed."""
    logits = [(w2 @ torch.relu(w1 @ a)).T for w1, w2, a in zip(W1, W2, x, strict=True)]
    wanted = [b.argmax(0) for b in y]
    losses = map(torch.nn.functional.cross_entropy, logits, wanted)
    return torch.stack(list(losses))


def test_loss_and_gradient_of_the_network_are_autograds(rng):
    network, x, y = small_network(rng)
    W1, W2 = (torch.tensor(W, requires_grad=True) for W in network)
    expected = torch_loss(W1, W2, torch.tensor(x), torch.tensor(y))
    expected.sum().backward()
    # Rounding of sums over a few tens of float64 numbers.
    np.testing.assert_allclose(digits.loss(network, x, y), expected.detach(), rtol=1e-12)
    for mine, theirs in zip(digits.gradient(network, x, y), (W1.grad, W2.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-13)


def test_gradients_of_the_adapters_are_autograds(rng):
    network, x, y = small_network(rng)
    pairs = [
        Factors(rng.normal(size=(2, 3, W.shape[-1])), rng.normal(size=(2, W.shape[-2], 3)))
        for W in network
    ]
    leaves = [torch.tensor(F, requires_grad=True) for pair in pairs for F in pair]
    A1, B1, A2, B2 = leaves
    W1, W2 = (torch.tensor(W) for W in network)
    loss = torch_loss(W1 + B1 @ A1, W2 + B2 @ A2, torch.tensor(x), torch.tensor(y))
    loss.sum().backward()
    mine = [F for pair in digits.adapter_gradients(network, pairs, x, y) for F in pair]
    for one, leaf in zip(mine, leaves, strict=True):
        np.testing.assert_allclose(one, leaf.grad, rtol=1e-10, atol=1e-13)


def test_a_network_that_is_sure_and_wrong_has_a_finite_loss(rng):
    network, x, y = small_network(rng)
    far = Factors(1e3 * network.A, 1e3 * network.B)
    assert np.isfinite(digits.loss(far, x, y)).all()


# --- the digits -------------------------------------------------------------------------------------


def test_a_split_keeps_parity_and_shares_no_digit(rng):
    found = digits.read_digits(0, 3, rng)
    for training, validation in zip(found.training, found.validation, strict=True):
        assert not set(training) & set(validation)
        both = np.concatenate([training, validation])
        assert (found.labels[both].argmax(axis=1) % 2 == 0).all()
        assert len(both) == (found.labels.argmax(axis=1) % 2 == 0).sum()
    assert (found.training[0] != found.training[1]).any()


def test_batches_are_of_each_seeds_own_training_digits(rng):
    found = digits.read_digits(1, 2, rng)
    x, y = found.batch(QUICK, rng)
    assert x.shape == (2, 64, digits.BATCH)
    assert y.shape == (2, 10, digits.BATCH)
    for images, labels, training in zip(x, y, found.training, strict=True):
        known = {(found.images[i].tobytes(), found.labels[i].argmax()) for i in training}
        for image, label in zip(images.T, labels.T, strict=True):
            assert (np.ascontiguousarray(image).tobytes(), label.argmax()) in known


@pytest.fixture(scope="module")
def task():
    return digits.make_task(QUICK, seeds=2)


def test_the_network_knows_odd_digits_and_not_even_ones(task):
    odd = digits.read_digits(1, 2, np.random.default_rng(0))  # the task's own split
    x, y = odd.pick(QUICK, odd.validation)
    right = digits.probabilities(task.network, x)[1].argmax(axis=1) == y.argmax(axis=1)
    assert (right.mean(axis=1) > 0.9).all()  # nearest neighbours reach 0.98
    x, y = task.digits.pick(QUICK, task.digits.validation)
    assert (digits.loss(task.network, x, y) > np.log(10)).all()  # worse than chance


def test_a_run_in_a_sweep_is_the_run_alone(task):
    """Other runs beside it have no effect on it, even where they diverge."""
    rates = np.array([0.1, 1e3])
    both = task.final_losses(rlora.chain(), rates, "both")
    alone = task.final_losses(rlora.chain(), rates[:1], "alone")
    # One matrix at a time is multiplied either way; batching may order a sum otherwise.
    np.testing.assert_allclose(both[:1], alone, rtol=1e-6)
    assert alone.max() < 1.0 < both[1].min()  # chance is log 10


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch, rng):
    def missing(name, package=None):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits.read_digits(0, 1, rng)


def test_a_learning_rate_is_good_by_the_best_of_both_methods():
    plain = np.array([[1.0, 9.0], [2.0, 0.4], [np.inf, 9.0]])  # (learning rates, seeds)
    scaled = np.array([[1.2, 0.1], [1.1, 0.2], [1.0, 0.3]])
    counts = learning_rates.good({"plain": plain, "scaled": scaled})
    assert [x.tolist() for x in counts] == [[2, 0], [3, 2]]


def test_curves_leave_out_what_diverged():
    losses = {"GD": np.array([[1.0, 2.0, 3.0], [np.inf, 1.0, np.inf]])}
    (curve,) = learning_rates.panel("", np.array([0.1, 1.0]), losses).curves
    assert (curve.x, curve.y) == ([0.1], [2.0])


# --- linear teachers --------------------------------------------------------------------------------


def test_a_teacher_has_its_rank_and_condition(rng):
    target, covariance = problems.draw_teacher(rng, 12, 10, 3, 7.0, 50)
    sigma = np.linalg.svd(target, compute_uv=False)
    # A product of two orthonormal bases: rounding.
    np.testing.assert_allclose(sigma[:3], [1.0, 7**-0.5, 1 / 7], rtol=1e-12)
    assert sigma[3] < 1e-14
    assert (np.linalg.eigvalsh(covariance) > 0).all()


def test_the_sine_is_that_of_the_largest_principal_angle(rng):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    factor, space = rng.normal(size=(9, 2)), np.linalg.qr(rng.normal(size=(9, 2)))[0]
    expected = np.sin(scipy_linalg.subspace_angles(factor, space)[0])
    # Two roads to an angle of about 1 radian.
    assert lora_one.sine(get("numpy"), factor, space) == pytest.approx(expected, 1e-10)


# --- LoRA-Pro, LoRA-GA, LoRA+, RAC-LoRA -------------------------------------------------------------


def test_the_projection_is_dense_least_squares():
    """``min |B X + Z A - G|`` over all X and Z, with the Kronecker matrix of the map written out."""
    problem = lora_pro_optimality.RandomPair(get("numpy"), 4)
    (A, B), G = problem.pair, problem.G
    m, n = G.shape
    # Row-major: vec(B X) = (B kron I) vec(X), vec(Z A) = (I kron Aᵀ) vec(Z).
    M = np.hstack([np.kron(B, np.eye(n)), np.kron(np.eye(m), A.T)])
    solution, *_ = np.linalg.lstsq(M, G.ravel(), rcond=1e-12)
    # The condition of M is that of the factors, about 10.
    np.testing.assert_allclose(problem.projection().ravel(), M @ solution, atol=1e-11)


def test_the_residual_of_sylvester_sees_another_gauge():
    problem = lora_pro_optimality.RandomPair(get("numpy"), 4)
    for gauge, low, high in (("sylvester", 0.0, 1e-10), ("zero", 0.1, 10.0)):
        move = problem.direction(rlora.lora_pro_sgd(gauge=gauge, damping=0.0))
        assert low <= problem.sylvester(move) <= high


def test_a_move_that_is_not_the_nearest_has_a_negative_excess():
    """The check of the claim can fail: from half the move, some perturbation comes nearer."""
    problem = lora_pro_optimality.RandomPair(get("numpy"), 4)
    move = problem.direction(rlora.lora_pro_sgd(damping=0.0))
    half = Factors(0.5 * move.A, 0.5 * move.B)
    assert problem.excess(half, 1e-3, 100) < 0 < problem.excess(move, 1e-3, 100)


def test_the_first_step_of_lora_ga_is_seen_to_be_off(rng):
    G = rng.normal(size=(8, 6))
    assert lora_ga_first_step.sine(-3 * G, G) < 1e-12  # rounding
    other = rng.normal(size=G.shape)
    cosine = (G * other).sum() / np.linalg.norm(G) / np.linalg.norm(other)
    assert lora_ga_first_step.sine(other, G) == pytest.approx((1 - cosine**2) ** 0.5)


def test_another_ratio_than_the_splits_gives_another_path():
    adam, c = splits.ADAM, 2.0
    rescaled = splits.moves(QUICK, adam, 0.02, c)
    wrong = splits.moves(QUICK, rlora.lora_plus(adam, ratio=3.0), 0.02 / c)
    assert splits.distance(rescaled, wrong) > 0.01


def test_one_sketch_leaves_what_lies_outside_of_it():
    """The plateau is that of the projector of the first sketch, formed densely."""
    found = rac_lora_rate.losses(QUICK, 16, 2, 1, fresh=False)
    size = rac_lora_rate.SIZE
    target = np.random.default_rng(0).standard_normal((1, size, size))
    weight = np.zeros_like(target)
    pair = Factors(weight[:, :16, :], weight[:, :, :16])
    _, (A, _) = rlora.methods.rac.restart(weight, pair, seed=0)
    outside = np.eye(size) - np.linalg.pinv(A[0]) @ A[0]
    expected = np.linalg.norm(target[0] @ outside) ** 2 / np.linalg.norm(target) ** 2
    assert found[-1, 0] == pytest.approx(expected, rel=1e-10)


# --- the head of attention --------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_the_gradients_are_computed_with_the_arrays_of_the_setting(library):
    pytest.importorskip(library)
    found = []
    for setting in (QUICK, Setting(get(library), quick=True)):
        head = gradient_rank.attention(setting, 40, 2.0)
        pairs = gradient_rank.exact_gradients(head), gradient_rank.chained_gradients(head, 3)
        assert {type(x) for pair in pairs for x in pair} == {type(setting.array(np.ones(1)))}
        found.append([setting.backend.to_numpy(x) for pair in pairs for x in pair])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_gradients_of_the_adapter_are_autograds():
    head = gradient_rank.attention(QUICK, 40, 2.0)
    A, B = (torch.tensor(F, requires_grad=True) for F in head.adapter)
    X, W_Q, W_K, W_V, target = map(torch.tensor, head[:5])
    scores = X @ (W_Q + B @ A).mT @ (X @ W_K.mT).mT
    out = torch.softmax(scores, dim=1) @ (X @ W_V.mT)
    (0.5 * (out - target).square().sum() / 40).backward()
    for mine, leaf in zip(gradient_rank.exact_gradients(head), (A, B), strict=True):
        np.testing.assert_allclose(mine, leaf.grad, rtol=1e-10, atol=1e-14)


def test_chained_gradients_become_exact_with_the_degree():
    """Scores of 1.3: 1.3^21 / 21! of exp is left behind degree 20, below rounding."""
    head = gradient_rank.attention(QUICK, 40, 1.0)
    for mine, exact in zip(
        gradient_rank.chained_gradients(head, 20), gradient_rank.exact_gradients(head), strict=True
    ):
        np.testing.assert_allclose(mine, exact, rtol=1e-9, atol=1e-14)
