"""Report of the runs of finetune_smollm2.py: a table, a plot and a JSON file."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure  # not pyplot: this one never looks for a display

COLORS = {"AdamW": "tab:gray", "ScaledAdamW": "tab:red"}


def table(result: dict[str, Any]) -> str:
    """One line for each optimizer; losses are means over the seeds."""
    before = result["before"]
    lines = [f"{'':11}  {'lr':>6}  {'validation loss':>15}  {'test loss':>15}  s/step"]
    for name, row in result["chosen"].items():
        cells = [f"{before[part]:.3f} > {mean(row[part]):.4f}" for part in ("validation", "test")]
        seconds = row["seconds_per_step"]
        lines.append(f"{name:11}  {row['lr']:6g}  {cells[0]:>15}  {cells[1]:>15}  {seconds:6.3f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot validation loss against steps: the chosen learning rates bold, the others faint."""
    start = result["before"]["validation"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in result["runs"]:
        name, lr = run["optimizer"], run["lr"]
        bold = lr == result["chosen"][name]["lr"]
        first = bold and run["seed"] == result["options"]["seeds"][0]
        steps, losses = zip((0, start), *run["validation"], strict=True)
        label = f"{name}, lr {lr:g}" if first else None
        width, alpha = (2.0, 1.0) if bold else (0.8, 0.4)
        axes.plot(steps, losses, color=COLORS[name], label=label, linewidth=width, alpha=alpha)
    axes.set(xlabel="step", ylabel="validation loss, nats per token", ylim=(None, 1.02 * start))
    axes.set_title("SmolLM2-135M learns to write docstrings")
    axes.legend()
    figure.savefig(path, dpi=120)


def save_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
