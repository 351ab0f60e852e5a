"""DeepSpeed's ZeRO 1 to 3: steps on whole factors from within the engine's own step.

ZeRO gives an optimizer flat partitions in place of its parameters. `ZeroOptimizer` takes those, and
gathers from them what the optimizer of `rlora.torch` steps: every factor, whole, on every process.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlora import ShardingError
from rlora.torch.optimizers.lora_optimizer import LoRAOptimizer
from rlora.torch.pairing.pairs import groups_by_id


class ZeroOptimizer(Optimizer):
    """An optimizer of `rlora.torch` in the form that DeepSpeed's engine can partition.

    Parameters
    ----------
    optimizer : Optimizer
        Of `rlora.torch`, built over the model while its factors are whole: before
        ``deepspeed.initialize`` or ``accelerator.prepare``. Its parameters become float32 copies;
        at ZeRO's stage 0 and without DeepSpeed they are the model's own again, rounded as it does.

    Raises
    ------
    TypeError
        For an optimizer that knows no pairs, which DeepSpeed takes as it is.
    ShardingError
        When two parameters share memory, or a pair lies in two groups, which ZeRO steps in turn;
        when accelerate is set to offload optimizers by a class of DeepSpeed's in place of this one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, LoRAOptimizer):
            msg = (
                f"expected an optimizer of rlora.torch, got {type(optimizer).__name__}: give that "
                f"to DeepSpeed as it is"
            )
            raise TypeError(msg)
        self.inner = optimizer
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._check()
        # DeepSpeed drops empty groups, and a schedule made before would miss them.
        groups = [
            {**_options(group), "params": params, "index": i}
            for i, (group, params) in enumerate(
                zip(optimizer.param_groups, self._params, strict=True)
            )
            if params
        ]
        super().__init__(groups, dict(optimizer.defaults))
        for group in optimizer.param_groups:
            group["params"] = [
                torch.nn.Parameter(p.detach().to(torch.float32, copy=True), p.requires_grad)
                for p in group["params"]
            ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups that come later: the optimizer inside has none for them.

        Raises
        ------
        ShardingError
            After construction.
        """
        if "index" not in param_group:
            msg = (
                f"a group of {len(list(param_group['params']))} parameters came after "
                f"ZeroOptimizer; add it to the optimizer of rlora.torch, and build this one then"
            )
            raise ShardingError(msg)
        super().add_param_group(param_group)

    def _check(self) -> None:
        if _is_replaced():
            msg = (
                "accelerate is set to offload the optimizer and would take DeepSpeed's own Adam in "
                'place of this one; set "zero_force_ds_cpu_optimizer": false in DeepSpeed\'s config'
            )
            raise ShardingError(msg)
        filled = [p for params in self._params for p in params if p.numel()]
        if len({p.data_ptr() for p in filled}) < len(filled):
            msg = "two of the parameters share memory, and ZeRO would tear them apart; use DDP"
            raise ShardingError(msg)
        group_of = groups_by_id(self.inner.param_groups)
        for pair in self.inner._pairs:
            if len({group_of[id(p)] for p in pair.moved}) > 1:
                msg = (
                    f"factors {tuple(pair.A.shape)} and {tuple(pair.B.shape)} of a pair lie in two "
                    f"parameter groups, and ZeRO steps one group after the other; put them in one"
                )
                raise ShardingError(msg)

    def _follow(self) -> None:
        """Bring the copies to the device that the engine has brought the model to."""
        for params, group in zip(self._params, self.inner.param_groups, strict=True):
            for p, copy in zip(params, group["params"], strict=True):
                if copy.device != p.device:
                    copy.data = copy.data.to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Gather masters and gradients of the groups that the engine steps, and step them.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, with gradients enabled.

        Returns
        -------
        The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        flats, originals, copies = [], list[Any](), list[tuple[Any, Tensor]]()
        for group in self.param_groups:
            i = group["index"]
            self.inner.param_groups[i].update(_options(group))
            if not group["params"]:  # ZeRO-3 steps another group now
                continue
            copies += zip(self._params[i], self.inner.param_groups[i]["params"], strict=True)
            originals += self._params[i]
            flats += group["params"]
        if not flats:
            return loss
        if all(flat is p for flat, p in zip(flats, originals, strict=False)):
            _step_whole(self.inner, copies)
        else:
            moved = [both for both in copies if both[1].requires_grad]  # frozen ones stay
            _step_partitions(self.inner, flats, moved)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Give the state of whole factors, equal on every process."""
        for group in self.param_groups:  # a schedule has moved since the step
            self.inner.param_groups[group["index"]].update(_options(group))
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or the state of the same optimizer without DeepSpeed.

        Parameters
        ----------
        state_dict : dict
            Of the optimizer inside.
        """
        self._follow()  # torch puts a state where its parameter is
        self.inner.load_state_dict(state_dict)
        for group in self.param_groups:
            group.update(_options(self.inner.param_groups[group["index"]]))


def under_zero(optimizer: Optimizer) -> Optimizer:
    """The optimizer in a `ZeroOptimizer` where accelerate is set to use DeepSpeed.

    Parameters
    ----------
    optimizer : Optimizer
        Of `rlora.torch`.

    Returns
    -------
    Optimizer
        Itself, without DeepSpeed.
    """
    return ZeroOptimizer(optimizer) if _uses_deepspeed() else optimizer


def _uses_deepspeed() -> bool:
    """True where accelerate is set to; trainers give a factory nothing else that would tell."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _is_replaced() -> bool:
    """True where `Accelerator.prepare` maps every optimizer to one of DeepSpeed's for CPUs."""
    if not _uses_deepspeed():
        return False
    from accelerate.state import AcceleratorState, is_initialized

    plugin = AcceleratorState().deepspeed_plugin if is_initialized() else None
    config = plugin.deepspeed_config if plugin else {}
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    forced = config.get("zero_force_ds_cpu_optimizer", True)
    return bool(forced and offload.get("device", "none") not in (None, "none"))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names", "index")}


def _step_whole(optimizer: Optimizer, copies: list[tuple[Any, Tensor]]) -> None:
    """Step the parameters themselves: under ZeRO's stage 0, or without DeepSpeed."""
    for p, copy in copies:
        copy.data, copy.grad = p.data, p.grad
    optimizer.step()
    for _, copy in copies:
        copy.grad = None


def _step_partitions(
    optimizer: Optimizer, flats: list[Any], moved: list[tuple[Any, Tensor]]
) -> None:
    """Step what the partitions are made of, on copies, and write the own part of each back."""
    from deepspeed.utils import safe_get_full_fp32_param

    _check_all_here(flats, moved)
    for p, copy in moved:
        copy.copy_(safe_get_full_fp32_param(p))
    masters = [flat.detach().clone() for flat in flats]
    try:
        for flat in flats:  # gradients are gathered in the place of the masters
            flat.copy_(flat.grad)
        for p, copy in moved:
            copy.grad = safe_get_full_fp32_param(p).float()
    finally:
        for flat, master in zip(flats, masters, strict=True):
            flat.copy_(master)
    optimizer.step()  # what refuses does so before anything has moved
    for p, copy in moved:
        _set(p, copy)
        copy.grad = None


def _check_all_here(flats: list[Any], moved: list[tuple[Any, Tensor]]) -> None:
    """ShardingError when stage 3 has cut a group, which it then steps piece by piece."""
    from deepspeed.utils import safe_get_local_fp32_param

    parts = [safe_get_local_fp32_param(p).numel() for p, _ in moved if hasattr(p, "ds_id")]
    if sum(parts) > sum(flat.numel() for flat in flats):
        msg = (
            f"DeepSpeed steps {sum(flat.numel() for flat in flats)} of the {sum(parts)} numbers "
            f"that this process has of a group; raise zero_optimization.sub_group_size"
        )
        raise ShardingError(msg)


def _set(p: Any, whole: Tensor) -> None:
    """Write this process's part of a parameter into its float32 master."""
    from deepspeed import comm
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    if not hasattr(p, "ds_id"):
        safe_set_full_fp32_param(p, whole)
        return
    # The last part is padded, which DeepSpeed's own function for whole tensors does not allow for.
    part = torch.zeros_like(safe_get_local_fp32_param(p))
    begin = comm.get_rank(p.ds_process_group) * part.numel()
    mine = whole.flatten()[begin : begin + part.numel()]
    part[: mine.numel()] = mine
    safe_set_local_fp32_param(p, part)
