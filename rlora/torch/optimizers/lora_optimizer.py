"""Base class of the optimizers: pairs, groups, step and state_dict.

It finds the pairs among its parameters by name or takes them by hand, keeps to them whatever
training libraries do to the groups, steps them by its own plans and the rest by its parent's step,
and loads its state as it was saved.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from rlora.core.checks import check_flag, plain_number
from rlora.core.dispatch import get_backend
from rlora.pairing import PairReport
from rlora.pairing.order import BY_ORDER
from rlora.torch.monitor import diagnostics as figures
from rlora.torch.monitor.run_warnings import warn_of_idle_pairs, warn_of_ties, warn_of_zero_factor
from rlora.torch.monitor.snapshot import Watch
from rlora.torch.optimizers.state_dict import LoadsState
from rlora.torch.pairing.discovery import (
    Pairs,
    check_explicit,
    no_pair,
    pairs_in_groups,
    split_source,
    ties_hold,
)
from rlora.torch.pairing.following import followed, named_anew, undone_if_refused, with_partners
from rlora.torch.pairing.modules import models_in, references, scalings_in, what_modules_know
from rlora.torch.pairing.pairs import TensorPair, identical, scalings_of
from rlora.torch.pairing.param_groups import (
    FLAGS,
    LOOPS,
    NUMBERS,
    as_groups,
    as_list,
    check_options,
    check_pairs,
    check_whole,
    in_order,
    names_of,
    pairs_of_group,
    plain_numbers,
    refuse_text,
    split_names,
    without_names,
)
from rlora.torch.pairing.sharding_checks import check_layouts
from rlora.torch.step.plan import Plan, StepsOfParent, Turn, before_new_plan, plans_of, signature
from rlora.torch.step.rounding import begin_count


class LoRAOptimizer(StepsOfParent, LoadsState, ABC):
    """A torch optimizer that knows the pairs among its parameters. Not to be used by itself."""

    report: PairReport
    """The pairs, the unpaired parameters, which the parent steps, and those refused."""

    _extra: tuple[str, ...] = ("report", "_adapter", "_by_hand", "_by_name", "_known", "_members")
    _extra += ("_names", "_own", "_pairs", "_source")
    """Attributes that a copy or a pickle takes along."""

    _given: tuple[tuple[int, ref[nn.Module]], ...] = ()
    """The models that parameters were given as, by their groups; a copy does not know its own."""

    _seen: Sequence[Any] = ()
    """The options at the last step: by identity, as a tensor's value is not asked for."""
    _told: frozenset[str] = frozenset()
    """Checks that were made, and warnings that were given, once."""
    _idle_steps: int | None = 0
    """Steps in a row without gradients; None where the last one had some, or after the warning."""

    watch, unwatch, diagnostics = figures.watch, figures.unwatch, figures.diagnostics

    def __init__(
        self,
        params: Any,
        *args: Any,
        own: dict[str, Any],
        pairs: Pairs,
        adapter: str | None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("differentiable"):
            msg = "differentiable=True is not supported: the step of a pair is not differentiated"
            raise ValueError(msg)
        self._adapter, self._own = adapter, tuple(own)
        self._by_hand, self._source = split_source(None if pairs == BY_ORDER else pairs)
        params = params if isinstance(params, (nn.Module, Tensor)) else as_list(params)
        models = models_in(params)
        self._known, self._given = what_modules_know(models), references(models)
        own, kwargs = plain_numbers(own), plain_numbers(kwargs)
        known = isinstance(self, (torch.optim.AdamW, torch.optim.SGD))
        refuse_text({"lr": args[0], **kwargs} if args else kwargs, numbers=known)
        groups = as_groups(params, self._source, self._known)
        if pairs == BY_ORDER:
            self._by_hand = in_order(groups, self._known)
        self._by_name = not self._by_hand
        super().__init__(groups, *map(plain_number, args), **kwargs)
        self.defaults.update(own)
        # Fused kernels would take gradients that GradScaler has not unscaled yet.
        self._step_supports_amp_scaling = False
        self._plans: tuple[Any, list[Plan]] | None = None
        self._watching: list[Watch] = []  # one at most; wrappers of this optimizer share it
        self._members: list[Tensor] = []
        self._names: list[str | None] = []  # of the members, None where there is none
        for group in self.param_groups:
            group.update(own | group)
            self._check(group)
            self._enroll(group)
        self._pair_up(scalings_in(models))
        if not self._pairs:
            raise no_pair(self._names, self.report, type(self).__name__)
        for kind in (Tensor, nn.Parameter):  # a compiled step cannot look for a backend
            get_backend(kind(torch.empty(0)))

    # --- for subclasses ---------------------------------------------------------------------------

    @abstractmethod
    def _turns(self, pairs: list[TensorPair]) -> list[Turn]:
        """The work that steps these pairs: of both factors in one turn, or of A and then of B."""

    @abstractmethod
    def _check_own(self, group: dict[str, Any]) -> None:
        """Refuse values of the subclass's own options that make no sense."""

    # --- pairs ----------------------------------------------------------------------------------

    def _enroll(self, group: dict[str, Any]) -> None:
        begin_count(group, group["params"])
        self._members = self._members + group["params"]
        self._names = self._names + group.get("param_names", [None] * len(group["params"]))

    def _pair_up(self, scalings: Mapping[int, float | None]) -> None:
        """The pairs given by hand, and unless the constructor got some, those found by name.

        `scalings` has the s of layers by the identity of their factors.
        """
        names = dict(zip(map(id, self._members), self._names, strict=True))
        pairs, self.report = pairs_in_groups(
            [[(names[id(p)], p) for p in group["params"]] for group in self.param_groups],
            self._by_hand,
            self._source,
            by_name=self._by_name,
            known=self._known,
            adapter=self._adapter,
        )
        self._pairs = [p._replace(scaling=scalings.get(id(p.A), p.scaling)) for p in pairs]

    def _models(self) -> list[tuple[int, nn.Module]]:
        """Those of the models that parameters were given as that are still there."""
        return [(i, model) for i, held in self._given if (model := held()) is not None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its factors are paired by name, unless the optimizer was built with pairs.

        Or by its key ``pairs``, by hand or by order. Models are asked for layouts and s anew.

        Parameters
        ----------
        param_group : dict
            As torch takes it; ``params`` may be named, whether those of other groups are or not.
            The parent steps those that have no names, here or in a model, and are in no ``pairs``.
        """
        group = plain_numbers(dict(param_group))
        explicit = pairs_of_group(group)
        group.pop("rounded", None)  # counts of the group that the options are copied of
        if not hasattr(self, "_pairs"):  # the parent's constructor is at work
            self._by_hand += explicit
            super().add_param_group(group)
            return
        added = [(len(self.param_groups), model) for _, model in models_in([param_group])]
        models = self._models() + added
        scalings, known = scalings_in(models), self._known
        if models:
            known = {**(known or {}), **(what_modules_know(models) or {})}
        group["params"] = as_list(group["params"], self._source, known)
        names = split_names(group)
        if names is None and not explicit:
            names = names_of((model for _, model in models), group["params"])
        self._check({**self.defaults, **group})
        scalings |= scalings_of(self._current_pairs())
        check_explicit([*self._by_hand, *explicit], [*self._members, *group["params"]])
        with undone_if_refused(self):
            with without_names(self.param_groups):
                super().add_param_group(group)
            if names is not None:
                group["param_names"] = names
            self._enroll(group)
            self._by_hand = self._by_hand + explicit
            self._known, self._given = known, self._given + references(added)
            self._pair_up(scalings)
        self._plans = None

    def _tied_anew(self) -> list[TensorPair]:
        """The pairs once more, as other parameters share memory now than did."""
        tied = self.report.tied
        self._pair_up(scalings_of(self._pairs))
        warn_of_ties(type(self).__name__, tied, self.report.tied)
        return self._pairs

    def _check(self, group: dict[str, Any]) -> None:
        """Numbers and choices of a group; torch checks those of the constructor only."""
        check_whole(group, self._own)
        check_options(group, self.defaults)
        check_flag("stochastic_rounding", group["stochastic_rounding"])
        self._check_own(group)

    def _current_pairs(self) -> list[TensorPair]:
        """The pairs as the groups hold them now."""
        now = [p for group in self.param_groups for p in group["params"]]
        if identical(now, self._members):
            return self._pairs
        now = with_partners(self.param_groups, self._pairs, self._members)
        found = followed(self._members, self._names, self._pairs, now)
        found.check(self._members, self._pairs)
        names = named_anew(self.param_groups, found.names)
        with undone_if_refused(self):
            self._pairs, self.report = found.still_there(self.report)
            self._by_hand = found.by_hand(self._by_hand)
            self._members, self._names, self._plans = now, names, None
            if names != found.names:  # of a group that was added by a wrapper of this optimizer
                self._known = what_modules_know(self._models()) or self._known
                self._pair_up(scalings_in(self._models()) | scalings_of(self._pairs))
        return self._pairs

    # --- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the pairs as the method does, and all other parameters as the parent does.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients. It is called once, first, with gradients enabled.

        Returns
        -------
        The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = self._current_plans()
        for watch in self._watching:
            watch.note(self._pairs, self.report, self.param_groups)
        for plan in plans:
            plan.run(self)
        return loss

    def _init_group(self, *args: Any) -> Any:  # called by the steps of torch's own optimizers
        return self._inherited("_init_group")(self, *args)

    def _current_plans(self) -> list[Plan]:
        """The plans, rebuilt when their inputs (see `signature`) have changed."""
        pairs = self._current_pairs()
        if torch.compiler.is_compiling():  # the graph is what is kept, and torch guards it
            return self._new_plans(pairs)
        names = ("betas", *NUMBERS, *FLAGS, *LOOPS, *self._own)
        options = [group.get(name) for group in self.param_groups for name in names]
        if not identical(options, self._seen):
            for group in self.param_groups:
                self._check(group)
            self._seen = options
        now = signature(pairs, self.param_groups, self._own)
        if self._plans is None or self._plans[0] != now:
            plans = self._new_plans(pairs)
            # As long as pairs are idle `warn_of_idle_pairs` looks again.
            self._plans = None if self._idle_steps else (now, plans)
            return plans
        return self._plans[1]

    def _new_plans(self, pairs: list[TensorPair]) -> list[Plan]:
        if not (torch.compiler.is_compiling() or ties_hold(pairs)):
            pairs = self._tied_anew()
        check_layouts(pairs)
        check_pairs(pairs)
        warn_of_zero_factor(self, pairs)
        warn_of_idle_pairs(self, pairs)
        if not torch.compiler.is_compiling():
            before_new_plan(self.state)
        return plans_of(self.param_groups, pairs, self._turns(pairs))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._extra}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        self._plans, self._watching = None, getattr(self, "_watching", [])
