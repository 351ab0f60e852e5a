"""Memory of a step: exact bytes of state, and the process's peak."""

from .common import BACKENDS, METHODS, RANKS, Suite, build, titled, warm

CPU = tuple(name for name in BACKENDS if name in ("numpy", "torch"))
"""JAX keeps the state that NumPy does, and like devices has a pool of its own, which the memory of
the process does not show."""


class StateBytes(Suite):
    """All arrays of the optimizer's state, counters too. Exact: any change is a change."""

    unit = "bytes"
    params = (CPU, METHODS, RANKS, ("4 of 1024x1024",))

    def prepare(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step = build(backend, method, rank, shape)

    @titled("State")
    def track_state_bytes(self, backend: str, method: str, rank: int, shape: str) -> int:
        return self.step.state_bytes()


class PeakMemory(Suite):
    """Resident memory at its highest, frameworks included: compare it with AdamW's row."""

    params = (
        CPU,
        METHODS,
        (64,),
        ("4 of 4096x4096",),
    )

    def prepare(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step = warm(build(backend, method, rank, shape))

    @titled("Peak resident memory of a process that steps")
    def peakmem_step(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step()
