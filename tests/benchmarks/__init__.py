"""What is timed: `python -m tests.benchmarks [name ...]` (`make bench`).

To add a benchmark, add a module here whose name begins with `bench_`, with a function `cases() -> Iterator[Case]`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Two ways to the same result: `ours` and `reference` are called in turn, once each before the clock starts.

    `runs` is how often each is timed. `unit` says what one call does. Whatever either returns is dropped. `before` is
    called before each of them, outside the clock.
    """

    name: str
    ours: Callable[[], object]
    reference: Callable[[], object]
    unit: str
    runs: int = 9
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Result:
    """Medians of alternating runs; ratio is reference_s / ours_s, above 1 where ours is faster."""

    name: str
    ours_s: float
    reference_s: float
    ratio: float
    unit: str
    runs: int


def measure(case: Case) -> Result:
    """Time both ways in turn, so that whatever else the machine does falls on both alike."""
    ours, reference = [], []
    case.ours(), case.reference()
    gc.collect()
    gc.freeze()  # or each collection would walk through all that was imported, and through the processor's caches
    for _ in range(case.runs):
        ours.append(_time_s(case.ours, case.before))
        reference.append(_time_s(case.reference, case.before))
    ours_s, reference_s = statistics.median(ours), statistics.median(reference)
    return Result(case.name, ours_s, reference_s, reference_s / ours_s, case.unit, case.runs)


def _time_s(call: Callable[[], object], before: Callable[[], object]) -> float:
    gc.collect()
    before()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
