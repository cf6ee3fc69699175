"""What a process knows of the machine it runs on: seeds, device, ranks, versions, log lines."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError

log = logging.getLogger("detrcache")

BAR_INTERVAL_S = 0.1 if sys.stderr.isatty() else 60.0
"""Least time between two updates of a progress bar: a log file gets a line a minute, not thousands."""

PATIENCE_S = float(os.environ.get("DETRCACHE_PATIENCE_S", "600"))
"""How long a training's processes wait for each other: as long as nccl does unless told otherwise, gloo too."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a process started by hand is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks() -> Ranks:
    """Ranks from torchrun's environment variables RANK, LOCAL_RANK and WORLD_SIZE."""
    return Ranks(*(int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES))


_RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device called `name`; `auto` is CUDA when present (one device per local rank), else the CPU."""
    ranks = ranks or Ranks()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"expected a device such as auto, cpu, cuda or cuda:1, found {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r} was asked for, but torch finds no CUDA device here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", ranks.local_rank)
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device {device} was asked for, but there are only {torch.cuda.device_count()} of them")
        torch.cuda.set_device(device)
    return device


def start_processes(ranks: Ranks, device: torch.device) -> None:
    """Join the process group of torchrun (nccl on CUDA, gloo on the CPU); nothing to join for a single process.

    A process that waits for the others longer than PATIENCE_S gives up: they are gone, or cannot be reached.
    """
    if ranks.world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_S))


def others_lost(error: RuntimeError) -> bool:
    """Whether an error means that another process ended or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; the tensor itself for a single process. Carries no gradient."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def seed_generators(seed: int, ranks: Ranks | None = None) -> None:
    """Seed the global generators of Python, NumPy and torch, differently on each rank (dropout must differ)."""
    seed = seed * 1_000_003 + (ranks.rank if ranks else 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from the global generator
    torch.manual_seed(seed)


def software_versions() -> dict[str, str]:
    """Versions of what decides a result, for manifests and run directories."""
    names = ("detrcache", "torch", "torchvision", "numpy", "zarr", "pycocotools")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def start_logging(ranks: Ranks | None = None) -> None:
    """Send the project's log lines to stderr, past progress bars; ranks after the first log warnings only."""
    log.handlers = [_BesideProgressBars()]
    log.propagate = False
    log.setLevel(logging.INFO if ranks is None or ranks.is_first else logging.WARNING)


class _BesideProgressBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError):  # a closed terminal: the run may have a state to save
            tqdm.write(mark + self.format(record), file=sys.stderr)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
