"""Normalisation of hyperparameters in every function that takes them."""

import inspect
from fractions import Fraction

import numpy as np
import pytest

import rlora
from rlora import initializers, methods
from rlora.core.checks import plain_number

every = pytest.mark.parametrize("name", methods.__all__)


@every
@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction], ids=lambda x: x.__name__)
def test_a_number_of_any_library_has_no_say_in_a_dtype(name, number):
    """A NumPy double beside float32 arrays would widen the state, and so the next step."""
    method = getattr(methods, name)
    parameters = inspect.signature(method).parameters.values()
    # A little of everything, and exact in all the kinds of numbers.
    given = {p.name: 2.0**-6 + 0.5 for p in parameters if isinstance(p.default, float)}
    rng = np.random.default_rng(0)
    pair = rlora.Factors(*(rng.normal(size=s).astype(np.float32) for s in ((3, 7), (5, 3))))
    runs = []
    for kind in (float, number):
        transform = method(**{k: kind(v) for k, v in given.items()})
        params, state = pair, transform.init(pair, kind(2.0))
        for _ in range(2):
            params, state = rlora.step(transform, params, pair, state, 0.125)
        runs.append({**rlora.flatten_state(state), "A": params.A, "B": params.B})
    for key, x in runs[0].items():
        assert runs[1][key].dtype == x.dtype, key
        np.testing.assert_array_equal(runs[1][key], x, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in initializers.__all__
        if name not in ("Start", "goat_scaling", "randomized_svd")
    ],
)
def test_starts_too(name):
    start = getattr(initializers, name)
    options = {
        p.name: 0.5
        for p in inspect.signature(start).parameters.values()
        if p.name in ("scaling", "lr", "gamma", "alpha", "rho", "size")
    }
    if name == "goat":
        options["experts"] = 2
    if name == "eva":
        options["out_features"] = 5
    W = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    plain, other = (
        start(W, rank, **{k: kind(v) if v == 0.5 else v for k, v in options.items()})
        for kind, rank in ((float, 2), (np.float64, np.int64(2)))
    )
    for x, y in zip(plain.params, other.params, strict=True):
        assert x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x, y)


@every
def test_betas_are_called_by_their_names_here(name):
    method = getattr(methods, name)
    rates = [b for b in ("b1", "b2") if b in inspect.signature(method).parameters]
    with pytest.raises(TypeError, match=" and ".join(f"{b}=..." for b in rates) or "unexpected"):
        method(betas=(0.9, 0.99))


@every
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "0.1", None])
def test_a_number_out_of_range_is_refused_by_name(name, value):
    method = getattr(methods, name)
    for p in inspect.signature(method).parameters.values():
        if not isinstance(p.default, float) or (value is None and "None" in str(p.annotation)):
            continue
        with pytest.raises((ValueError, TypeError), match=p.name):
            method(**{p.name: value})


def test_plain_numbers():
    for given, plain in (
        (np.float32(0.5), 0.5), (np.int64(3), 3), (Fraction(1, 4), 0.25), ((np.float64(0.5), 1), (0.5, 1)),
        (np.bool_(True), True),
    ):  # fmt: skip
        assert plain_number(given) == plain
        assert type(plain_number(given)) is type(plain)
    pair = rlora.Factors(np.float64(1.0), None)
    for other in (None, True, "1", np.ones(2), pair, [np.float64(1.0)]):
        assert plain_number(other) is other
