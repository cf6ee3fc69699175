"""Where the time goes: a line for every step and every few of them, and in the end the bottleneck by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from student_train.feed import TrainingStep, Work

WORTH_MENDING = 0.1  # share of the time that is spent waiting for something


@dataclass
class Totals:
    """Seconds and samples of this process over some steps."""

    steps: int = 0
    samples: int = 0
    stepping_s: float = 0.0
    waiting_for_images_s: float = 0.0
    waiting_for_cache_s: float = 0.0
    loss: float = 0.0

    def add(self, step: TrainingStep, step_s: float, loss: float) -> None:
        self.steps += 1
        self.samples += len(step.image_ids)
        self.stepping_s += step_s
        self.waiting_for_images_s += step.waiting_for_images_s
        self.waiting_for_cache_s += step.waiting_for_cache_s
        self.loss += loss

    @property
    def whole_s(self) -> float:
        return max(1e-9, self.stepping_s + self.waiting_for_images_s + self.waiting_for_cache_s)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.whole_s


@dataclass
class Progress:
    """Totals since the last line of the log; `line` makes the next one of every `every` steps."""

    every: int
    world_size: int = 1
    _since: Totals = field(default_factory=Totals)

    def line(
        self,
        step: int,
        total_steps: int,
        trained_on: TrainingStep,
        step_s: float,
        loss: float,
        lr: float,
        scales: Mapping[str, float] | None = None,
    ) -> str | None:
        """What the log says after this step, in means over the steps since it last did; None for most steps.

        scales: of balanced losses, as of now.
        """
        self._since.add(trained_on, step_s, loss)
        if not self.every or step % self.every:
            return None
        since, self._since = self._since, Totals()
        steps = since.steps
        balanced = ", ".join(f"{name} {scale:.3g}" for name, scale in scales.items()) if scales else ""
        return (
            f"step {step}/{total_steps}  loss {since.loss / steps:.3f}  lr {lr:.2e}  {since.whole_s / steps:.3f} s/step"
            f"  waiting for images {since.waiting_for_images_s / steps:.3f} s,"
            f" for the cache {since.waiting_for_cache_s / steps:.3f} s"
            f"  {self.world_size * since.samples_per_s:.1f} samples/s" + (f"  scales {balanced}" if balanced else "")
        )


def step_record(
    step: int,
    epoch: int,
    trained_on: TrainingStep,
    losses: dict[str, float],
    gradient_norm: float,
    step_s: float,
    learning_rate: float,
    scales: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What metrics.jsonl says of one step, losses weighted, samples of this process.

    scales: that balanced losses were multiplied by besides, which the losses on record are not.
    """
    whole_s = step_s + trained_on.waiting_for_images_s + trained_on.waiting_for_cache_s
    return {
        "step": step,
        "epoch": epoch,
        "loss": sum(losses.values()),
        "losses": losses,
        **({} if scales is None else {"scales": scales}),
        "gradient_norm": gradient_norm,
        "lr": learning_rate,
        "step_s": round(step_s, 4),
        "waiting_for_images_s": round(trained_on.waiting_for_images_s, 4),
        "waiting_for_cache_s": round(trained_on.waiting_for_cache_s, 4),
        "samples_per_s": round(len(trained_on.image_ids) / whole_s, 3),
    }


def time_spent(totals: Totals) -> str:
    """Steps, speed, and the shares of computing and waiting."""
    shares = {
        "computing": totals.stepping_s,
        "waiting for images": totals.waiting_for_images_s,
        "waiting for the cache": totals.waiting_for_cache_s,
    }
    times = ", ".join(f"{name} {seconds / totals.whole_s:.0%}" for name, seconds in shares.items())
    return f"{totals.steps} steps in {totals.whole_s:.1f} s, {totals.samples_per_s:.2f} samples/s ({times})"


def bottleneck(totals: Totals, work: Work, workers: int, cores: int | None = None) -> str:
    """A sentence that names what training waits for most, and what to change. cores: of this machine by default."""
    cores = cores or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores or os.cpu_count() or 1
    images, cache = totals.waiting_for_images_s / totals.whole_s, totals.waiting_for_cache_s / totals.whole_s
    if max(images, cache) < WORTH_MENDING:
        return (
            f"the bottleneck is computing ({totals.stepping_s / totals.whole_s:.0%} of the time): --amp bf16 on a GPU,"
            " more processes with torchrun, or a smaller student would be faster"
        )
    if cache > images:
        speed = work.cache_bytes / max(1e-9, work.reading_cache_s) / 1e6
        return (
            f"the bottleneck is the disk of the store ({cache:.0%} of the time went by waiting for the cache, which was"
            f" read at {speed:.0f} MB/s): keep the store on a faster disk (a bucket's on --local-cache), or make it"
            " smaller with `python -m teacher_dump transcode`"
        )
    count = max(1, work.images)
    reading_ms, decoding_ms = 1e3 * work.reading_images_s / count, 1e3 * work.decoding_s / count
    measured = (
        f"({images:.0%} of the time went by waiting for images; reading one took {reading_ms:.1f} ms, decoding and"
        f" resizing it {decoding_ms:.1f} ms)"
    )
    if reading_ms > decoding_ms:
        return f"the bottleneck is the disk of the images {measured}: keep them on a faster disk, or raise --workers"
    if workers < cores:
        advice = f"raise --workers from {workers} towards the {cores} cores there are"
    else:
        advice = f"--workers {workers} use all {cores} cores there are: more cores, or smaller --sizes, would be faster"
    return f"the bottleneck is decoding {measured}: {advice}"
