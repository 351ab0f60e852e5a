"""One base class; every kind is also the builtin that a caller would think of first."""


class RLoraError(Exception):
    """Base class of every error that rlora raises on purpose."""


class ShapeError(RLoraError, ValueError):
    """Arrays whose shapes do not fit together."""


class NamespaceError(RLoraError, TypeError):
    """Arrays of two libraries or devices in one call, or of a dtype without this arithmetic."""


class PairingError(RLoraError, ValueError):
    """Parameters that do not form LoRA pairs, or gradients that do not match the parameters."""


class BackendError(RLoraError, ImportError):
    """A backend that is not installed, has no device here, or cannot do what was asked."""


def not_installed(name: str | None, extra: str) -> BackendError:
    """The error for a missing library: it names the extra of rlora that brings it."""
    return BackendError(f"{name} is not installed: pip install 'rlora[{extra}]'", name=name)


class ShardingError(RLoraError, RuntimeError):
    """Parameters that a sharding scheme has cut or flattened beyond what an r x r Gram can see."""


class NumericsError(RLoraError, ArithmeticError):
    """A result that is not finite where the method promises one."""
