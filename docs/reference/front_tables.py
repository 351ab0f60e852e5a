"""Write the tables that stand on several pages between their marks.

python docs/reference/front_tables.py
"""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "reference" / "speed.md",
    ROOT / "docs" / "reference" / "study.md",
]
STUDY: Final = ROOT / "docs" / "reference" / "study" / "tables.md"

STRINGS: Final = STUDY.parent / "strings" / "tables.md"

COSTS: Final = """
*One optimizer step, as a multiple of torch's fused AdamW on the same parameters; gpt2-medium, 24
pairs, float32.*

| rank | 4 | 16 | 64 |
| --- | --- | --- | --- |
| `ScaledAdamW`, two CPU threads | 4.1 | 4.3 | 9.0 |
| PEFT's Riemannian wrapper, two CPU threads | 9.3 | 6.8 | 14.2 |
| `ScaledAdamW`, one NVIDIA H100 | 10.6 | 9.9 | 9.0 |
| PEFT's Riemannian wrapper, one NVIDIA H100 | 47 | 56 | 154 |
"""
"""Figures of today's default, idle machines: renew them here and run this script."""

METHODS: Final = {
    "`adamw`": "AdamW (0.9, 0.999)",
    "`adamw-fast`": "AdamW (0.7, 0.8)",
    "`scaled-both-fast`": "`ScaledAdamW` (0.7, 0.8)",
    "`lora-plus-fast`": "`LoRAPlus` (0.7, 0.8)",
}
TASKS: Final = {
    "pronounce, rank 8, 160 steps": "SmolLM2-135M, `pronounce`, rank 8",
    "pronounce, rank 32, 160 steps": "SmolLM2-135M, `pronounce`, rank 32",
    "chain_sum, rank 8, 160 steps": "SmolLM2-135M, `chain_sum`, rank 8",
    "chain_sum, rank 32, 160 steps": "SmolLM2-135M, `chain_sum`, rank 32",
    "rotated, rank 8, 200 steps": "rotated digits, rank 8",
}
ROWS: Final = {
    "Betas": "`(cipher-noisy|fall)`, rank 4, |worst",
    "Best losses of all methods": "`(adamw|scaled|lora-rite|.*-fast|.*-sgd|.*muon|(ref|alt)-lora)`",
    "One learning rate for all settings": "`(adamw|adamw-fast|scaled|scaled-clipped)`",
    "Regret by learning rate": "`(adamw|adamw-fast|scaled|.*-16-fast|.*rite-fast|scaled-clipped)`",
    "Steps in a trust region": "`(fall|fall-large)`, rank 4, 300 steps",
    "Best rates against rank, s, width, batch and length": "`(adamw|scaled|.*-fast)`",
    "The rate of the usual task on its unusual forms": "`(adamw-fast|scaled|.*-(16|rite)-fast)`",
}
"""Title of a section -> pattern of the rows that the page of the study has."""


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def losses() -> str:
    """Test losses of the methods that matter most, from the study's tables."""
    rows = [cells(line) for line in STUDY.read_text("utf-8").splitlines() if line.startswith("| ")]
    head, *body = rows
    found = {row[0]: dict(zip(head, row, strict=True)) for row in body if len(row) == len(head)}
    lines = [
        "*Test loss, cross-entropy in natural logarithms (lower is better), each with a learning",
        "rate of its own sweep; betas in parentheses; bold: the lowest.*",
        "",
        f"| task | {' | '.join(METHODS.values())} |",
        "| --- |" + " --- |" * len(METHODS),
    ]
    for task, name in TASKS.items():
        row = [found[method][task] for method in METHODS]
        best = min(row, key=lambda cell: float("inf") if cell == "-" else float(cell))
        shown = (f"**{cell}**" if cell == best else cell.replace("-", "not run") for cell in row)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def sections() -> dict[str, str]:
    """Title -> text of the sections in the tables of strings, with the rows of `ROWS` alone."""
    _, *parts = STRINGS.read_text("utf-8").partition("\n![")[0].split("\n## ")
    found = {title: text for title, _, text in (part.partition("\n") for part in parts)}
    return {title: few_rows(text, ROWS.get(title, "")) for title, text in found.items()}


def few_rows(table: str, pattern: str) -> str:
    """A table with a caption, its head, and the rows in which a pattern is found."""
    lines = table.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("| ---")), len(lines)) + 1
    return "\n".join([*lines[:first], *(x for x in lines[first:] if re.search(pattern, x))])


def rewritten(text: str) -> str:
    """A page with all tables as they are now."""
    for name, table in {"costs": COSTS, "losses": losses(), **sections()}.items():
        begin, end = f"<!-- {name}: made by front_tables.py -->", f"<!-- end of {name} -->"
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        block = f"{begin}\n\n{table.strip()}\n\n{end}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8")), "utf-8")
