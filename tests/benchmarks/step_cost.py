"""What distillation costs a training step: `python -m tests.benchmarks.step_cost [--students tiny r18 r50]`.

One step is forward, losses, backward and AdamW on a batch of two 480 x 640 images, all targets at hand (reading a store
goes on beside the step; its own benchmark is elsewhere). The ways are run in turn, so that whatever else the machine
does falls on all of them alike. What counts is each way's median over plain's: of CPU seconds on the CPU, which others
on the machine do not lengthen, of seconds on a GPU. Memory is the peak of a process of its own for each way (on a GPU,
what torch allocated).

plain: detection loss alone. cached: logits and feature distillation. cached+group: with the assignment group. live: as
cached, with the teacher's forward pass in every step. live+group likewise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.cache.schema import TeacherInfo
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.geometry import level_shapes, token_count
from common.images import collate
from common.records import CachedBatch, Targets
from common.teacher import detector_info
from student_train.config import DistillationOptions
from student_train.live import LiveTeacher
from student_train.model import Bridge, StudentInTraining
from student_train.teachers import Lesson
from tests.training_cases import losses_of

CLASSES, BOXES, SIZE = 80, 7, (480, 640)
OPTIONS = {
    "plain": DistillationOptions().without_losses(),
    "cached": DistillationOptions(assignment_weight=0.0),
    "cached+group": DistillationOptions(),
    "live": DistillationOptions(assignment_weight=0.0),
    "live+group": DistillationOptions(),
}
WAYS = tuple(OPTIONS)
TEACHERS = {"tiny": "tiny"}  # of the others: R-101


class Steps:
    """Everything that steps in any of the ways need, for one student."""

    def __init__(
        self,
        student: str,
        device: torch.device,
        ways: tuple[str, ...],
        images: int = 2,
        size: tuple[int, int] = SIZE,
    ) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        boxes = torch.rand(images, BOXES, 4, generator=generator) * 0.4 + 0.2
        labels = torch.randint(CLASSES, (images, BOXES), generator=generator)
        pairs = [
            (torch.randn(3, *size, generator=generator), Targets(b, c)) for b, c in zip(boxes, labels, strict=True)
        ]
        batch = collate(pairs)
        self.images, self.mask = batch.images.to(device), batch.padding_mask.to(device)
        self.targets = batch.targets
        self.device = device

        teacher = TEACHERS.get(student, "r101")
        with torch.device("meta"):
            shape = DeformableDetr(PRESETS[teacher](CLASSES))
        info = detector_info(shape, teacher, "", trained=False)
        queries = torch.randn(info.queries, 2 * info.channels, generator=generator)
        self.cached = draw_records(info, generator, device, images, size)
        live = None
        if any("live" in way for way in ways):
            live = LiveTeacher(DeformableDetr(PRESETS[teacher](CLASSES)), info, range(CLASSES))
        detector = DeformableDetr(PRESETS[student](CLASSES)).to(device).train()  # one for all, to save memory
        self.optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-6)
        self.students = {
            way: StudentInTraining(
                detector, OPTIONS[way], [Bridge(detector, OPTIONS[way], info, queries)], live if "live" in way else None
            ).to(device)
            for way in ways
        }

    def step(self, way: str) -> None:
        model, optimizer = self.students[way], self.optimizer
        optimizer.zero_grad()
        output = model(self.images, self.mask)
        lessons = [Lesson(self.cached)] if "cached" in way else []
        losses = losses_of(output, self.targets, lessons, model.options)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def draw_records(
    info: TeacherInfo,
    generator: torch.Generator,
    device: torch.device,
    images: int = 2,
    size: tuple[int, int] = SIZE,
) -> CachedBatch:
    """Records of the batch as the default store gives them, of a teacher that says anything."""
    grids = [level_shapes(*size, info.strides)] * images
    tokens = token_count(grids[0])
    sample_shape = (images, info.layers, info.queries)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    channels = info.channels
    assignment = torch.full(sample_shape, -1)
    assignment[..., :BOXES] = torch.arange(BOXES)
    drawn = CachedBatch(
        tokens=codes(images * tokens, channels // 8),
        token_scales=None,
        channel_scale=None,
        channel_shift=None,
        token_positions=torch.arange(tokens).repeat(images),
        token_weights=torch.rand(images * tokens, generator=generator),
        token_offsets=torch.arange(images + 1) * tokens,
        level_shapes=torch.tensor(grids),
        queries=torch.empty(0, info.layers, info.queries, channels),
        logits=codes(*sample_shape, CLASSES) // 4,  # scores below .15
        boxes_cxcywh=torch.rand(*sample_shape, 4, generator=generator) * 0.4 + 0.2,
        quality=torch.rand(*sample_shape, generator=generator),
        assignment=assignment,
        level_strides=torch.tensor(info.strides).float()[None, :, None].expand(images, -1, 2),
        codebooks=torch.randn(channels // 8, 256, 8, generator=generator),
        rotation=torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0],
    )
    return Lesson(drawn).to(device).cached


def time_steps(student: str, device: torch.device, runs: int) -> dict[str, float]:
    """Median seconds of a step in each way: the CPU's own, or passed with a GPU."""
    steps = Steps(student, device, WAYS)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(runs + 1):
        for way in WAYS:
            begun = clock()
            steps.step(way)
            if run:  # the first warms up
                times[way].append(clock() - begun)
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def peak_bytes(student: str, device: str, way: str, threads: int) -> int:
    """Of a process that makes two steps in this way alone."""
    arguments = ["--peak", way, "--students", student, "--device", device, "--threads", str(threads)]
    command = [sys.executable, "-m", "tests.benchmarks.step_cost", *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(student: str, device: torch.device, way: str) -> None:
    steps = Steps(student, device, (way,))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        steps.step(way)
    # Not getrusage's: a child's begins with what its parent had.
    status = Path("/proc/self/status").read_text()
    on_host = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else on_host)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_cost", description=__doc__)
    parser.add_argument("--students", nargs="+", default=["tiny", "r18", "r50"])
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; more spin (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, a process for each way")
    parser.add_argument("--out", type=Path, default=Path("build/step_cost.json"), help="default: %(default)s")
    parser.add_argument("--peak", metavar="WAY", help="print the peak memory in bytes of steps in this way, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.peak:
        print_peak(arguments.students[0], device, arguments.peak)
        return

    print(f"2 images of {SIZE[0]} x {SIZE[1]}, {device}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'student':8} {'way':14} {'step':>9} {'of plain':>9} {'peak':>9} {'of plain':>9}")
    results = []
    for student in arguments.students:
        seconds, peaks = time_steps(student, device, arguments.runs), {}
        if arguments.memory:
            peaks = {way: peak_bytes(student, arguments.device, way, arguments.threads) for way in WAYS}
        for way in WAYS:
            times = f"{seconds[way]:8.3f}s {seconds[way] / seconds['plain']:9.2f}"
            peak = f"{peaks[way] / 1e6:7.0f}MB {peaks[way] / peaks['plain']:9.2f}" if way in peaks else ""
            print(f"{student:8} {way:14} {times} {peak}", flush=True)
            results.append({"student": student, "way": way, "step_s": seconds[way], "peak_bytes": peaks.get(way)})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
