"""The optimizer class of every method that `rlora.torch` has not written by hand.

The stub beside this file says the same to type checkers and editors, which do not run it;
`rlora.write_stubs` writes it.
"""

from typing import Any

from rlora import methods
from rlora.torch.optimizers import scaled
from rlora.torch.optimizers.factory import class_name, optimizer_class

_CLASSES: dict[str, Any] = {
    class_name(name): optimizer_class(getattr(methods, name))
    for name in methods.__all__
    if not hasattr(scaled, class_name(name))
}
globals().update(_CLASSES)
__all__ = list(_CLASSES)
