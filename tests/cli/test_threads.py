import os
import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl

from rlora.cli.bench.timing import pinned, reserved


def test_libraries_are_pinned_and_set_free_again():
    torch = pytest.importorskip("torch")
    np.ones((2, 2)) @ np.ones((2, 2))
    before = torch.get_num_threads()
    with reserved(1), pinned(1):
        assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} == {1}
        assert torch.get_num_threads() == 1
        assert os.environ["NPROC"] == "1"
    assert torch.get_num_threads() == before
    with reserved(None), pinned(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("before", [None, "3"])
def test_what_xla_asks_for_is_as_before(monkeypatch, before):
    monkeypatch.setenv("NPROC", before or "")
    if before is None:
        monkeypatch.delenv("NPROC")
    with reserved(1):
        assert os.environ["NPROC"] == "1"
    with reserved(None):
        assert os.environ.get("NPROC") == before


def test_xla_makes_as_many_threads_as_were_reserved():
    pytest.importorskip("jax")
    code = (
        "import os, sys\n"
        "from rlora.cli.bench.timing import reserved\n"
        "with reserved(int(sys.argv[1])):\n"
        "    import jax\n"
        "    jax.numpy.ones(3).block_until_ready()\n"
        "names = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]\n"
        "sys.stdout.write(str(sum('XLAEigen' in name or 'XLATfrt' in name for name in names)))\n"
    )

    def threads(count):
        done = subprocess.run(
            [sys.executable, "-c", code, str(count)],
            capture_output=True,
            text=True,
            timeout=1200,
            check=True,
        )
        return int(done.stdout)

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads cannot be counted here")
    assert threads(1) < threads(5)


def test_the_record_has_the_number(rlora_cli, refused, adapter, tmp_path):
    import json

    out = tmp_path / "out.json"
    args = ("--method", "scaled_sgd", "--repeat", 1, "--threads", 1, "--output", out)
    assert rlora_cli("bench", "--adapter", adapter, *args).exit_code == 0
    found = json.loads(out.read_text())
    assert found["command"]["threads"] == 1
    assert {library["threads"] for library in found["environment"]["blas"]} == {1}
    assert "1<=x<=4096" in refused("bench", "--threads", 0)
