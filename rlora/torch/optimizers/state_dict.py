"""Loading of a saved state: all of it is checked first; that of pairs stays at least float32."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlora.torch.monitor.run_warnings import look_on_the_host
from rlora.torch.optimizers.saved_order import as_groups_are
from rlora.torch.optimizers.state_entries import ELEMENTWISE, Shapes, check_saved, in_use
from rlora.torch.pairing.following import followed, rename
from rlora.torch.pairing.pairs import TensorPair, groups_by_id, is_distributed, params_of
from rlora.torch.step.dtensors import cut_as
from rlora.torch.step.kernels import counter_dtype
from rlora.torch.step.plan import has_step_of_torch
from rlora.torch.step.rounding import begin_count


class Ids(list[Any]):
    """Ids of a saved group: torch asks for every tensor of the state whether its id is here."""

    def __init__(self, ids: Iterable[Any] = ()) -> None:
        super().__init__(ids)
        self._known = set(self)

    def __contains__(self, key: object) -> bool:
        return key in self._known


class LoadsState(Optimizer, ABC):
    """The loading of an optimizer that knows pairs. Not to be used by itself."""

    _own: tuple[str, ...]
    _members: list[Tensor]
    _names: list[str | None]
    _pairs: list[TensorPair]

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Refuse options of a group that make no sense."""

    @abstractmethod
    def _current_pairs(self) -> list[TensorPair]:
        """The pairs as the groups hold them now."""

    def _state_shapes(
        self, pairs: Sequence[TensorPair], groups: Sequence[Mapping[str, Any]]
    ) -> Callable[[Tensor], Shapes]:
        """Shapes of each parameter's state, as far as the parent is known.

        `groups` are in the order of the optimizer's own and have the options that count.
        """
        adam = isinstance(self, torch.optim.AdamW)
        kept = ELEMENTWISE[:3] if adam else ("momentum_buffer",)
        return lambda p: Shapes(
            {x: p.shape if x in kept else None for x in ELEMENTWISE},
            needed={"step", *kept[:2]} if adam else frozenset(),
        )

    def _fresh_state(
        self, pairs: Sequence[TensorPair]
    ) -> Callable[[Tensor], dict[str, Any] | None]:
        """The state that a parameter has at its first step; None where that is not known."""
        group_of = groups_by_id(self.param_groups)
        paired = {id(p) for p in params_of(pairs)}

        def fresh(p: Tensor) -> dict[str, Any] | None:
            group = self.param_groups[group_of[id(p)]]
            wide = torch.promote_types(p.dtype, torch.float32) if id(p) in paired else p.dtype
            zeros = partial(torch.zeros_like, p, dtype=wide, requires_grad=False)
            if not has_step_of_torch(self):
                return None
            if isinstance(self, (torch.optim.Adam, torch.optim.AdamW)):
                keys = ELEMENTWISE[: 3 if group["amsgrad"] else 2]
                step = torch.zeros((), dtype=counter_dtype(), device="cpu")
                return {"step": step, **{key: zeros() for key in keys}}
            if isinstance(self, torch.optim.SGD) and not (group["momentum"] and group["dampening"]):
                return {"momentum_buffer": zeros()} if group["momentum"] else {}
            return None

        return fresh

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it, with entries for what never had a gradient too.

        Once there is any state: an expert that no token was sent to has the one it will begin with,
        where that is known: not under `precondition` of others than torch's Adam, AdamW and SGD,
        under dampening, or where it is sharded and depends on values of the factors.
        torch.distributed.checkpoint takes a missing one for an error, and what a file lacks it
        would fill with a step that has been counted.

        Warns
        -----
        RuntimeWarning
            Once, when a pair on a CPU, or its state, is not finite. What lies on an accelerator is
            not looked at: the device would have to be waited for. `diagnostics` looks there too.
        """
        look_on_the_host(self)
        saved = super().state_dict()
        if not self._is_whole(saved):  # a hook has made another dict of it
            return saved
        # A save neither refuses a change of the groups nor acts on it: the next step does.
        now = [p for _, p in self._owners(saved)]
        found = followed(self._members, self._names, self._pairs, now)
        rename(saved["param_groups"], found.names)
        for group in saved["param_groups"]:
            if "rounded" in group:  # steps write to it
                group["rounded"] = torch.as_tensor(group["rounded"]).clone()
        if saved["state"]:
            try:
                for group in self.param_groups:
                    self._check(group)
            except (TypeError, ValueError):  # as the next step will say
                return saved
            pairs = [pair for pair in found.pairs if pair is not None]
            fresh = self._fresh_state(pairs)
            shapes_of = self._state_shapes(pairs, self.param_groups)
            for i, p in self._owners(saved):
                if i in saved["state"]:
                    shapes = shapes_of(p)
                    held = in_use(saved["state"][i], shapes)
                    if held and not shapes.needed <= held.keys():  # options have been changed
                        begin = fresh(p) or {}
                        held = {k: x for k, x in begin.items() if k in shapes.needed} | held
                    saved["state"][i] = held
                elif p.requires_grad and (start := fresh(p)) is not None:
                    saved["state"][i] = start
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this optimizer or of the plain parent; whole or not at all.

        Moments get the dtype of their parameters, those of paired factors at least float32. Where
        both have names, a state goes to the parameter of its name, in whatever order and
        groups they were saved. Without names it goes by place as in torch, and where the groups
        differ by shape, if that is unambiguous; frozen parameters without state may be missing
        on either side.

        As in torch all options of the saved groups come along: learning rate, ``betas``, ``eps``,
        weight decay and the parent's flags. What a saved group lacks, as one of the plain parent
        lacks damping and placement, stays as constructed, and so do options on which saved
        groups disagree that are one here.

        Parameters
        ----------
        state_dict : dict
            From `state_dict`.

        Raises
        ------
        ShapeError, ShardingError
            When a saved moment has another shape than its parameter, is one of a method's class or
            AdamW's that this one does not keep or not alone, or is whole and the parameter is
            sharded, or the other way round; nothing has been loaded then. A ShapeError too where
            there are no names, the groups differ, and shapes do not identify the owner of each
            state. What else other optimizers keep is loaded as torch does.
        ValueError
            When a trainable parameter is not among the saved names, or a saved one with state is
            not here.
        """
        incoming: list[dict[str, Any]] = []

        def take(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            incoming.append(self._completed(saved))
            return incoming[-1]

        def restore(_: Optimizer) -> None:
            self._restore_dtypes(incoming[-1])

        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        load = super().load_state_dict
        if getattr(load, "__func__", None) is not Optimizer.load_state_dict:
            state_dict = take(self, state_dict)  # a parent's own loading may run no hooks
        kept = self.state, self.param_groups
        try:
            load(state_dict)
        except BaseException:  # torch may find out late, when both are those of the file already
            self.state, self.param_groups = kept
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _is_whole(self, saved: Mapping[str, Any]) -> bool:
        """Return whether a saved state has what torch puts there, for each parameter."""
        if not {"state", "param_groups"} <= saved.keys():
            return False
        both = (saved["param_groups"], self.param_groups)
        found, own = ([len(group.get("params", ())) for group in groups] for groups in both)
        return found == own

    def _owners(self, saved: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """(id in the saved state, parameter)."""
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return list(zip(ids, params, strict=True))

    def _completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        self._current_pairs()  # names follow the parameters as they are now
        saved = as_groups_are(saved, self.param_groups, self._names)
        # Defaults do not have what a parent needs for parameters in no pair alone.
        options = {*self._own, *self.defaults, "betas", "momentum"}
        groups = [
            {**{name: mine[name] for name in options & mine.keys()}, **theirs}
            for mine, theirs in zip(self.param_groups, saved["param_groups"], strict=True)
        ]
        for group, mine in zip(groups, self.param_groups, strict=True):
            self._check(group)
            begin_count(group, mine["params"])
        shapes_of = self._state_shapes(self._pairs, groups)
        for i, p in self._owners(saved):
            check_saved(i, saved["state"].get(i, {}), p, shapes_of(p))
        params = ({**group, "params": Ids(group["params"])} for group in groups)  # found fast
        return {**saved, "param_groups": list(params)}

    def _restore_dtypes(self, saved: dict[str, Any]) -> None:
        """Undo torch's cast to the dtype of the parameter: of counters, and of pairs to 16 bits."""
        paired = {id(p) for p in params_of(self._current_pairs())}
        for i, p in self._owners(saved):
            held = self.state.get(p, {})
            for key, value in saved["state"].get(i, {}).items():
                loaded = held.get(key)
                if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                    continue
                number = value.ndim == 0 or not value.is_floating_point()
                if key != "step" and (number or id(p) in paired):
                    dtype = value.dtype if number else torch.promote_types(p.dtype, torch.float32)
                    loaded = value.detach().to(p.device, dtype, copy=True)
                elif loaded is value:
                    loaded = value.clone()  # else both would count in one tensor
                if is_distributed(loaded) and is_distributed(p) and loaded.shape == p.shape:
                    # Kernels, and parents, step pieces; a part of a whole could not be saved.
                    loaded = cut_as(loaded, p).clone()
                held[key] = loaded
