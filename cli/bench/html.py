"""Reports as HTML. Everything that a record says is escaped: it may be anybody's."""

import base64
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlora.cli.console import one_line

from .chart_data import KINDS, Chart
from .join import setups
from .options import ROUNDS
from .schema import Record, Row
from .table import COLUMNS, NOTES, TEXTS, cells, figure, filled, instability, size

NAMES_SHOWN: Final = 3
"""Models or methods named in a heading."""

FIRST: Final = ("method", "verdict", "rank", "ratio", "on", "preset", "record")
"""Columns before all others: the page sends its reader to the verdicts."""


def render(records: Mapping[str, Record], drawn: Sequence[tuple[Chart, str]]) -> str:
    """Make the report of records, by name, with charts that are drawn already."""
    source = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    env = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda x: x if isinstance(x, Markup) else one_line(str(x)),
    )
    rows = [row for record in records.values() for row in record["rows"]]
    lines = [_line(name, row) for name, record in records.items() for row in record["rows"]]
    said_above = [x for x in ("preset", "record") if len({line[x] for line in lines}) == 1]
    columns = [name for name in filled(lines) if name not in said_above]
    have = {chart.kind for chart, _ in drawn}
    return env.from_string(source).render(
        policy=_policy(source),
        title=_title(rows),
        about=_about(rows),
        records=records,
        setups=dict(zip(records, setups([*records.values()]), strict=True)),
        checks=[(name, check) for name, record in records.items() for check in record["checks"]],
        charts=[(KINDS[chart.kind], Markup(svg)) for chart, svg in drawn],  # noqa: S704
        missing=[kind for key, kind in KINDS.items() if key not in have],
        columns=columns,
        texts=(*TEXTS, "preset", "record"),
        rows=list(zip(rows, lines, strict=True)),
        number=_number,
        notes=[*(NOTES[name] for name in columns if name in NOTES), instability(rows) or ""],
        shaky=sum(row["verdict"] != "ok" for row in rows),
        figure=figure,
        conditions=_conditions,
        command_of=command_of,
    )


def _policy(template: str) -> str:
    """Allow the page its own script and styles, and nothing else, whatever a record may hold."""
    found = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = hashlib.sha256((found[1] if found else "").encode()).digest()
    script = f"'sha256-{base64.b64encode(digest).decode()}'"
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {script}"


def _title(rows: Sequence[Row]) -> str:
    """Name the model, or for several what is not the same in all rows."""
    parts = {
        "model": [row["preset"] or row["adapter"] for row in rows],
        "backend": [f"{row['backend']} {row['device']}" for row in rows],
        "rank": [str(row["rank"]) for row in rows],
        "dtype": [row["dtype"] for row in rows],
    }
    if len(set(parts["model"])) < 2:
        return f"What a step costs: {_listed(parts['model'])}"
    varied = [name for name, values in parts.items() if len(set(values)) > 1]
    return f"What a step costs, by {_listed(varied)}"


def _listed(values: Any) -> str:
    names = list(dict.fromkeys(str(value) for value in values))
    more = len(names) - NAMES_SHOWN
    if more > 1:
        return f"{', '.join(names[:NAMES_SHOWN])} and {more} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _about(rows: Sequence[Row]) -> str:
    methods = _listed(row["method"] for row in rows)
    ranks = _listed(row["rank"] for row in rows)
    places = _listed(f"{row['backend']} {row['device']}" for row in rows)
    models = _listed(row["preset"] or row["adapter"] for row in rows)
    return f"{methods} for {models} on {places}; rank {ranks}."


def _line(name: str, row: Row) -> dict[str, str]:
    """Give the cells of a row, those first that a telephone shows."""
    line = {**cells(row), "preset": row["preset"] or row["adapter"] or "-", "record": name}
    return {**{key: line[key] for key in FIRST}, **line}


def _number(name: str, row: Row) -> float | None:
    """Give the number that a column is sorted by; None for what was not measured."""
    value = COLUMNS[name].value(row)
    number: float | None = value[-1] if isinstance(value, list) else value
    return number


def _conditions(record: Record) -> dict[str, Any]:
    """List the conditions of a record, by name."""
    env, threads = record["environment"], record["command"]["threads"]
    return {
        "processor": f"{env['cpu']}, {env['cpus']} logical",
        "memory": size(env["memory_bytes"]),
        "accelerators": ", ".join(env["accelerators"]) or "none",
        "system": f"{env['system']} {env['machine']}, Python {env['python']}",
        "versions": ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
        "BLAS, OpenMP (threads)": ", ".join(map(_library, env["blas"])) or "-",
        "threads": "not pinned" if threads is None else threads,
        "load before": ", ".join(map(str, env["load_average"] or ())) or "-",
        **{
            f"peak of {x['backend']} {x['device']}": f"{x['bytes_per_s'] / 1e9:.3g} GB/s, "
            f"{x['flops_per_s'] / 1e9:.3g} Gflop/s"
            for x in record["peaks"]
        },
    }


def _library(found: Mapping[str, Any]) -> str:
    """Name a BLAS or OpenMP library, with what is known of its version and threads."""
    threads = None if found["threads"] is None else f"({found['threads']})"
    return " ".join(filter(None, (found["library"], found["version"], threads)))


def command_of(record: Record) -> str:
    """Say how a record was made, quoted for a shell."""
    command, words = record["command"], ["rlora", "bench", "run"]
    rounds, suite = command["rounds"], command["suite"]
    fixed, seconds = rounds["least"] == rounds["most"], rounds["seconds"]
    usual = None if fixed else ROUNDS.seconds
    trains = any(row["forward_backward_s"] is not None for row in record["rows"])
    options = {
        "suite": suite,
        "backend": None if suite else ",".join(map(str, command["backends"])),
        "method": None if suite else ",".join(command["methods"]),
        "rank": ",".join(map(str, command["ranks"] or ())),
        "preset": command["preset"],
        "adapter": command["adapter"],
        "dtype": None if command["dtype"] == "float32" else command["dtype"],
        "device": command["device"],
        "against": None if suite else ",".join(command["against"]),
        "repeat": rounds["most"] if fixed else None,
        "seconds": None if seconds in (None, usual) else f"{seconds:g}",
        "threads": command["threads"],
        "seed": command["seed"] or None,
    }
    for name, value in options.items():
        if value not in (None, ""):
            words += [f"--{name}", one_line(str(value))]
    return shlex.join([*words, *["--end-to-end"] * trains])
