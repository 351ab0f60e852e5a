"""A torch optimizer out of any method: its pure step over the pairs, the parent's over the rest."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.core.checks import check_betas, check_scaling, mark_of
from rlora.core.state import flatten_state
from rlora.core.transform import Transform, check_transform
from rlora.pairing.report import number_of
from rlora.torch.optimizers.lora_optimizer import LoRAOptimizer
from rlora.torch.optimizers.state_entries import ELEMENTWISE, Shapes, in_use, words_of_methods
from rlora.torch.pairing.discovery import Pairs, without_diagonals
from rlora.torch.pairing.following import pairs_of_copy
from rlora.torch.pairing.modules import scalings_in
from rlora.torch.pairing.pairs import TensorPair, groups_by_id, is_distributed, params_of
from rlora.torch.step.dtensors import cut_as
from rlora.torch.step.method_batch import places_in, start_of
from rlora.torch.step.plan import Turn, for_its_plans, keep
from rlora.torch.step.steps import check_one_group, steps_of_method

Method = Callable[..., Transform]

PLAIN = {"lr", "betas", "eps", "weight_decay", "momentum", "maximize"}
"""Options that the parent keeps in its groups too."""

MOMENTUM = {"betas", "momentum"}
"""Options that OneCycleLR and CyclicLR cycle if they are among the defaults: so those that only the
parent has, without effect on the pairs, must not be there."""


class MethodOptimizer(LoRAOptimizer):
    """Class that `optimizer_class` puts in front of AdamW or SGD. Not to be used by itself."""

    method: Method
    """Gives the transform for the options of a group."""

    _options: dict[str, Any]
    """The method's hyperparameters with their defaults; not asked of it in a compiled step."""

    finds_rate: bool = False
    """True where ``lr`` is a number that the rates are multiplied by, which the method finds."""

    _extra = (*LoRAOptimizer._extra, "_scalings")
    _scalings: list[float | None]
    """The `scaling` of the group of each pair that the state follows."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        known = self._options
        if unknown := sorted(options.keys() - known.keys()):
            msg = f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(known)}"
            raise TypeError(msg)
        options = {**known, **options}
        if "betas" in known:
            check_betas(options["betas"])  # the parent unpacks them without a look
        plain = {name: options.pop(name) for name in PLAIN & options.keys()}
        super().__init__(
            params,
            lr=lr,
            own={**options, "scaling": scaling, "stochastic_rounding": stochastic_rounding},
            pairs=pairs,
            adapter=adapter,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            **plain,
        )
        _check_scalings(self.param_groups)
        self._scalings = self._scalings_given(self._pairs)
        self._check_rates_of_rest()
        without = options.get("adam") is False  # a method with Adam on request: betas do nothing
        for name in MOMENTUM if without else MOMENTUM - known.keys():
            self.defaults.pop(name, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `LoRAOptimizer.add_param_group`."""
        # The parent needs its numbers also where they are no longer among the defaults.
        first = self.param_groups[0] if self.param_groups else {}
        kept = {k: first[k] for k in MOMENTUM & first.keys() - self.defaults.keys()}
        super().add_param_group({**kept, **param_group})

    @staticmethod
    def options_of(method: Method) -> tuple[inspect.Parameter, ...]:
        """The hyperparameters of a method, as torch calls them."""
        parameters = inspect.signature(method).parameters.values()
        # A partial that binds `inner` shows it among the keywords; it is no number of a group.
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "inner"}
        if not {"b1", "b2"} <= options.keys():
            return tuple(options.values())
        b1, b2 = options.pop("b1"), options.pop("b2")
        defaults = (b1.default, b2.default)
        betas = b1.replace(name="betas", default=defaults, annotation=tuple[float, float])
        return betas, *options.values()

    def _transform(self, group: Mapping[str, Any]) -> Transform:
        transform = type(self).method(**self._chosen(group))
        check_transform(transform)
        return transform

    def _chosen(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a group for the method, under the names that it has for them."""
        chosen = {name: group[name] for name in self._options}
        if "betas" in chosen:
            chosen["b1"], chosen["b2"] = chosen.pop("betas")
        return chosen

    def _check_own(self, group: dict[str, Any]) -> None:
        if "betas" in self._options:
            check_betas(group["betas"])
        self._transform(group)
        _check_scalings([group])

    def _pair_up(self, scalings: Mapping[int, float | None]) -> None:
        super()._pair_up(scalings)
        self._pairs, self.report = without_diagonals(self._pairs, self.report)
        check_one_group(self, self._pairs)

    def _check_rates_of_rest(self) -> None:
        """Refuse the rate of a method that finds its own for parameters that the parent steps."""
        rate = mark_of(type(self).method, "lr")
        if rate is None or torch.compiler.is_compiling():
            return
        paired = {id(p) for p in params_of(self._pairs)}
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.requires_grad and id(p) not in paired]
            if rest and not isinstance(group["lr"], Tensor) and group["lr"] == rate:
                msg = (
                    f"{number_of(len(rest), 'unpaired parameter')} would be stepped with "
                    f"lr={rate}: {type(self).__name__} finds rates for pairs alone; put what is in "
                    f"no pair into a group with an lr of its own"
                )
                raise ValueError(msg)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step as `LoRAOptimizer.step`; sharded pairs out of any graph.

        Their layouts would break a graph within a step, which would lose what it writes later.
        """
        if torch.compiler.is_compiling() and any(is_distributed(pair.A) for pair in self._pairs):
            return _eager_step(self, closure)
        return super().step(closure)

    def _turns(self, pairs: list[TensorPair]) -> list[Turn]:
        self._check_rates_of_rest()
        # Here, as everything else that may refuse the step has been checked.
        if self._scalings_given(pairs) != self._scalings:
            self._follow_scalings(pairs)
        work = steps_of_method(for_its_plans(self), pairs)
        if not torch.compiler.is_compiling():  # momentum that was switched off does not come back
            shapes_of = self._state_shapes(pairs, self.param_groups)
            for p in params_of(pairs):
                if p in self.state:
                    self.state[p] = in_use(self.state[p], shapes_of(p))
        return [(work, {})]

    def _state_shapes(
        self, pairs: Sequence[TensorPair], groups: Sequence[Mapping[str, Any]]
    ) -> Callable[[Tensor], Shapes]:
        plain = super()._state_shapes(pairs, groups)
        sides = {id(p): (pair, k) for pair in pairs for k, p in enumerate((pair.A, pair.B))}
        group_of = groups_by_id(self.param_groups)
        kinds: dict[Any, list[Shapes]] = {}  # pairs of one shape are alike

        def shapes_of(p: Tensor) -> Shapes:
            if id(p) not in sides:
                return plain(p)
            pair, side = sides[id(p)]
            kind = (group_of[id(p)], pair.views, p.dtype, p.device)
            if kind not in kinds:
                kinds[kind] = self._shapes_of_pair(pair, groups[group_of[id(p)]])
            return kinds[kind][side]

        return shapes_of

    def _shapes_of_pair(self, pair: TensorPair, group: Mapping[str, Any]) -> list[Shapes]:
        """Shapes of the state that A has, and of the state that B has."""
        start, words = list(self._start_of(pair, group)), words_of_methods()
        shapes = []
        for k in (0, 1):
            known: dict[str, torch.Size | None] = dict.fromkeys(ELEMENTWISE)
            known |= {key: x.shape for side, key, x in start if side in (k, None)}
            own = {key for side, key, _ in start if side == k}  # one factor keeps what is of both
            shapes.append(Shapes(known, words, own, of_method=True))
        return shapes

    def _start_of(
        self, pair: TensorPair, group: Mapping[str, Any]
    ) -> Iterator[tuple[int | None, str, Tensor]]:
        """The state of a pair before its first step: side (None for both), name and value."""
        for product in (pair.whole() if is_distributed(pair.A) else pair).products():
            flat = flatten_state(start_of(self._transform(group), [[product]], group["scaling"]))
            for name, (_, side, key) in places_in(flat).items():
                yield side, key + product.suffix, flat[name][0]

    def _start_of_sharded(
        self, pair: TensorPair, group: Mapping[str, Any]
    ) -> list[tuple[int | None, str, Tensor]]:
        """`_start_of` of a sharded pair; nothing if it depends on values, which are elsewhere."""
        whole = pair.whole()
        other = whole._replace(A=whole.A + 1, B=whole.B + 1)
        start, same = (list(self._start_of(x, group)) for x in (whole, other))
        values = zip(start, same, strict=True)
        return start if all(torch.equal(x, y) for (*_, x), (*_, y) in values) else []

    def _fresh_state(
        self, pairs: Sequence[TensorPair]
    ) -> Callable[[Tensor], dict[str, Any] | None]:
        plain = super()._fresh_state(pairs)
        group_of = groups_by_id(self.param_groups)
        paired: dict[int, dict[str, Any]] = {}
        shapes_of = self._state_shapes(pairs, self.param_groups)
        for pair in pairs:
            paired |= {id(p): {} for p in pair.moved}
            keeper = next(pair.products()).keepers[0]
            held = [(p, self.state[p]) for p in pair[:2] if self.state.get(p)]
            complete = all(shapes_of(p).needed <= state.keys() for p, state in held)
            if id(keeper) not in group_of or (held and complete):
                continue
            cut = is_distributed(pair.A)
            begin = self._start_of_sharded if cut else self._start_of
            for side, key, x in begin(pair, self.param_groups[group_of[id(keeper)]]):
                owner: Any = keeper if side is None else pair[side]
                paired[id(owner)][key] = cut_as(x, owner) if cut and x.shape == owner.shape else x
        return lambda p: paired[id(p)] if id(p) in paired else plain(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class; see `ScaledAdamW.load_state_dict`.

        Of the s of a pair the group's `scaling` of the file counts, where it is None what the layer
        says today, and the s in the state only where neither is known.
        """
        saved_groups = state_dict.get("param_groups")
        if isinstance(saved_groups, list):
            _check_scalings(group for group in saved_groups if isinstance(group, dict))
        super().load_state_dict(state_dict)
        today = scalings_in(self._models())
        pairs = [p._replace(scaling=today.get(id(p.A), p.scaling)) for p in self._current_pairs()]
        self._pairs, self._plans = pairs, None
        self._follow_scalings(pairs)

    def _scalings_given(self, pairs: Iterable[TensorPair]) -> list[float | None]:
        group_of = groups_by_id(self.param_groups)
        return [self.param_groups[group_of[id(pair.A)]].get("scaling") for pair in pairs]

    def _follow_scalings(self, pairs: Sequence[TensorPair]) -> None:
        """Put the s of groups, else of layers, into the state: it is no memory of training."""
        _check_scalings(self.param_groups)
        self._scalings = self._scalings_given(pairs)
        for pair, given in zip(pairs, self._scalings, strict=True):
            s = pair.scaling if given is None else given
            if s is None:
                continue
            for p in pair.moved:
                held = self.state.get(p, {})
                for key in held:
                    if "scaling" in key.split("."):
                        keep(held, key, torch.full_like(held[key], s))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parent would look for its own entries in the state of the pairs.
        pairs = pairs_of_copy(state) if "_pairs" in state else self._current_pairs()
        paired = {id(p) for p in params_of(pairs)}
        everything = state["state"]
        plain = {p: held for p, held in everything.items() if id(p) not in paired}
        super().__setstate__({**state, "state": plain})
        self.state = defaultdict(dict, everything)


_without_graph: Any = torch.compiler.disable  # which has no types
_eager_step = _without_graph(LoRAOptimizer.step)


def _check_scalings(groups: Iterable[Mapping[str, Any]]) -> None:
    """ValueError or TypeError where the `scaling` of a group is out of its range."""
    for s in (group.get("scaling") for group in groups):
        if s is not None:
            check_scaling(s)
            if float(s) > torch.finfo(torch.float32).max:
                msg = f"scaling {s!r} is above what float32 holds; give a smaller s"
                raise ValueError(msg)
