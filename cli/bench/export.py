"""``rlora bench export``: a record in the formats of other tools, each a pure function."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from rlora.cli.records import check_writable, is_stream, make_folder, write_text

from .schema import Record, Row, read_record
from .stats import median_interval
from .table import cells, filled


def full_name(row: Row) -> str:
    """Name a row the same in every format and every run: ``gpt2-medium/torch/r16/adamw``.

    With the device and the dtype after the backend where they are not the usual ones.
    """
    rank = row["rank"]
    ranks = "-".join(map(str, rank)) if isinstance(rank, list) else str(rank)
    device = "cpu" if "cpu" in row["device"].lower() else row["device"]  # JAX's is "cpu:0"
    unusual = [x for x in (device, row["dtype"]) if x not in ("cpu", "float32")]
    backend = "-".join([row["backend"], *unusual])
    return f"{row['preset'] or row['adapter']}/{backend}/r{ranks}/{row['method']}"


def pytest_benchmark(record: Record, commit: str) -> str:
    """Write what ``pytest-benchmark compare`` reads, and several dashboards; seconds."""
    environment = record["environment"]
    made = {
        "machine_info": {
            "node": "",
            "processor": environment["cpu"],
            "machine": environment["machine"],
            "python_version": environment["python"],
            "python_implementation": "CPython",
            "system": environment["system"],
            "cpu": {"brand_raw": environment["cpu"], "count": environment["cpus"]},
        },
        "commit_info": {"id": commit, "time": record["created"], "dirty": False, "branch": ""},
        "benchmarks": [_pytest_row(row) for row in record["rows"]],
        "datetime": record["created"],
        "version": "5.0.0",
    }
    return json.dumps(made, indent=1) + "\n"


def _pytest_row(row: Row) -> dict[str, Any]:
    params = {key: row[key] for key in ("method", "backend", "rank", "preset", "adapter", "dtype")}
    extra = ("ratio", "ratio_to", "state_bytes", "peak_temporary_bytes", "verdict")
    return {
        "group": f"{row['preset'] or row['adapter']}, rank {row['rank']}",
        "name": full_name(row),
        "fullname": full_name(row),
        "params": params,
        "param": full_name(row),
        "extra_info": {key: row[key] for key in extra},
        "options": {"disable_gc": True, "timer": "perf_counter", "warmup": True},
        "stats": _pytest_stats(row["samples_s"]),
    }


def _pytest_stats(samples: list[float]) -> dict[str, Any]:
    x = np.sort(samples)
    q1, median, q3 = (float(q) for q in np.quantile(x, (0.25, 0.5, 0.75)))
    mean, deviation = float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0
    inside = x[(x >= q1 - 1.5 * (q3 - q1)) & (x <= q3 + 1.5 * (q3 - q1))]
    far = int(np.sum(np.abs(x - mean) > deviation))
    return {
        "min": float(x[0]),
        "max": float(x[-1]),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(x),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(x) - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(x) - len(inside)}",
        "ld15iqr": float(inside[0]),
        "hd15iqr": float(inside[-1]),
        "ops": 1 / mean,
        "total": float(x.sum()),
        "iterations": 1,
        "data": samples,
    }


def github_action(record: Record, commit: str) -> str:
    """``customSmallerIsBetter`` of github-action-benchmark: step times, then ratios."""
    cases = []
    for row in record["rows"]:
        half = (row["spread"] or 0) * row["median_s"] / 2
        about = f"{len(row['samples_s'])} samples; {row['verdict']}"
        step = {"unit": "ms", "value": row["median_s"] * 1e3, "range": f"± {half * 1e3:.3g}"}
        cases.append({"name": f"{full_name(row)}/step", **step, "extra": about})
        if row["ratio"] is not None:
            to = f"x {row['ratio_to']}"
            cases.append({"name": f"{full_name(row)}/ratio", "unit": to, "value": row["ratio"]})
    return json.dumps(cases, indent=1) + "\n"


def bencher(record: Record, commit: str) -> str:
    """Bencher Metric Format: latency in nanoseconds, with quartiles, and our own measures."""
    made = {}
    for row in record["rows"]:
        low, middle, high = (float(q) for q in np.quantile(row["samples_s"], (0.25, 0.5, 0.75)))
        latency = {"value": middle * 1e9, "lower_value": low * 1e9, "upper_value": high * 1e9}
        measures: dict[str, Any] = {"latency": latency}
        if row["ratio"] is not None:
            measures["ratio"] = {"value": row["ratio"]}
        measures["state-bytes"] = {"value": row["state_bytes"]}
        made[full_name(row)] = measures
    return json.dumps(made, indent=1) + "\n"


ASV_COLUMNS: Final = [
    *("result", "params", "version", "started_at", "duration", "stats_ci_99_a", "stats_ci_99_b"),
    *("stats_q_25", "stats_q_75", "stats_number", "stats_repeat", "samples"),
]

MACHINE: Final = "rlora-bench"
"""Name of the machine and of the environment in asv's results."""


def asv(record: Record, commit: str) -> str:
    """A result file of asv (version 2): a benchmark for each row, its samples in seconds."""
    environment, created = record["environment"], _milliseconds(record["created"])
    made = {
        "version": 2,
        "commit_hash": commit,
        "env_name": MACHINE,
        "date": created,
        "params": {**_asv_machine(record), "python": environment["python"]},
        "python": environment["python"],
        "requirements": environment["versions"],
        "env_vars": {},
        "durations": {},
        "result_columns": ASV_COLUMNS,
        "results": {_asv_name(row): _asv_row(row, created) for row in record["rows"]},
    }
    return json.dumps(made) + "\n"


def _asv_machine(record: Record) -> dict[str, str]:
    environment = record["environment"]
    return {
        "machine": MACHINE,
        "arch": environment["machine"],
        "cpu": environment["cpu"],
        "num_cpu": str(environment["cpus"]),
        "os": environment["system"],
        "ram": str(environment["memory_bytes"] or ""),
    }


def write_asv_results(record: Record, commit: str, folder: Path) -> None:
    """Write a result with all that asv asks for beside it, into its folder of results.

    Its machine, without which asv skips the result, and its benchmarks; results of the same commit
    and benchmarks are added to those that the folder has.
    """
    make_folder("--output", folder / MACHINE)
    known, result = folder / "benchmarks.json", folder / MACHINE / f"{commit[:8]}-{MACHINE}.json"
    mine = {_asv_name(row): _asv_benchmark(row) for row in record["rows"]}
    benchmarks = {"version": 2, **_read_asv(known), **mine}
    made = json.loads(asv(record, commit))
    made["results"] = {**_read_asv(result).get("results", {}), **made["results"]}
    machine = {**_asv_machine(record), "version": 1}
    write_text(known, json.dumps(benchmarks, indent=1) + "\n")
    write_text(folder / MACHINE / "machine.json", json.dumps(machine, indent=1) + "\n")
    write_text(result, json.dumps(made) + "\n")


def _read_asv(path: Path) -> dict[str, Any]:
    """Read a file of asv, whose entries of others are kept as they are; empty without a file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON: {error}"
        raise ValueError(msg) from error
    if not isinstance(found, dict) or not isinstance(found.get("results", {}), dict):
        msg = f"{path} is no file of asv; give the folder of its results"
        raise ValueError(msg)
    return found


def _asv_benchmark(row: Row) -> dict[str, Any]:
    return {
        "name": _asv_name(row),
        "version": full_name(row),
        "code": "",
        "type": "time",
        "unit": "seconds",
        "params": [],
        "param_names": [],
    }


def _asv_name(row: Row) -> str:
    return f"{full_name(row).replace('/', '.')}.time_step"


def _asv_row(row: Row, created: int) -> list[Any]:
    samples = row["samples_s"]
    q1, median, q3 = ([float(q)] for q in np.quantile(samples, (0.25, 0.5, 0.75)))
    # Infinite ends are what asv itself takes for too few samples.
    low, high = median_interval(samples, 0.99) or (-math.inf, math.inf)
    duration, repeat, version = sum(samples), [len(samples)], full_name(row)
    return [median, [], version, created, duration, [low], [high], q1, q3, [1], repeat, [samples]]


def _milliseconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp() * 1000)


def as_csv(record: Record, commit: str) -> str:
    """One line for each row, with the numbers as they are; of the samples their count."""
    out = io.StringIO()
    lines = [_csv_row(row) for row in record["rows"]]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_row(row: Row) -> dict[str, Any]:
    low, high = row["ratio_interval"] or (None, None)
    rest = {key: value for key, value in row.items() if key not in ("samples_s", "ratio_interval")}
    return {**rest, "samples": len(row["samples_s"]), "ratio_low": low, "ratio_high": high}


def markdown(record: Record, commit: str) -> str:
    """Give the table as it is on the screen, of several problems with what each is."""
    lines = [{"of": str(row["preset"] or row["adapter"]), **cells(row)} for row in record["rows"]]
    names = filled(lines)
    if len({line["of"] for line in lines}) < 2:
        names = names[1:]
    rows = [names, ["---"] * len(names), *([line[name] for name in names] for line in lines)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


FORMATS: Final[dict[str, Callable[[Record, str], str]]] = {
    "asv": asv,
    "bencher": bencher,
    "csv": as_csv,
    "github-action": github_action,
    "markdown": markdown,
    "pytest-benchmark": pytest_benchmark,
}


def _commit(context: click.Context, option: click.Parameter, commit: str) -> str:
    """Take a commit that may become the name of a file."""
    if not re.fullmatch("[0-9a-fA-F]{7,64}", commit):
        msg = f"--commit must be 7 to 64 hexadecimal digits, as git rev-parse gives, got {commit!r}"
        raise ValueError(msg)
    return commit


@click.command()
@click.argument("record", type=Path)
@click.option("--format", "name", type=click.Choice(list(FORMATS)), required=True)
@click.option(
    "--output", type=Path, help="A file, of asv the folder of its results; else standard output."
)
@click.option(
    "--commit",
    default="0" * 40,
    callback=_commit,
    help="What was measured, for formats that keep it: 7 to 64 hexadecimal digits.",
)
def export(record: Path, name: str, output: Path | None, commit: str) -> None:
    """Write RECORD in a format of another tool."""
    read = read_record(record)
    if name == "asv" and output is not None:
        write_asv_results(read, commit, output)
        click.echo(f"results of asv: {output}")
        return
    text = FORMATS[name](read, commit)
    if output is None:
        click.echo(text, nl=False)
        return
    check_writable(output)
    write_text(output, text)
    click.echo(f"{name}: {output}", err=is_stream(output))  # not behind the text itself
