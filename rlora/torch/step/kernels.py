"""Torch's own AdamW and SGD over lists of tensors, with their state where torch has it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from rlora.torch.pairing.pairs import local
from rlora.torch.step.dtensors import like_param
from rlora.torch.step.plan import misshapen

Number: TypeAlias = float | Tensor


class Kernel(ABC):
    """The entrywise half of a step: what an optimizer makes of preconditioned gradients.

    Parameters
    ----------
    optimizer : Optimizer
        Its state holds what is carried from step to step.
    group : dict
        The parameter group; its options are read at each step.
    params : sequence of Tensor
        The parameters, which own the state.
    targets : sequence of Tensor
        Tensors to be stepped, in memory as the state is: of a DTensor this process's piece.
    """

    members: Sequence[tuple[Tensor, Tensor]] = ()
    """Each parameter with its stand-in, where the parent's own step is to move that."""

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        params: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        self.optimizer, self.group = optimizer, group
        self.params, self.targets = params, targets

    @abstractmethod
    def prepare(self, directions: Sequence[Tensor]) -> None:
        """Do everything that may fail."""

    @abstractmethod
    def run(self, directions: Sequence[Tensor], lr: Number, weight_decay: float) -> None:
        """Step the targets along gradients of their shapes and strides, which may be changed."""


class WithState(Kernel):
    """A kernel whose state is in ``optimizer.state``, where others may have put something else."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen: list[dict[str, tuple[Any, int]]] = [{} for _ in self.params]
        """The entries of the state that fitted, with the addresses of their memory."""

    def follow(self, names: Sequence[str], *, begin: bool = True) -> list[list[Any]]:
        """Take over the optimizer's state; what is missing there begins at 0, or is None.

        For each name the arrays of all parameters come back.
        """
        arrays: list[list[Any]] = [[] for _ in names]
        for k, p in enumerate(self.params):
            held: dict[str, Any] = self.optimizer.state.setdefault(p, {})
            for name, array in zip(names, arrays, strict=True):
                known = held.get(name)
                if known is None and not begin:
                    array.append(None)
                    continue
                seen, place = self._seen[k].get(name, (None, 0))
                if known is None or known is not seen or known.data_ptr() != place:
                    entry = self._fitting(k, name, known)
                    if entry is not known:
                        held[name] = known = entry
                    compiling = torch.compiler.is_compiling()  # then it has no address
                    self._seen[k][name] = known, 0 if compiling else known.data_ptr()
                array.append(local(known))
        return arrays

    def _fitting(self, k: int, name: str, known: Any) -> Tensor:
        """The entry of a state, or what it becomes where it does not lie as the target does."""
        if name == "step":
            return self._counter(k, known)
        like = self.targets[k]
        if known is None:
            return like_param(self.params[k], torch.zeros_like(like))
        # A tensor stays where it is: `as_tensor` would take it to torch's default device.
        entry = known if isinstance(known, Tensor) else torch.as_tensor(known)
        x = local(entry)
        if x.shape != like.shape:
            raise misshapen(name, known, like)
        if (x.dtype, x.device, x.stride()) == (like.dtype, like.device, like.stride()):
            return entry
        return like_param(self.params[k], torch.empty_like(like).copy_(x))

    def _counter(self, k: int, known: Any) -> Tensor:
        """On the host as torch has it, unless a kernel is to read it on the device."""
        fused = self.group["fused"]
        on_device = self.group["capturable"] or fused
        # The options may have been others: where it was then, to read it may be to wait.
        device = self.targets[k].device if on_device else torch.device("cpu")
        if known is None:
            return torch.zeros((), dtype=counter_dtype(fused), device=device)
        return (
            known.to(device) if isinstance(known, Tensor) else torch.as_tensor(known, device=device)
        )


def counter_dtype(fused: Any = False) -> torch.dtype:
    """The dtype of torch's counters of steps: a bfloat16 one would stop at 256."""
    wide = torch.get_default_dtype() == torch.float64 and not fused  # fused kernels read float32
    return torch.float64 if wide else torch.float32


class AdamW(WithState):
    """Torch's AdamW."""

    def prepare(self, directions: Sequence[Tensor]) -> None:
        if self.targets:
            _check_options(self.group, self.targets[0].device.type)
            if self.targets[0].device.type != "cpu":
                check_capture(self.optimizer)
        names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        self._arrays = self.follow(names if self.group["amsgrad"] else names[:3])

    def run(self, directions: Sequence[Tensor], lr: Number, weight_decay: float) -> None:
        steps, exp_avgs, exp_avg_sqs, *maxima = self._arrays
        group = self.group
        adamw(
            list(self.targets),
            list(directions),
            exp_avgs,
            exp_avg_sqs,
            maxima[0] if maxima else [],
            steps,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=self._fused(),
        )

    def _fused(self) -> bool | None:
        if torch.compiler.is_compiling():  # then fusing is the compiler's business
            return None
        fused: bool | None = self.group["fused"]
        on_cpu = self.targets[0].device.type == "cpu"  # elsewhere counters would have to be there
        if fused is None and on_cpu and has_kernel(self.group, "cpu"):
            return True
        return fused


class SGD(WithState):
    """Torch's SGD, whose momentum begins as the first gradient."""

    def prepare(self, directions: Sequence[Tensor]) -> None:
        self._buffers: list[Any] = []
        if self.group["momentum"]:
            (self._buffers,) = self.follow(["momentum_buffer"], begin=False)

    def run(self, directions: Sequence[Tensor], lr: Number, weight_decay: float) -> None:
        group, buffers = self.group, list(self._buffers)
        sgd(
            list(self.targets),
            list(directions),
            buffers,
            weight_decay=weight_decay,
            momentum=group["momentum"],
            lr=cast("float", lr),  # torch's own SGD hands it tensors too
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            fused=None if torch.compiler.is_compiling() else group["fused"],
        )
        # Without momentum there are none.
        for p, old, new in zip(self.params, self._buffers, buffers, strict=False):
            if old is None:
                self.optimizer.state[p]["momentum_buffer"] = like_param(p, new)


FUSED = ("cpu", "cuda")
"""Types of device on which steps over stacks are tested."""


def has_kernel(group: dict[str, Any], device: str) -> bool:
    """Return whether torch's fused AdamW has the options of a group on a type of device."""
    if device not in FUSED or (device == "cpu" and group.get("capturable")):
        return False
    if group.get("fused") is False or group.get("foreach"):
        return False
    if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
        return False
    lr = group.get("lr")  # of a tensor on the host a graph would keep the value at its capture
    return not (group.get("capturable") and isinstance(lr, Tensor) and lr.device.type == "cpu")


def _check_options(group: dict[str, Any], device: str) -> None:
    """ValueError where torch's kernel would refuse, once other groups have moved."""
    if torch.compiler.is_compiling():  # then it takes both
        return
    if group["capturable"] and device in ("cpu", "mps"):
        msg = (
            f"capturable=True is for parameters on a device that captures graphs, such as cuda, "
            f"got some on {device}; leave it out there"
        )
        raise ValueError(msg)
    rates = (group["lr"], *group["betas"])
    if group["foreach"] and not group["capturable"] and any(isinstance(x, Tensor) for x in rates):
        msg = (
            "foreach=True takes lr and betas that are numbers, got a tensor; give numbers, or "
            "leave foreach out"
        )
        raise ValueError(msg)


def check_capture(optimizer: Any) -> None:
    """Torch's error for a step in a CUDA graph whose counters are on the host."""
    if torch.compiler.is_compiling():  # the compiler makes the graph
        return
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    for name in names:  # torch renamed it
        if check := getattr(optimizer, name, None):
            check()
            return
