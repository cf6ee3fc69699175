"""A dump's images a second, a step's time in every way, where that goes, and how fast records reach the device."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common.cache.buffers import BatchBuffers
from common.cache.reader import CacheReader
from common.cache.schema import TeacherAmp
from common.coco import load_annotations
from common.runtime import Ranks
from common.synthetic import draw_data_set
from teacher_dump.config import DataOptions, DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import store_constants, write_missing
from teacher_dump.job import Job, prepare
from teacher_dump.store import writable_store
from teacher_dump.teachers import load_teacher
from tests.benchmarks.step_cost import Steps
from tests.gpu.measuring import Place, Row, fits

WAYS = ("plain", "cached", "cached+group", "live")
WORKERS = 12
NAMES = 25  # lines of the trace


def dump(place: Place) -> Iterator[Row]:
    """Images a second of writing the default store, untrained R-101, images of 800 pixels, decoded on the way: in
    float32, TF32 and bfloat16."""
    images, side, teacher = (4, 64, "tiny") if place.small else (96, 800, "r101")
    with tempfile.TemporaryDirectory(prefix="detrcache-gpu-") as folder:
        data = Path(folder) / "data"
        draw_data_set(data, train_images=images, val_images=1, size=max(64, side // 2))
        precisions: tuple[TeacherAmp | None, ...] = (None, "tf32", "bf16")
        for amp in precisions:
            if amp == "tf32" and place.device.type != "cuda":
                continue
            precision = amp or "float32"
            job = job_of(data, f"random:{teacher}", side, place.device, 2 if place.small else 8, amp)
            write(job, Path(folder) / f"{precision} warm-up.zarr")
            begun = time.perf_counter()
            write(job, Path(folder) / f"{precision}.zarr")
            seconds = time.perf_counter() - begun
            yield Row(f"dump, {teacher}, {side} x {side}, {precision}", {"images/s": images / seconds})


def job_of(
    data: Path, teacher: str, side: int, device: torch.device, batch_size: int, amp: TeacherAmp | None = None
) -> Job:
    config = DumpConfig(
        DataOptions(data, sizes=(side,)), TeacherOptions(teacher, batch_size=batch_size), StoreOptions()
    )
    annotations = load_annotations(data, "train2017")
    return prepare(config, annotations, load_teacher(teacher, annotations, device, amp=amp))


def write(job: Job, store: Path) -> None:
    constants = store_constants(job)
    with writable_store(store, job.manifest, job.plan, lambda: constants, Ranks()):
        pass
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        write_missing(job, store, WORKERS, False, Ranks())


def steps(place: Place) -> Iterator[Row]:
    """A step of training, 480 x 640 pixels an image: forward, losses, backward, AdamW, all targets on the device."""
    students, batches = (("tiny",), (2,)) if place.small else (("r18", "r50"), (2, 8, 16))
    for student in students:
        for images in batches:
            for way in WAYS:
                yield Row(f"step, {student}, {images} images, {way}", step_figures(place, student, images, way))


def step_figures(place: Place, student: str, images: int, way: str) -> dict[str, float | str]:
    size = (64, 96) if place.small else (480, 640)
    figures: dict[str, float | str] = {}

    def measure() -> None:
        steps = Steps(student, place.device, (way,), images, size)

        def step() -> None:
            steps.step(way)

        step_s = place.seconds(step, runs=place.runs // 4 + 1)
        figures.update({"ms": step_s * 1e3, "images/s": images / step_s, "peak MiB": place.peak_mib(step)})

    return figures if fits(measure) else {"ms": "out of memory"}


def trace(place: Place) -> Iterator[Row]:
    """Where three steps' time goes (R-50, cached with the assignment group): the dearest operators by name."""
    student, images, size = ("tiny", 2, (64, 96)) if place.small else ("r50", 8, (480, 640))
    steps = Steps(student, place.device, ("cached+group",), images, size)

    def three() -> None:
        for _ in range(3):
            steps.step("cached+group")
        place.wait()

    three()
    on_device = place.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiled:
        three()
    counted = "self_device_time_total" if on_device else "self_cpu_time_total"
    time_of = attrgetter(counted)
    events = sorted(profiled.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events))
    for event in events[:NAMES]:
        figures = {"ms a step": time_of(event) / 3e3, "share": time_of(event) / total, "calls a step": event.count / 3}
        yield Row(event.key[:70], figures)


def reader(place: Place) -> Iterator[Row]:
    """Records of the default store and of an fp16 one into page-locked memory, and from there to the device."""
    images, side, teacher = (4, 64, "tiny") if place.small else (64, 800, "r18")
    pin = place.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="detrcache-gpu-") as folder:
        data, store = Path(folder) / "data", Path(folder) / "store.zarr"
        draw_data_set(data, train_images=images, val_images=1, size=128)
        write(job_of(data, f"random:{teacher}", side, place.device, batch_size=4), store)
        records, buffers = CacheReader(store), BatchBuffers(pin=pin)
        rows = list(range(images))
        size_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())

        def read(to_device: bool) -> None:
            for start in range(0, images, 4):
                cached = records.read(rows[start : start + 4], buffers)
                if to_device:
                    for value in vars(cached).values():
                        if isinstance(value, torch.Tensor):
                            value.to(place.device, non_blocking=True)
                    place.wait()

        for name, to_device in (("read into host memory", False), ("read, and copied to the device", True)):
            seconds = place.seconds(lambda to_device=to_device: read(to_device), runs=3)  # type: ignore[misc]
            where = "page-locked" if pin else "pageable"
            yield Row(f"{name}, {where}", {"records/s": images / seconds, "GB/s": size_bytes / seconds / 1e9})
        records.close()
