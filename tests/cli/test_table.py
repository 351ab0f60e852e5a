import io

import pytest
from rich.console import Console

from rlora.cli.table import cells, seconds, show, size

ROW = {
    "method": "scaled_adamw",
    "backend": "torch",
    "device": "cuda:0",
    "rank": 4,
    "samples_s": [0.1] * 12,
    "median_s": 0.1234,
    "spread": 0.234,
    "ratio": 12.345,
    "ratio_interval": [12.1, 12.5],
    "ratio_to": "adamw",
    "ratio_to_backend": "numpy",
    "compile_s": None,
    "first_call_s": 0.2,
    "operations": None,
    "model_s": None,
    "forward_backward_s": None,
    "state_bytes": 123_456_789,
    "peak_temporary_bytes": None,
    "verdict": "unstable: spread 23.4% > 15%; close other programs or raise --repeat",
}


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_ever_cut(width):
    out = io.StringIO()
    show("a title", [ROW, {**ROW, "rank": 64, "verdict": "ok"}], Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    for word in ("scaled_adamw", "123 ms", "23%", "12.35", "123 MB", " ok", "23.4% > 15%"):
        assert word in text
    assert ("torch cuda:0" in text) == (width == 200)
    assert "compile" not in text  # nobody has it
    assert all(len(line) <= width for line in text.splitlines())


def test_cells_of_what_is_not_known():
    line = cells({**ROW, "rank": [4, 8], "spread": None, "ratio": None})
    assert [line[name] for name in ("rank", "spread", "ratio", "peak temporary")] == [
        "4-8",
        "-",
        "-",
        "-",
    ]


def test_units():
    assert [seconds(t) for t in (123.4, 1.5, 0.0999, 1.23456e-4)] == [
        "123 s",
        "1.5 s",
        "99.9 ms",
        "123 us",
    ]
    assert [size(n) for n in (0, 999, 1_000, 12_345_678, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "2.5 GB",
    ]
