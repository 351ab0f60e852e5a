import io

import pytest
from rich.console import Console

from rlora.cli.bench.table import cells, seconds, show_record, show_rows, size

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


def shown(rows, width):
    out = io.StringIO()
    show_rows("a title", rows, Console(file=out, width=width))
    assert all(len(line) <= width for line in out.getvalue().splitlines())
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_ever_cut(width):
    text = shown([ROW, {**ROW, "rank": 64, "verdict": "ok"}], width)
    assert "…" not in text
    for word in ("scaled_adamw", "123 ms", "23%", "12.35", "123 MB", " ok", "23.4% > 15%"):
        assert word in text
    assert "torch cuda:0" in text
    assert "compile" not in text  # nobody has it


def test_a_narrow_terminal_shows_fewer_columns_and_explains_no_others():
    text = shown([ROW, {**ROW, "backend": "numpy", "device": "cpu"}], 40)
    assert "…" not in text
    assert "12.35" in text
    assert "numpy cpu" in text
    assert "torch" in text
    assert "cuda:0" in text
    for name in ("spread:", "peak temporary", "interval", "first"):
        assert name not in text


def test_where_rows_ran_is_said_once_where_it_is_the_same_for_all_and_does_not_fit():
    row = {**ROW, "method": "lora_pro_adamw"}
    narrow, wide = shown([row], 30), shown([row], 80)
    assert "lora_pro_adamw" in narrow
    assert "all rows: on torch cuda:0." in narrow
    assert "all rows" not in wide
    assert "torch cuda:0" in wide


def test_instability_is_explained_once_for_a_table():
    calm = {**ROW, "verdict": "ok"}
    other = {**ROW, "verdict": ROW["verdict"].replace("23.4%", "40.0%")}
    text = shown([ROW, other, calm], 200)
    assert text.count("close other programs or raise --repeat") == 1
    assert "unstable: 2 of 3 rows, for example spread 23.4% > 15% (close" in text
    assert "unstable:" not in shown([calm], 200)


@pytest.mark.parametrize("width", [40, 80])
def test_verdicts_of_a_suite_keep_their_names(width):
    check = {"what": "torch scaled_adamw / torch adamw", "preset": "gpt2-medium", "rank": 4}
    check |= {"sense": "at most", "limit": 1.6, "measured": 3.65, "passed": False}
    check |= {"stable": True, "goal": None}
    record = {"rows": [], "partial": True, "command": {"dtype": "float32"}, "peaks": []}
    out = io.StringIO()
    show_record({**record, "checks": [check]}, Console(file=out, width=width))
    words = "".join(out.getvalue().split())
    assert "FAIL" in words
    assert "…" not in words
    assert ("3.65" in words) == (width == 80)


def test_cells_of_what_is_not_known():
    line = cells({**ROW, "rank": [4, 8], "spread": None, "ratio": None})
    assert [line[name] for name in ("rank", "spread", "ratio", "peak temporary")] == [
        "4-8",
        "-",
        "-",
        "-",
    ]


def test_three_digits_round_up_into_the_next_unit():
    assert [seconds(t) for t in (0.9996e-3, 0.9996, 999.7, 0.9994)] == [
        "1 ms",
        "1 s",
        "1000 s",
        "999 ms",
    ]
    assert [size(n) for n in (999_700, 999_400, 999_800_000)] == ["1 MB", "999 kB", "1 GB"]


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
