"""tunix: every method of `rlora.optax` as a name in optax, where ``opt_type`` is looked up.

``python -m rlora.integrations.tunix config.yaml optimizer_config.opt_type=scaled_adamw`` registers
them and starts tunix's fine-tuning; before another of its pipelines, import this module.
"""

import optax

import rlora.optax

for _name in rlora.optax.__all__:
    if not hasattr(optax, _name):
        setattr(optax, _name, getattr(rlora.optax, _name))


if __name__ == "__main__":
    from absl import app
    from tunix.cli import peft_main

    app.run(peft_main.main)
