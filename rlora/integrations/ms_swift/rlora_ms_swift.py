"""ms-swift's plugin: ``--optimizer ScaledAdamW`` and every other class of `rlora.torch`.

``--external_plugins`` takes the path of this file, `rlora.integrations.ms_swift.PLUGIN`.
"""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn
from torch.optim import Optimizer

from rlora.integrations.options import from_text, optimizer_names
from rlora.integrations.trainer import RLoraFactory


class RLoraOptimizerCallback(OptimizerCallback):
    """Makes the optimizer that ``--optimizer`` names, with the options of ``--optim_args``."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build it over the trainer's model, with its learning rate and weight decay."""
        model = self.trainer.model if model is None else model
        options: dict[str, Any] = from_text(self.args.optim_args)
        return RLoraFactory()(model, self.args, optimizer=self.args.optimizer, **options)


optimizers_map.update(dict.fromkeys(optimizer_names(), RLoraOptimizerCallback))
