"""No benchmark dies unseen: each runs once here, on small parameters, without asv."""

import importlib
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlora.methods

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "asv_bench"
KINDS = ("time_", "timeraw_", "peakmem_", "track_")
SMALL = "2 of 80x72"
SOME = ("adamw", "scaled_adamw")
"""The methods that JAX compiles here: all of them would take it a minute."""


def load(name, path):
    """A module from a file, and the package of a folder."""
    search = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules():
    package = load("rlora_asv_suite", SUITE / "benchmarks" / "__init__.py")
    names = sorted(path.stem for path in (SUITE / "benchmarks").glob("[a-z]*.py"))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


before = dict(os.environ)
MODULES = modules()
os.environ.clear()
os.environ.update(before)
common = MODULES["common"]
BENCHMARKS = {
    f"{name}.{kind.__name__}.{method}": (kind, method)
    for name, module in MODULES.items()
    for kind in vars(module).values()
    if inspect.isclass(kind) and kind.__module__ == module.__name__
    for method in dir(kind)
    if method.startswith(KINDS)
}
EVERY = pytest.mark.parametrize("name", BENCHMARKS)


def smallest(kind):
    """The first of each parameter, but every backend and method, and a small shape."""
    values = {
        name: every
        if name in ("backend", "method", "source", "module", "initializer")
        else every[:1]
        for name, every in zip(kind.param_names, kind.params, strict=True)
    }
    if "rank" in values and 16 in dict(zip(kind.param_names, kind.params, strict=True))["rank"]:
        values["rank"] = [16]  # at which every backend takes part in every benchmark
    if "shape" in values:
        values["shape"] = ["24x20"] if "initializer" in values else [SMALL]
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        if chosen.get("backend") != "jax" or chosen.get("method", SOME[0]) in SOME:
            yield combination


def lacking(parameters):
    """Libraries that the parameters need and that are not installed."""
    needs = {"jax": ("jax", "optax"), "torch": ("torch",), "torch model": ("torch",)}
    wanted = itertools.chain.from_iterable(needs.get(p, ()) for p in parameters)
    return [name for name in wanted if importlib.util.find_spec(name) is None]


@EVERY
def test_every_benchmark_runs(name, monkeypatch):
    kind, method = BENCHMARKS[name]
    if hasattr(sys.modules[kind.__module__], "SECONDS"):
        monkeypatch.setattr(sys.modules[kind.__module__], "ROUNDS", (1, 1))
    ran = 0
    for parameters in smallest(kind):
        benchmark = kind()
        try:
            benchmark.setup(*parameters)
        except NotImplementedError:
            if not lacking(parameters):
                raise
            continue
        value = getattr(benchmark, method)(*parameters)
        if method.startswith("timeraw_"):
            statement, before_it = value
            code = f"{before_it}\n{statement}"
            subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)
        if method.startswith("track_"):
            assert value > 0 or method == "track_state_bytes", parameters
        ran += 1
    assert ran


@EVERY
def test_identity_survives_refactoring(name):
    kind, method = BENCHMARKS[name]
    assert issubclass(kind, common.Suite)
    assert kind.version
    assert getattr(kind, method).pretty_name
    assert method.startswith("track_") == hasattr(kind, "unit")
    takes = list(inspect.signature(getattr(kind, method)).parameters)[1:]
    assert takes == list(kind.param_names)
    assert all(isinstance(x, (str, int)) for values in kind.params for x in values)


def test_the_suite_has_what_it_should():
    found = {name.rpartition(".")[2] for name in BENCHMARKS}
    assert found == {
        "time_step", "time_precondition", "time_find_pairs", "time_initialize", "timeraw_import",
        "peakmem_step", "track_state_bytes", "track_operations", "track_overhead_ratio",
    }  # fmt: skip
    titles = [getattr(kind, method).pretty_name for kind, method in BENCHMARKS.values()]
    assert len(set(titles)) == len(titles)
    assert common.METHODS[:2] == ("scaled_adamw", "adamw")
    assert sorted(common.METHODS) == sorted(["adamw", *rlora.methods.__all__])


def test_what_is_absent_is_a_skip():
    with pytest.raises(NotImplementedError, match="nothing_of_the_kind"):
        common.build("numpy", "nothing_of_the_kind", 4, SMALL)
    with pytest.raises(NotImplementedError, match="no_such_backend"):
        common.load_backend("no_such_backend")
    pytest.importorskip("torch")
    with pytest.raises(NotImplementedError, match="no torch class of nothing"):
        common.build("torch", "nothing", 4, SMALL)


def test_set_up_is_done_once_for_the_same_parameters():
    calls = []

    class Counted(common.Suite):
        def prepare(self, *params):
            calls.append(params)

    benchmark = Counted()
    for parameters in [("a", 1), ("a", 1), ("b", 1)]:
        benchmark.setup(*parameters)
    assert calls == [("a", 1), ("b", 1)]


def test_state_bytes_are_those_of_the_arrays():
    """AdamW keeps two moments in the shape of the factors and a counter or two."""
    factors = 4 * 2 * 4 * (80 + 72)
    for backend in ("numpy", "torch"):
        if not lacking([backend]):
            extra = common.build(backend, "adamw", 4, SMALL).state_bytes() - 2 * factors
            assert 0 < extra <= 8 * 4


def test_ratio_is_taken_round_by_round(monkeypatch):
    steps = MODULES["steps"]
    times = iter([2.0, 1.0, 40.0, 20.0, 3.0, 1.0])
    monkeypatch.setattr(steps, "seconds", lambda step: next(times))
    monkeypatch.setattr(steps, "ROUNDS", (3, 3))
    assert steps.median_ratio(None, None) == 2.0


def test_operations_are_counted_without_views():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3)
    with MODULES["operations"].counter() as count:
        (x.mT + 1.0).mul_(2.0)
    assert count.operations == 2


def test_shapes_by_name():
    assert common.shapes("2 of 24x16") == [(24, 16), (24, 16)]
    assert len(common.shapes("SmolLM2-135M layer")) == 7


def test_configuration_is_one_that_asv_reads():
    config = pytest.importorskip("asv.config", reason="asv is not installed")
    known = set(vars(config.Config())) | {"version"}
    read = config.Config.load(str(SUITE / "asv.conf.json"))
    assert set(vars(read)) <= known
    assert (SUITE / read.repo).resolve() == ROOT
    assert (SUITE / read.benchmark_dir).is_dir()
    assert all(re.compile(pattern) for pattern in read.regressions_thresholds)


publish = load("rlora_asv_publish", SUITE / "publish.py")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone: no history to publish")
def test_a_commit_is_laid_out_as_it_would_be_installed(tmp_path):
    (commit,) = publish.history("HEAD", 1)
    site = publish.lay_out(commit, tmp_path)
    code = "import rlora.backends.numpy as a, rlora.cli as b; print(a.__file__, b.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(str(site)) == 2


def test_page_is_made_to_load_from_beside_itself(tmp_path):
    html, assets = tmp_path / "html", tmp_path / "assets" / "jquery" / "dist"
    html.mkdir()
    assets.mkdir(parents=True)
    (assets / "jquery.min.js").write_text("it")
    (html / "index.html").write_text(
        '<script src="https://a.example/jquery-3.3.1.min.js" integrity="sha256-x"></script>\n'
        '<link rel="stylesheet" href="https://b.example/other.min.css">'
    )
    missing = publish.localise(html, tmp_path / "assets")
    text = (html / "index.html").read_text()
    assert '<script src="vendor/jquery.min.js"></script>' in text
    assert (html / "vendor" / "jquery.min.js").read_text() == "it"
    assert missing == ["https://b.example/other.min.css"]


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--commits", "-3"], 2, "--commits must be at least 1, got -3"),
        (["--rev", "no-such-commit"], 1, "no-such-commit"),
    ],
)
def test_wrong_commits_are_refused_in_a_line(arguments, code, why):
    if "--rev" in arguments and not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = [sys.executable, str(SUITE / "publish.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert why in done.stderr
