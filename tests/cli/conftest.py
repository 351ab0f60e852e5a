"""A command line to call, and tiny adapters to call it on."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from rlora.cli.app import app


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
