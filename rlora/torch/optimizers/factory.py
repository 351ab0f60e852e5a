"""Optimizer classes made of others: of any torch optimizer, and of any method."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from rlora.core.checks import mark_of
from rlora.torch.optimizers.lora_optimizer import LoRAOptimizer
from rlora.torch.optimizers.method_optimizer import Method, MethodOptimizer
from rlora.torch.optimizers.preconditioned import GramPreconditioned
from rlora.torch.step.standins import over_wide


@functools.cache
def precondition(optimizer: Any) -> type[Optimizer]:
    """The optimizer class that does the same on gradients preconditioned pair by pair.

    Parameters
    ----------
    optimizer : type
        Any subclass of torch's Optimizer whose step needs no closure.

    Returns
    -------
    type
        A subclass of it. Its constructor takes a model, ``named_parameters()``, groups with names,
        or tensors with ``pairs=[(A, B), ...]``, then the parent's arguments and ``damping``,
        ``damping_mode``, ``placement``, ``order``, ``compute_dtype``, ``stochastic_rounding`` and
        ``adapter`` as `ScaledAdamW` has them, but with ``placement="before"`` by default, the only
        one that any optimizer can have, and ``order="gauss_seidel"`` over those of torch alone. It
        raises a TypeError where the parent keeps parameters outside of its groups.

    Raises
    ------
    TypeError
        When it is no optimizer class, has no step, or is one that knows pairs already.
    ValueError
        When its step needs a closure: it would evaluate the loss again within a step, on
        gradients that nobody preconditions.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Module()
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(4, 16))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> optimizer = rlora.torch.precondition(torch.optim.NAdam)(layer, lr=1e-3)
    >>> isinstance(optimizer, torch.optim.NAdam)
    True
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        msg = f"expected a subclass of torch.optim.Optimizer, got {optimizer!r}"
        raise TypeError(msg)
    if issubclass(optimizer, LoRAOptimizer):
        msg = f"{optimizer.__name__} preconditions the gradients of pairs itself: use it as it is"
        raise TypeError(msg)
    if optimizer.step is Optimizer.step:
        msg = f"expected a class of optimizers with a step, {optimizer.__name__} has none"
        raise TypeError(msg)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        msg = (
            f"{optimizer.__name__} evaluates the loss again within its step, on gradients that "
            f"nobody preconditions; use an optimizer whose closure is optional, such as AdamW"
        )
        raise ValueError(msg)
    name = f"Preconditioned{optimizer.__name__}"
    doc = f"{optimizer.__name__} on gradients preconditioned pair by pair."
    others = {
        key: over_wide(method)
        for key in dir(optimizer)
        if not key.startswith("_") and not hasattr(GramPreconditioned, key)
        if inspect.isfunction(method := inspect.getattr_static(optimizer, key))
    }
    own = {"__doc__": doc, "_made_by": (precondition, optimizer), "__reduce__": _reduce}
    return type(name, (GramPreconditioned, optimizer), {**others, **own})


def _reduce(self: Any) -> tuple[Any, ...]:
    """Say what a copy is made of: the class was made here, so a pickle must make it again."""
    made_by = vars(type(self)).get("_made_by")
    if made_by is None:  # a subclass that somebody has written, which has a name to be found by
        return object.__new__, (type(self),), self.__getstate__()
    return _revive, made_by, self.__getstate__()


def _revive(make: Callable[..., Any], *given: Any) -> Any:
    kind = make(*given)
    return kind.__new__(kind)


def optimizer_class(method: Method, parent: type[Optimizer] | None = None) -> type[MethodOptimizer]:
    """The torch optimizer of a method.

    Parameters
    ----------
    method : callable
        Gives a `rlora.Transform` for its keyword-only hyperparameters, as `rlora.lora_rite` does.
        ``b1`` and ``b2`` together are called ``betas`` in torch.
    parent : type, optional
        The optimizer of parameters in no pair: torch's SGD for a method with ``momentum``,
        else torch's AdamW.

    Returns
    -------
    type
        An optimizer class with the method's name in capitals. Its constructor takes a model,
        ``named_parameters()``, groups with names, or tensors with ``pairs=[(A, B), ...]``; ``lr``;
        the method's hyperparameters; ``scaling``, the s of ``W0 + s B A``, by default what each
        layer of the model says, and 1 where it says nothing or no model is given;
        ``stochastic_rounding`` and ``adapter`` as `ScaledAdamW` has them; and ``maximize``,
        ``foreach`` and ``fused`` for the parent.

    Raises
    ------
    TypeError
        When `method` is no function, as what one of them gives, or has hyperparameters that are not
        keyword-only, or are called as an option that every class has.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> LoRARite = rlora.torch.optimizer_class(rlora.lora_rite)
    >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
    >>> optimizer = LoRARite([A, B], lr=1e-3, betas=(0.9, 0.99), pairs=[(A, B)])
    """
    given: Any = method
    if not callable(given):
        msg = (
            f"expected a function that makes a method, as rlora.lora_rite, got a "
            f"{type(given).__name__}; do not call it before"
        )
        raise TypeError(msg)
    _check_names(method)
    momentum = "momentum" in inspect.signature(method).parameters
    plain: Any = parent or (torch.optim.SGD if momentum else torch.optim.AdamW)
    return _class(method, plain)


def _check_names(method: Method) -> None:
    """TypeError for hyperparameters that a torch class could not have."""
    taken = {"betas", "param_names", *inspect.signature(MethodOptimizer.__init__).parameters}
    for name, p in inspect.signature(method).parameters.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or (
            name == "inner" and p.default is not p.empty  # of a wrapper
        ):
            continue
        if p.kind is not p.KEYWORD_ONLY:
            fault = "must be keyword-only, after a *"
        elif name in taken - {"options"}:
            fault = "is an option of every torch class already: give it another name"
        else:
            continue
        msg = f"the hyperparameter {name!r} of {_name_of(method)} {fault}"
        raise TypeError(msg)


def _name_of(method: Any) -> str:
    """The name of a function, of that under a `functools.partial`, or of a callable's class."""
    under = getattr(method, "func", method)
    name: str = getattr(under, "__name__", type(under).__name__)
    return name


@functools.cache
def _class(method: Method, parent: Any) -> type[MethodOptimizer]:
    doc = inspect.getdoc(method) or ""
    return type(
        class_name(_name_of(method)),
        (MethodOptimizer, parent),
        {
            "method": staticmethod(method),
            "finds_rate": mark_of(method, "lr") is not None,
            "_options": {p.name: p.default for p in MethodOptimizer.options_of(method)},
            "__init__": _constructor(method),
            "__doc__": f"The torch optimizer of `rlora.{_name_of(method)}`.\n\n{doc}",
            "__module__": "rlora.torch",
            "_made_by": (optimizer_class, method, parent),
            "__reduce__": _reduce,
        },
    )


def _constructor(method: Method) -> Any:
    """`MethodOptimizer`'s constructor with the options of a method in its signature."""
    *own, _ = inspect.signature(MethodOptimizer.__init__).parameters.values()  # but **options
    usual = next(p.default for p in own if p.name == "lr")
    found = mark_of(method, "lr")
    rate = usual if found is None else found
    own = [p.replace(default=rate) if p.name == "lr" else p for p in own]

    @functools.wraps(MethodOptimizer.__init__)
    def construct(self: Any, params: Any, lr: Any = rate, **kwargs: Any) -> None:
        MethodOptimizer.__init__(self, params, lr, **kwargs)

    at = next(i for i, p in enumerate(own) if p.kind is p.KEYWORD_ONLY)
    own[at:at] = MethodOptimizer.options_of(method)
    vars(construct)["__signature__"] = inspect.Signature(own, return_annotation=None)
    return construct


SPELLING = {
    "lora": "LoRA",
    "loft": "LoFT",
    "sgd": "SGD",
    "adamw": "AdamW",
    "fa": "FA",
    "sb": "SB",
    "rac": "RAC",
    "op": "OP",
}


def class_name(method: str) -> str:
    """``lora_pro_adamw`` as ``LoRAProAdamW``."""
    words = (SPELLING.get(word, word.capitalize()) for word in method.split("_"))
    return "".join(words).replace("Adapre", "AdaPre")
