"""Where tensors are and what all processes agree on: devices, process groups, seeds."""

from __future__ import annotations

import os
import random
import re
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from common.runtime import Ranks

PATIENCE_S = float(os.environ.get("DETRCACHE_PATIENCE_S", "600"))
"""How long a training's processes wait for each other: as long as nccl does unless told otherwise, gloo too."""


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device called `name`; `auto` is CUDA when present (one device per local rank), else the CPU."""
    ranks = ranks or Ranks()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name) is None:
        advice = f": use cuda:{name}" if name.isdecimal() else ""
        raise UserError(f"expected a device such as auto, cpu, cuda or cuda:1, found {name!r}{advice}")
    device = torch.device(name)
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
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"expected {' and '.join(missing)} for {ranks.world_size} processes, found none: use torchrun"
            )
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
