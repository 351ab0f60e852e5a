"""Stable-LoRA: A shrinks in the first steps, until its start no longer outweighs B.

Y. Wu, K. Gao, L. Li, Y. Wu. Stable-LoRA: Stabilizing Feature Learning of Low-Rank Adaptation.
arXiv:2603.05204, 2026.
"""

from rlora.core.checks import check_unit, hyperparameters
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, map_pairs
from rlora.core.inner import check_jacobi, inner_or_adamw
from rlora.core.sizes import into_range
from rlora.core.transform import Transform, rounded_once


@hyperparameters
def stable_lora(
    inner: Transform | None = None,
    *,
    shrink: float = 5e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Any method, with A shrinking while it outweighs B.

    With A of shape (r, n) and B (m, r), before the move of `inner`::

        A <- (1 - c) A   while   |A|_F / n >= |B|_F / m

    A must not start at zero, as B does, but a large start disturbs what is learnt as the layers
    grow wider; so it goes once it has done its work.

    Parameters
    ----------
    inner : Transform, optional
        Any method whose factors move at once; AdamW with the following hyperparameters by default.
    shrink : float
        c, in [0, 1): what A loses in each such step, whatever the learning rate is, unless it is 0.
    b1, b2, eps, weight_decay
        Of the default AdamW; without effect on an `inner` that is given.

    Returns
    -------
    Transform
        State: that of `inner`.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type, or `inner` moves its factors
        one after the other.

    Notes
    -----
    A pair with a frozen factor is left alone. Gradients, and the decay of `inner`, are those of A
    before it shrinks; the authors decay the smaller A, by ``lr λ c A`` less. Their code stops for
    good when A is first below the bound; here each step asks anew, so that nothing is kept and a
    saved run goes on as it was. In bfloat16 a c below 2e-3 is lost in rounding to the nearest
    number; the torch class rounds at random.

    References
    ----------
    Y. Wu, K. Gao, L. Li, Y. Wu. Stable-LoRA: Stabilizing Feature Learning of Low-Rank Adaptation.
    arXiv:2603.05204, 2026.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.stable_lora(shrink=5e-4, weight_decay=0.01)
    >>> scaled = rlora.stable_lora(rlora.scaled_adamw())
    """
    check_unit("shrink", shrink)
    inner = inner_or_adamw(inner, b1, b2, eps, weight_decay)
    check_jacobi("stable_lora", inner)
    move = inner.apply

    def shrunk(pair: Factors, d: Factors) -> Factors:
        if d.A is None or d.B is None:
            return pair
        (A, B), backend = pair, get_backend(pair.A)
        sized, numbers = into_range(backend, [A, B])
        a, b = (backend.xp.sum(x * x, axis=(-2, -1), keepdims=True) ** 0.5 for x in sized)
        a, b = (a, b) if numbers is None else (a / numbers[0], b / numbers[1])
        large = a / A.shape[-1] >= b / B.shape[-2]
        return Factors(backend.xp.where(large, (1 - shrink) * A, A), B)

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        return move(map_pairs(shrunk, params, direction), direction, lr)

    return inner._replace(apply=rounded_once(apply))
