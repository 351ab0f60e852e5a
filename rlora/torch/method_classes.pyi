"""Written by ``python -m rlora.write_stubs``."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlora.torch.pairing.discovery import Pairs
from rlora.torch.optimizers.method_optimizer import MethodOptimizer

__all__ = ['AdaPreLoRA', 'AltLoRA', 'AltLoRAPlus', 'BalancedLoRA', 'FactorMuon', 'GraftAdamW', 'LoFT', 'LoRAFA', 'LoRAMuon', 'LoRAPlus', 'LoRAProAdamW', 'LoRAProSGD', 'LoRARite', 'LoRASB', 'OPLoRA', 'RACLoRA', 'RefLoRA', 'Riemannion', 'ScaledProdigy', 'StableLoRA', 'TrustRegion']

class AdaPreLoRA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class AltLoRA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        b1: float = 0.9,
        weight_decay: float = 0.0,
        first: Literal['A', 'B'] = 'B',
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class AltLoRAPlus(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        first: Literal['A', 'B'] = 'B',
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class BalancedLoRA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class FactorMuon(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        b1: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class GraftAdamW(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoFT(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        first: Literal['A', 'B'] = 'B',
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRAFA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        eps_form: Literal['torch', 'hf'] = 'torch',
        decay: Literal['before', 'after'] = 'before',
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRAMuon(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        b1: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRAPlus(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        ratio: float = 16.0,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRAProAdamW(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        mode: Literal['efficient', 'full'] = 'efficient',
        gauge: Literal['sylvester', 'balanced', 'zero'] = 'sylvester',
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRAProSGD(MethodOptimizer, torch.optim.SGD):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        gauge: Literal['sylvester', 'balanced', 'zero'] = 'sylvester',
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRARite(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        escape: bool = False,
        max_norm: float | None = None,
        max_rms: float | None = None,
        balance: bool = False,
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class LoRASB(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class OPLoRA(MethodOptimizer, torch.optim.SGD):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 0.01,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class RACLoRA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        frozen: Literal['A', 'B'] = 'A',
        adam: bool = False,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        damping: float = 1e-06,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class RefLoRA(MethodOptimizer, torch.optim.SGD):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        form: Literal['matrix', 'scalar'] = 'matrix',
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class Riemannion(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        b1: float = 0.9,
        weight_decay: float = 0.0,
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class ScaledProdigy(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        betas: tuple[float, float] = (0.7, 0.8),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        d0: float = 0.0001,
        damping: float = 0.01,
        damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
        compute_dtype: str | None = None,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class StableLoRA(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        shrink: float = 0.0005,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...

class TrustRegion(MethodOptimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.001,
        *,
        betas: tuple[float, float] = (0.7, 0.8),
        bound: float = 0.01,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        pairs: Pairs = None,
        adapter: str | None = None,
        scaling: float | None = None,
        stochastic_rounding: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None: ...
