"""``rlora bench report``: records as a page that anybody can open, and as pictures."""

import re
from pathlib import Path

import click

from rlora.cli.console import load_plots
from rlora.cli.records import check_writable, make_folder, write_bytes, write_text
from rlora.pairing.report import number_of

from .chart_data import Chart, charts
from .schema import read_record


@click.command()
@click.argument("records", type=Path, nargs=-1, required=True, metavar="RECORD...")
@click.option("--output", type=Path, required=True, help="HTML file; its folder must exist.")
@click.option("--pictures", type=Path, help="A folder for every chart, as PNG and SVG.")
def report(records: tuple[Path, ...], output: Path, pictures: Path | None) -> None:
    """Write charts and tables of the RECORDs into one HTML file.

    The file needs no network and no other file. This command needs matplotlib and Jinja2:
    pip install 'rlora[plot]'.
    """
    read = {}
    for i, path in enumerate(records):
        read[path.name if path.name not in read else f"{path.name} ({i + 1})"] = read_record(path)
    check_writable(output)
    plots, html = load_plots(), load_plots("rlora.cli.bench.html")
    found = charts([*read.values()])
    svgs = [plots.as_svg(chart.title, chart.panels, by_name=True) for chart in found]
    drawn = [
        (chart, plots.inline(svg, f"chart{i}", chart.words()))
        for i, (chart, svg) in enumerate(zip(found, svgs, strict=True))
    ]
    made = html.render(read, drawn)
    if pictures is not None:
        make_folder("--pictures", pictures)
        for name, chart, svg in zip(file_names(found), found, svgs, strict=True):
            write_text(pictures / f"{name}.svg", svg)
            png = plots.as_png(chart.title, chart.panels, by_name=True)
            write_bytes(pictures / f"{name}.png", png)
    write_text(output, made)
    click.echo(
        f"report: {output}, {number_of(len(found), 'chart')} of {number_of(len(read), 'record')}"
    )
    if pictures is not None:
        click.echo(f"pictures: {pictures}")


def file_names(found: list[Chart]) -> list[str]:
    """Name charts by what they show, in letters that every system takes; no name twice."""
    names: list[str] = []
    for chart in found:
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{chart.kind}-{chart.where}").strip("-.")[:100]
        same = sum(name == words or name.startswith(f"{words}--") for name in names)
        names.append(f"{words}--{same + 1}" if same else words)
    return names
