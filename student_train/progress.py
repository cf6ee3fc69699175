"""Where the time goes: a line for every step and every few of them, and in the end the bottleneck by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from student_train.feed import TrainingStep, Work

FIRST_STEPS = 5  # of a process: they compile kernels, allocate memory and fill caches, as no later one does
STEPS_FOR_ADVICE = 100  # fewer say little of where the time of a long training goes
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


class Account:
    """Where the seconds of this process went since `begun_s`, a time of `clock`; by default since now.

    steps: those after the first, which rates and advice are taken from.
    """

    def __init__(self, begun_s: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun_s = clock() if begun_s is None else begun_s
        self._spent_s = {"starting": 0.0, "evaluating": 0.0, "saving": 0.0}
        self._first = Totals()
        self.steps = Totals()

    def started(self) -> None:
        """To be called before the first step: what went before was starting."""
        self._spent_s["starting"] = self._clock() - self._begun_s

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Put the time of this block down as "evaluating" or "saving"."""
        begun_s = self._clock()
        try:
            yield
        finally:
            self._spent_s[what] += self._clock() - begun_s

    def add(self, step: TrainingStep, step_s: float, loss: float) -> None:
        """Put down a step. Waits are the step's own."""
        (self._first if self._first.steps < FIRST_STEPS else self.steps).add(step, step_s, loss)

    @property
    def only_first(self) -> bool:
        """Whether no step after the first ones was put down."""
        return not self.steps.steps

    @property
    def step_count(self) -> int:
        return self._first.steps + self.steps.steps

    def seconds(self) -> dict[str, float]:
        """What was spent on what; the sum is the time since the account was begun."""
        named = {
            "starting": self._spent_s["starting"],
            "first steps": self._first.whole_s if self._first.steps else 0.0,
            "computing": self.steps.stepping_s,
            "waiting for images": self.steps.waiting_for_images_s,
            "waiting for the cache": self.steps.waiting_for_cache_s,
            "evaluating": self._spent_s["evaluating"],
            "saving": self._spent_s["saving"],
        }
        return named | {"other": self._clock() - self._begun_s - sum(named.values())}


@dataclass
class Progress:
    """Totals since the last line of the log; `line` makes the next one of every `every` steps. What goes before the
    end of the first steps is left out of the first line, unless there is nothing else."""

    every: int
    world_size: int = 1
    _since: Totals = field(default_factory=Totals)
    _done: int = 0

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
        self._done += 1
        if not self.every or step % self.every:
            if self._done == FIRST_STEPS:
                self._since = Totals()
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


def time_spent(account: Account) -> str:
    """Steps, the shares of the command's time, and the speed after the first steps."""
    seconds = account.seconds()
    whole_s = sum(seconds.values())
    shares = ", ".join(f"{name} {spent_s / max(1e-9, whole_s):.0%}" for name, spent_s in seconds.items())
    speed = "" if account.only_first else f", {account.steps.samples_per_s:.2f} samples/s after the first steps"
    return f"{account.step_count} steps in {whole_s:.1f} s{speed} ({shares})"


def bottleneck(steps: Totals, work: Work, workers: int, cores: int | None = None) -> str:
    """A sentence that names what the steps wait for most, and what to change.

    work: of the feed's threads, for these steps. cores: of this machine by default.
    """
    images, cache = steps.waiting_for_images_s / steps.whole_s, steps.waiting_for_cache_s / steps.whole_s
    if max(images, cache) < WORTH_MENDING:
        return (
            f"the bottleneck is computing ({steps.stepping_s / steps.whole_s:.0%} of the steps' time): --amp bf16 on a"
            " GPU, more processes with torchrun, or a smaller student would be faster"
        )
    if cache > images:
        speed = work.cache_bytes / max(1e-9, work.reading_cache_s) / 1e6
        return (
            f"the bottleneck is the disk of the store ({cache:.0%} of the steps' time went by waiting for the cache,"
            f" which was read at {speed:.0f} MB/s): keep the store on a faster disk (a bucket's on --local-cache), or"
            " make it smaller with `python -m teacher_dump transcode`"
        )
    return _bottleneck_of_images(images, work, workers, _usable_cores() if cores is None else cores)


def _bottleneck_of_images(share: float, work: Work, workers: int, cores: int) -> str:
    count = max(1, work.images)
    reading_ms, decoding_ms = 1e3 * work.reading_images_s / count, 1e3 * work.decoding_s / count
    measured = (
        f"({share:.0%} of the steps' time went by waiting for images; reading one took {reading_ms:.1f} ms, decoding"
        f" and resizing it {decoding_ms:.1f} ms)"
    )
    if reading_ms > decoding_ms:
        return f"the bottleneck is the disk of the images {measured}: keep them on a faster disk, or raise --workers"
    if workers < cores:
        return (
            f"the bottleneck is decoding {measured}: raise --workers from {workers} towards the {cores} cores there are"
        )
    return (
        f"the bottleneck is decoding {measured}: --workers {workers} use all {cores} cores there are: more cores, or"
        " smaller --sizes, would be faster"
    )


def _usable_cores() -> int:
    """Those that this process may run on, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
