"""What a teacher's cache is worth on one device in 25 minutes: a teacher trained here, its store, and four students.

All train at a constant learning rate and are evaluated as moving averages, so that what a run was after some of its
steps is what a run of so many steps is: one run is compared at equal steps and at equal minutes. Each begins with some
steps that tell how many fit in its time. Minutes are those of the steps, waits included, evaluations not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

from common.files import write_atomically
from student_train.compare import read_run
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    SpeedOptions,
    TrainConfig,
)
from student_train.progress import FIRST_STEPS
from student_train.sweep import PlannedRun, state_of
from tests.gpu.__main__ import AT_LIMIT, DONE, within

SCENES_LIMIT_S, TEACHER_LIMIT_S, STORE_LIMIT_S, STUDENT_LIMIT_S = 60, 530, 140, 180
NEVER = 10**6  # epochs: a run ends by its steps, and its learning rate stays
TEACHER = "teacher"  # the name of its run
EVALUATIONS = 4  # of a run, besides the one after its first steps


@dataclass(frozen=True)
class Setting:
    """The sizes of a study. scale: of the shapes. trial_steps: the first ones of a run, which tell how many fit in
    teacher_s or student_s seconds."""

    device: str = "cuda"
    teacher: str = "r50"
    student: str = "r18"
    side_px: int = 512
    scale: float = 4.0
    train_images: int = 3000
    val_images: int = 500
    views: int = 2
    batch_size: int = 16
    amp: Literal["off", "bf16"] = "bf16"
    trial_steps: int = 60
    teacher_s: float = 440
    student_s: float = 110


SMALL = Setting(
    device="cpu",
    teacher="tiny_teacher",
    student="tiny",
    side_px=64,
    scale=1.0,
    train_images=16,
    val_images=6,
    views=1,
    batch_size=4,
    amp="off",
    trial_steps=8,
    teacher_s=2,
    student_s=2,
)


@dataclass(frozen=True)
class Arm:
    """A student: by which losses it learns, and whether from the store's views or from fresh ones."""

    name: str
    losses: DistillationOptions
    cached: bool = True


def arms(teacher: Path) -> tuple[Arm, ...]:
    plain, distilled = DistillationOptions().without_losses(), DistillationOptions(balance=True)
    return (
        Arm("plain-fresh", plain, cached=False),
        Arm("plain-cached", plain),
        Arm("distilled", distilled),
        Arm("distilled-live", replace(distilled, live_teacher=teacher)),
    )


@dataclass(frozen=True)
class Study:
    setting: Setting
    out: Path

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def scenes(self) -> Path:
        return self.out / "scenes"

    @property
    def store(self) -> Path:
        return self.out / "store.zarr"

    @property
    def dumped(self) -> Path:
        """How the dump ended: the store is as it will be."""
        return self.out / "dumped.json"

    @property
    def teacher(self) -> Path:
        return self.runs / TEACHER / "best.safetensors"

    @property
    def workers(self) -> int:
        return max(1, min(16, os.cpu_count() or 1))

    def config(self, name: str, arm: Arm | None) -> TrainConfig:
        """The first steps of a student's run, or of the teacher's (None). Students share their start, their order of
        samples and all but the losses."""
        setting = self.setting
        plain = DistillationOptions().without_losses()
        cached = arm is not None and arm.cached
        return TrainConfig(
            DataOptions(
                str(self.store) if cached else None,
                data=self.scenes,
                sizes=None if cached else (setting.side_px,),
                workers=self.workers,
            ),
            ModelOptions(setting.teacher) if arm is None else ModelOptions(setting.student, init=self.teacher),
            plain if arm is None else arm.losses,
            OptimisationOptions(
                epochs=NEVER,
                max_steps=setting.trial_steps,
                batch_size=setting.batch_size,
                lr_drop=NEVER,
                warmup_steps=setting.trial_steps // 2,
                ema=0.995,
            ),
            OutputOptions(self.runs, name, checkpoint_every=0, keep=1, eval_every=0, device=setting.device),
            SpeedOptions(amp=setting.amp),
        )


def run_study(study: Study) -> Iterator[tuple[str, str]]:
    """Do what is not done yet; after each run its name, and how it ended. Ends early where students have no teacher."""
    setting = study.setting
    if not study.scenes.exists():
        sizes = ("--size", setting.side_px, "--scale", setting.scale, "--processes", study.workers)
        counts = ("--train-images", setting.train_images, "--val-images", setting.val_images)
        yield "scenes", _run(SCENES_LIMIT_S, "common.synthetic", "--out", study.scenes, *counts, *sizes)
    if not study.dumped.exists():  # a store is of the teacher as it was then
        yield TEACHER, train(study.config(TEACHER, None), setting, setting.teacher_s, TEACHER_LIMIT_S)
        if study.teacher.exists():
            yield "store", dump(study)
    if study.dumped.exists():
        for arm in arms(study.teacher):
            yield arm.name, train(study.config(arm.name, arm), setting, setting.student_s, STUDENT_LIMIT_S)


def dump(study: Study) -> str:
    """Write the store, as far as it comes until the limit: students train on what is finished. Says how it ended."""
    setting, begun = study.setting, time.monotonic()
    teacher = ("--teacher", study.teacher, "--batch-size", 8, "--device", setting.device)
    data = ("--data", study.scenes, "--sizes", setting.side_px, "--views", setting.views, "--workers", study.workers)
    ended = _run(STORE_LIMIT_S, "teacher_dump", *teacher, *data, "--out", study.store)
    if ended.startswith((DONE, AT_LIMIT)):
        found = {"ended": ended, "wall_s": time.monotonic() - begun}
        write_atomically(study.dumped, lambda path: path.write_text(json.dumps(found)))
    return ended


def _run(limit_s: float, module: str, *arguments: object) -> str:
    return within(limit_s, [sys.executable, "-m", module, *map(str, arguments)])


def train(config: TrainConfig, setting: Setting, seconds: float, limit_s: float) -> str:
    """Train for as many steps as the first ones say fit in `seconds`, or until the limit; says how it ended."""
    folder, begun = config.output.out / str(config.output.name), time.monotonic()

    def go_on(to: TrainConfig) -> str:
        run = PlannedRun(to, state_of(to))
        if run.state == "finished":
            return DONE
        return _run(limit_s - (time.monotonic() - begun), "student_train", *run.arguments)

    if steps_on_record(folder) < setting.trial_steps:
        ended = go_on(config)
        if ended != DONE:
            return ended
    rate = mean(read_run(folder).durations_s[FIRST_STEPS : setting.trial_steps])
    steps = max(setting.trial_steps, round(seconds / rate))
    print(f"{folder.name}: {1e3 * rate:.0f} ms a step, {steps} steps fit in {seconds:.0f} s", flush=True)
    every = max(1, steps * setting.batch_size // (setting.train_images * EVALUATIONS))
    optimisation, output = replace(config.optimisation, max_steps=steps), replace(config.output, eval_every=every)
    return go_on(replace(config, optimisation=optimisation, output=output))


def steps_on_record(folder: Path) -> int:
    return len(read_run(folder).steps) if (folder / "metrics.jsonl").exists() else 0
