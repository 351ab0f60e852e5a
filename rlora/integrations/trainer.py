"""A factory for transformers' Trainer, and for those that are built on it.

``Trainer(..., optimizer_cls_and_kwargs=(RLoraFactory, {"lr": 1e-2}))``
"""

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlora.integrations.deepspeed import under_zero
from rlora.integrations.options import finds_rate, from_mapping, optimizer_named


class RLoraFactory:
    """Makes an optimizer of `rlora.torch` from a model, as Trainer's optimizer factories do."""

    def __call__(
        self, model: nn.Module, args: Any = None, *, optimizer: str = "ScaledAdamW", **options: Any
    ) -> Optimizer:
        """Build the optimizer over the model, so that it sees the names.

        Parameters
        ----------
        model : Module
            With its adapter.
        args : TrainingArguments, optional
            ``learning_rate``, unless the class finds its own, and ``weight_decay`` are taken from
            it unless given. Its ``adam_*`` have defaults of their own, indistinguishable from a
            choice: give ``betas``, ``eps``.
            Transformers' Trainer hands over none: give ``lr``, and ``weight_decay`` unless the
            class's own is right.
        optimizer : str
            Name of a class of `rlora.torch`.
        **options
            Options of the class; numbers may be text.

        Returns
        -------
        Optimizer
            Its second group, without decay, has the trained biases and norms, which the Trainer
            does not decay either: so the schedule and the checkpoint of Trainer's own AdamW fit,
            unless there are factors on a module that is named as a norm, or the Trainer's class
            chooses otherwise. Under DeepSpeed it is a `ZeroOptimizer`.

        Raises
        ------
        ValueError
            When there is no class of this name, or no ``lr`` without `args`.
        PairingError
            When the model has no trainable adapter.
        """
        kind, chosen = optimizer_named(optimizer), from_mapping(options)
        rate = {} if args is None or finds_rate(kind) else {"lr": args.learning_rate}
        decay = {} if args is None else {"weight_decay": args.weight_decay}
        chosen = {**rate, **decay, **chosen}
        if "lr" not in chosen and not finds_rate(kind):
            msg = (
                "no learning rate: this trainer does not hand over its arguments, so that its "
                "learning_rate and weight_decay would be ignored; give lr and weight_decay among "
                "the options of the optimizer"
            )
            raise ValueError(msg)
        made: Any = kind(model, **chosen)
        trainer: Any = importlib.import_module("transformers").Trainer
        (group,) = made.param_groups
        members = list(zip(group["param_names"], group["params"], strict=True))
        decayed = trainer.get_decay_parameter_names(None, model)  # asks the model alone
        bare = {*made.report.plain} - {*decayed}
        group["param_names"] = [name for name, _ in members if name not in bare]
        group["params"] = [p for name, p in members if name not in bare]
        some = [(name, p) for name, p in members if name in bare]
        made.add_param_group({"params": some, "weight_decay": 0.0})
        return under_zero(made)
