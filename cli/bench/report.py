"""``rlora bench report``: records as a page that anybody can open, and as plot_style."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import click

from rlora.cli.records import check_writable, make_folder, write_bytes, write_text

from .chart_data import Chart, charts
from .html import page
from .schema import read_record


@click.command()
@click.argument("records", type=Path, nargs=-1, required=True, metavar="RECORD...")
@click.option("--output", type=Path, required=True, help="HTML file; its folder must exist.")
@click.option("--pictures", type=Path, help="A folder for every chart, as PNG and SVG.")
def report(records: tuple[Path, ...], output: Path, pictures: Path | None) -> None:
    """Write charts and tables of the RECORDs into one HTML file.

    The file needs no network and no other file. Charts need matplotlib: pip install 'rlora[plot]'.
    """
    read = {}
    for i, path in enumerate(records):
        read[path.name if path.name not in read else f"{path.name} ({i + 1})"] = read_record(path)
    check_writable(output)
    draw = drawing("rlora.cli.bench.charts")
    found = charts([*read.values()])
    drawn = [(chart, draw.for_page(chart, f"chart{i}")) for i, chart in enumerate(found)]
    made = page(read, drawn)
    if pictures is not None:
        save(found, pictures, draw)
    write_text(output, made)


def drawing(module: str) -> ModuleType:
    """Import what draws, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        msg = "pictures need matplotlib, which is not installed: pip install 'rlora[plot]'"
        raise ImportError(msg) from error


def save(found: list[Chart], folder: Path, draw: ModuleType) -> None:
    """Write every chart twice into a folder, which is made if need be."""
    make_folder("--pictures", folder)
    for name, chart in zip(file_names(found), found, strict=True):
        write_bytes(folder / f"{name}.svg", draw.as_svg(chart).encode())
        write_bytes(folder / f"{name}.png", draw.as_png(chart))


def file_names(found: list[Chart]) -> list[str]:
    """Name charts by what they show, in letters that every system takes; no name twice."""
    names: list[str] = []
    for chart in found:
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{chart.kind}-{chart.where}").strip("-.")[:100]
        same = sum(name == words or name.startswith(f"{words}--") for name in names)
        names.append(f"{words}--{same + 1}" if same else words)
    return names
