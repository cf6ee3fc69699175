"""Does it teach? AP of a student trained plainly and with each loss alone, in pairs and together, over seeds.

    python -m tests.results            # or make results; stopped, it goes on where it was

Draws scenes that no choice was made on, caches the demo's teacher on them, trains every run of ARMS and CACHES, some at
a time with one thread each, and writes the tables and the plot of docs/results.md. What has not run yet is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.errors import UserError, run_command
from common.runtime import log, start_logging
from common.synthetic import draw_data_set
from student_train.compare import Run, read_run
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from student_train.sweep import PlannedRun, execute, state_of
from tests.studies import Curve, markdown, plot

matplotlib.use("agg")  # files only, no display needed

TEACHER = Path("docs/demo/teacher.safetensors")
PAGE, PLOT = Path("docs/results.md"), Path("docs/results.png")
IMAGES, VAL_IMAGES, SCENES_SEED, SIZE_PX = 1200, 1000, 1, 128
VIEWS, SEEDS = 4, (0, 1, 2)


@dataclass(frozen=True)
class Start:
    """How a student begins, and for how many steps it trains; with which seeds, and only which arms, if not all."""

    name: str
    init: Path | None
    steps: int
    seeds: tuple[int, ...] = SEEDS
    only: tuple[str, ...] = ()

    def arms(self) -> tuple[Arm, ...]:
        every = (*ARMS, *CACHES) if self is STARTS[0] else ARMS
        return tuple(arm for arm in every if not self.only or arm.name in self.only)


@dataclass(frozen=True)
class Arm:
    """One row of the tables: what is distilled, and from which store."""

    name: str
    losses: DistillationOptions
    store: str = "half"


def losses(logits: float = 0, features: float = 0, assignment: float = 0) -> DistillationOptions:
    return DistillationOptions(logits_weight=logits, feature_weight=features, assignment_weight=assignment)


STARTS = (
    Start("inherited", TEACHER, 1000),
    Start("scratch", None, 1500),
    Start("scratch, longer", None, 3000, (0,), ("plain", "all", "features", "logits", "assignment")),
)
L, F, A = 1, 1000, 1  # chosen on other scenes: docs/results.md
ARMS = (
    Arm("plain", losses()),
    Arm("all", losses(L, F, A)),
    Arm("features", losses(0, F, 0)),
    Arm("logits", losses(L, 0, 0)),
    Arm("assignment", losses(0, 0, A)),
    Arm("released", DistillationOptions(mode="released")),
    Arm("logits + features", losses(L, F, 0)),
    Arm("features + assignment", losses(0, F, A)),
    Arm("logits + assignment", losses(L, 0, A)),
    Arm("all, --balance", DistillationOptions(balance=True)),
)
CACHES = (
    Arm("all, compact store", losses(L, F, A), "compact"),
    Arm("all, a quarter of the tokens", losses(L, F, A), "quarter"),
    Arm("all, one view", losses(L, F, A), "one_view"),
)
"""What a smaller cache costs, beside "all"; from the first START."""

# Options of `teacher_dump` for each store.
STORES = {
    "half": ("--views", str(VIEWS), "--preset", "half", "--neck"),
    "compact": ("--views", str(VIEWS)),
    "quarter": ("--views", str(VIEWS), "--preset", "half", "--keep-tokens", "0.25"),
    "one_view": ("--views", "1", "--preset", "half"),
}


@dataclass(frozen=True)
class Options:
    out: Path = Path("build/results")
    """Folder of the scenes, the stores and the runs."""
    parallel: int = 2
    """Runs at a time, of one thread each."""
    only: str = ""
    """Regular expression of the runs to train, e.g. inherited; the tables hold all that have been."""
    page: Path = PAGE
    """Page whose tables are replaced; the plot is written beside it."""


def main(options: Options) -> None:
    start_logging()
    if not TEACHER.exists():
        raise UserError(f"expected {TEACHER}: run this from the project's root")
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    scenes = options.out / "scenes"
    if not scenes.exists():
        draw_data_set(scenes, IMAGES, VAL_IMAGES, SCENES_SEED, SIZE_PX)
    wanted = [item for item in planned(options.out) if re.search(options.only, item.name)]
    for store in sorted({item.arm.store for item in wanted}):
        out = options.out / f"{store}.zarr"
        run("teacher_dump", "--data", scenes, "--sizes", SIZE_PX, "--teacher", TEACHER, "--out", out, *STORES[store])
    evaluated = options.out / "runs" / "teacher"
    if not (evaluated / "run.json").exists():
        of_teacher = ("--data", scenes, "--sizes", SIZE_PX, "--checkpoint", TEACHER, "--record", evaluated)
        run("student_train", "evaluate", *of_teacher)

    runs = [PlannedRun(item.config, state_of(item.config)) for item in wanted]
    failed = execute([run for run in runs if run.state != "finished"], options.parallel)
    text = options.page.read_text() if options.page.exists() else "<!-- table -->\n"
    plot = options.page.with_suffix(".png")
    options.page.write_text(text[: text.index("<!-- table -->")] + f"<!-- table -->\n\n{tables(options.out)}\n")
    draw(options.out, plot)
    log.info(f"written: {options.page}, {plot}")
    if failed:
        raise UserError(f"{len(failed)} runs failed ({', '.join(failed)}): see log.txt in their folders")


@dataclass(frozen=True)
class Item:
    """One run of one arm."""

    start: Start
    arm: Arm
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", f"{self.start.name}-{self.arm.name}-{self.seed}")

    @property
    def config(self) -> TrainConfig:
        """Same start, same samples in the same order, same steps for every arm; only losses or store differ."""
        return TrainConfig(
            DataOptions(str(self.out / f"{self.arm.store}.zarr"), data=self.out / "scenes", workers=1),
            ModelOptions("tiny", init=self.start.init),
            self.arm.losses,
            OptimisationOptions(
                max_steps=self.start.steps,
                batch_size=4,
                lr=1e-3,
                schedule="cosine",
                warmup_steps=100,
                seed=self.seed,
            ),
            OutputOptions(
                self.out / "runs",
                self.name,
                checkpoint_every=0,
                keep=1,
                log_every=100,
                eval_every=1 if self.start.init else 2,
                device="cpu",
            ),
        )

    def trained(self) -> Run | None:
        folder = self.config.output.out / self.name
        return read_run(folder) if (folder / "run.json").exists() and state_of(self.config) == "finished" else None


def planned(out: Path) -> Iterator[Item]:
    """All runs, the most telling first."""
    for start in STARTS:
        for arm in start.arms():
            for seed in start.seeds:
                yield Item(start, arm, seed, out)


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


# ---- what came of them


def curve(start: Start, arm: Arm, out: Path) -> Curve | None:
    runs = [run for seed in start.seeds if (run := Item(start, arm, seed, out).trained()) is not None]
    if not runs:
        return None
    steps = tuple(step for step, _ in runs[0].evaluations)
    return Curve(steps, tuple(tuple(100 * metrics["ap"] for _, metrics in run.evaluations) for run in runs))


COLUMNS = ("arm", "AP", "each seed", "over plain", "reaches plain's AP at")


def tables(out: Path) -> str:
    blocks = []
    teacher = read_run(out / "runs" / "teacher").evaluations[-1][1]["ap"]
    for start in STARTS:
        rows = list(table_rows(start, start.arms(), out))
        if rows:
            head = f"### {start.name.capitalize()}, {start.steps} steps (teacher {100 * teacher:.1f})"
            blocks.append(f"{head}\n\n{markdown(COLUMNS, rows)}")
    return "\n\n".join(blocks)


def table_rows(start: Start, arms: Iterable[Arm], out: Path) -> Iterator[tuple[str, ...]]:
    plain = curve(start, ARMS[0], out)
    for arm in arms:
        found = curve(start, arm, out)
        if found is None:
            continue
        seeds = ", ".join(f"{ap:.1f}" for ap in found.final)
        ap = f"{mean(found.final):.1f}" + (f" ± {stdev(found.final):.1f}" if len(found.final) > 1 else "")
        gain, share = "", ""
        if plain is not None and arm is not ARMS[0] and len(plain.final) == len(found.final):
            gains = [ours - theirs for ours, theirs in zip(found.final, plain.final, strict=True)]
            gain = f"{mean(gains):+.1f}" + (f" ± {stdev(gains):.1f}" if len(gains) > 1 else "")
            reached = found.reaches(mean(plain.final))
            share = "never" if reached is None else f"{100 * reached / start.steps:.0f}% of the steps"
        yield arm.name, ap, seeds, gain, share


def draw(out: Path, path: Path) -> None:
    """Mean AP over steps, one panel for each start; the band is the range over seeds."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(STARTS))
    for start, panel in zip(STARTS, panels, strict=True):
        for arm in [arm for arm in ARMS if arm in start.arms()]:
            found = curve(start, arm, out)
            if found is not None:
                plot(panel, arm.name, found)
        panel.set(title=start.name, xlabel="step", ylabel="AP (%)", ylim=(0, None))
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, description=__doc__)))
