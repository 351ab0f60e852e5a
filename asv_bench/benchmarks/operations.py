"""Operations that a torch step dispatches: its cost where each is a kernel's launch."""

from typing import Any

from .common import BACKENDS, METHODS, Suite, attribute, build, titled, warm


class Operations(Suite):
    """Operations that are no mere views, in one warm step. Exact.

    Between the two shapes, of which one has 64 times as many layers, a method that treats all
    layers in one batch does not grow.
    """

    unit = "operations"
    params = (
        tuple(name for name in BACKENDS if name.startswith("torch")),
        METHODS,
        (16,),
        ("1 of 64x64", "64 of 64x64"),
    )

    def prepare(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step = warm(build(backend, method, rank, shape))
        self.count = counter()

    @titled("Operations dispatched in a step")
    def track_operations(self, backend: str, method: str, rank: int, shape: str) -> int:
        with self.count as count:
            self.step()
        return count.operations


def counter() -> Any:
    """A context in which torch counts the operations it dispatches."""
    base = attribute("torch.utils._python_dispatch", "TorchDispatchMode")

    class Counter(base):
        operations = 0

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.operations += not is_view(op)
            return op(*args, **(kwargs or {}))

    return Counter()


def is_view(op: Any) -> bool:
    """Return whether an operation gives another look at a tensor and computes nothing."""
    aliases = [result.alias_info for result in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
