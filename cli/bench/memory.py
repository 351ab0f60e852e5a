"""Costs of a step beside time: memory for a while, and operations of its library.

Of memory the same is meant everywhere: the most bytes that are held at once during a step and were
not before it. New parameters and state count where a library returns them as new arrays.
"""

import gc
import importlib
import os
import tracemalloc
from collections.abc import Callable
from math import prod
from typing import Any

from rlora.core.dispatch import get_backend
from rlora.core.factors import Array


def nbytes(x: Array) -> int:
    """Bytes of an array of any library."""
    known = getattr(x, "nbytes", None)
    if known is not None:
        return int(known)
    # States are real floating-point arrays throughout.
    return int(prod(x.shape) * get_backend(x).xp.finfo(x.dtype).bits) // 8


def traced(step: Callable[[], None]) -> int:
    """Peak of a step, for libraries that report their memory to tracemalloc as NumPy does."""
    gc.collect()
    own = not tracemalloc.is_tracing()
    if own:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if own:
            tracemalloc.stop()
    return peak - before


def of_xla(compiled: Any) -> int | None:
    """Scratch and results that XLA planned for a compiled function; None if unavailable."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes)


def operations(step: Callable[[], None]) -> int:
    """Count the operations that a step hands to torch's dispatcher, views among them."""
    count = 0

    def seen(*_: Any) -> None:
        nonlocal count
        count += 1

    with watching(seen):
        step()
    return count


def watching(seen: Callable[[Any, Any, Any], None]) -> Any:
    """Call back for each operation that torch dispatches: with it, its arguments, its result."""
    mode = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode

    def dispatch(_: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        seen(op, args, result)
        return result

    return type("Watch", (mode,), {"__torch_dispatch__": dispatch})()


def hush_profiler() -> None:
    """Keep torch's profiler from writing to stderr; works only before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    # Of memory that was there before the profiler, its CPU allocator warns in the log of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def of_torch_cpu(step: Callable[[], None]) -> tuple[int, int]:
    """Bytes still held after a step, and the peak during it, from the profiler's allocations."""
    profiler = importlib.import_module("torch.profiler")
    cpu = profiler.ProfilerActivity.CPU
    with profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    # The public table sums allocations up by operator; only the raw events have their order.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return total, peak


def of_torch_cuda(step: Callable[[], None]) -> tuple[int, int]:
    """Bytes still held after a step, and the peak during it, from CUDA's caching allocator."""
    cuda = importlib.import_module("torch.cuda")
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    step()
    return cuda.memory_allocated() - before, cuda.max_memory_allocated() - before
