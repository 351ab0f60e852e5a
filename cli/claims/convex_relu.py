"""A two-layer ReLU network in its convex form, each gate with a weight W_i + B_i A_i to tune."""

import math
from typing import Final, NamedTuple

import numpy as np

import rlora
from rlora import Factors
from rlora.core.factors import Array

from .claim import Check, Claim, Outcome, Setting, lines
from .papers import PRECONDITIONED
from .problems import errors, factor_gradients, iterations, low_rank, truncated

LR: Final = 0.3
GATES, INPUTS, OUTPUTS, RANK = 3, 20, 10, 2
SAMPLES: Final = 3_000
"""Many for each input: the theorem wants gated data that keep lengths on matrices of low rank."""
DATA: Final = math.sqrt(2 / SAMPLES)
"""Scale of X's entries: a gate lets half of the samples through, and their Gram is then near I."""

BOUND: Final = 250
"""Iterations to 1e-8. Without crosstalk of the gates the theorem's rate at this step gives 114;
their inputs overlap, which costs about twice that here."""
NARROW: Final = 1.5
"""Longest run over that at condition number 1, over three decades."""
PLAIN: Final = 5.0
"""GD at condition number 10 over scaled GD there: theory says ten."""

GD: Final = rlora.chain()
SCALED: Final = rlora.scaled_sgd(damping=1e-6, damping_mode="relative")


class Network(NamedTuple):
    """``½ |Σ D_i X (W_i + B_i A_i) - Y|²``, where the gates are ``D_i = diag(X u_i >= 0)``.

    With Y made by a network of the same gates the W_i drop out, and all that is left of the data
    is the Gram of ``[D_1 X, D_2 X, ...]``.
    """

    gram: Array
    target: Array
    """Target of the products B_i A_i, (gates, inputs, outputs)."""
    start: Factors

    def grads(self, pair: Factors) -> Factors:
        """``B_iᵀ G_i`` and ``G_i A_iᵀ`` with ``G_i = (D_i X)ᵀ residual``."""
        missing = pair.B @ pair.A - self.target
        G = (self.gram @ missing.reshape((-1, OUTPUTS))).reshape(missing.shape)
        return factor_gradients(pair, G)


def network(setting: Setting, condition: float, data_condition: float | None = None) -> Network:
    """A network whose missing weights have this condition number; also X, if it is given one."""
    rng = np.random.default_rng(0)
    X = DATA * rng.normal(size=(SAMPLES, INPUTS))
    if data_condition is not None:
        U, _, Vt = np.linalg.svd(X, full_matrices=False)
        X = math.sqrt(2) * U * np.geomspace(1.0, 1.0 / data_condition, INPUTS) @ Vt
    gated = [X * (X @ rng.normal(size=(INPUTS, 1)) >= 0) for _ in range(GATES)]
    gram = np.hstack(gated).T @ np.hstack(gated)
    target = np.stack([low_rank(rng, INPUTS, OUTPUTS, RANK, condition) for _ in range(GATES)])
    correlation = (gram @ target.reshape(-1, OUTPUTS)).reshape(target.shape)
    start = truncated(correlation, RANK)
    return Network(setting.array(gram), setting.array(target), setting.arrays(start))


def run(setting: Setting) -> Outcome:
    """Iterations to a relative error of 1e-8 in the weights, by the condition of these and of X."""
    conditions = (1, 10, 1000) if setting.quick else (1, 10, 100, 1000)
    of_data = (1, 3) if setting.quick else (1, 3, 10)
    most = 2_000 if setting.quick else 4_000

    def path(network: Network, method: rlora.Transform, most: int) -> list[float]:
        pairs = setting.path(method, network.start, network.grads, LR)
        return errors(setting.backend, pairs, network.target, most)

    networks = {c: network(setting, c) for c in conditions}
    scaled = {c: path(networks[c], SCALED, most) for c in setting.track(conditions, "scaled GD")}
    plain = {c: path(networks[c], GD, most) for c in setting.track(conditions, "GD")}
    data = {
        c: path(network(setting, 1, c), SCALED, 20_000)
        for c in setting.track(of_data, "condition of X")
    }
    drawn = {
        "Scaled GD": {f"condition number {c}": scaled[c] for c in conditions},
        "GD": {f"condition number {c}": plain[c] for c in conditions},
        "Scaled GD, ill-conditioned data": {f"X: condition number {c}": data[c] for c in of_data},
    }
    iterate = "iterate, from the start at 1", range(1, 20_002)
    panels = [lines(title, iterate, "relative error", paths) for title, paths in drawn.items()]
    return Outcome(checks(scaled, plain, data), tuple(panels))


Paths = dict[int, list[float]]


def checks(scaled: Paths, plain: Paths, data: Paths) -> tuple[Check, ...]:
    """The claim, and its limit: the condition number of X is not the one that drops out."""
    counts = [iterations(path) for path in scaled.values()]
    limit = max(data)
    return (
        Check("iterations of scaled GD, the most", max(counts), "<=", BOUND),
        Check("the same over those at condition number 1", max(counts) / counts[0], "<=", NARROW),
        Check(
            "GD over scaled GD at condition number 10",
            iterations(plain[10]) / iterations(scaled[10]),
            ">=",
            PLAIN,
        ),
        # In least squares without a network it is the square; here other directions help.
        Check(
            f"limit: slower by, when X has condition number {limit}",
            iterations(data[limit]) / iterations(data[1]),
            ">=",
            limit,
        ),
    )


CLAIM: Final = Claim(
    "convex-relu",
    "In the convex form of a two-layer ReLU network scaled gradient descent converges at a rate "
    "free of the condition number of the weights to be found, where the data are well "
    "conditioned; ill-conditioned data slow it down.",
    f"{PRECONDITIONED}. Section 7, the reparametrised ReLU network.",
    run,
)
