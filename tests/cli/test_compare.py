import copy
import json

import pytest

from rlora.cli.bench.compare import changes
from rlora.cli.bench.export import FORMATS
from rlora.cli.bench.schema import SCHEMA
from rlora.cli.records import fault


def by_method(found):
    return {change.row["method"]: change for change in found}


def slowed(record, method, factor):
    new = copy.deepcopy(record)
    for row in new["rows"]:
        if row["method"] == method:
            row["samples_s"] = [factor * t for t in row["samples_s"]]
    return new


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.09, "same"), (1.3, "slower"), (0.7, "faster")]
)
def test_a_method_is_judged_by_its_ratio_to_the_plain_one(a_record, factor, verdict):
    found = by_method(changes(a_record, slowed(a_record, "scaled_adamw", factor), 0.10))
    change = found["scaled_adamw"]
    assert (change.of, change.verdict) == ("ratio", verdict)
    assert change.quotient == pytest.approx(factor)
    assert change.interval[0] <= factor <= change.interval[1]
    assert found["adamw"].verdict == "baseline"


def test_a_slower_machine_is_no_regression(a_record):
    new = slowed(slowed(a_record, "scaled_adamw", 3.0), "adamw", 3.0)
    found = by_method(changes(a_record, new, 0.10))
    assert found["scaled_adamw"].verdict == "same"
    assert found["adamw"].quotient == pytest.approx(3.0)


def test_rows_of_one_record_alone_are_named(a_record):
    less = {**a_record, "rows": a_record["rows"][:1]}
    assert by_method(changes(a_record, less, 0.1))["scaled_adamw"].verdict == "only in old"
    assert by_method(changes(less, a_record, 0.1))["scaled_adamw"].verdict == "only in new"


def test_one_sample_is_no_evidence(a_record):
    new = slowed(a_record, "scaled_adamw", 9.0)
    for row in new["rows"]:
        del row["samples_s"][1:]
    assert by_method(changes(a_record, new, 0.1))["scaled_adamw"].verdict == "too few samples"


def test_without_the_plain_row_times_are_compared(a_record):
    old = {**a_record, "rows": a_record["rows"][1:]}
    found = by_method(changes(old, slowed(a_record, "scaled_adamw", 2.0), 0.1))
    assert (found["scaled_adamw"].of, found["scaled_adamw"].verdict) == ("time", "slower")


def test_ratios_to_two_baselines_are_not_compared(a_record):
    """Torch's AdamW may be NumPy's half: a row beside the one and then the other is the same."""
    new = copy.deepcopy(a_record)
    plain, row = new["rows"]
    other = copy.deepcopy(plain) | {"backend": "torch", "ratio_to_backend": "torch"}
    other["samples_s"] = [t / 2 for t in plain["samples_s"]]
    row["ratio_to_backend"] = "torch"
    new["rows"].append(other)
    for old, after in ((a_record, new), (new, a_record)):
        change = by_method(changes(old, after, 0.1))["scaled_adamw"]
        assert (change.of, change.verdict, change.quotient) == ("time", "same", 1.0)


def test_rows_of_other_devices_and_shapes_are_others(a_record):
    for key, value in (("device", "cuda:0"), ("pairs", 3), ("parameters", 1)):
        new = copy.deepcopy(a_record)
        for row in new["rows"]:
            row[key] = value
        found = changes(a_record, new, 0.1)
        assert [change.verdict for change in found] == ["only in new"] * 2 + ["only in old"] * 2


def test_a_baseline_on_another_device_is_found(a_record):
    new = copy.deepcopy(a_record)
    new["rows"][1]["device"] = "cuda:0"
    assert new["rows"][1]["method"] == "scaled_adamw"
    found = by_method(changes(new, slowed(new, "scaled_adamw", 2.0), 0.1))
    assert (found["scaled_adamw"].of, found["scaled_adamw"].verdict) == ("ratio", "slower")


def test_records_of_other_threads_are_told(rlora_cli, a_record, tmp_path):
    for name, threads in (("one", 1), ("two", 2)):
        record = {**a_record, "command": {**a_record["command"], "threads": threads}}
        (tmp_path / name).write_text(json.dumps(record))
    told = "two numbers of threads"
    assert told in rlora_cli("bench", "compare", tmp_path / "one", tmp_path / "two").stdout
    assert told not in rlora_cli("bench", "compare", tmp_path / "one", tmp_path / "one").stdout


def test_exit_codes(rlora_cli, refused, a_record, tmp_path):
    def saved(name, record):
        (tmp_path / name).write_text(json.dumps(record))
        return tmp_path / name

    old = saved("old.json", a_record)
    slow = saved("slow.json", slowed(a_record, "scaled_adamw", 2.0))
    assert rlora_cli("bench", "compare", old, old).exit_code == 0
    result = rlora_cli("bench", "compare", old, slow)
    assert result.exit_code == 1
    assert "slower" in result.stdout
    assert rlora_cli("bench", "compare", old, slow, "--threshold", 2).exit_code == 0
    assert rlora_cli("bench", "compare", slow, old).exit_code == 0
    assert "threshold" in refused("bench", "compare", old, old, "--threshold", -1)
    assert "No such file" in refused("bench", "compare", old, tmp_path / "none.json")
    other = saved("other.json", {**a_record, "rows": [{**a_record["rows"][1], "rank": 8}]})
    assert "no row in common" in refused("bench", "compare", old, other)


@pytest.mark.parametrize("key", ["samples_s", "median_s"])
def test_a_row_that_took_no_time_is_refused(refused, a_record, tmp_path, key):
    """There would be no ratio to it."""
    record = copy.deepcopy(a_record)
    row = record["rows"][1]
    row[key] = [0.0, *row[key][1:]] if key == "samples_s" else 0.0
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record))
    assert "rows[1] took no time" in refused("bench", "show", path)


BROKEN = {
    "no JSON": ("{", "not JSON"),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "must be of type object"),
    "something else": ('{"schema": "pyperf"}', "lacks"),
    "nothing": ("", "not JSON"),
    "no text": (b"\xff\xfe\x00", "not JSON"),
    "a number of 400 digits": ("[" + "1" * 400 + "]", "400 digits"),
    "null": ("null", "must be of type object"),
    "code": ("__import__('os').system('touch out')", "not JSON"),
    "a name with control codes": ('{"\\u001b[31m": 1}', "lacks"),
    "a path for a schema": ('{"schema": "../../etc/passwd"}', "lacks"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["show", "compare", "export", "report"])
def test_broken_records_are_refused_in_one_line(refused, tmp_path, kind, command):
    text, why = BROKEN[kind]
    path, out = tmp_path / "x.json", ("--output", tmp_path / "out")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    more = {"show": (), "compare": (path,), "export": ("--format", "csv", *out), "report": out}
    message = refused("bench", command, path, *more[command])
    assert why in message
    assert message[:-1].isprintable()
    assert list(tmp_path.iterdir()) == [path]


def with_text(node, text):
    """A record, or a part of it, with this text after every string but its schema's name."""
    if isinstance(node, dict):
        return {
            key: value if key in ("schema", "created", "sense") else with_text(value, text)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [with_text(x, text) for x in node]
    return node + text if isinstance(node, str) else node


@pytest.mark.parametrize(
    "words", ["show", "compare", *(f"export --format {name}" for name in FORMATS)]
)
def test_control_codes_of_a_record_do_not_reach_the_terminal(rlora_cli, a_record, tmp_path, words):
    """They could set its title, its colours, or the line above."""
    record = with_text(a_record, "\x1b]0;pwn\x07\x1b[31mEVIL\r\n\x9b2J\u202e")
    record["environment"]["versions"]["\x1b[2J"] = "1"
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record))
    command, *options = words.split()
    done = rlora_cli("bench", command, path, *([path] if command == "compare" else options))
    assert done.exit_code == 0, done.output
    assert "EVIL" in done.stdout
    assert all(c.isprintable() or c == "\n" for c in done.output)
    assert "x1b]0;pwn" in done.stdout


def broken_copies(record):
    """A record, each time with one thing wrong."""
    for path in ("schema", "rows", "created", "environment"):
        yield {key: value for key, value in record.items() if key != path}
    yield {**record, "schema": "rlora-bench/3"}
    yield {**record, "partial": 1}
    yield {**record, "rows": []}
    yield {**record, "checks": [{"what": "x"}]}
    yield {**record, "surprise": 1}
    for key, value in (
        ("median_s", -1.0),
        ("median_s", None),
        ("median_s", True),
        ("rank", 0),
        ("rank", []),
        ("rank", "4"),
        ("samples_s", []),
        ("samples_s", [1.0, "2"]),
        ("ratio_interval", [1.0]),
        ("pairs", 1.5),
    ):
        yield {**record, "rows": [{**record["rows"][0], key: value}]}


def test_the_check_agrees_with_jsonschema(a_record):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(a_record)
    assert fault(a_record, SCHEMA) is None
    for broken in broken_copies(a_record):
        assert not validator.is_valid(broken)
        assert fault(broken, SCHEMA).startswith("it")
    assert (
        fault({**a_record, "partial": "\x1b"}, SCHEMA)
        == "it.partial must be of type boolean, got str"
    )


def test_numbers_and_lengths_are_refused_with_their_bounds():
    bounded, free = {"type": "number", "minimum": 0}, {"type": "number"}
    assert fault(-1, bounded) == "it must be a number from 0 up, got -1"
    for value in (float("nan"), float("inf"), float("-inf")):
        assert fault(value, bounded) == f"it must be a finite number, got {value}"
        assert fault(value, free) == f"it must be a finite number, got {value}"
    pair = {"type": "array", "items": free, "minItems": 2, "maxItems": 2}
    assert fault([1], pair) == "it must have at least 2 items, got 1"
    assert fault([], pair | {"minItems": 1}) == "it must have at least 1 item, got 0"
    assert fault([1, 2, 3], pair) == "it must have at most 2 items, got 3"


@pytest.mark.parametrize("created", ["yesterday", "", "2026-13-01T00:00:00+00:00"])
def test_a_record_says_when_it_was_made(refused, a_record, tmp_path, created):
    """Exports compute with it."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**a_record, "created": created}))
    assert f"it.created must be a time as in 2026-01-31T12:00:00+00:00, got {created!r}" in refused(
        "bench", "show", path
    )
