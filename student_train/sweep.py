"""Many runs from one plain list, in turn or in parallel; what is finished is skipped, what was interrupted goes on.

[defaults]                      # options of every run, by the names of their flags
cache = "store.zarr"
epochs = 12

[[run]]
name = "r18"
student = "r18"

[[run]]
name = "r18-plain"
student = "r18"
logits-weight = 0
feature-weight = 0
assignment-weight = 0
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.runtime import log
from student_train.config import SweepConfig, TrainConfig
from student_train.interruption import signals_to_heed
from student_train.recipe import configured, read_recipe
from student_train.run_folder import RunFolder

POLL_S = 0.2


@dataclass(frozen=True)
class PlannedRun:
    """One run of the list, and what has become of it so far: "new", "interrupted" or "finished"."""

    config: TrainConfig
    state: str

    @property
    def folder(self) -> Path:
        assert self.config.output.name is not None
        return self.config.output.out / self.config.output.name

    @property
    def arguments(self) -> list[str]:
        """Of `python -m student_train`, to begin it or to go on."""
        return [*flags(self.config), *(["--resume"] if self.state == "interrupted" else [])]


def sweep(config: SweepConfig) -> list[Path]:
    """Do every run of the file that is not finished; returns the folders of all. UserError before the first begins for
    a mistake in the file, and after the last one if some failed."""
    planned = [PlannedRun(run, state_of(run)) for run in read_sweep(config.file)]
    for run in planned:
        log.info(f"{run.folder}: {run.state}: python -m student_train {shlex.join(run.arguments)}")
    if not config.dry_run:
        failed = execute([run for run in planned if run.state != "finished"], config.parallel)
        if failed:
            raise UserError(
                f"{len(failed)} of {len(planned)} runs failed ({', '.join(failed)}): see what they wrote; the same"
                " command goes on with them"
            )
    return [run.folder for run in planned]


def read_sweep(path: Path) -> list[TrainConfig]:
    """The runs of a file. UserError, with the nearest name, for what is unknown in it."""
    values = read_recipe(path)
    for key in values:
        if key not in ("defaults", "run"):
            nearest = difflib.get_close_matches(key, ("defaults", "run"), n=1, cutoff=0.0)[0]
            raise UserError(
                f"{path}: expected [defaults] and [[run]] tables, found {key!r}, the nearest is {nearest!r}"
            )
    runs = values.get("run", [])
    if not isinstance(runs, list) or not runs:
        raise UserError(f"{path}: expected at least one [[run]] table, with double brackets")
    defaults = configured(TrainConfig(), _table(values.get("defaults", {}), path), f"{path} [defaults]")
    configs = []
    for number, run in enumerate(runs, start=1):
        run = _table(run, path)
        source = f"{path} [[run]] {run.get('name', number)}"
        configs.append(configured(defaults, run, source))
        if configs[-1].output.name is None:
            raise UserError(f"{source}: expected a name, which its folder gets")
    names, repeated = Counter(config.output.out / str(config.output.name) for config in configs).most_common(1)[0]
    if repeated > 1:
        raise UserError(f"{path}: expected every name once, found {repeated} runs for {names}")
    return configs


def state_of(config: TrainConfig) -> str:
    """UserError where the run's folder holds one of another configuration."""
    folder = RunFolder(config.output.out / str(config.output.name), writes=True)
    if not folder.saved:
        return "new"
    return "finished" if folder.is_finished(config) else "interrupted"


def flags(config: TrainConfig) -> list[str]:
    """The command line of a configuration: what differs from the defaults."""
    words: list[str] = []
    for name, default in vars(TrainConfig()).items():
        if not dataclasses.is_dataclass(default):
            continue
        for option, usual in vars(default).items():
            value, flag = getattr(getattr(config, name), option), option.replace("_", "-")
            if value == usual:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def execute(runs: Sequence[PlannedRun], parallel: int) -> list[str]:
    """Do the runs, `parallel` at a time, each in a process of its own; returns the names of those that failed.

    In parallel, each writes to log.txt in its folder, and has a GPU of its own while there are enough. Ctrl-C,
    SIGTERM and SIGHUP are passed on, once, and waited for: each run saves itself.
    """
    waiting, failed = deque(runs), []
    running: dict[int, tuple[PlannedRun, subprocess.Popen[bytes]]] = {}
    gpus = visible_gpus()
    with passing_on(running):
        while waiting or running:
            for slot in sorted(set(range(parallel)) - running.keys())[: len(waiting)]:
                run = waiting.popleft()
                gpu = gpus[slot % len(gpus)] if parallel > 1 and len(gpus) > 1 else None
                running[slot] = (run, begin(run, gpu, to_file=parallel > 1))
            time.sleep(POLL_S)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    log.info(f"{run.folder}: {'done' if process.returncode == 0 else _failure(process.returncode)}")
                    if process.returncode:
                        failed.append(run.folder.name)
    return failed


def begin(run: PlannedRun, gpu: str | None, to_file: bool) -> subprocess.Popen[bytes]:
    """Start a run's process."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [sys.executable, "-m", "student_train", *run.arguments]
    log.info(
        f"{run.folder}: {'goes on' if run.state == 'interrupted' else 'begins'}" + (f" on GPU {gpu}" if gpu else "")
    )
    if not to_file:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with (run.folder / "log.txt").open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


@contextmanager
def passing_on(running: Mapping[int, tuple[PlannedRun, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """Send what means "stop" on to the runs, wait for them, and raise KeyboardInterrupt.

    The runs are in sessions of their own, so that Ctrl-C does not reach them twice, which would be an order to die."""

    def pass_on(number: int, _: Any) -> None:
        log.info(f"{len(running)} runs are told to stop; they save themselves first")
        for _, process in running.values():
            process.send_signal(number)
        for _, process in running.values():
            process.wait()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, pass_on) for number in signals_to_heed()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def _table(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: expected tables [defaults] and [[run]], found {value!r}")
    return value


def _failure(status: int) -> str:
    return f"ended with exit status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
