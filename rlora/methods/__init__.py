"""One file per published method. No method imports another."""

from rlora.methods.scaled import scaled_adamw, scaled_sgd

__all__ = ["scaled_adamw", "scaled_sgd"]
