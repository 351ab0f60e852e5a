"""RAC-LoRA's rate: with a fresh sketch each step, a quadratic falls by ``1 - r / n`` a step.

``f = |W - D|² / 2`` and steps of 1, which take the row space of A out of the error. With one A for
ever, the first step does all that can be done.
"""

from typing import Final

import numpy as np

import rlora
from rlora import Factors
from rlora.methods.rac import restart

from .claim import Check, Claim, Outcome, Setting, lines
from .problems import Matrix, factor_gradients

SIZE = 100
RANKS: Final = (1, 4, 16)

CLOSE: Final = 0.05
"""Relative, of the fall r / n. One step's is off by sqrt(2 / (r n)), 0.14 for r = 1, and more when
few directions are left in the error; 240 steps or more bring their mean within 0.02."""
STUCK: Final = 1e-10
"""Bound on rounding: the second step changes nothing else."""


def run(setting: Setting) -> Outcome:
    """Losses with fresh sketches and with one, against the rate."""
    steps, chains = (60, 4) if setting.quick else (200, 8)
    checks, panels = [], []
    at = "step", range(steps + 1)
    for rank in setting.track(RANKS, "ranks"):
        fresh = losses(setting, rank, steps, chains, fresh=True)
        fixed = losses(setting, rank, steps, chains, fresh=False)
        off = abs(np.mean(1.0 - fresh[1:] / fresh[:-1]) / (rank / SIZE) - 1.0)
        change = np.max(np.abs(fixed[2:] / fixed[1] - 1.0))
        checks += [
            Check(f"r = {rank}: fall a step, off r / n", float(off), "<=", CLOSE),
            Check(f"r = {rank}, one sketch: change after a step", float(change), "<=", STUCK),
        ]
        rate = (1.0 - rank / SIZE) ** np.arange(steps + 1)
        found = {
            "fresh sketches": fresh.mean(axis=1),
            "(1 - r/n)^t": rate,
            "one sketch": fixed.mean(axis=1),
        }
        title = f"rank {rank} of {SIZE}"
        panels.append(lines(title, at, "loss over the first", found, log_x=False))
    return Outcome(tuple(checks), tuple(panels))


def losses(setting: Setting, rank: int, steps: int, chains: int, *, fresh: bool) -> Matrix:
    """Over the first (steps + 1, chains); every chain has a target and sketches of its own."""
    shape = (chains, SIZE, SIZE)
    target = setting.array(np.random.default_rng(0).standard_normal(shape))
    weight = 0.0 * target
    pair = Factors(weight[:, :rank, :], weight[:, :, :rank])
    method = rlora.rac_lora(damping=0.0)

    path = [target]
    for t in range(steps):
        if fresh or t == 0:
            weight, pair = restart(weight, pair, seed=t)
        error = weight + pair.B @ pair.A - target
        grads = factor_gradients(pair, error)
        pair, _ = rlora.step(method, pair, grads, method.init(pair), 1.0)
        path.append(weight + pair.B @ pair.A - target)
    squares = np.stack([np.sum(setting.backend.to_numpy(x) ** 2, axis=(-2, -1)) for x in path])
    relative: Matrix = squares / squares[0]
    return relative


CLAIM = Claim(
    name="rac-lora-rate",
    statement=(
        "RAC-LoRA with a fresh sketch each step falls at the rate 1 - r/n on a quadratic; with "
        "one sketch for ever it stops after its first step."
    ),
    source=(
        "G. Malinovsky, U. Michieli, H. A. A. K. Hammoud, T. Ceritli, H. Elesedy, M. Ozay, "
        "P. Richtárik. Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical "
        "Framework for Low-Rank Adaptation. arXiv:2410.08305, 2024. The rate under the PL condition"
    ),
    run=run,
)
