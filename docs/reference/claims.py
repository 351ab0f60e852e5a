"""The page of claims: tries them again, all or those named, then writes claims.md.

python docs/reference/claims.py [CLAIM...]
"""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rlora.cli.claims import CLAIMS
from rlora.cli.evidence import read_evidence
from rlora.cli.reproduce import reproduce

PAGE: Final = Path(__file__).with_suffix(".md")
FOLDER: Final = Path(__file__).with_suffix("")
"""Folder of the figures and records that the page is made of."""

HEAD: Final = """# The papers' claims, tried here

See which statements of the papers hold in small seeded experiments, and try them again:

    rlora reproduce --list
    rlora reproduce all                 # figures and records in build/reproduce
    rlora reproduce damping --quick

A verdict is that of the checks under a claim, whose thresholds have their reasons in the claim's
file; `rlora reproduce` exits with 1 if a verdict is not the documented one. Algebra and rates are
tested here, not the quality of a fine-tuned model. `python docs/reference/claims.py` makes this
page. Seconds are those of a machine with other work to do.
"""


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
    return "\n".join([HEAD, *table(records), *map(section, records)])


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each claim."""
    return [
        "| claim | verdict | of |",
        "| --- | --- | --- |",
        *(
            f"| [{x['claim']}](#{x['claim']}) | {x['verdict']} | {arxiv(x['source'])} |"
            for x in records
        ),
    ]


def arxiv(source: str) -> str:
    """The numbers of the papers in a reference."""
    return ", ".join(f"arXiv:{number}" for number in re.findall(r"arXiv:(\d+\.\d+)", source))


def section(record: dict[str, Any]) -> str:
    """A claim with its measurements and its figure."""
    name = record["claim"]
    lines = [
        "",
        f"## {name}",
        "",
        f"{record['statement']} **{record['verdict'].capitalize()}.**",
        "",
        record["source"],
        "",
        "| measured | value | threshold | |",
        "| --- | --- | --- | --- |",
        *map(check_line, record["checks"]),
        "",
        f"![{name}](claims/{name}.svg)",
        "",
        f"[Record](claims/{name}.json): {record['backend']}, {record['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def check_line(check: dict[str, Any]) -> str:
    """A row of the table of a claim."""
    value = "none" if check["value"] is None else f"{check['value']:.3g}"
    sign = {"<=": "≤", ">=": "≥"}[check["bound"]]
    holds = "yes" if check["holds"] else "no"
    return f"| {check['what']} | {value} | {sign} {check['threshold']:.3g} | {holds} |"


if __name__ == "__main__":
    exit_code = refresh(sys.argv[1:])
    PAGE.write_text(page() + "\n", encoding="utf-8")
    print(f"wrote {PAGE.name}")
    sys.exit(exit_code)
