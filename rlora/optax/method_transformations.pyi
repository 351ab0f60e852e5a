"""Written by ``python -m rlora.write_stubs``."""

from typing import Literal

import optax

from rlora.core.transform import Transform
from rlora.optax.param_tree import Hold
from rlora.pairing import Source

__all__ = ['adapre_lora', 'alt_lora', 'alt_lora_plus', 'balanced_lora', 'factor_muon', 'graft_adamw', 'loft', 'lora_fa', 'lora_muon', 'lora_plus', 'lora_pro_adamw', 'lora_pro_sgd', 'lora_rite', 'lora_sb', 'op_lora', 'rac_lora', 'ref_lora', 'riemannion', 'scaled_adamw', 'scaled_prodigy', 'scaled_sgd', 'stable_lora', 'trust_region']

def adapre_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def alt_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    first: Literal['A', 'B'] = 'B',
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def alt_lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    first: Literal['A', 'B'] = 'B',
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def balanced_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    inner: Transform | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs: ...

def factor_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def graft_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    inner: Transform | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs: ...

def loft(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    first: Literal['A', 'B'] = 'B',
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
    eps_form: Literal['torch', 'hf'] = 'torch',
    decay: Literal['before', 'after'] = 'before',
) -> optax.GradientTransformationExtraArgs: ...

def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.95,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    inner: Transform | None = None,
    ratio: float = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs: ...

def lora_pro_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    mode: Literal['efficient', 'full'] = 'efficient',
    gauge: Literal['sylvester', 'balanced', 'zero'] = 'sylvester',
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def lora_pro_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    gauge: Literal['sylvester', 'balanced', 'zero'] = 'sylvester',
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-06,
    weight_decay: float = 0.0,
    escape: bool = False,
    max_norm: float | None = None,
    max_rms: float | None = None,
    balance: bool = False,
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def lora_sb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def op_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    damping: float = 0.01,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def rac_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    frozen: Literal['A', 'B'] = 'A',
    adam: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    damping: float = 1e-06,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'relative',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def ref_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    form: Literal['matrix', 'scalar'] = 'matrix',
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def riemannion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-08,
    weight_decay: float = 0.01,
    damping: float = 0.01,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
    placement: Literal['before', 'after', 'both'] = 'both',
    order: Literal['jacobi', 'gauss_seidel'] = 'jacobi',
    compute_dtype: str | None = None,
    eps_form: Literal['torch', 'hf'] = 'torch',
    bias_correction: bool = True,
    decay: Literal['before', 'after'] = 'before',
) -> optax.GradientTransformationExtraArgs: ...

def scaled_prodigy(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-08,
    weight_decay: float = 0.01,
    d0: float = 0.0001,
    damping: float = 0.01,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def scaled_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    damping: float = 0.0001,
    damping_mode: Literal['relative', 'absolute', 'covariant'] = 'covariant',
    order: Literal['jacobi', 'gauss_seidel'] = 'jacobi',
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs: ...

def stable_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    inner: Transform | None = None,
    shrink: float = 0.0005,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs: ...

def trust_region(
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
    inner: Transform | None = None,
    bound: float = 0.01,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs: ...
