"""Try the claims again, all or those named, and write claims.md.

python docs/reference/claims.py [CLAIM...]
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rlora.cli.claims import CLAIMS
from rlora.cli.claims.evidence import read_evidence
from rlora.cli.claims.reproduce import reproduce

PAGE: Final = Path(__file__).with_suffix(".md")
FOLDER: Final = Path(__file__).with_suffix("")
"""Folder of the figures and records that the page is made of."""

HEAD: Final = """# The papers' claims, tested

See which statements of the papers hold in small seeded experiments, and repeat these, into
build/reproduce (exit code 1: a verdict differs):

    rlora reproduce --list
    rlora reproduce all
    rlora reproduce damping --quick

A *gauge* or *split* is a factorization (R A, B R⁻¹) of a product B A.
"""

REFERENCE: Final = re.compile(
    r"(?:[A-Z]\.[- ]?(?:[A-Z]\.[- ]?)*[\w-]+(?:, |\. ))+[^.?]*[.?] arXiv:(\d+\.\d+), \d{4}"
)
"""Authors, title, number and year of a paper."""


def refresh(names: Sequence[str]) -> int:
    """Try claims, and keep figures and records; the exit code of the command."""
    with TemporaryDirectory() as folder:
        code = reproduce.main([*names, "--output", folder], standalone_mode=False)
        FOLDER.mkdir(exist_ok=True)
        for suffix in ("svg", "json"):
            for path in Path(folder).glob(f"*.{suffix}"):
                shutil.copy(path, FOLDER)
    return int(code)


def page() -> str:
    """The whole page, from the records."""
    records = [read_evidence(FOLDER / f"{name}.json") for name in CLAIMS]
    return "\n".join([HEAD, *summary(records), *map(section, records)])


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each verdict, with the claims that have it; a number of those that hold."""
    by_verdict: dict[str, list[str]] = {}
    for x in records:
        by_verdict.setdefault(x["verdict"], []).append(f"[{x['claim']}](#{x['claim']})")
    return [
        wrapped(f"- **{verdict}**: {len(x) if verdict == 'holds' else ', '.join(x)}")
        for verdict, x in by_verdict.items()
    ]


def linked(source: str) -> str:
    """A source with a link in place of each paper's authors and title."""
    return REFERENCE.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source).rstrip(".")


def wrapped(text: str) -> str:
    """A paragraph in lines of the source's length."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def section(record: dict[str, Any]) -> str:
    """A claim with its measurements and its figure."""
    name, verdict = record["claim"], record["verdict"].capitalize()
    lines = [
        "",
        f"## {name}",
        "",
        wrapped(f"{record['statement']} **[{verdict}](claims/{name}.json).**"),
        "",
        wrapped(f"{linked(record['source'])}."),
        *failed(record["checks"]),
        "",
        f"![{name}](claims/{name}.svg)",
    ]
    return "\n".join(lines)


def failed(checks: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the checks that do not hold, where there are any."""
    rows = [check_line(check) for check in checks if not check["holds"]]
    return ["", "| check | measured |", "| --- | --- |", *rows] if rows else []


def check_line(check: dict[str, Any]) -> str:
    """A row of that table."""
    value = "none" if check["value"] is None else f"{check['value']:.3g}"
    sign = {"<=": "≤", ">=": "≥"}[check["bound"]]
    return f"| {check['what']} | {value}, not {sign} {check['threshold']:.3g} |"


if __name__ == "__main__":
    exit_code = refresh(sys.argv[1:])
    PAGE.write_text(page() + "\n", encoding="utf-8")
    print(f"wrote {PAGE.name}")
    sys.exit(exit_code)
