"""One step of an optimizer: work on its pairs and their state, the parent's step over the rest."""

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from rlora.core.errors import ShapeError
from rlora.torch.pairing.pairs import TensorPair, local, params_of
from rlora.torch.step.dtensors import cut_as
from rlora.torch.step.rounding import begin_count


class Work(Protocol):
    """The work for some pairs around the parent's step."""

    def prepare(self) -> Any:
        """Do everything that may fail; no parameter has changed when this returns."""

    def finish(self, prepared: Any) -> None:
        """Do the rest, with the result of `prepare`."""


Turn: TypeAlias = tuple[Sequence[Work], Mapping[int, Tensor]]
"""Work to be done at once, and by the id of its parameter each stand-in that the parent steps."""


class Plan(NamedTuple):
    """Everything a step needs that does not change from one step to the next."""

    batches: Sequence[Work]
    params: list[list[tuple[Tensor, Tensor]]]
    """For each group what the parent steps: a parameter in no pair with itself, one that
    `precondition` has wrapped with its stand-in."""

    rounding: list[dict[str, Any]]
    """Groups that round at random: the first plan of a step counts it for them."""

    def run(self, optimizer: Any) -> None:
        """Prepare all pairs, let the parent step what is in `params`, and finish the pairs."""
        prepared = [batch.prepare() for batch in self.batches]
        for group in self.rounding:  # not before: a step that is refused changes nothing
            group["rounded"].add_(1)  # a tensor, so that a compiled or captured step counts too
        if any(self.params):
            over_stand_ins(optimizer, self.params, optimizer._inherited("step"))
        for batch, given in zip(self.batches, prepared, strict=True):
            batch.finish(given)


def plans_of(
    groups: Sequence[dict[str, Any]], pairs: Iterable[TensorPair], turns: Iterable[Turn]
) -> list[Plan]:
    """A plan for each turn; in the first one the parent steps the parameters in no pair too."""
    paired = {id(p) for p in params_of(pairs)}
    plans: list[Plan] = []
    for work, stand_ins in turns:
        first = not plans
        params = [
            [
                (p, stand_ins.get(id(p), p))
                for p in group["params"]
                if id(p) in stand_ins or (first and id(p) not in paired)
            ]
            for group in groups
        ]
        rounding = [group for group in groups if first and begin_count(group, group["params"])]
        plans.append(Plan(work, params, rounding))
    return plans


def signature(
    pairs: Iterable[TensorPair], groups: Iterable[dict[str, Any]], own: Sequence[str]
) -> tuple[Any, ...]:
    """Inputs of a plan, which is rebuilt when they change; `own` are names of options."""
    seen: list[Any] = []
    for p in params_of(pairs):
        grad = p.grad
        layout = 0 if grad is None else grad.layout
        address = p.data_ptr() or local(p).data_ptr()  # a DTensor returns 0
        seen.append((address, p.shape, p.stride(), p.dtype, type(grad), layout, p.requires_grad))
    # What decides which kernel there is, in which memory, and of which state.
    names = (*own, "amsgrad", "capturable", "foreach", "fused")
    settings: list[Any] = []
    for group in groups:
        lr, numbers = group.get("lr"), map(group.get, ("momentum", "weight_decay", "eps"))
        settings += [id(group), id(group.get("rounded")), len(group["params"])]
        settings += map(group.get, names)
        settings.append(isinstance(lr, Tensor) and lr.device.type == "cpu")
        for x in (*numbers, *group.get("betas", ())):  # a tensor's value is not asked for
            settings.append(x.device.type if isinstance(x, Tensor) else x == 0)
    return seen, settings


def over_stand_ins(
    optimizer: Any, params: list[list[tuple[Tensor, Tensor]]], call: Callable[[Any], Any]
) -> Any:
    """Call a method of the parent while stand-ins are in the places of their parameters.

    Parameters
    ----------
    optimizer : Optimizer
        Its groups and state are changed meanwhile.
    params : list of lists of (Tensor, Tensor)
        See `Plan`.
    call : callable
        Called with the optimizer.
    """
    real_groups, real_state = optimizer.param_groups, optimizer.state
    state: dict[Any, Any] = defaultdict(dict)
    state.update((key, v) for key, v in real_state.items() if not isinstance(key, Tensor))
    groups = []
    compiling = torch.compiler.is_compiling()  # then fusing is the compiler's business
    for group, members in zip(real_groups, params, strict=True):
        for p, stand_in in members:
            if held := real_state.get(p):
                state[stand_in] = held
        stand_ins = {"params": [stand_in for _, stand_in in members]}
        unfused = {"fused": None} if compiling and "fused" in group else {}
        groups.append({**group, **stand_ins, **unfused})
    given = [dict(group) for group in groups]
    try:
        optimizer.param_groups = [group for group in groups if group["params"]]
        optimizer.state = state
        return call(optimizer)
    finally:
        optimizer.param_groups, optimizer.state = real_groups, real_state
        for real, group, old, members in zip(real_groups, groups, given, params, strict=True):
            if not compiling:  # what the parent has changed: others may change options meanwhile
                new = [key for key in group if key not in old or group[key] is not old[key]]
                real.update((key, group[key]) for key in new if key != "params")
            for p, stand_in in members:
                if stand_in in state:
                    real_state[p] = state[stand_in]
        real_state.update((k, v) for k, v in state.items() if not isinstance(k, Tensor))


class StepsOfParent:
    """The functions of the torch class that an optimizer inherits, for steps in and out of a graph.

    Its hooks run around our own step already. While a step is compiled the rest goes too: torch
    breaks the graph around its own steps, and keeps what they call out of it.
    """

    _bare: Mapping[str, Callable[..., Any]]
    """Functions of the parent without what is wrapped around them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = super()
        names = [name for name in ("step", "_init_group") if hasattr(behind, name)]
        cls._bare = {name: inspect.unwrap(getattr(behind, name)) for name in names}

    def _inherited(self, name: str) -> Callable[..., Any]:
        if torch.compiler.is_compiling():
            return self._bare[name]
        function: Any = getattr(super(StepsOfParent, type(self)), name)
        bare: Callable[..., Any] = function.__wrapped__ if hasattr(function, "hooked") else function
        return bare


def for_its_plans(optimizer: Any) -> Any:
    """An optimizer for what is kept in its own plans, which is not to keep it in memory."""
    return optimizer if torch.compiler.is_compiling() else weakref.proxy(optimizer)


def has_step_of_torch(optimizer: Any) -> bool:
    """Return whether the parent's step is that of one of torch's own classes."""
    module: str = optimizer._bare["step"].__module__
    return module.startswith("torch.optim.")


@dataclass(eq=False)
class Share:
    """One parameter's share of the arrays in which a step works: views, under their names."""

    owner: Tensor
    keys: list[str]
    views: list[Tensor]
    sources: list[Any] = field(default_factory=list)
    """For each of them whatever `start` of `take_over` needs to know."""

    given: list[Tensor] = field(default_factory=list)
    """The entries of the optimizer's state: tensors of their own in the memory of the views, as
    ``x.data = ...`` there would take the views themselves away from the arrays."""

    places: list[int] = field(default_factory=list)
    """The addresses of `given`."""

    def put_into(self, held: dict[str, Any]) -> None:
        """Let the state be the views."""
        self.given = [view.detach() for view in self.views]
        self.places = [x.data_ptr() for x in self.given]
        held.update(zip(self.keys, self.given, strict=True))


def before_new_plan(state: Any) -> None:
    """Copy what parameters without gradient have on stacks that the next plan does not use.

    Else one of them would keep the memory of all that were on its stack. RuntimeError in the
    capture of a CUDA graph, whose replays would begin the state anew.
    """
    _check_not_capturing()
    for p, held in state.items():
        if isinstance(p, Tensor) and p.grad is None:
            for key, x in held.items():
                if type(x) is Tensor and x.untyped_storage().nbytes() > x.nbytes:
                    held[key] = x.clone()


def _check_not_capturing() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        msg = (
            "a CUDA graph is capturing a step that has to be laid out anew: the first one, or one "
            "whose parameters, gradients or options are others than the last step's; make an eager "
            "step as they are now, then capture"
        )
        raise RuntimeError(msg)


def take_over(
    shares: Sequence[Share], state: Any, start: Callable[[Share, int], Tensor | None]
) -> None:
    """Give the views of shares the values of the optimizer's state, and put them there.

    All or, where an entry is refused, none.

    Parameters
    ----------
    shares : sequence of Share
        The shares of a step.
    state : dict
        ``optimizer.state``.
    start : callable
        ``start(share, k)``, what entry k of a share begins with if the state lacks it; None for
        the values that the view has.

    Raises
    ------
    ShapeError
        When an entry has not the shape of its view.
    """
    moved: list[tuple[Tensor, Tensor]] = []
    changed: list[Share] = []
    for share in shares:
        held = state.setdefault(share.owner, {})
        same = bool(share.given) and all(map(is_, map(held.get, share.keys), share.given))
        if same and [*map(Tensor.data_ptr, share.given)] == share.places:
            continue
        changed.append(share)
        for k, (key, view) in enumerate(zip(share.keys, share.views, strict=True)):
            known = held.get(key)
            if known is None:
                known = start(share, k)
            elif isinstance(known, (int, float)):  # the step of old states
                known = torch.as_tensor(known)
            if known is not None:
                if getattr(known, "shape", None) != view.shape:
                    raise misshapen(key, known, view)
                moved.append((local(view), local(cut_as(known, view))))
    if moved:
        old, new = map(list, zip(*moved, strict=True))
        if not torch.compiler.is_compiling():
            written = {x.data_ptr() for x in old}  # the entries of one may be those of another
            new = [x.clone() if x.data_ptr() in written else x for x in new]
        torch._foreach_copy_(old, new)
    if not torch.compiler.is_compiling():  # a graph writes into what is there, later
        for share in changed:
            share.put_into(state[share.owner])


def misshapen(key: str, known: Any, view: Tensor) -> ShapeError:
    """The error for an entry of the optimizer's state that is no tensor of a view's shape."""
    found = tuple(known.shape) if isinstance(known, Tensor) else repr(known)
    msg = (
        f"optimizer.state has {found} as {key!r} of a LoRA factor, expected a tensor of shape "
        f"{tuple(view.shape)}; remove the entry for a fresh start"
    )
    return ShapeError(msg)


def keep(held: dict[str, Any], name: str, value: Tensor) -> None:
    """Put a tensor into a parameter's state; a graph writes into the one that is there."""
    if torch.compiler.is_compiling() and name in held:
        # Torch 2.13 loses a compiled `copy_` to a float64 number.
        torch._foreach_copy_([held[name]], [value])
    else:
        held[name] = value
