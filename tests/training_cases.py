"""A small data set, its store and a run on it, for the tests of phase two; and processes that start at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.records import Targets
from common.synthetic import draw_data_set
from student_train.__main__ import main
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from student_train.model import StudentOutput
from student_train.objective import Losses, add_up, separate_losses
from student_train.step_counts import StepCounts
from student_train.teachers import Lesson

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES, SIDE = 10, 64
PLAIN = DistillationOptions(logits_weight=0, feature_weight=0, assignment_weight=0)

# Children are forked from a process that has imported everything once and runs no threads yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["student_train.loop", "tests.training_cases"])


def make_store(folder: Path) -> Path:
    """scenes/: ten training and four validation images. store.zarr: two views by a teacher whose file is gone."""
    from teacher_dump.config import DataOptions as DumpDataOptions
    from teacher_dump.config import DumpConfig, StoreOptions, TeacherOptions
    from teacher_dump.dump import run_dump

    draw_data_set(folder / "scenes", train_images=IMAGES, val_images=4)
    torch.manual_seed(0)
    save_detector(folder / "teacher.safetensors", DeformableDetr(PRESETS["tiny_teacher"](7, queries=20)))
    data = DumpDataOptions(folder / "scenes", views=2, sizes=(SIDE,), workers=1)
    teacher = TeacherOptions(str(folder / "teacher.safetensors"), device="cpu")
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "store.zarr", preset="half", neck=True)))
    (folder / "teacher.safetensors").unlink()
    return folder


def configuration(folder: Path, out: Path, cached: bool = True) -> TrainConfig:
    """The tiny student for two epochs of three steps, the last of two images."""
    return TrainConfig(
        DataOptions(str(folder / "store.zarr"), data=folder / "scenes", workers=2, prefetch=2)
        if cached
        else DataOptions(None, data=folder / "scenes", sizes=(SIDE,), workers=2, prefetch=2),
        ModelOptions("tiny"),
        DistillationOptions(),
        OptimisationOptions(epochs=2, batch_size=4, lr=1e-3),
        OutputOptions(out, "run", eval_every=0, device="cpu", log_every=1),
    )


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps, not evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "losses" in line]


def wait_for_steps(run: Path, steps: int) -> None:
    """Until the metrics of a run have so many steps; at most two minutes."""
    begun = time.monotonic()
    while not (run / "metrics.jsonl").is_file() or len(steps_of(run)) < steps:
        assert time.monotonic() < begun + 120
        time.sleep(0.02)


def losses_of(
    student: StudentOutput,
    targets: list[Targets],
    lessons: Sequence[Lesson],
    options: DistillationOptions,
    counts: Sequence[StepCounts] = (),
) -> Losses:
    """The weighted losses, whose sum is minimised: `separate_losses` added up."""
    return add_up(*separate_losses(student, targets, lessons, options, counts))


def start_process(function: Callable[..., None], *arguments: Any, rank: int = 0, ranks: int = 1, port: int = 0) -> Any:
    """A process of its own that calls a function of an importable module, as one of torchrun's."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    settings = {name: str(value) for name, value in environment.items()}
    process = PROCESSES.Process(target=_call, args=(settings, function, arguments))
    process.start()
    return process


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Call a function on several ranks at once and wait; all must succeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_process(function, *arguments, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def run_command_line(arguments: list[str], output: Path) -> None:
    """For `start_process`: `python -m student_train` with these arguments, its stdout and stderr written to a file."""
    file = output.open("w", buffering=1)
    sys.stdout = sys.stderr = file
    sys.argv = ["student_train", *arguments]
    main()


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
