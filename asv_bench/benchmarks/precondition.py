"""The preconditioner alone: Grams, inverses and products, without moments."""

from typing import Any

from .common import BACKENDS, LR, RANKS, Pure, Shell, Suite, attribute, titled, warm


class TimePrecondition(Suite):
    """The direction of scaled SGD; in torch a step of plain SGD on preconditioned gradients."""

    param_names = ("backend", "rank", "shape")
    params = (BACKENDS, RANKS, ("4 of 1024x1024",))

    def prepare(self, backend: str, rank: int, shape: str) -> None:
        make = torch_sgd if backend.startswith("torch") else direction
        self.step = warm(make(backend, rank, shape))

    @titled("Precondition")
    def time_precondition(self, backend: str, rank: int, shape: str) -> None:
        self.step()


def torch_sgd(backend: str, rank: int, shape: str) -> Shell:
    sgd, precondition = attribute("torch.optim", "SGD"), attribute("rlora.torch", "precondition")
    return Shell(backend, rank, shape, lambda model: precondition(sgd)(model, lr=LR))


def direction(backend: str, rank: int, shape: str) -> Pure:
    method = attribute("rlora", "scaled_sgd")()

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        towards, _ = method.update(grads, state[0], params)
        return params, (state[0], towards)

    # The direction is handed on as state, so that it is waited for.
    return Pure(backend, rank, shape, lambda params: (method.init(params), params), step)
