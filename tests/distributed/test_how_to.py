"""The how-to's script under torchrun, as it is told there to be run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def test_the_how_to_trains_and_resumes():
    script = HOW_TO / "distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, script],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout
    pairs, n, r = 8, 1024, 16
    grams, pieces = 4 * r * (r + 1) * pairs, 20 * r * n // 2 * pairs
    assert f"with shard_placement: a step sends {{'allreduce': {grams}}} bytes" in said
    assert f"{{'alltoall_base': {pieces}, 'allreduce': {grams}}} bytes" in said
    first, last, again = (
        float(x) for x in re.search(r"loss (\S+) -> (\S+); .*y (\S+)", said).groups()
    )
    assert last < 0.5 * first
    assert again == last
    assert "the same bits" in said


def test_the_page_shows_the_code_of_the_script():
    """Blocks of the page are lines of the script, in their order."""
    script = [line.strip() for line in (HOW_TO / "distributed.py").read_text().splitlines()]
    blocks = re.findall(r"```python\n(.*?)```", (HOW_TO / "distributed.md").read_text(), re.DOTALL)
    assert blocks
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        known = [
            line,
            f"return model, {line.removeprefix('optimizer = ')}",
            f"{line} if whole_ranks else None",
        ]
        assert any(form in script for form in known), line
