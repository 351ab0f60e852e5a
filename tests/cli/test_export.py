import copy
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from rlora.cli.bench.export import FORMATS, full_name
from rlora.cli.bench.schema import read_record

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NUMBER = {"type": "number"}
TEXT = {"type": "string"}
DOCS = Path(__file__).parents[2] / "docs" / "reference" / "benchmarks"


def an_object(properties, required=None):
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required}


STATS = [
    "min",
    "max",
    "mean",
    "stddev",
    "median",
    "iqr",
    "q1",
    "q3",
    "ld15iqr",
    "hd15iqr",
    "ops",
    "total",
    "rounds",
    "iterations",
    "iqr_outliers",
    "stddev_outliers",
]
PYTEST_ROW = an_object(
    {
        "group": TEXT,
        "name": TEXT,
        "fullname": TEXT,
        "params": {"type": "object"},
        "param": TEXT,
        "extra_info": {"type": "object"},
        "options": {"type": "object"},
        "stats": an_object({**dict.fromkeys(STATS, NUMBER), "outliers": TEXT}),
    }
)
SCHEMAS = {
    "pytest-benchmark": an_object(
        {
            "machine_info": {"type": "object"},
            "commit_info": an_object({"id": TEXT, "time": TEXT, "dirty": {"type": "boolean"}}),
            "datetime": TEXT,
            "version": TEXT,
            "benchmarks": {"type": "array", "items": PYTEST_ROW},
        }
    ),
    "github-action": {
        "type": "array",
        "items": {
            **an_object(
                {"name": TEXT, "unit": TEXT, "value": NUMBER, "range": TEXT, "extra": TEXT},
                ["name", "unit", "value"],
            ),
            "additionalProperties": False,
        },
    },
    "bencher": {
        "type": "object",
        "propertyNames": {"maxLength": 1024},
        "additionalProperties": {
            "type": "object",
            "propertyNames": {"maxLength": 64},
            "additionalProperties": {
                **an_object(
                    dict.fromkeys(("value", "lower_value", "upper_value"), NUMBER), ["value"]
                ),
                "additionalProperties": False,
            },
        },
    },
    "asv": an_object(
        {
            "version": {"const": 2},
            "commit_hash": {"pattern": "^[0-9a-f]{40}$"},
            "env_name": TEXT,
            "date": {"type": "integer"},
            "params": an_object(
                dict.fromkeys(("arch", "cpu", "machine", "num_cpu", "os", "ram", "python"), TEXT)
            ),
            "python": TEXT,
            "requirements": {"type": "object", "additionalProperties": TEXT},
            "env_vars": {"type": "object"},
            "durations": {"type": "object"},
            "result_columns": {"type": "array", "items": TEXT},
            "results": {"type": "object", "additionalProperties": {"type": "array"}},
        }
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_as_the_format_has_it(a_record, name):
    made = json.loads(FORMATS[name](a_record, COMMIT))
    jsonschema.validate(made, SCHEMAS[name], cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", FORMATS)
def test_every_record_that_is_published_exports(name):
    for path in DOCS.glob("*.json"):
        assert FORMATS[name](read_record(path), COMMIT)


def test_numbers_arrive(a_record):
    row = a_record["rows"][1]
    name = full_name(row)
    assert name == "roberta-base/numpy/r4/scaled_adamw"
    made = {key: FORMATS[key](a_record, COMMIT) for key in FORMATS}
    pytest_rows = json.loads(made["pytest-benchmark"])["benchmarks"]
    assert pytest_rows[1]["stats"]["median"] == row["median_s"]
    assert pytest_rows[1]["stats"]["mean"] == pytest.approx(np.mean(row["samples_s"]))
    assert pytest_rows[1]["stats"]["stddev"] == pytest.approx(statistics.stdev(row["samples_s"]))
    latency = json.loads(made["bencher"])[name]["latency"]
    assert latency["value"] == pytest.approx(1e9 * row["median_s"])
    assert latency["lower_value"] <= latency["value"] <= latency["upper_value"]
    cases = {x["name"]: x for x in json.loads(made["github-action"])}
    assert cases[f"{name}/step"]["value"] == pytest.approx(1e3 * row["median_s"])
    half = float(cases[f"{name}/step"]["range"].removeprefix("± ").removesuffix(" ms"))
    assert half == pytest.approx(1e3 * row["spread"] * row["median_s"] / 2, rel=5e-3)  # 3 digits
    assert cases[f"{name}/ratio"]["value"] == row["ratio"]
    (line,) = [x for x in csv.DictReader(io.StringIO(made["csv"])) if x["method"] == row["method"]]
    assert float(line["ratio"]) == row["ratio"]
    assert int(line["samples"]) == len(row["samples_s"])
    header, rule, *lines = made["markdown"].splitlines()
    assert header.count("|") == rule.count("|") == lines[1].count("|")
    assert "scaled_adamw" in lines[1]


def test_pytest_benchmark_compares_it(a_record, tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    for name in ("0001_old.json", "0002_new.json"):
        text = FORMATS["pytest-benchmark"](a_record, COMMIT)
        (tmp_path / name).write_text(text)
    code = "from pytest_benchmark.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *sorted(map(str, tmp_path.glob("*.json")))],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("roberta-base/numpy/r4/scaled_adamw") == 2


def test_asv_reads_it(a_record, tmp_path):
    results = pytest.importorskip("asv.results", reason="asv is not installed")
    path = tmp_path / "rlora-bench" / f"{COMMIT[:8]}-rlora-bench.json"
    path.parent.mkdir()
    path.write_text(FORMATS["asv"](a_record, COMMIT))
    found = results.Results.load(str(path), machine_name="rlora-bench")
    name = "roberta-base.numpy.r4.scaled_adamw.time_step"
    row = a_record["rows"][1]
    assert name in found.get_all_result_keys()
    assert found.get_result_value(name, []) == [row["median_s"]]
    assert found.get_result_samples(name, []) == [row["samples_s"]]
    (stats,) = found.get_result_stats(name, [])
    assert stats["repeat"] == len(row["samples_s"])


def test_the_interval_is_asvs(a_record):
    """99 % around the median; asv too has infinite ends for what no samples bound."""
    statistics = pytest.importorskip("asv_runner.statistics", reason="asv is not installed")
    row = a_record["rows"][1]
    for count in (15, 8, 7, 1):
        samples = row["samples_s"][:count]
        made = json.loads(FORMATS["asv"]({**a_record, "rows": [{**row, "samples_s": samples}]}, ""))
        (values,) = made["results"].values()
        found = dict(zip(made["result_columns"], values, strict=True))
        _, wanted = statistics.quantile_ci(samples, 0.5, 0.99)
        assert (*found["stats_ci_99_a"], *found["stats_ci_99_b"]) == wanted
        assert (wanted[0] == -np.inf) == (count < 8)


def git(folder, *arguments):
    who = ("-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_asv_compares_and_publishes_it_at_once(rlora_cli, a_record, tmp_path):
    pytest.importorskip("asv", reason="asv is not installed")
    (tmp_path / "repository").mkdir()
    git(tmp_path / "repository", "init", "-q", "-b", "main")
    commits = []
    for i in range(2):
        git(tmp_path / "repository", "commit", "-q", "--allow-empty", "-m", str(i))
        commits.append(git(tmp_path / "repository", "rev-parse", "HEAD"))
        record = copy.deepcopy(a_record)
        record["rows"][1]["samples_s"] = [(1 + i) * x for x in record["rows"][1]["samples_s"]]
        (tmp_path / "record.json").write_text(json.dumps(record))
        args = ("--format", "asv", "--commit", commits[-1], "--output", tmp_path / "results")
        done = rlora_cli("bench", "export", tmp_path / "record.json", *args)
        assert (done.exit_code, done.output) == (0, f"results of asv: {tmp_path / 'results'}\n")
    config = {"version": 1, "project": "x", "repo": str(tmp_path / "repository")}
    config |= {"branches": ["main"], "results_dir": "results", "html_dir": "html"}
    (tmp_path / "asv.conf.json").write_text(json.dumps(config))

    def asv(*arguments):
        command = [sys.executable, "-m", "asv", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    name = "roberta-base.numpy.r4.scaled_adamw.time_step"
    (line,) = [x for x in asv("compare", *commits).splitlines() if name in x]
    assert "2.0" in line
    asv("publish", "--no-pull")
    assert name in json.loads((tmp_path / "html" / "index.json").read_text())["benchmarks"]
    assert list((tmp_path / "html" / "graphs").rglob(f"{name}.json"))


def test_the_command_writes_a_file_or_standard_output(rlora_cli, refused, a_record, tmp_path):
    record, out = tmp_path / "x.json", tmp_path / "out.csv"
    record.write_text(json.dumps(a_record))
    printed = rlora_cli("bench", "export", record, "--format", "csv")
    assert printed.exit_code == 0
    done = rlora_cli("bench", "export", record, "--format", "csv", "--output", out)
    assert (done.exit_code, done.stdout) == (0, f"csv: {out}\n")
    assert out.read_text() == printed.stdout
    assert "xml" in refused("bench", "export", record, "--format", "xml")
    assert "directory" in refused(
        "bench", "export", record, "--format", "csv", "--output", tmp_path
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices of POSIX")
def test_what_is_no_file_gets_the_text_and_stays(rlora_cli, a_record, tmp_path):
    record, link, target = (tmp_path / name for name in ("x.json", "link", "target.csv"))
    record.write_text(json.dumps(a_record))
    target.write_text("old")
    link.symlink_to(target)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    text = rlora_cli("bench", "export", record, "--format", "csv").stdout
    for path in (link, pipe, os.devnull):
        done = rlora_cli("bench", "export", record, "--format", "csv", "--output", path)
        assert done.exit_code == 0, done.output
    assert os.read(reader, 1 << 16).decode() == text
    os.close(reader)
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert target.read_text() == text
    assert not Path(os.devnull).is_file()
    assert sorted(tmp_path.iterdir()) == sorted([record, link, target, pipe])


@pytest.mark.skipif(os.name == "nt", reason="/dev/stdout of POSIX")
def test_standard_output_by_its_path(a_record, tmp_path):
    record, out = tmp_path / "x.json", tmp_path / "out.txt"
    record.write_text(json.dumps(a_record))
    command = [sys.executable, "-c", "from rlora.cli import main; main()", "bench", "export"]
    command += [str(record), "--format", "pytest-benchmark", "--output", "/dev/stdout"]
    piped = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(piped.stdout)["version"] == "5.0.0"
    rows = ["--preset", "8x8*1", "--method", "scaled_sgd", "--rank", "2", "--quick"]
    measured = [*command[:4], "run", *rows, "--output", "/dev/stdout"]
    made = subprocess.run(measured, capture_output=True, check=True, text=True)
    assert json.loads(made.stdout)["command"]["ranks"] == [2]
    assert "scaled_sgd" in made.stderr
    out.write_text("precious\n")
    with out.open("a") as file:
        subprocess.run(command, stdout=file, check=True)
    assert out.read_text() == f"precious\n{piped.stdout}"


def test_symlinks_in_a_circle_are_refused(refused, a_record, tmp_path):
    record = tmp_path / "x.json"
    record.write_text(json.dumps(a_record))
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    options = ("--format", "csv", "--output", tmp_path / "a")
    assert "cannot be written" in refused("bench", "export", record, *options)


def test_benchmarks_of_others_stay_as_they_are(rlora_cli, a_record, tmp_path):
    record, known = tmp_path / "x.json", tmp_path / "benchmarks.json"
    record.write_text(json.dumps(a_record))
    theirs = {"time_x": {"code": "def time_x():\n\treturn 1\n", "seed": 10**20}, "version": 2}
    known.write_text(json.dumps(theirs))
    done = rlora_cli("bench", "export", record, "--format", "asv", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert json.loads(known.read_text()).items() >= theirs.items()


def test_a_commit_may_have_several_records(rlora_cli, refused, a_record, tmp_path):
    record, out = tmp_path / "x.json", tmp_path / "asv"
    result = out / "rlora-bench" / f"{COMMIT[:8]}-rlora-bench.json"
    options = ("--format", "asv", "--commit", COMMIT, "--output", out)
    slower = copy.deepcopy(a_record)
    slower["rows"][1] |= {"rank": 8, "samples_s": [1.0], "median_s": 1.0}
    for made in (a_record, slower):
        record.write_text(json.dumps(made))
        assert rlora_cli("bench", "export", record, *options).exit_code == 0
    found = json.loads(result.read_text())["results"]
    assert found.keys() == json.loads((out / "benchmarks.json").read_text()).keys() - {"version"}
    assert found["roberta-base.numpy.r8.scaled_adamw.time_step"][0] == [1.0]
    assert len(found) == 3
    for text in ("{", "[]", '{"results": []}'):
        result.write_text(text)
        assert result.name in refused("bench", "export", record, *options)


@pytest.mark.parametrize("commit", ["", "feature/x", "../../../esc", "abc", "g" * 40])
def test_a_commit_is_none(refused, a_record, tmp_path, commit):
    record = tmp_path / "x.json"
    record.write_text(json.dumps(a_record))
    options = ("--format", "asv", "--commit", commit, "--output", tmp_path / "asv")
    assert "hexadecimal" in refused("bench", "export", record, *options)
    assert list(tmp_path.iterdir()) == [record]


@pytest.mark.parametrize("text", ["[]", "{"])
def test_benchmarks_of_asv_that_are_none(refused, a_record, tmp_path, text):
    record = tmp_path / "x.json"
    record.write_text(json.dumps(a_record))
    (tmp_path / "benchmarks.json").write_text(text)
    said = refused("bench", "export", record, "--format", "asv", "--output", tmp_path)
    assert "benchmarks.json" in said


def test_several_problems_devices_and_dtypes_are_told_apart(a_record):
    record = copy.deepcopy(a_record)
    row = record["rows"][1]
    rows = [row, {**row, "device": "cuda:0"}, {**row, "dtype": "bfloat16"}]
    names = [full_name(x) for x in rows]
    assert names[0].count("-") == names[0].split("/")[0].count("-")
    assert names[1] == names[0].replace("/numpy/", "/numpy-cuda:0/")
    assert names[2] == names[0].replace("/numpy/", "/numpy-bfloat16/")
    for cpu in ("cpu:0", "TFRT_CPU_0", "array_api_strict.Device('CPU_DEVICE')"):
        assert full_name({**row, "device": cpu}) == names[0]
    record["rows"] = [row, {**row, "preset": "256x256*4"}]
    assert "| 256x256*4 |" in FORMATS["markdown"](record, "")
