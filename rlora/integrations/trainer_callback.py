"""A callback for trainers built on transformers' Trainer that let nobody name an optimizer.

LLaMA-Factory v0: ``run_exp(callbacks=[OptimizerCallback("ScaledAdamW")])``
"""

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

from rlora.integrations.options import check_multiplier, from_mapping, optimizer_named


class OptimizerCallback(TrainerCallback):
    """Put an optimizer of `rlora.torch` in the place of the Trainer's AdamW when training begins.

    Its groups, learning rate, weight decay and schedule stay; frozen factors join the groups of
    their partners, and then the Trainer, whose AdamW loads a checkpoint first, resumes none.

    Parameters
    ----------
    optimizer : str
        Name of a class of `rlora.torch`.
    **options
        Options of the class.

    Raises
    ------
    ValueError
        For ``lr`` and ``weight_decay``, which come from the Trainer. When training begins, for a
        learning rate other than 1 of a class that finds its own.
    """

    def __init__(self, optimizer: str = "ScaledAdamW", **options: Any) -> None:
        if taken := sorted({"lr", "weight_decay"} & options.keys()):
            msg = (
                f"{' and '.join(taken)} would be ignored: the groups are the Trainer's; set it in "
                f"its arguments"
            )
            raise ValueError(msg)
        self._make, self._options = optimizer_named(optimizer), from_mapping(options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Build the optimizer over the Trainer's groups, with the state of a checkpoint if any.

        Parameters
        ----------
        args, state, control
            The Trainer's.
        **parts
            ``model``, ``optimizer`` and ``lr_scheduler`` among others.

        Raises
        ------
        TypeError
            Under DeepSpeed, and with the gradient scaler of float16: these hold the optimizer's
            step themselves.
        """
        prepared = parts["optimizer"]
        names = {id(p): name for name, p in parts["model"].named_parameters()}
        old: Any = getattr(prepared, "optimizer", None)
        fits = isinstance(old, Optimizer) and all(
            id(p) in names for group in old.param_groups for p in group["params"]
        )
        if not fits or getattr(prepared, "scaler", None) is not None:
            msg = (
                f"the Trainer's optimizer cannot be replaced: expected accelerate's wrapper of one "
                f"over the model's parameters, without a gradient scaler, got "
                f"{type(prepared).__name__} of {type(old).__name__}; train without DeepSpeed, in "
                f"bfloat16 or float32"
            )
            raise TypeError(msg)
        first = old.param_groups[0]
        check_multiplier(self._make, first.get("initial_lr", first["lr"]))
        # The model tells more than its names.
        new: Any = self._make(parts["model"], lr=first["lr"], **self._options)
        (mine,) = new.param_groups
        # What else is in the Trainer's groups is a schedule's.
        own = {*old.defaults, *mine} - {"lr", "weight_decay"}
        new.param_groups = [
            {
                **mine,
                **{k: v for k, v in group.items() if k not in own},
                "params": list(group["params"]),
                "param_names": [names[id(p)] for p in group["params"]],
            }
            for group in old.param_groups
        ]
        new._current_pairs()  # puts frozen factors beside those that the Trainer trains
        if old.state:  # loaded from a checkpoint before training began
            now = [p for group in new.param_groups for p in group["params"]]
            places = {id(p): i for i, p in enumerate(now)}
            state = {places[id(p)]: held for p, held in old.state.items()}
            new.load_state_dict({**new.state_dict(), "state": state})
        prepared.optimizer = new
        schedule = getattr(parts["lr_scheduler"], "scheduler", parts["lr_scheduler"])
        if schedule.optimizer is old:
            schedule.optimizer = new
