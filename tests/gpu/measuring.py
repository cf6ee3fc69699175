"""How the benchmarks of a device measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What was measured of one thing: figures by their name, which ends in the unit, or a word where there is none."""

    name: str
    figures: dict[str, float | str]


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs. small: with inputs that the CPU has done in seconds, to try the benchmark itself."""

    device: torch.device
    small: bool = False

    @property
    def runs(self) -> int:
        return 1 if self.small else 20

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], runs: int | None = None) -> float:
        """Median seconds of one call, after two that warm up."""
        times = []
        for run in range((runs or self.runs) + 2):
            self.wait()
            begun = time.perf_counter()
            call()
            self.wait()
            if run >= 2:
                times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def peak_mib(self, call: Callable[[], object]) -> float | str:
        """The most device memory in use during a call, beyond what was in use before."""
        if self.device.type != "cuda":
            return "-"
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def copy_bytes_per_s(self) -> float:
        """How fast the device copies memory: each byte counts twice, read and written."""
        source = torch.empty(2**20 if self.small else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))


def bytes_of(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def fits(call: Callable[[], object]) -> bool:
    """Whether a call finds enough device memory; frees what it took where it did not."""
    try:
        call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
