"""Finding backends: available, missing, broken, from another package, or deleted."""

import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import rlora
import rlora.backends
from rlora import BackendError, Factors
from rlora.core import dispatch
from rlora.core.backend import Backend
from rlora.testing import CONTRACT, assert_close, check_backend, make_problem


def test_available_says_version_and_devices_or_why_not():
    info = rlora.backends.available()
    assert list(info)[:4] == ["numpy", "torch", "jax", "cupy"]
    assert info["numpy"].version == np.__version__
    assert "cpu" in info["torch"].devices
    for backend in info.values():
        assert backend.usable == (backend.why_not is None)
        assert backend.devices if backend.usable else backend.why_not


def test_cupy_without_a_device_says_so():
    info = rlora.backends.available()["cupy"]
    if info.usable:
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BackendError, match=r"CuPy|cupy"):
        rlora.backends.get("cupy")


@pytest.fixture
def pretended_cupy(monkeypatch):
    """Make the class of backends/cupy.py on NumPy with two devices, and a list of what they saw."""
    seen = []
    kind = type(
        "array", (np.ndarray,), {"device": SimpleNamespace(synchronize=lambda: seen.append("wait"))}
    )
    runtime = SimpleNamespace(getDeviceCount=lambda: 2, CUDARuntimeError=OSError)
    cupy = ModuleType("cupy")
    cupy.linalg, cupy.tril, cupy.asnumpy = np.linalg, np.tril, np.asarray
    cupy.ndarray, cupy.asarray = kind, lambda x, dtype: np.asarray(x, dtype).view(kind)
    cupy.cuda = SimpleNamespace(
        runtime=runtime, Device=lambda i: contextlib.nullcontext(seen.append(i))
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    file = Path(rlora.backends.__file__).with_name("cupy.py")
    spec = importlib.util.spec_from_file_location("pretended", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BACKEND(rlora.backends.get("numpy").xp, "cupy"), runtime, seen


def test_the_algebra_of_cupy(pretended_cupy):
    """Done in another way than by the generic class; 1e-13 is of a condition of 30."""
    backend, _, _ = pretended_cupy
    X = np.random.default_rng(0).normal(size=(5, 4, 9))
    S = X @ X.mT
    assert_close(backend.spd_power(S, -1.0), np.linalg.inv(S), rtol=1e-13)
    for power in (-0.5, 0.5):
        expected = Backend.spd_power(backend, S, power)
        assert_close(backend.spd_power(S, power), expected, rtol=1e-13)
    for upper in (False, True):
        W = backend.inverse_cholesky(S, upper=upper)
        assert_close(W, Backend.inverse_cholesky(backend, S, upper=upper), rtol=1e-13)


def test_the_devices_of_cupy(pretended_cupy, monkeypatch):
    backend, runtime, seen = pretended_cupy
    assert backend.devices() == ["cuda:0", "cuda:1"]
    arrays = [backend.asarray(np.ones(3), device=x) for x in (None, "cuda", "cuda:0", "cuda:1")]
    assert seen == [0, 0, 0, 1]
    assert {x.dtype for x in arrays} == {np.dtype("float32")}
    with pytest.raises(ValueError, match="no device 'cuda:2' here; it has cuda:0, cuda:1"):
        backend.asarray(np.ones(3), device="cuda:2")
    backend.synchronize(*arrays)
    assert seen[4:] == ["wait"] * 4
    runtime.getDeviceCount = lambda: 0
    with pytest.raises(BackendError, match="finds no CUDA device; use another"):
        backend.devices()

    def fail():
        raise OSError("no driver")

    runtime.getDeviceCount = fail
    with pytest.raises(BackendError, match=r"finds no CUDA device \(no driver\)"):
        backend.devices()


def test_unknown_backend():
    with pytest.raises(BackendError, match="nonesuch is not installed; there are numpy, "):
        rlora.backends.get("nonesuch")


def test_a_known_library_that_is_missing_comes_with_its_extra(monkeypatch):
    monkeypatch.setattr(rlora.backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"torch is not installed: pip install 'rlora\[torch\]'"):
        rlora.backends.get("torch")


def test_any_array_api_namespace_goes_through_the_generic_class():
    backend = rlora.backends.get("array_api_strict")
    assert type(backend) is Backend
    assert backend.name == "array_api_strict"


def in_fresh_python(code, *, path=None):
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def plugin(tmp_path):
    """Write a package with a backend entry point, as pip would install it."""

    def write(source, name="numpy"):
        (tmp_path / "tinyplugin.py").write_text(textwrap.dedent(source))
        info = tmp_path / "tinyplugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyplugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rlora.backends]\n{name} = tinyplugin:Tiny\n")
        return tmp_path

    return write


TINY = """
    from rlora.core.backend import Backend

    class Tiny(Backend):
        calls = 0

        def spd_power(self, S, power):
            Tiny.calls += 1
            return super().spd_power(S, power)
"""


def test_plugin_is_found_by_the_type_of_the_arrays(plugin):
    out = in_fresh_python(
        """
        import sys
        sys.path.insert(0, ".")
        import array_api_strict as xp, rlora, rlora.backends
        pair = rlora.Factors(xp.ones((2, 3)), xp.ones((4, 2)))
        assert "tinyplugin" not in sys.modules
        method = rlora.scaled_sgd(damping_mode="relative")  # one inverse
        method.update(pair, method.init(pair), pair)
        import tinyplugin
        print(tinyplugin.Tiny.calls, rlora.backends.available()["array_api_strict"].usable)
        """,
        path=plugin(TINY, "array_api_strict"),
    )
    assert out.split() == ["1", "True"]


@pytest.mark.parametrize("source", ["raise RuntimeError('broken on purpose')", "Tiny = 3"])
def test_broken_plugin_warns_and_breaks_nothing(plugin, source):
    out = in_fresh_python(
        """
        import sys, warnings
        sys.path.insert(0, ".")
        import numpy as np, rlora, rlora.backends
        pair = rlora.Factors(np.ones((2, 3)), np.ones((4, 2)))
        method = rlora.scaled_sgd()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.update(pair, method.init(pair), pair)
        print(len(caught), str(caught[0].message).count("goes on with its generic one"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(rlora.backends.available()["numpy"].usable)
        """,
        path=plugin(source),
    )
    assert out.split() == ["1", "1", "True"]


def test_plugins_are_entry_points_of_the_documented_group():
    assert dispatch.ENTRY_POINT_GROUP == "rlora.backends"
    found = importlib.metadata.entry_points(group=dispatch.ENTRY_POINT_GROUP)
    assert dispatch.plugins() == {point.name: point for point in found}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_without_its_file_everything_still_works(library, monkeypatch):
    """The deletion test: the contract holds with any file of backends/ hidden."""
    fast = rlora.backends.get(library)
    of_namespace = dispatch.backend_for_namespace
    monkeypatch.setattr(dispatch, "_by_type", {})
    hidden = Backend(fast.xp, library)
    hidden.asarray, hidden.to_numpy = fast.asarray, fast.to_numpy  # making arrays does not count
    monkeypatch.setattr(
        dispatch,
        "backend_for_namespace",
        lambda xp: hidden if dispatch.namespace_name(xp) == library else of_namespace(xp),
    )
    problem = make_problem().on(hidden)
    assert dispatch.get_backend(problem.params.A) is hidden
    for check in CONTRACT:
        for make in (rlora.scaled_sgd, lambda: rlora.scaled_adamw(placement="both")):
            check(make, hidden)


def test_results_are_those_of_numpy(backend):
    if backend.name == "numpy":
        pytest.skip("NumPy's own are compared with those of the generic class, array_api_strict's")
    check_backend(backend)


WRONG = {
    "spd_power": lambda right: lambda S, power: right(S, power) / 2,
    "add_scaled": lambda right: lambda X, D, c, donate=False: right(X, D, c / 2),
    "adam": lambda right: (
        lambda M, V, G, numbers: right(M, V, G, numbers._replace(eps=[1.0] * len(G)))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_backend_that_computes_something_else_is_found(monkeypatch, name):
    """Half an inverse, half a learning rate, another eps."""
    strict = rlora.backends.get("array_api_strict")
    assert dispatch.get_backend(strict.asarray(np.ones(1))) is strict
    monkeypatch.setattr(strict, name, WRONG[name](getattr(strict, name)))
    with pytest.raises(AssertionError, match="beside NumPy's: differ by"):
        check_backend(strict)


def test_torch_optimizer_without_the_torch_backend(monkeypatch):
    import torch

    import rlora.torch

    def moved():
        torch.manual_seed(0)
        A, B = (torch.nn.Parameter(torch.randn(*s)) for s in ((4, 9), (7, 4)))
        optimizer = rlora.torch.ScaledAdamW([A, B], lr=0.1, pairs=[(A, B)])
        for _ in range(3):
            A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
            optimizer.step()
        return B.detach() @ A.detach()

    fast = moved()
    generic = Backend(rlora.backends.get("torch").xp, "torch")
    monkeypatch.setattr(dispatch, "_by_type", {torch.Tensor: generic})
    assert_close(moved(), fast, rtol=1e-4)


def test_float64_without_jax_x64_is_refused(monkeypatch):
    backend = rlora.backends.get("jax")
    monkeypatch.setattr(type(backend), "has_float64", lambda self: False)
    pair = Factors(*(backend.asarray(x, "float32") for x in make_problem().params))
    method = rlora.scaled_sgd(compute_dtype="float64")
    with pytest.raises(BackendError, match="jax_enable_x64"):
        method.update(pair, method.init(pair), pair)


@pytest.mark.parametrize("c", [0.0, 0.5, -2.0])
def test_a_sum_with_a_product(c, backend):
    """Stacks (K, r, r), one of them transposed; a few roundings of float32."""
    S, X, Y = np.random.default_rng(0).normal(size=(3, 4, 5, 5))
    s, x, y = (backend.asarray(z, "float32") for z in (S, X, Y))
    found = backend.plus_product(s, c, x.mT, y)
    assert_close(found, S + c * X.mT @ Y, rtol=1e-6)


@pytest.mark.parametrize("name", ["lora_rite", "lora_pro_sgd", "riemannion", "scaled_adamw"])
def test_jax_steps_of_many_ranks_do_not_wait_for_each_other(name):
    """jaxlib's LAPACK waits for the threads that it runs on: more than one stack at once hung."""
    pytest.importorskip("jax")
    code = f"""
    import jax, numpy as np, rlora
    from rlora.backends import get
    backend, rng = get("jax"), np.random.default_rng(0)
    def pairs():
        draw = lambda *shape: backend.asarray(rng.normal(size=shape), "float32")
        return [rlora.Factors(draw(r, 96), draw(96, r)) for r in (4, 8, 16, 24, 32, 48) * 4]
    method, params, grads = rlora.{name}(), pairs(), pairs()
    state = method.init(params)
    step = jax.jit(lambda p, g, s: rlora.step(method, p, g, s, 1e-4))
    for _ in range(5):
        params, state = jax.block_until_ready(step(params, grads, state))
    print("done")
    """
    assert in_fresh_python(code) == "done\n"
