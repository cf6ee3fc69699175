"""Runs side by side: a table, and curves of AP and loss over steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from common.errors import UserError
from student_train.run_folder import METRICS, RUN

matplotlib.use("agg")  # files only, no display needed

COLUMNS = ("AP", "AP50", "APs", "APm", "APl")
_KEYS = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Run:
    """What is on record of a run. evaluations: (step, CocoMetrics as a dict), in order. steps: each step's line."""

    name: str
    what: str
    parameters: int
    evaluations: tuple[tuple[int, dict[str, Any]], ...]
    steps: tuple[dict[str, Any], ...]

    @property
    def step_ms(self) -> float | None:
        """Median duration of a step, its waits included."""
        whole = [s["step_s"] + s["waiting_for_images_s"] + s["waiting_for_cache_s"] for s in self.steps]
        return 1000 * median(whole) if whole else None


def read_run(folder: Path) -> Run:
    """Read a run's folder. UserError if it is none."""
    try:
        started = json.loads((folder / RUN).read_text())
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        what, parameters = started["what"], started["parameters"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: expected the folder of a run, with {RUN} and {METRICS} ({error})") from None
    evaluations = tuple((line["step"], line["evaluation"]) for line in lines if "evaluation" in line)
    steps = tuple(line for line in lines if "evaluation" not in line)
    return Run(folder.name, what, parameters, evaluations, steps)


def table(runs: Sequence[Run]) -> str:
    """One line for each run: its last evaluation, in percent, its steps and their median duration."""
    header = ["run", "trained", *COLUMNS, "steps", "ms/step", "M params"]
    rows = []
    for run in runs:
        last = run.evaluations[-1][1] if run.evaluations else {}
        values = [f"{100 * last[key]:.1f}" if last.get(key, -1) >= 0 else "-" for key in _KEYS]
        duration = "-" if run.step_ms is None else f"{run.step_ms:.0f}"
        steps = str(run.steps[-1]["step"]) if run.steps else "-"
        rows.append([run.name, run.what, *values, steps, duration, f"{run.parameters / 1e6:.2f}"])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    return "\n".join(lines)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """AP of every evaluation, and the detection loss, which all runs share, smoothed over a fiftieth of the steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        steps, aps = [step for step, _ in run.evaluations], [100 * metrics["ap"] for _, metrics in run.evaluations]
        if run.steps:
            left.plot(steps, aps, marker="o", label=run.name)
            smooth = _smoothed([_detection_loss(line) for line in run.steps])
            right.plot([line["step"] for line in run.steps], smooth, label=run.name)
        elif aps:
            left.axhline(aps[-1], linestyle="--", color="grey", label=run.name)
    left.set(xlabel="step", ylabel="AP (%)")
    right.set(xlabel="step", ylabel="detection loss", yscale="log")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _detection_loss(line: dict[str, Any]) -> float:
    return float(sum(value for name, value in line["losses"].items() if name.startswith("detection")))


def _smoothed(values: list[float]) -> list[float]:
    """Means over the last fiftieth of all values."""
    window = max(1, len(values) // 50)
    return [sum(part) / len(part) for end in range(1, len(values) + 1) for part in [values[max(0, end - window) : end]]]
