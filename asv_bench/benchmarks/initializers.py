"""Spectral starts: a randomised SVD of a gradient or a weight."""

import contextlib

import numpy as np

from .common import BACKENDS, Suite, attribute, leaves, load_backend, titled

INITIALIZERS = ("lora_one", "pissa")


class TimeInitialize(Suite):
    """One matrix, eagerly, as an adapter is initialised layer by layer."""

    param_names = ("backend", "initializer", "rank", "shape")
    params = (BACKENDS, INITIALIZERS, (16,), ("768x768",))

    def prepare(self, backend: str, initializer: str, rank: int, shape: str) -> None:
        self.backend = load_backend(backend)
        self.initialize = attribute("rlora.initializers", initializer)
        size = tuple(map(int, shape.split("x")))
        matrix = np.random.default_rng(0).standard_normal(size, np.float32)
        self.matrix = self.backend.asarray(matrix, "float32", backend.partition(":")[2] or None)
        self.quiet = contextlib.nullcontext
        if "torch" in backend:
            import torch

            torch.set_num_threads(1)
            self.quiet = torch.no_grad
        self.time_initialize(backend, initializer, rank, shape)

    @titled("Initialise")
    def time_initialize(self, backend: str, initializer: str, rank: int, shape: str) -> None:
        with self.quiet():
            start = self.initialize(self.matrix, rank)
        self.backend.synchronize(*leaves(tuple(start)))
