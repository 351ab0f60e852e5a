"""Time that ``import rlora`` adds to a program that has its array library already."""

import importlib.util

from .common import Suite, skip, titled


class Import(Suite):
    """In a new process each time."""

    number = 1
    repeat = (5, 9, 20.0)
    param_names = ("module",)
    params = (("rlora", "rlora.torch"),)

    def prepare(self, module: str) -> None:
        if importlib.util.find_spec(module.replace("rlora.", "")) is None:
            skip(f"{module} needs what is not installed")

    @titled("Import")
    def timeraw_import(self, module: str) -> tuple[str, str]:
        known = {"rlora": "import numpy", "rlora.torch": "import numpy, torch"}
        return f"import {module}", known[module]
