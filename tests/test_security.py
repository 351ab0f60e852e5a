"""Limits of the source and of an import, and checks that survive ``python -O``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("rlora", "backends", "cli", "asv_bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "node_modules" not in path.parts
]

# --- the source ----------------------------------------------------------------------------------

RUN_TEXT = {"eval", "exec", "compile", "__import__"}
RUN_COMMANDS = {"system", "popen", "getoutput", "getstatusoutput"}
UNPICKLE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
SURE = {"allow_pickle": False, "shell": False, "weights_only": True, "verify": True}
"""Keyword -> the one value it may have, and that written out."""


def dangers(tree):
    """Places in a module that could run untrusted text or bytes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _imported(node)
        elif isinstance(node, ast.Call):
            yield from _called(node)


def _imported(node):
    module = getattr(node, "module", None) or ""
    for alias in node.names:
        roots = {module.split(".")[0], alias.name.split(".")[0]}
        if roots & UNPICKLE:
            yield "unpickles"
        if (module, alias.name) in {("torch", "load"), ("yaml", "load")}:
            yield "hides where load comes from"
        if module in ("os", "subprocess") and alias.name in RUN_COMMANDS:
            yield "runs a command line"


def _called(node):
    called = ast.unparse(node.func)
    name = called.rpartition(".")[2]
    given = {word.arg: word.value for word in node.keywords}
    if called in RUN_TEXT or called.removeprefix("builtins.") in RUN_TEXT:
        yield "runs text"
    if called in {f"{module}.{word}" for module in ("os", "subprocess") for word in RUN_COMMANDS}:
        yield "runs a command line"
    if called.startswith("yaml.") and name in {"load", "load_all", "full_load", "unsafe_load"}:
        yield "builds what YAML asks for"
    if name in {"extract", "extractall"} and "filter" not in given:
        yield "unpacks without a filter"
    if name in {"mktemp", "_create_unverified_context"}:
        yield f"uses {name}"
    if called == "torch.load" and "weights_only" not in given:
        yield "loads without weights_only"
    if called in {"importlib.import_module", "import_module"} and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and str(first.value).split(".")[0] in UNPICKLE:
            yield "unpickles"
    for word in SURE.keys() & given.keys():
        value = given[word]
        if not (isinstance(value, ast.Constant) and value.value is SURE[word]):
            yield f"{word} is not surely {SURE[word]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_source_runs_a_strangers_text_or_bytes(path):
    assert list(dangers(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "exec(x)",
        "compile(x, '', 'exec')",
        "__import__(x)",
        "builtins.eval(x)",
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "from multiprocessing import pickle",
        "importlib.import_module('pickle')",
        "import marshal, json",
        "os.system(x)",
        "from os import system",
        "os.popen(x)",
        "subprocess.getoutput(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=1)",
        "subprocess.run(x, shell=flag)",
        "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "from yaml import load",
        "tar.extractall(x)",
        "tarfile.open(x).extract(y)",
        "np.load(x, allow_pickle=True)",
        "np.load(x, allow_pickle=flag)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=not trusted)",
        "from torch import load",
        "requests.get(x, verify=False)",
        "tempfile.mktemp()",
    ],
)
def test_the_scan_sees(code):
    assert len(list(dangers(ast.parse(code)))) == 1


def test_the_scan_lets_the_rest_through():
    code = (
        "import json, importlib\n"
        "model.eval()\n"
        "re.compile(x)\n"
        "torch.compile(x)\n"
        "torch.load(x, weights_only=True)\n"
        "np.load(x, allow_pickle=False)\n"
        "json.load(x)\n"
        "yaml.safe_load(x)\n"
        "tar.extractall(x, filter='data')\n"
        "subprocess.run(['git', x], check=True)\n"
        "importlib.import_module('torch')\n"
    )
    assert list(dangers(ast.parse(code))) == []
    assert len(SOURCES) > 60


# --- an import -----------------------------------------------------------------------------------

WATCHED = """
import importlib, logging, os, random, signal, sys, warnings
import numpy as np

for name in {before}:
    importlib.import_module(name)

ACTS = ("socket.", "subprocess.", "urllib.", "http.", "ftplib.", "smtplib.", "shutil.", "tempfile.",
        "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.putenv",
        "os.unsetenv", "os.chdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link",
        "os.symlink", "os.truncate", "os.chmod", "os.kill", "signal.", "webbrowser.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
seen = []

def hook(event, args):
    if event == "open":
        flags = args[2] if isinstance(args[2], int) else 0
        if flags & WRITES or (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            seen.append((event, str(args[0])))
    elif event.startswith(ACTS):
        seen.append((event, repr(args)[:100]))

def state():
    found = dict(
        environment=dict(os.environ), folder=os.getcwd(), path=list(sys.path),
        warnings=list(warnings.filters), errors=np.geterr(), printing=np.get_printoptions(),
        random=random.getstate(), numpy_random=str(np.random.get_state()),
        handlers=list(logging.root.handlers), level=logging.root.level,
        interrupt=signal.getsignal(signal.SIGINT), hooks=(sys.excepthook, sys.displayhook),
        streams=(sys.stdout, sys.stderr), limit=sys.getrecursionlimit(),
    )
    if torch := sys.modules.get("torch"):
        found["torch"] = (torch.get_default_dtype(), torch.is_grad_enabled(),
                          torch.get_num_threads(), torch.get_float32_matmul_precision(),
                          torch.are_deterministic_algorithms_enabled(), torch.random.initial_seed())
    if jax := sys.modules.get("jax"):
        found["jax"] = dict(jax.config.values)
    return found

before = state()
sys.addaudithook(hook)
for name in {names}:
    importlib.import_module(name)
watched, seen = seen, []
after = state()
changed = [key for key in before if before[key] != after[key]]
sys.stdout.write(repr((watched, changed)))
"""


def import_watched(names, before=(), path=ROOT):
    """(what it did, what global state it changed), after imports that are not watched."""
    code = WATCHED.format(names=names, before=before)
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return ast.literal_eval(done.stdout)  # a module that prints would be in the way


@pytest.mark.parametrize(
    ("names", "before"),
    [
        (["rlora", "rlora.testing", "rlora.backends", "rlora.backends.numpy"], []),
        (
            ["rlora.cli", "rlora.cli.bench", "rlora.cli.info"],
            ["click", "rich.table", "threadpoolctl"],
        ),
        # Every torch optimizer loads dynamo, which makes its folder, when it is built.
        (["rlora.torch", "rlora.backends.torch"], ["torch._dynamo", "torch.distributed.tensor"]),
        (["rlora.optax", "rlora.backends.jax"], ["jax", "optax"]),
    ],
    ids=["rlora", "cli", "torch", "optax"],
)
def test_an_import_sends_starts_writes_prints_and_changes_nothing(names, before, tmp_path):
    """In a fresh interpreter; what the frameworks do when they are imported is their affair."""
    for name in before:
        pytest.importorskip(name.partition(".")[0])
    assert import_watched(names, before, tmp_path) == ([], [])
    assert list(tmp_path.iterdir()) == []


HOSTILE = {
    "import socket; socket.socket().close()": "socket.__new__",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])": "subprocess.Popen",
    "import os; os.system('true')": "os.system",
    "open('one', 'w').close()": "one",
    "import os; os.close(os.open('two', os.O_CREAT))": "two",
    "import os; os.mkdir('made')": "os.mkdir",
    "import os; os.environ['HOSTILE'] = '1'": "environment",
    "import numpy; numpy.seterr(all='raise')": "errors",
    "import random; random.random()": "random",
    "import sys; sys.path.append('elsewhere')": "path",
    "import warnings; warnings.simplefilter('ignore')": "warnings",
}


def test_the_hook_sees(tmp_path):
    for i, code in enumerate(HOSTILE):
        (tmp_path / f"hostile_{i}.py").write_text(code)
    did, changed = import_watched([f"hostile_{i}" for i in range(len(HOSTILE))], path=tmp_path)
    assert {word for event in did for word in event} | {*changed} >= {*HOSTILE.values()}


def test_checks_outlive_optimised_python():
    """No check is an assert, which ``-O`` would leave out."""
    code = (
        "import sys\n"
        "import numpy as np, rlora\n"
        "assert False\n"
        "try:\n"
        "    rlora.scaled_adamw().init(rlora.Factors(np.ones((3, 5)), np.ones((4, 2))))\n"
        "except rlora.ShapeError as error:\n"
        "    sys.stdout.write('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=1200, check=True
    )
    assert done.stdout == "refused"
