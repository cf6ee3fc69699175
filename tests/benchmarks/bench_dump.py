"""What writing adds to the time of the teacher: a dump against the teacher alone, on the same samples and threads.

Both decode and replay the images in threads, run the teacher and derive its targets; only the dump encodes tokens and
writes them, and brings them to the disk. The target is a ratio of 0.95 or more: writing adds at most 5%.
Small data sets have small shards (a 32nd of them), each of which waits for the disk as long as one of 256 MB does: with
a tiny teacher and a few hundred images it is these waits that are measured.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from common.ahead import map_ahead
from common.coco import load_annotations
from common.runtime import Ranks
from common.synthetic import draw_data_set
from teacher_dump.config import DataOptions, DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import store_constants, write_missing
from teacher_dump.encode import run_teacher
from teacher_dump.job import Job, batches, load_sample, prepare
from teacher_dump.store import writable_store
from teacher_dump.teachers import load_teacher
from tests.benchmarks import Case

WORKERS = 2


def cases() -> Iterator[Case]:
    folder = tempfile.TemporaryDirectory(prefix="detrcache-bench-")
    atexit.register(folder.cleanup)
    data = Path(folder.name) / "data"
    draw_data_set(data, train_images=1024, val_images=1, size=128)
    for teacher, side, images, runs in (("tiny", 128, 1024, 5), ("r50", 480, 8, 3)):
        job = _job(data, teacher, side, images)
        stores = _empty_stores(job, Path(folder.name), teacher, runs + 1)
        unit = f"{images} images of {side} px, random:{teacher}, default store"
        yield Case(f"dump, {teacher}", _dump(job, stores), _teacher_alone(job), unit, runs)


def _job(data: Path, teacher: str, side: int, images: int) -> Job:
    config = DumpConfig(
        DataOptions(data, sizes=(side,)), TeacherOptions(f"random:{teacher}", batch_size=4), StoreOptions()
    )
    annotations = load_annotations(data, "train2017")
    annotations = replace(annotations, entries=annotations.entries[:images])
    return prepare(config, annotations, load_teacher(config.teacher.teacher, annotations, torch.device("cpu")))


def _empty_stores(job: Job, folder: Path, name: str, count: int) -> Iterator[Path]:
    constants = store_constants(job)
    stores = [folder / f"{name}-{number}.zarr" for number in range(count)]
    for store in stores:
        with writable_store(store, job.manifest, job.plan, lambda: constants, Ranks()):
            pass
    return iter(stores)


def _dump(job: Job, stores: Iterator[Path]) -> Callable[[], object]:
    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            write_missing(job, next(stores), WORKERS, False, Ranks())

    return run


def _teacher_alone(job: Job) -> Callable[[], object]:
    def run() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            rows, group = range(len(job.plan.table)), job.manifest.batch_size
            samples = map_ahead(pool, lambda row: load_sample(job, row, skip_broken=False), rows, ahead=2 * group)
            for batch in batches(samples, group):
                run_teacher(job, batch)

    return run
