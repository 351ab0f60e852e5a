"""``rlora reproduce``: the claims of the papers, tried here."""

import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import click
from rich.padding import Padding
from rich.text import Text

from rlora.cli.bench.options import among, make_spec
from rlora.cli.console import console, load_plots, one_line, text_table
from rlora.cli.records import as_json, check_writable, make_folder, write_bytes, write_text
from rlora.pairing.report import number_of

from . import CLAIMS
from .claim import Claim, Setting
from .evidence import make_evidence, panels_of, title_of

ALL: Final = "all"
OFF: Final = 1
"""Exit code when a verdict is not the documented one."""

HELP = """Try the claims of the papers in small, seeded experiments.

All of them, or those that are named as CLAIM. Each leaves a figure (PNG and SVG) and a record
(JSON) in the folder --output. The exit code is 1 if any verdict is not the documented one. Figures
need matplotlib: pip install 'rlora[plot]'.
"""


@click.command(help=HELP, epilog="`rlora reproduce --list` has the claims.")
@click.argument("names", nargs=-1, metavar="[CLAIM|all]...")
@click.option("--list", "listing", is_flag=True, help="List the claims, and try none.")
@click.option("--quick", is_flag=True, help="Smaller experiments, for the same verdicts.")
@click.option(
    "--output",
    type=Path,
    default=Path("build", "reproduce"),
    show_default=True,
    help="A folder for figures and records; made if need be.",
)
@click.option(
    "--backend", default="numpy", show_default=True, help="Array library of the experiments."
)
def reproduce(
    names: tuple[str, ...], *, listing: bool, quick: bool, output: Path, backend: str
) -> int:
    chosen = choose(names)
    if listing:
        show_claims(chosen)
        return 0
    draw = load_plots()
    if backend == "jax":
        os.environ.setdefault("JAX_ENABLE_X64", "1")  # read when JAX is imported
    arrays = make_spec(backend, "float64", None)
    make_folder("--output", output)
    for claim in chosen:
        check_writable(output / f"{claim.name}.json")
    setting = Setting(arrays.backend, quick)
    records, failed = [], []
    for claim in chosen:
        try:
            records.append(attempt(claim, setting, output, draw))
        except OSError:  # a full disk, or a reader that has gone: no other claim could go on
            raise
        except Exception as error:  # raised again below
            failed.append(error)
            click.echo(one_line(f"{claim.name} failed: {type(error).__name__}: {error}"), err=True)
    off = show_verdicts(records) if records else 0
    if records:
        click.echo(f"figures and records: {output}")
    if failed:
        raise failed[0]
    return OFF if off else 0


def choose(names: tuple[str, ...]) -> list[Claim]:
    """The claims of these names, each once, in the order of the registry."""
    wanted = among("CLAIM", names or (ALL,), (*CLAIMS, ALL))
    return [claim for name, claim in CLAIMS.items() if ALL in wanted or name in wanted]


def attempt(claim: Claim, setting: Setting, output: Path, draw: ModuleType) -> dict[str, Any]:
    """Try a claim, write its files, and show what came out."""
    click.echo(f"{claim.name}: {claim.statement}", err=True)
    start = time.perf_counter()
    outcome = claim.run(setting)
    record = make_evidence(claim, outcome, setting, time.perf_counter() - start)
    # What is drawn is what is kept; the files are written when all of them are made.
    title, panels, text = title_of(record), panels_of(record), as_json(record)
    svg, png = draw.as_svg(title, panels), draw.as_png(title, panels)
    write_text(output / f"{claim.name}.json", text)
    write_text(output / f"{claim.name}.svg", svg)
    write_bytes(output / f"{claim.name}.png", png)
    show_checks(record)
    return record


def show_checks(record: dict[str, Any]) -> None:
    """Print each value beside its threshold."""
    rows = [
        (
            check["what"],
            "-" if check["value"] is None else f"{check['value']:.3g}",
            check["bound"],
            f"{check['threshold']:.3g}",
            "yes" if check["holds"] else "no",
        )
        for check in record["checks"]
    ]
    title = f"{record['claim']}: {record['verdict']} ({record['seconds']} s)"
    heads = ("", "value", "", "threshold", "holds")
    console().print(text_table(*heads, rows=rows, title=title, wrap_first=True))


def show_verdicts(records: list[dict[str, Any]]) -> int:
    """Print the verdicts; give the number of those that are not as documented."""
    rows = [(record["claim"], record["verdict"], str(record["seconds"])) for record in records]
    off = sum(not record["as_documented"] for record in records)
    out = console()
    out.print(text_table("claim", "verdict", "seconds", rows=rows))
    out.print(f"{len(records) - off} of {number_of(len(records), 'verdict')} as documented")
    return off


def show_claims(claims: list[Claim]) -> None:
    """Print claims with what is documented of them."""
    out = console()
    for claim in claims:
        out.print(Text(f"{claim.name}: {'holds' if claim.holds else 'fails'}", style="bold"))
        out.print(Padding(Text(claim.statement), (0, 0, 0, 4), expand=False))
