"""The plugin for axolotl: ``plugins: [rlora.integrations.axolotl.RLoraPlugin]``."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from rlora.integrations.trainer import RLoraFactory


class RLoraArgs(BaseModel):
    """Keys that the plugin adds to axolotl's YAML."""

    rlora: dict[str, Any] | None = None
    """``optimizer``, a class of `rlora.torch`, and its options."""


class RLoraPlugin(BasePlugin):
    """Let axolotl's trainer make its optimizer by `RLoraFactory`."""

    def get_input_args(self) -> str:
        """Name the class by which axolotl checks its YAML."""
        return "rlora.integrations.axolotl.RLoraArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the trainer's factory; `create_optimizer` of a plugin is never called."""
        trainer.optimizer_cls_and_kwargs = (RLoraFactory, dict(cfg.rlora or {}))
