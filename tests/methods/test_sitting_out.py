"""Steps without a gradient: of a pair, and of one factor whose partner moves on."""

import numpy as np
import pytest

import rlora
from rlora import Factors, methods
from rlora.testing import assert_close

MOVES_B = [name for name in methods.__all__ if name != "lora_sb"]  # which is not for B = 0


def drawn(rng):
    return Factors(rng.normal(size=(2, 6)), rng.normal(size=(5, 2)))


def gradients(pair, G):
    return Factors(pair.B.T @ G, G @ pair.A.T)


@pytest.mark.parametrize("name", [*MOVES_B, "graft_adamw:lora_rite"])
def test_a_pair_that_sits_out_is_as_it_would_be_alone(name):
    """To the last bit but for stacks of another size: six steps, without the fourth."""
    outer, _, inner = name.partition(":")
    given = [getattr(methods, inner)()] if inner else []
    method = getattr(methods, outer)(*given, weight_decay=0.0)

    def last(neighbours):
        rng = np.random.default_rng(0)
        pairs = [drawn(rng) for _ in range(1 + neighbours)]
        state = method.init(pairs)
        for t in range(6):
            G = np.random.default_rng(t + 1).normal(size=(5, 6))
            grads = [gradients(pair, G) for pair in pairs]
            if t == 3:
                if not neighbours:
                    continue
                grads[0] = Factors(None, None)
            pairs, state = rlora.step(method, pairs, grads, state, 0.1)
        return pairs[0]

    for alone, found in zip(last(0), last(1), strict=True):
        assert_close(found, alone, rtol=1e-12)


class RiteOracle:
    """LoRA-RITE of one factor (N, r) in QR bases; moments turn with the partner at every step."""

    def __init__(self, shape, partner, b1=0.9, b2=0.999, eps=1e-6):
        self.M, self.V = np.zeros(shape), np.zeros((2, 2))
        self.basis, self.t, self.numbers = np.linalg.qr(partner)[0], 0, (b1, b2, eps)

    def turn(self, partner):
        U, R = np.linalg.qr(partner)
        P = U.T @ self.basis
        self.M, self.V, self.basis = self.M @ P.T, P @ self.V @ P.T, U
        return np.linalg.inv(R)

    def direction(self, G, partner):
        back = self.turn(partner)
        G = G @ back
        b1, b2, eps = self.numbers
        c1, c2 = (b * (1 - b**self.t) / (1 - b ** (self.t + 1)) for b in (b1, b2))
        self.t += 1
        self.V = c2 * self.V + (1 - c2) * G.T @ G / len(G)
        w, Q = np.linalg.eigh(self.V)
        self.M = c1 * self.M + (1 - c1) * G @ (Q / (np.sqrt(w) + eps)) @ Q.T
        return self.M @ back.T


@pytest.mark.parametrize("idle", [(), (3,), (3, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("side", ["A", "B"])
def test_moments_of_a_factor_that_sits_out_turn_with_its_partner(side, idle):
    """Eight steps in float64, of which one factor has no gradient in some."""
    rng = np.random.default_rng(0)
    pair, method, lr = drawn(rng), rlora.lora_rite(), 0.1
    state = method.init(pair)
    of_A, of_B = RiteOracle((6, 2), pair.B), RiteOracle((5, 2), pair.A.T)
    A, B = pair
    for t in range(8):
        G = rng.normal(size=(5, 6))
        sits = side if t in idle else ""
        grads = gradients(pair, G)
        pair, state = rlora.step(method, pair, grads._replace(**dict.fromkeys(sits)), state, lr)
        if sits == "A":
            of_A.turn(B)
        if sits == "B":
            of_B.turn(A.T)
        D_A = 0 if sits == "A" else of_A.direction((B.T @ G).T, B).T
        D_B = 0 if sits == "B" else of_B.direction(G @ A.T, A.T)
        A, B = A - lr * D_A, B - lr * D_B
    assert_close(pair.A, A, rtol=1e-11)
    assert_close(pair.B, B, rtol=1e-11)
