"""Number of threads of a library, which decides more than any method."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def reserved(threads: int | None) -> Iterator[None]:
    """Tell libraries that are yet to be loaded; XLA makes its pool once, and asks NPROC."""
    if threads is None:
        yield
        return
    if threads < 1:
        msg = f"--threads must be at least 1, got {threads}"
        raise ValueError(msg)
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before


@contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """Pin the threads of the BLAS and OpenMP libraries that are loaded, and torch's."""
    if threads is None:
        yield
        return
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else threads
    with threadpool_limits(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)
