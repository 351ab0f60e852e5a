"""LLaMA-Factory v1's optimizer plugins: every class of `rlora.torch` by its name.

``python -m rlora.integrations.llama_factory sft config.yaml`` registers them and starts the
trainer; ``torchrun --nproc-per-node 2 -m rlora.integrations.llama_factory ...`` on more devices.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlora.integrations.deepspeed import under_zero
from rlora.integrations.options import (
    check_multiplier,
    finds_rate,
    from_mapping,
    optimizer_named,
    optimizer_names,
)

try:
    from llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer import OptimizerPlugin
except ImportError:  # up to 0.9.5
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin


def create(optimizer: str, model: nn.Module, optim_config: Mapping[str, Any]) -> Optimizer:
    """The optimizer that ``optim_config`` describes.

    Parameters
    ----------
    optimizer : str
        Name of a class of `rlora.torch`.
    model : Module
        With its adapter.
    optim_config : dict
        Its name, ``lr`` and options of the class.

    Returns
    -------
    Optimizer
        Under DeepSpeed it is a `ZeroOptimizer`.

    Raises
    ------
    ValueError
        Without ``lr``: up to 0.9.5 the trainer does not hand its ``learning_rate`` over. With one
        other than 1 for a class that finds its own.
    """
    kind = optimizer_named(optimizer)
    if "lr" not in optim_config and not finds_rate(kind):
        msg = (
            f"LLaMA-Factory handed over {', '.join(optim_config)} and no lr; write it under "
            f"optim_config, beside the name"
        )
        raise ValueError(msg)
    options: dict[str, Any] = from_mapping({k: v for k, v in optim_config.items() if k != "name"})
    check_multiplier(kind, options.get("lr", 1.0))
    return under_zero(kind(model, **options))


for _name in optimizer_names():
    _create: Callable[..., Optimizer] = partial(create, _name)
    OptimizerPlugin(_name).register()(_create)


if __name__ == "__main__":
    from llamafactory.v1.launcher import main

    main()
