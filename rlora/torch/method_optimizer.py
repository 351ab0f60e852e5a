"""A torch optimizer out of any method: its pure step over the pairs, the parent's over the rest."""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError
from rlora.core.factors import Factors
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.transform import State, Transform, step
from rlora.torch.pair_optimizer import PairOptimizer
from rlora.torch.params import TensorPair
from rlora.torch.plan import Plan, matrix

Method = Callable[..., Transform]

PLAIN = {"lr", "betas", "eps", "weight_decay", "momentum", "maximize"}
"""Options that the parent keeps in its groups too."""


class MethodOptimizer(PairOptimizer):
    """What `optimizer_class` puts in front of AdamW or SGD. Not to be used by itself."""

    method: Method
    """Gives the transform for the options of a group."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        pairs: Iterable[TensorPair] | None = None,
        adapter: str | None = None,
        scaling: float = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        known = self._options()
        if unknown := sorted(options.keys() - known.keys()):
            msg = f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(known)}"
            raise TypeError(msg)
        options = {**known, **options}
        plain = {name: options.pop(name) for name in PLAIN & options.keys()}
        super().__init__(
            params,
            lr=lr,
            own={**options, "scaling": scaling},
            pairs=pairs,
            adapter=adapter,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            **plain,
        )

    @classmethod
    def _options(cls) -> dict[str, Any]:
        """The method's hyperparameters with their defaults, as torch calls them."""
        parameters = inspect.signature(cls.method).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        if options.keys() >= {"b1", "b2"}:
            options = {"betas": (options.pop("b1"), options.pop("b2")), **options}
        return options

    def _transform(self, group: Mapping[str, Any]) -> Transform:
        options = {name: group[name] for name in self._options()}
        if "betas" in options:
            options["b1"], options["b2"] = options.pop("betas")
        return type(self).method(**options)

    def _check_own(self, group: dict[str, Any]) -> None:
        self._transform(group)

    def _make_plans(self, pairs: list[TensorPair]) -> list[Plan]:
        owner = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        work: dict[Any, list[TensorPair]] = {}
        for a, b in pairs:
            if len(groups := {owner[id(p)] for p in (a, b)}) > 1:
                msg = (
                    f"the factors of a pair of shapes {tuple(a.shape)} and {tuple(b.shape)} are in "
                    f"two parameter groups; {type(self).__name__} moves them together: put both in "
                    f"one group (for two learning rates there is LoRAPlus)"
                )
                raise PairingError(msg)
            if a.grad is not None or b.grad is not None:
                work.setdefault((groups.pop(), a.device), []).append((a, b))
        batches = [MethodBatch(self, i, members) for (i, _), members in work.items()]
        paired = {id(p) for pair in pairs for p in pair}
        plain = [
            [(p, p) for p in group["params"] if id(p) not in paired] for group in self.param_groups
        ]
        return [Plan(batches, plain)]

    def _state_shapes(self, p: Tensor) -> dict[str, torch.Size]:
        for a, b in self._current_pairs():
            if p is a or p is b:
                group = next(g for g in self.param_groups if any(q is a for q in g["params"]))
                like = _StateLayout(self._transform(group), [(a, b)], group["scaling"])
                return {key: shape for q, key, shape in like.entries if q is p}
        return super()._state_shapes(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parent would look for its own entries in the state of the pairs.
        pairs = state.get("_pairs") or self._current_pairs()
        paired = {id(p) for pair in pairs for p in pair}
        everything = state["state"]
        plain = {p: held for p, held in everything.items() if id(p) not in paired}
        super().__setstate__({**state, "state": plain})
        self.state = defaultdict(dict, everything)


class MethodBatch:
    """The pairs of one group on one device, and where their state is kept."""

    def __init__(self, optimizer: MethodOptimizer, group: int, pairs: list[TensorPair]) -> None:
        self._optimizer, self._group, self._pairs = optimizer, group, pairs
        options = optimizer.param_groups[group]
        self._transform = optimizer._transform(options)
        self._layout = _StateLayout(self._transform, pairs, options["scaling"])

    def prepare(self) -> tuple[dict[str, Factors], State]:
        """The pairs and their state after the step; nothing has moved yet."""
        group, states = self._optimizer.param_groups[self._group], self._optimizer.state
        sign = -1.0 if group["maximize"] else 1.0
        params = _named(self._pairs, matrix)
        grads = _named(
            self._pairs, lambda p: None if p.grad is None else _signed(sign, matrix(p.grad))
        )
        state = self._layout.gather(states)
        with get_backend(self._pairs[0][0]).exact(self._pairs[0][0]):
            moved: tuple[dict[str, Factors], State] = step(
                self._transform, params, grads, state, group["lr"]
            )
        return moved

    def finish(self, moved: tuple[dict[str, Factors], State]) -> None:
        """Write both where they belong."""
        params, state = moved
        self._layout.scatter(state, self._optimizer.state)
        for old, new in zip(self._pairs, params.values(), strict=True):
            for p, x in zip(old, new, strict=True):
                if p.grad is not None:
                    p.copy_(x.view(p.shape))


def _named(pairs: list[TensorPair], f: Callable[[Tensor], Any]) -> dict[str, Factors]:
    return {f"pair {k}": Factors(*map(f, pair)) for k, pair in enumerate(pairs)}


def _signed(sign: float, grad: Tensor) -> Tensor:
    return grad if sign > 0 else -grad


class _StateLayout:
    """Which array of a method's state belongs to which parameter, under which name.

    What a pair has once is kept with its A. A name is the field's own; where two links of a chain
    have a field of one name, the place of the link comes first.
    """

    def __init__(self, transform: Transform, pairs: list[TensorPair], scaling: float) -> None:
        self._like = transform.init(_named(pairs, matrix), scaling)
        owners = {f"pair {k}": pair for k, pair in enumerate(pairs)}
        flat = flatten_state(self._like)
        self._place: dict[str, tuple[Tensor, str]] = {}
        self.entries: list[tuple[Tensor, str, torch.Size]] = []
        for name in flat:
            before, pair, letter = self._split(name, owners)
            owner = owners[pair][1 if letter == "B" else 0]
            self._place[name] = (owner, before)
        keys = {key for _, key in self._place.values()}
        short = {key: key.rpartition(".")[2] for key in keys}
        clear = len(set(short.values())) == len(keys)
        for name, (owner, key) in self._place.items():
            key = short[key] if clear else key
            self._place[name] = (owner, key)
            self.entries.append((owner, key, flat[name].shape))

    @staticmethod
    def _split(name: str, owners: Mapping[str, Any]) -> tuple[str, str, str]:
        parts = name.split(".")
        at = next(i for i, part in enumerate(parts) if part in owners)
        return ".".join(parts[:at]), parts[at], "".join(parts[at + 1 :])

    def gather(self, states: Mapping[Any, dict[str, Any]]) -> State:
        """The method's state out of the optimizer's; what is not there yet is as at the start."""
        start = flatten_state(self._like)
        flat = {
            name: states.get(owner, {}).get(key, start[name])
            for name, (owner, key) in self._place.items()
        }
        return unflatten_state(flat, self._like)

    def scatter(self, state: State, states: Any) -> None:
        """The method's state into the optimizer's."""
        for name, x in flatten_state(state).items():
            owner, key = self._place[name]
            states[owner][key] = x


def optimizer_class(method: Method, parent: type[Optimizer] | None = None) -> type[MethodOptimizer]:
    """The torch optimizer of a method.

    Parameters
    ----------
    method : callable
        Gives a `rlora.Transform` for its keyword-only hyperparameters, as `rlora.lora_rite` does.
        ``b1`` and ``b2`` together are called ``betas`` in torch.
    parent : type, optional
        What updates parameters that are in no pair: torch's SGD for a method with ``momentum``,
        else torch's AdamW.

    Returns
    -------
    type
        An optimizer class with the method's name in capitals. Its constructor takes a model,
        ``named_parameters()``, groups with names, or tensors with ``pairs=[(A, B), ...]``; ``lr``;
        the method's hyperparameters; ``scaling``, the s of ``W0 + s B A``; ``adapter``; and
        ``maximize``, ``foreach`` and ``fused`` for the parent.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> LoRARite = rlora.torch.optimizer_class(rlora.lora_rite)
    >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
    >>> optimizer = LoRARite([A, B], lr=1e-3, betas=(0.9, 0.99), pairs=[(A, B)])
    """
    momentum = "momentum" in inspect.signature(method).parameters
    plain: Any = parent or (torch.optim.SGD if momentum else torch.optim.AdamW)
    return _class(method, plain)


@functools.cache
def _class(method: Method, parent: Any) -> type[MethodOptimizer]:
    doc = inspect.getdoc(method) or ""
    return type(
        class_name(method.__name__),
        (MethodOptimizer, parent),
        {
            "method": staticmethod(method),
            "__doc__": f"The torch optimizer of `rlora.{method.__name__}`.\n\n{doc}",
            "__module__": "rlora.torch",
            "__reduce__": _reduce,
        },
    )


SPELLING = {"lora": "LoRA", "sgd": "SGD", "adamw": "AdamW", "fa": "FA", "sb": "SB", "rac": "RAC"}


def class_name(method: str) -> str:
    """``lora_pro_adamw`` as ``LoRAProAdamW``."""
    words = (SPELLING.get(word, word.capitalize()) for word in method.split("_"))
    return "".join(words).replace("Adapre", "AdaPre")


def _reduce(self: Any) -> tuple[Any, ...]:
    # The class was made here, so a pickle must make it again.
    kind = type(self)
    return _revive, (kind.method, kind.__bases__[1]), self.__getstate__()


def _revive(method: Method, parent: type[Optimizer]) -> Optimizer:
    kind = optimizer_class(method, parent)
    return kind.__new__(kind)
