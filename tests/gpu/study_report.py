"""What came of a study: a table at equal steps and at equal minutes, and the curves, as .md, .json and .png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from common.figures import save_figure
from student_train.compare import Run, read_run
from tests.gpu.__main__ import DONE
from tests.gpu.study import TEACHER, Study, arms
from tests.studies import Curve, markdown, plot

COLUMNS = ("images/s", "waiting for images", "waiting for the cache", "peak memory")


@dataclass(frozen=True)
class Row:
    """What is on record of one run. Waits are shares of the steps' time, images_per_s is that of the median step."""

    name: str
    over_steps: Curve
    over_minutes: Curve
    images_per_s: float
    waiting_for_images: float
    waiting_for_cache: float
    peak_memory_bytes: int | None


def row(run: Run, batch_size: int) -> Row:
    """run: with an evaluation."""
    durations_s = run.durations_s
    minutes = [seconds / 60 for seconds in accumulate(durations_s)]
    steps = tuple(step for step, _ in run.evaluations)
    aps = (tuple(100 * metrics["ap"] for _, metrics in run.evaluations),)

    def share(wait: str) -> float:
        return float(sum(step[wait] for step in run.steps)) / sum(durations_s)

    return Row(
        run.name,
        Curve(steps, aps),
        Curve(tuple(minutes[step - 1] for step in steps), aps),
        batch_size / median(durations_s),
        share("waiting_for_images_s"),
        share("waiting_for_cache_s"),
        run.peak_memory_bytes,
    )


def rows_of(study: Study) -> list[Row]:
    """Of the teacher and the students that have been evaluated."""
    folders = [study.runs / name for name in (TEACHER, *(arm.name for arm in arms(study.teacher)))]
    runs = [read_run(folder) for folder in folders if (folder / "metrics.jsonl").exists()]
    return [row(run, study.setting.batch_size) for run in runs if run.evaluations]


def write(study: Study, machine: Mapping[str, Any], ended: Mapping[str, str], path: Path) -> str:
    """Write the table as `path`, the same and more as .json, and the curves as .png; returns the table.

    ended: by name, what was done in this process, and how it ended.
    """
    rows, setting, store = rows_of(study), study.setting, stored(study)
    students = [found for found in rows if found.name != TEACHER]
    steps = min((found.over_steps.x[-1] for found in students), default=0.0)
    minutes = min((found.over_minutes.x[-1] for found in students), default=0.0)
    head = (
        f"{machine['device']}, torch {machine['torch']}: {setting.train_images} scenes of {setting.side_px} x"
        f" {setting.side_px} pixels, teacher {setting.teacher}, students {setting.student}, {setting.batch_size} images"
        f" a step, --amp {setting.amp}.\nStore: {setting.views} views, {store}."
    )
    columns = ("run", "steps", "minutes", "AP", f"AP at {steps:.0f} steps", f"AP at {minutes:.2f} minutes", *COLUMNS)
    results = markdown(columns, (cells(found, steps, minutes) for found in rows))
    notes = [f"{name}: {how}" for name, how in ended.items() if how != DONE]
    page = "\n\n".join([head, results, markdown(("run", "AP on the way"), map(curve_cells, rows)), *notes])
    path.write_text(page + "\n")
    content = {
        "machine": machine,
        "setting": asdict(setting),
        "store": store,
        "ended": ended,
        "equal_steps": steps,
        "equal_minutes": minutes,
        "rows": [asdict(found) for found in rows],
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))
    return page


def cells(found: Row, steps: float, minutes: float) -> list[str]:
    """Of a run: its length and AP, a student's AP where all had come, and its speed."""
    length = [f"{found.over_steps.x[-1]:.0f}", f"{found.over_minutes.x[-1]:.2f}", f"{found.over_steps.final[0]:.1f}"]
    at_equal = [f"{found.over_steps.at(steps):.1f}", f"{found.over_minutes.at(minutes):.1f}"]
    waits = [f"{share:.0%}" for share in (found.waiting_for_images, found.waiting_for_cache)]
    peak = "-" if found.peak_memory_bytes is None else f"{found.peak_memory_bytes / 1e9:.1f} GB"
    equal = ["", ""] if found.name == TEACHER else at_equal
    return [found.name, *length, *equal, f"{found.images_per_s:.1f}", *waits, peak]


def curve_cells(found: Row) -> tuple[str, str]:
    points = zip(found.over_steps.x, found.over_minutes.x, found.over_steps.aps[0], strict=True)
    return found.name, ", ".join(f"{ap:.1f} at step {step} ({minute:.2f} min)" for step, minute, ap in points)


def stored(study: Study) -> str:
    """The store's size, and how long it took."""
    if not study.dumped.exists():
        return "not written"
    dumped = json.loads(study.dumped.read_text())
    size_bytes = sum(path.stat().st_size for path in study.store.rglob("*") if path.is_file())
    return f"{size_bytes / 1e6:.1f} MB, {dumped['ended']} after {dumped['wall_s']:.0f} s"


def draw(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for_steps, for_minutes = figure.subplots(1, 2)
    for found in rows:
        plot(for_steps, found.name, found.over_steps)
        plot(for_minutes, found.name, found.over_minutes)
    for_steps.set(xlabel="step", ylabel="AP (%)", ylim=(0, None))
    for_minutes.set(xlabel="minutes of steps", ylim=(0, None))
    for_steps.legend(fontsize=8)
    save_figure(figure, path, dpi=110)
