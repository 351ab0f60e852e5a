"""A command line to call, and tiny adapters to call it on."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from rlora.cli.app import app


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
    """Peaks by one look at small arrays: no test is about how high they are."""
    monkeypatch.setattr("rlora.cli.bench.cost_model.LONG", 1 << 12)
    monkeypatch.setattr("rlora.cli.bench.cost_model.SQUARE", 16)
    monkeypatch.setattr("rlora.cli.bench.cost_model.SECONDS", 0.0)


@pytest.fixture
def rlora_cli():
    """Runs `rlora ...` in this process; the result has stdout, stderr and exit_code."""

    def call(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return call


@pytest.fixture
def refused(rlora_cli):
    """Runs a command that must fail: exit code 2 and one line, which is returned."""

    def call(*args):
        result = rlora_cli(*args)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert result.stderr.startswith("rlora: error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    return call


@pytest.fixture
def factors():
    """Two pairs of rank 3 for weights of 20 x 16, under PEFT's names."""
    rng = np.random.default_rng(0)
    return {
        f"base_model.model.layers.{i}.q_proj.lora_{letter}.weight": rng.normal(size=shape).astype(
            np.float32
        )
        for i in range(2)
        for letter, shape in (("A", (3, 16)), ("B", (20, 3)))
    }


@pytest.fixture
def adapter(tmp_path, factors):
    path = tmp_path / "tiny.safetensors"
    save_file(factors, path)
    return path


@pytest.fixture
def hostile(tmp_path):
    """Writes a safetensors file with a header and data of one's own making."""

    def write(header, data=b"", length=None):
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "hostile.safetensors"
        size = len(raw) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + raw + data)
        return path

    return write


@pytest.fixture(scope="session")
def a_record():
    """A record of two rows, true but for its 15 samples each; to be copied, not changed."""
    from rlora.cli.bench.options import make_options
    from rlora.cli.bench.run import Results

    options = dict.fromkeys(("adapter", "device", "seconds", "threads"))
    plan = make_options(
        backend=["numpy"],
        methods=["scaled_adamw"],
        ranks=[4],
        preset="roberta-base",
        dtype="float32",
        against=[],
        repeat=15,
        quick=False,
        end_to_end=False,
        seed=0,
        **options,
    )
    results, rng = Results([plan]), np.random.default_rng(0)
    results.measure()
    rows = [row for row, _ in results.rows]
    for row, scale in zip(rows, (1e-3, 2e-3), strict=True):
        row["samples_s"] = [scale * float(x) for x in rng.uniform(0.95, 1.05, 15)]
        row["median_s"] = float(np.median(row["samples_s"]))
        row["ratio"] = row["median_s"] / rows[0]["median_s"]
    return json.loads(json.dumps(results.record()))
