"""The asv suite of rlora: one file for each subject, one base class in `common`."""

import os

# Before NumPy and the frameworks are loaded: one thread, so that runs of different machines and
# days compare. What the caller has set stays. JAX keeps its own threads: held to one by
# xla_cpu_multi_thread_eigen=false, compiled steps of the CPU client wait for each other for ever.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
