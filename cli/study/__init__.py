"""`rlora study`: which optimizer is best on real models, and at which learning rate."""

from .command import study

__all__ = ["study"]
