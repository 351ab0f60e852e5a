"""SD-LoRA for continual learning: frozen directions of past tasks with trainable magnitudes."""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everybody knows

from rlora.core.checks import check_nonnegative
from rlora.core.errors import PairingError


class SDLoRALinear(nn.Module):
    """A frozen linear layer, the directions of past tasks, and the pair of the current one.

    In task t its weight is ``W + Σ_{k<t} α_k B_k A_k / (‖B_k‖ ‖A_k‖) + α_t B A``, with Frobenius
    norms. The pair (A, B) and all magnitudes α_1..α_t are trainable; the rest is frozen.

    Parameters
    ----------
    base : nn.Linear
        The layer to adapt, (m, n); it is frozen in place and kept as ``base``.
    rank : int
        r of every pair, at least 1. A starts uniform as a linear layer's weight does, B at zero.
    alpha : float
        Initial magnitude of a new task, above 0.
    magnitudes : nn.ParameterList, optional
        One list for several layers, which then share one α a task. By default a layer has its own.

    Attributes
    ----------
    lora_A, lora_B : nn.Parameter
        The current pair, (r, n) and (m, r), in the base's dtype but at least float32; so is α.
    past_A, past_B : Tensor
        Past factors, each divided by its norm: buffers (t - 1, r, n) and (t - 1, m, r). A state
        with more tasks than the layer has can be loaded: the layer grows.

    Raises
    ------
    TypeError, ValueError
        When `base` is no nn.Linear, or `rank` or `alpha` is out of its range.

    Notes
    -----
    The current pair is not normalised, as in the authors' code: B = 0 has no direction yet. A
    factor that is still zero when its task ends stays in the stack as zeros, which do nothing.

    A layer with magnitudes of its own sets ``α_t <- α_t ‖B‖ ‖A‖`` when it freezes a pair, and so
    computes what it did before. Shared magnitudes cannot take up the norms of several layers:
    they keep their values, and the function jumps, as in the authors' code.

    That code (github.com/WuYichen-97/SD-Lora-CL, 8bacded) has one α a task for all layers, and
    starts those of past tasks from 0.8 again in every task; rank 10, SGD with momentum 0.9.

    References
    ----------
    Y. Wu, H. Piao, L.-K. Huang, R. Wang, W. Li, H. Pfister, D. Meng, K. Ma, Y. Wei. SD-LoRA:
    Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning. arXiv:2501.13198, 2025.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch.init.sd_lora import SDLoRALinear
    >>> layer = SDLoRALinear(torch.nn.Linear(16, 32), rank=4)
    >>> _ = torch.nn.init.normal_(layer.lora_B)  # a task is learned
    >>> x = torch.randn(5, 16)
    >>> before = layer(x)
    >>> layer.next_task()
    >>> torch.allclose(layer(x), before, atol=1e-4), layer.tasks
    (True, 2)
    """

    past_A: Tensor  # noqa: N815 -- the capitals of the papers
    past_B: Tensor  # noqa: N815

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float = 0.8,
        magnitudes: nn.ParameterList | None = None,
    ) -> None:
        super().__init__()
        _check(base, rank, alpha)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = n, m = base.in_features, base.out_features
        self.rank, self.alpha, self.keeps_function = rank, alpha, magnitudes is None
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.register_buffer("past_A", base.weight.new_zeros((0, rank, n), dtype=dtype))
        self.register_buffer("past_B", base.weight.new_zeros((0, m, rank), dtype=dtype))
        self.magnitudes = nn.ParameterList() if magnitudes is None else magnitudes
        self._new_pair()

    @property
    def tasks(self) -> int:
        """Number of tasks so far, the current one included."""
        return self.past_A.shape[0] + 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m), in the base's dtype; the low-rank terms in at least float32."""
        out: Tensor = self.base(x)
        x = x.to(self.lora_A.dtype)
        low = F.linear(self.magnitudes[self.tasks - 1] * F.linear(x, self.lora_A), self.lora_B)
        if self.tasks > 1:
            A, B, scale = self._past()
            low = low + F.linear(F.linear(x, A) * scale, B)
        return out + low.to(out.dtype)

    def _past(self) -> tuple[Tensor, Tensor, Tensor]:
        """The k past terms as one pair, (k r, n) and (m, k r), and their magnitudes, (k r,)."""
        scale = torch.stack(list(self.magnitudes[: self.tasks - 1]))
        A, B = self.past_A.flatten(0, 1), self.past_B.transpose(0, 1).flatten(1)
        return A, B, scale.repeat_interleave(self.rank)

    def delta(self) -> Tensor:
        """The adapter's change of the weight, (m, n), in the dtype of the factors."""
        delta: Tensor = self.magnitudes[self.tasks - 1] * (self.lora_B @ self.lora_A)
        if self.tasks > 1:
            A, B, scale = self._past()
            delta = delta + (B * scale) @ A
        return delta

    @torch.no_grad()
    def next_task(self) -> None:
        """Freeze the current direction and begin a new pair; it needs a new optimizer."""
        (A, nA), (B, nB) = _normalised(self.lora_A), _normalised(self.lora_B)
        if self.keeps_function:
            self.magnitudes[self.tasks - 1].mul_(nA * nB)
        self.past_A = torch.cat([self.past_A, A[None]])
        self.past_B = torch.cat([self.past_B, B[None]])
        self._new_pair()

    def _new_pair(self) -> None:
        self.lora_A = nn.Parameter(self.past_A.new_empty(self.rank, self.in_features))
        self.lora_B = nn.Parameter(self.past_A.new_zeros(self.out_features, self.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self._grow_magnitudes()

    def _grow_magnitudes(self) -> None:
        """One for each task; a layer that shares the list may have made them already."""
        while len(self.magnitudes) < self.tasks:
            self.magnitudes.append(nn.Parameter(self.past_A.new_tensor(self.alpha)))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A copy of the base with the sum of all terms added to its weight, in the base's dtype."""
        merged, delta = copy.deepcopy(self.base), self.delta()
        merged.weight.copy_(merged.weight.to(delta.dtype) + delta)
        return merged

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Make room for as many tasks as the state has; torch itself refuses other misfits."""
        past = [state_dict.get(f"{prefix}past_{side}") for side in "AB"]
        shapes = [tuple(getattr(x, "shape", ())) for x in past]
        if shapes == [shapes[0][:1] + x.shape[1:] for x in (self.past_A, self.past_B)]:
            room = (0, 0, 0, 0, 0, max(shapes[0][0] + 1 - self.tasks, 0))
            self.past_A, self.past_B = F.pad(self.past_A, room), F.pad(self.past_B, room)
            self._grow_magnitudes()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def add_sd_lora(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str],
    *,
    alpha: float = 0.8,
    share_magnitudes: bool = False,
) -> list[SDLoRALinear]:
    """Replace linear layers of a model, in place, by `SDLoRALinear`.

    Parameters
    ----------
    model : nn.Module
        Only the layers that are replaced get frozen; freeze the rest of the backbone yourself.
    rank, alpha
        As in `SDLoRALinear`.
    targets : str or sequence of str
        As in PEFT: a regular expression for whole names of modules, or the ends of names.
    share_magnitudes : bool
        One α a task for all layers, as in the authors' code, instead of one a layer.

    Returns
    -------
    list of SDLoRALinear
        In the model's order. Call `SDLoRALinear.next_task` of each when a task is over.

    Raises
    ------
    PairingError, TypeError
        When no module has such a name, or one that has is no nn.Linear; nothing is replaced then.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> from rlora.torch.init.sd_lora import add_sd_lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> layers = add_sd_lora(model, 2, ["0"])
    >>> print(rlora.torch.find_pairs(model))
    1 pair, 3 unpaired parameters, 0 refused
      pair 8 x 8, rank 2: 1 time, 0
      unpaired, so updated without preconditioning: 0.magnitudes.0, 2.weight, 2.bias
    """
    named = dict(list(model.named_modules(remove_duplicate=False))[1:])  # tied ones by all names
    ends = "" if isinstance(targets, str) else "|".join(map(re.escape, targets))
    pattern = targets if isinstance(targets, str) else rf"(.*\.)?({ends})"
    found = {name: module for name, module in named.items() if re.fullmatch(pattern, name)}
    if not found:
        linear = [name for name, module in named.items() if isinstance(module, nn.Linear)]
        msg = f"no module has a name like {targets!r}; there are nn.Linear {linear[:8]}"
        raise PairingError(msg)
    for name, module in found.items():
        _check(module, rank, alpha, f"the module {name!r}")
    shared = nn.ParameterList() if share_magnitudes else None
    made = {m: SDLoRALinear(m, rank, alpha=alpha, magnitudes=shared) for m in found.values()}
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    return list(made.values())


def parameter_groups(
    model: nn.Module, lr: float, *, magnitude_lr: float | None = None, rest_lr: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters of a model with SD-LoRA layers, as groups for an optimizer.

    Parameters
    ----------
    model : nn.Module
        With at least one `SDLoRALinear`.
    lr, magnitude_lr, rest_lr : float
        Learning rates, at least 0, of the current pairs, of the magnitudes, and of what else is
        trainable, such as a head; the latter two by default `lr`.

    Returns
    -------
    list of dict
        Groups "pairs", "magnitudes" and "rest" (key ``name``), with named parameters. Magnitudes
        have no weight decay: it would shrink what past tasks learned.

    Raises
    ------
    PairingError, ValueError, TypeError
        When the model has no SD-LoRA layer, or a learning rate is out of its range.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> from rlora.torch.init.sd_lora import SDLoRALinear, parameter_groups
    >>> model = torch.nn.Sequential(SDLoRALinear(torch.nn.Linear(8, 8), 2), torch.nn.Linear(8, 2))
    >>> groups = parameter_groups(model, 0.1, rest_lr=0.01)
    >>> optimizer = rlora.torch.ScaledSGD(groups, momentum=0.9, damping_mode="covariant")
    >>> len(optimizer.report)
    1
    """
    layers = [module for module in model.modules() if isinstance(module, SDLoRALinear)]
    if not layers:
        msg = f"{type(model).__name__} has no SDLoRALinear; call add_sd_lora(model, ...) first"
        raise PairingError(msg)
    role = {id(p): "magnitudes" for layer in layers for p in layer.magnitudes}
    role |= {id(p): "pairs" for layer in layers for p in (layer.lora_A, layer.lora_B)}
    groups: dict[str, dict[str, Any]] = {
        "pairs": {"lr": lr},
        "magnitudes": {"lr": lr if magnitude_lr is None else magnitude_lr, "weight_decay": 0.0},
        "rest": {"lr": lr if rest_lr is None else rest_lr},
    }
    for kind, group in groups.items():
        check_nonnegative(f"the lr of {kind}", group["lr"])
        group |= {"name": kind, "params": []}
    for name, p in model.named_parameters():
        kind = role.get(id(p), "rest")
        # The frozen partner of a trainable factor is in: its Gram preconditions the other.
        if p.requires_grad or kind == "pairs":
            groups[kind]["params"].append((name, p))
    return [group for group in groups.values() if group["params"]]


def _check(base: Any, rank: Any, alpha: Any, what: str = "base") -> None:
    if not isinstance(base, nn.Linear):
        msg = f"{what} must be an nn.Linear, got {type(base).__name__}"
        raise TypeError(msg)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        msg = f"rank must be an integer of at least 1, got {rank!r}"
        raise ValueError(msg)
    check_nonnegative("alpha", alpha)
    if alpha == 0:
        msg = "alpha must be above 0: with B = 0 nothing would ever get a gradient"
        raise ValueError(msg)


def _normalised(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A factor of norm 1 and the norm it had; zeros stay zeros."""
    norm = torch.linalg.norm(factor)
    return factor / torch.where(norm > 0, norm, 1.0), norm
