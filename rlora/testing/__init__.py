"""For tests of methods and backends, here and elsewhere: a problem, a comparison, the contract.

>>> import rlora.testing
>>> from rlora.backends import get
>>> rlora.testing.check_method(lambda: rlora.scaled_sgd(), get("numpy"))
"""

from rlora.testing.comparisons import MethodFactory, check_backend
from rlora.testing.contract import CONTRACT, check_method
from rlora.testing.growth import Growth, GrowthCase, growth, growths
from rlora.testing.invariance import GAUGES, change_of_basis, invariance
from rlora.testing.problems import Problem, assert_close, make_problem, run

__all__ = [
    "CONTRACT",
    "GAUGES",
    "Growth",
    "GrowthCase",
    "MethodFactory",
    "Problem",
    "assert_close",
    "change_of_basis",
    "check_backend",
    "check_method",
    "growth",
    "growths",
    "invariance",
    "make_problem",
    "run",
]
