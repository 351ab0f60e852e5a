"""Conditions of a timing, without anything that says whose machine it was.

No host name, no user, no folder, no environment variable: records are made to be published.
"""

import importlib
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from threadpoolctl import threadpool_info

BASE: Final = ("numpy", "array-api-compat", "click", "rich", "threadpoolctl", "safetensors")
EXTRAS: Final = ("torch", "jax", "jaxlib", "optax", "cupy", "peft", "transformers")


def environment() -> dict[str, Any]:
    """Versions of what takes part, the processor, its load, and the BLAS libraries."""
    loaded = [name for name in EXTRAS if name in sys.modules]
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpus": cpu_count(),
        "memory_bytes": _memory(),
        "versions": {name: found for name, found in versions((*BASE, *loaded)).items() if found},
        "accelerators": _accelerators(),
        "blas": blas(),
        "load_average": load_average(),
    }


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions by package; None for what is not installed."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # CuPy's wheels are called after their CUDA version.
        return getattr(sys.modules.get(name), "__version__", None)


def cpu_model() -> str:
    """Name the processor as the kernel does, or its architecture."""
    return _of_proc("cpuinfo", r"^model name\s*:\s*(.+)$") or platform.machine()


def cpu_count() -> int:
    """Logical processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def blas() -> list[dict[str, Any]]:
    """BLAS and OpenMP libraries that this process has loaded, with their threads."""
    return [
        {"library": p["internal_api"], "version": p["version"], "threads": p["num_threads"]}
        for p in threadpool_info()
    ]


def _accelerators() -> list[str]:
    """Names of the devices that a loaded library sees; one is asked, as others see the same."""
    torch, jax, cupy = map(sys.modules.get, ("torch", "jax", "cupy"))
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if jax is not None and jax.default_backend() != "cpu":
        return [device.device_kind for device in jax.devices()]
    if cupy is not None and cupy.cuda.is_available():
        cuda = cupy.cuda.runtime
        counted = range(cuda.getDeviceCount())
        return [cuda.getDeviceProperties(i)["name"].decode() for i in counted]
    return []


def _memory() -> int | None:
    try:
        return int(importlib.import_module("psutil").virtual_memory().total)
    except ImportError:
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Bytes that new arrays can take without swapping; None where that is unknown."""
    try:
        return int(importlib.import_module("psutil").virtual_memory().available)
    except ImportError:
        found = _of_proc("meminfo", r"^MemAvailable:\s*(\d+) kB$")
        return int(found) * 1024 if found else None


def _of_proc(name: str, pattern: str) -> str | None:
    """Find what a pattern has in parentheses, in a file of Linux's /proc."""
    try:
        found = re.search(pattern, Path("/proc", name).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def load_average() -> list[float] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes; None where nobody counts."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
