"""LoRA+: a larger learning rate for B than for A, around any method.

S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient Low Rank Adaptation of Large Models. arXiv:2402.12354,
2024.
"""

from rlora.core.checks import check_nonnegative, hyperparameters
from rlora.core.factors import Factors, Tree, map_pairs
from rlora.core.inner import inner_or_adamw
from rlora.core.transform import State, Transform


@hyperparameters
def lora_plus(
    inner: Transform | None = None,
    *,
    ratio: float = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """LoRA+, the learning rate ``lr`` for A and ``ratio * lr`` for B.

    Parameters
    ----------
    inner : Transform, optional
        Any method; AdamW with the following hyperparameters by default. A weight decay that is part
        of its direction goes with the learning rate of each factor, one after the step with `lr`.
    ratio : float
        At least 0. The paper recommends 16.
    b1, b2, eps, weight_decay
        Of the default AdamW; without effect on an `inner` that is given.

    Returns
    -------
    Transform
        State: that of `inner`.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    A ratio is a choice of split: AdamW without eps and decay moves the product from (A, B) with
    ratio c² as it does from (c A, B / c) with ratio 1 and c times the learning rate. Methods that
    no split can change need none.
    PEFT's ``create_loraplus_optimizer`` takes ``loraplus_weight_decay`` and ignores `weight_decay`.

    References
    ----------
    S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient Low Rank Adaptation of Large Models.
    arXiv:2402.12354, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.lora_plus(ratio=16.0, weight_decay=0.01)
    >>> both = rlora.lora_plus(rlora.scaled_adamw(), ratio=4.0)
    """
    check_nonnegative("ratio", ratio)
    inner = inner_or_adamw(inner, b1, b2, eps, weight_decay)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        direction, state = inner.update(grads, state, params)

        def favour(d: Factors) -> Factors:
            return d if d.B is None else Factors(d.A, ratio * d.B)

        return map_pairs(favour, direction), state

    return inner._replace(update=update)
