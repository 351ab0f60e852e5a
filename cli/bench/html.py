"""The parts of a report, as HTML. Everything that a record says is escaped: it may be anybody's."""

import base64
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any, Final

from rlora.cli.console import one_line

from .chart_data import KINDS, Chart
from .join import Record, Row, setups
from .options import ROUNDS
from .table import NOTES, cells, figure, instability, size

NAMES_SHOWN: Final = 3
"""Models or methods named in a heading."""

FIRST: Final = ("method", "verdict", "rank", "ratio", "on", "preset", "record")
"""Columns before all others: the page sends its reader to the verdicts."""

TEXT_COLUMNS: Final = ("record", "preset", "method", "on", "to", "dtype", "verdict")


def page(records: Mapping[str, Record], drawn: Sequence[tuple[Chart, str]]) -> str:
    """Make the report of records, by name, with charts that are drawn already."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    rows = [row for record in records.values() for row in record["rows"]]
    parts = {"charts": "Charts", "measured": "All rows", "environment": "Environment"}
    parts |= {"reproduce": "Measure it again"}
    if any(record["checks"] for record in records.values()):
        parts = {"checks": "Targets", **parts}
    return Template(template).substitute(
        policy=_policy(template),
        title=text(_title(rows)),
        headline=_headline(records, rows),
        contents=" ".join(f'<a href="#{key}">{name}</a>' for key, name in parts.items()),
        checks=_checks(records),
        charts=_charts(drawn),
        shown=f"{len(rows)} of {len(rows)} rows",
        rows=_rows(records),
        environment=_environments(records),
        reproduce=_commands(records),
    )


def text(value: Any) -> str:
    """Escape something that a record says, on one line and without control codes."""
    return escape(one_line(str(value)))


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
        return f"What a step costs: {_listed(parts['model']) or 'no rows'}"
    varied = [name for name, values in parts.items() if len(set(values)) > 1]
    return f"What a step costs, by {_listed(varied)}"


def _listed(values: Any) -> str:
    names = list(dict.fromkeys(str(value) for value in values))
    more = len(names) - NAMES_SHOWN
    if more > 1:
        return f"{', '.join(names[:NAMES_SHOWN])} and {more} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _headline(records: Mapping[str, Record], rows: Sequence[Row]) -> str:
    methods = _listed(row["method"] for row in rows)
    ranks = _listed(row["rank"] for row in rows)
    places = _listed(f"{row['backend']} {row['device']}" for row in rows)
    models = _listed(row["preset"] or row["adapter"] for row in rows)
    told = f"{methods} for {models} on {places}; rank {ranks}."
    said = [f"<p>{text(told)}</p>"] if rows else []
    for name, record in records.items():
        env, of = record["environment"], f"{name}: " if len(records) > 1 else ""
        told = f"{of}measured {record['created']} with rlora {record['rlora']} on {env['cpu']}, "
        said.append(f'<p class="soft">{text(told + str(env["cpus"]))} logical processors.</p>')
        if record["partial"]:
            note = f"Partial: {name} was interrupted; this is what was done until then."
            said.append(f'<p class="note">{text(note)}</p>')
    shaky = sum(row["verdict"] != "ok" for row in rows)
    if shaky:
        note = f"{shaky} of {len(rows)} rows are unstable: hollow in the charts, not to be quoted."
        said.append(f'<p class="note">{note} Under the table it says why.</p>')
    checks = [check for record in records.values() for check in record["checks"]]
    if checks:
        passed = sum(check["passed"] for check in checks)
        said.append(f"<p><strong>Targets: {passed} of {len(checks)} passed.</strong></p>")
    return "\n".join(said)


def _checks(records: Mapping[str, Record]) -> str:
    lines = []
    for name, record in records.items():
        for check in record["checks"]:
            word = "pass" if check["passed"] else "fail"
            mark = "" if check.get("stable", True) else "?"
            limit = f"{check['sense']} {figure(check['limit'])}"
            rank = "-" if check["rank"] is None else check["rank"]
            lines.append(
                f'<tr><td><span class="word {word}">{word.upper()}{mark}</span></td>'
                f'<th scope="row">{text(check["what"])}</th><td>{text(check["preset"])}</td>'
                f'<td class="n">{text(rank)}</td><td>{text(limit)}</td>'
                f'<td class="n">{figure(check["measured"])}</td>'
                + (f"<td>{text(name)}</td></tr>" if len(records) > 1 else "</tr>")
            )
    if not lines:
        return ""
    names = ["verdict", "what", "preset", "rank", "limit", "measured"]
    heads = names + ["record"] * (len(records) > 1)
    head = "".join(
        f'<th scope="col"{" class=n" * (name in ("rank", "measured"))}>{name}</th>'
        for name in heads
    )
    caption = "Measured against the limits of the suite; a ? where it rests on an unstable row."
    table = f"<table><caption><span>{caption}</span></caption>"
    return (
        '<section id="checks" aria-labelledby="checks-head"><h2 id="checks-head">Targets</h2>\n'
        f'<div class="scroll" role="region" aria-label="Targets" tabindex="0">{table}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _charts(drawn: Sequence[tuple[Chart, str]]) -> str:
    figures = [
        f"<figure>{svg}<figcaption>{KINDS[chart.kind].about}</figcaption></figure>"
        for chart, svg in drawn
    ]
    have = {chart.kind for chart, _ in drawn}
    missing = [
        f"<li>{kind.title} needs {kind.lacks}: <code>{escape(kind.command)}</code></li>"
        for key, kind in KINDS.items()
        if key not in have
    ]
    said = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    if missing:
        said += f"\n<h3>Not drawn, for want of data</h3>\n<ul>{''.join(missing)}</ul>"
    return said


def _rows(records: Mapping[str, Record]) -> str:
    lines = [(_line(name, row), row) for name, record in records.items() for row in record["rows"]]
    names = lines[0][0] if lines else FIRST
    kept = [name for name in names if not lines or any(line[name] != "-" for line, _ in lines)]
    kept = [name for name in kept if name != "record" or len(records) > 1]
    head = "".join(
        f'<th scope="col" aria-sort="none"{_class(name)}><button type="button">{name}</button></th>'
        for name in kept
    )
    body = "\n".join(
        f"<tr>{''.join(_cell(name, line[name], row) for name in kept)}</tr>" for line, row in lines
    )
    said = [note for name, note in NOTES.items() if name in kept]
    said += filter(None, [instability([row for _, row in lines])])
    notes = " ".join(map(text, said))
    return (
        '<div class="scroll" role="region" aria-label="All rows" tabindex="0">'
        '<table id="rows"><caption><span>A row for each method, preset and rank; press '
        "a column head to sort by it.</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        f'</div>\n<p class="about">{notes}</p>'
    )


def _line(name: str, row: Row) -> dict[str, str]:
    """Give the cells of a row, those first that a telephone shows."""
    line = {**cells(row), "preset": row["preset"] or row["adapter"] or "-", "record": name}
    first = {key: line[key] for key in FIRST}
    return {**first, **line}


def _class(name: str) -> str:
    return "" if name in TEXT_COLUMNS else ' class="n"'


def _cell(name: str, said: str, row: Row) -> str:
    if name == "method":
        return f'<th scope="row">{text(said)}</th>'
    if name == "verdict":
        word, _, why = one_line(said).partition(":")
        kind, hint = (
            ("pass", "") if said == "ok" else ("unstable", f' title="{escape(why.strip())}"')
        )
        return f'<td><span class="word {kind}"{hint}>{escape(word)}</span></td>'
    value = _number(name, row)
    sort = "" if value is None else f' data-v="{value!r}"'
    return f"<td{_class(name)}{sort}>{text(said)}</td>"


def _number(name: str, row: Row) -> float | None:
    """Number that a column is sorted by; None for text and for what was not measured."""
    model, rest, step = row["model_s"], row["forward_backward_s"], row["median_s"]
    rank = row["rank"]
    values: dict[str, float | None] = {
        "rank": max(rank) if isinstance(rank, list) else rank,
        "samples": len(row["samples_s"]),
        "step": step,
        "spread": row["spread"],
        "ratio": row["ratio"],
        "interval": row["ratio_interval"] and row["ratio_interval"][0],
        "compile": row["compile_s"],
        "first": row["first_call_s"],
        "state": row["state_bytes"],
        "peak temporary": row["peak_temporary_bytes"],
        "operations": row["operations"],
        "model": model,
        "of roofline": model and model / step if step else None,
        "of training": rest and step / (step + rest),
    }
    return values.get(name)


def _environments(records: Mapping[str, Record]) -> str:
    parts = []
    for (name, record), setup in zip(records.items(), setups([*records.values()]), strict=True):
        env, command = record["environment"], record["command"]
        blas = [_library(x) for x in env["blas"]]
        lines = {
            "processor": f"{env['cpu']}, {env['cpus']} logical",
            "memory": size(env["memory_bytes"]),
            "accelerators": ", ".join(env["accelerators"]) or "none",
            "system": f"{env['system']} {env['machine']}, Python {env['python']}",
            "versions": ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
            "BLAS, OpenMP (threads)": ", ".join(blas) or "-",
            "threads": "not pinned" if command["threads"] is None else command["threads"],
            "load before": ", ".join(map(str, env["load_average"] or ())) or "-",
            **{
                f"peak of {x['backend']} {x['device']}": f"{x['bytes_per_s'] / 1e9:.3g} GB/s, "
                f"{x['flops_per_s'] / 1e9:.3g} Gflop/s"
                for x in record["peaks"]
            },
        }
        told = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in lines.items())
        head = f"<h3>{text(', '.join(filter(None, (name, setup))))}</h3>\n"
        parts.append(f"{head}<dl>{told}</dl>")
    return "\n".join(parts)


def _library(found: Mapping[str, Any]) -> str:
    """Name a BLAS or OpenMP library, with what is known of its version and threads."""
    threads = None if found["threads"] is None else f"({found['threads']})"
    return " ".join(filter(None, (found["library"], found["version"], threads)))


def _commands(records: Mapping[str, Record]) -> str:
    parts = []
    for name, record in records.items():
        head = f"<p>{text(name)}</p>\n" if len(records) > 1 else ""
        parts.append(f"{head}<pre><code>{text(command_of(record))}</code></pre>")
    return "\n".join(parts)


def command_of(record: Record) -> str:
    """Say how a record was made, quoted for a shell."""
    command, words = record["command"], ["rlora", "bench", "run"]
    rounds, suite = command["rounds"], command["suite"]
    fixed, seconds = rounds["least"] == rounds["most"], rounds["seconds"]
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
        "seconds": None if seconds in (None, ROUNDS.seconds) else f"{seconds:g}",
        "threads": command["threads"],
        "seed": command["seed"] or None,
    }
    for name, value in options.items():
        if value not in (None, ""):
            words += [f"--{name}", one_line(str(value))]
    return shlex.join([*words, *["--end-to-end"] * trains])
