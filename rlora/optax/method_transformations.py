"""Shorthand for every method of `rlora.methods`: it and its learning rate in one call.

The stub beside this file says the same to type checkers and editors, which do not run it;
`rlora.write_stubs` writes it.
"""

import inspect
from collections.abc import Callable
from typing import Any, Final, cast

import optax

from rlora import methods
from rlora.core.transform import Transform
from rlora.optax.pair_transformation import of_options, transformation

SHORTHAND: Final = """`rlora.{method}` as an optax transformation.

Parameters
----------
{shared}
    See `rlora.optax.transformation`.
{own}
    See `rlora.{method}`.

Returns
-------
GradientTransformationExtraArgs
    As `rlora.optax.transformation` makes it of a method.
"""


def _shorthand(method: Callable[..., Transform]) -> Callable[..., Any]:
    whole, own = (inspect.signature(f).parameters.values() for f in (transformation, method))
    shared = [p for p in whole if p.name != "method"]
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    names, usual = [p.name for p in shared], {p.name: p.default for p in shared[1:]}

    def make(learning_rate: optax.ScalarOrSchedule, **given: Any) -> Any:
        ours = {name: given.pop(name, default) for name, default in usual.items()}
        return of_options(method, given, learning_rate, **ours)

    # For `inject_hyperparams`, which makes arrays of the numbers among them.
    cast("Any", make).__signature__ = inspect.Signature([*shared, *options])
    make.__name__ = make.__qualname__ = method.__name__
    make.__doc__ = SHORTHAND.format(
        method=method.__name__, shared=", ".join(names), own=", ".join(p.name for p in own)
    )
    return make


globals().update({name: _shorthand(getattr(methods, name)) for name in methods.__all__})
__all__ = list(methods.__all__)
