"""Runs side by side: a table, and curves of AP and loss over steps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from common.errors import UserError
from common.figures import save_figure
from student_train.config import METRICS, RUN

COLUMNS = ("AP", "AP50", "APs", "APm", "APl")
_KEYS = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Run:
    """What is on record of a run. evaluations: (step, CocoMetrics as a dict), in order. steps: each step's line.

    peak_memory_bytes: of the GPU, None if it was trained without one.
    """

    name: str
    what: str
    parameters: int
    evaluations: tuple[tuple[int, dict[str, Any]], ...]
    steps: tuple[dict[str, Any], ...]
    peak_memory_bytes: int | None = None

    @property
    def durations_s(self) -> list[float]:
        """Of each step, its waits included."""
        return [s["step_s"] + s["waiting_for_images_s"] + s["waiting_for_cache_s"] for s in self.steps]

    @property
    def loss_names(self) -> list[str]:
        """Of the losses by kind, e.g. "detection" for detection/class, detection/l1 and detection/giou."""
        return list(dict.fromkeys(name.split("/")[0] for line in self.steps for name in line["losses"]))


def read_run(folder: Path) -> Run:
    """Read a run's folder. UserError if it is none."""
    try:
        started = json.loads((folder / RUN).read_text(encoding="utf-8"))
        lines = read_metrics(folder / METRICS)
        what, parameters = started["what"], started["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: expected the folder of a run, with {RUN} and {METRICS} ({error})") from None
    evaluations = tuple((line["step"], line["evaluation"]) for line in lines if "evaluation" in line)
    steps = tuple(line for line in lines if "evaluation" not in line)
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    return Run(folder.name, what, parameters, evaluations, steps, max(peaks, default=None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is being written, or that a crash cut off, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def distinct(names: Sequence[Sequence[str]]) -> list[str]:
    """A name for each of some things that have several, the shortest first: the shortest that tells all of them apart.

    names: (things, lengths), as many for each.
    """
    by_length = [list(column) for column in zip(*names, strict=True)]
    return next((column for column in by_length if len(set(column)) == len(column)), by_length[-1])


def table(runs: Sequence[Run]) -> str:
    """One line for each run: its last evaluation, in percent, its steps, their median and their whole duration."""
    header = ["run", "trained", *COLUMNS, "steps", "ms/step", "time", "M params"]
    rows = []
    for run in runs:
        last = run.evaluations[-1][1] if run.evaluations else {}
        values = [f"{100 * last[key]:.1f}" if last.get(key, -1) >= 0 else "-" for key in _KEYS]
        took = ["-", "-", "-"]
        if run.steps:
            whole = timedelta(seconds=round(sum(run.durations_s)))
            took = [str(run.steps[-1]["step"]), f"{1000 * median(run.durations_s):.0f}", str(whole)]
        rows.append([run.name, run.what, *values, *took, f"{run.parameters / 1e6:.2f}"])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    return "\n".join(lines)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """AP of every evaluation, and each kind of loss as it was weighted, smoothed over a fiftieth of the steps."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(name for run in runs for name in run.loss_names))
    columns = min(3, 1 + len(kinds))
    rows = -(-(1 + len(kinds)) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, run in enumerate(runs):
        steps, aps = [step for step, _ in run.evaluations], [100 * metrics["ap"] for _, metrics in run.evaluations]
        if run.steps:
            panels[0].plot(steps, aps, marker="o", label=run.name, color=f"C{number}")
        elif aps:
            panels[0].axhline(aps[-1], linestyle="--", color="grey", label=run.name)
    panels[0].set(xlabel="step", ylabel="AP (%)")
    if panels[0].lines:
        panels[0].legend()
    for panel, kind in zip(panels[1:], kinds, strict=False):
        for number, run in enumerate(runs):
            if kind in run.loss_names:
                values = [_loss_of_kind(line, kind) for line in run.steps]
                panel.plot([line["step"] for line in run.steps], _smoothed(values), color=f"C{number}")
        panel.set(xlabel="step", ylabel=f"{kind} loss", yscale="log")
    for panel in panels[1 + len(kinds) :]:
        panel.set_axis_off()
    save_figure(figure, path, dpi=120)


def _loss_of_kind(line: dict[str, Any], kind: str) -> float:
    return float(sum(value for name, value in line["losses"].items() if name.split("/")[0] == kind))


def _smoothed(values: list[float]) -> list[float]:
    """Means over the last fiftieth of all values."""
    window = max(1, len(values) // 50)
    return [sum(part) / len(part) for end in range(1, len(values) + 1) for part in [values[max(0, end - window) : end]]]
