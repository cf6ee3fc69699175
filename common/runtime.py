"""What a process knows of the machine it runs on: ranks, versions, log lines."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from tqdm import tqdm

from common.errors import UserError

log = logging.getLogger("detrcache")

BAR_INTERVAL_S = 0.1 if sys.stderr.isatty() else 60.0
"""Least time between two updates of a progress bar: a log file gets a line a minute, not thousands."""


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
    """Ranks from torchrun's environment variables RANK, LOCAL_RANK and WORLD_SIZE.

    UserError where they contradict each other, and where another launcher started several processes that would not
    know of each other.
    """
    given = {name: os.environ[name] for name in _RANK_VARIABLES if name in os.environ}
    if not given:
        _refuse_other_launchers()
    expected = "expected RANK below WORLD_SIZE and LOCAL_RANK, all set by torchrun, found "
    found = ", ".join(f"{name}={value}" for name, value in given.items())
    try:
        ranks = Ranks(*(int(given.get(name, default)) for name, default in _RANK_VARIABLES.items()))
    except ValueError:
        raise UserError(f"{expected}{found}") from None
    known = "RANK" in given or ranks.world_size == 1
    if not (known and 0 <= ranks.rank < ranks.world_size and ranks.local_rank >= 0):
        raise UserError(f"{expected}{found}")
    return ranks


def _refuse_other_launchers() -> None:
    for launcher, variable in _OTHER_LAUNCHERS.items():
        if (processes := os.environ.get(variable, "1")) != "1":
            raise UserError(
                f"{launcher} started this command {processes} times, and each would do the whole work: let it start"
                " torchrun once on each node (docs/tutorial.md), or set RANK=0 WORLD_SIZE=1 if you want just this"
            )


_RANK_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


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
