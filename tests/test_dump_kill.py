"""A dump is indestructible: killed at any moment, run again, alone or on two ranks, it ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from common.cache.reader import read_manifest
from common.cache.writer import finished_shards
from tests.dump_cases import OPTIONS, draw_scenes, dump, run_in_child, same_bytes

KILLS = 20
MORE = ("--tokens", "int8", "--keep-tokens", "0.5", "--views", "2")

Start = Callable[[Path], BaseProcess]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=64)


@pytest.fixture(scope="module")
def start(data: Path) -> Iterator[Start]:
    """Starts a process that dumps to a path. A server imports everything once; each process is a fork of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dump_cases"])
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as environment:  # of the server: it does not take sys.path over before 3.13
        environment.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        environment.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    started: list[BaseProcess] = []

    def start(out: Path) -> BaseProcess:
        process = context.Process(target=run_in_child, args=(("--data", data, *OPTIONS, *MORE, "--out", out),))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(data: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A store that was written without interruption, and how many seconds it took, start of the process included."""
    out = tmp_path_factory.mktemp("undisturbed") / "store.zarr"
    for _ in range(2):  # the first also starts the server
        shutil.rmtree(out, ignore_errors=True)
        begin_s = time.monotonic()
        process = start(out)
        process.join()
        assert process.exitcode == 0
    return out, time.monotonic() - begin_s


def finished(store: Path) -> float:
    """Share of the shards that are there."""
    return float(finished_shards(store, read_manifest(store)).mean()) if store.exists() else 0.0


def test_killed_at_random_moments(start: Start, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of a dump, each run again over what the last one left: a store that gets finished
    has the bytes of the undisturbed one, and is begun anew until 20 processes have been killed."""
    reference, duration_s = undisturbed
    out, generator = tmp_path / "store.zarr", random.Random(0)
    killed, midway = 0, 0
    while killed < KILLS:
        process = start(out)
        process.join(generator.uniform(0, duration_s))
        if process.is_alive():
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            midway += 0 < finished(out) < 1
        else:
            assert process.exitcode == 0
            assert same_bytes(out, reference)
            shutil.rmtree(out)
    last = start(out)
    last.join()
    assert last.exitcode == 0
    assert same_bytes(out, reference)
    assert midway >= 3, "hardly any process was killed while it wrote: the test has lost its subject"
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_another_number_of_ranks(data: Path, start: Start, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """A dump that one process began and torchrun completes on two ranks has the bytes of one process alone."""
    reference, _ = undisturbed
    out = tmp_path / "store.zarr"
    process = start(out)
    while finished(out) < 0.2 and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert finished(out) < 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = subprocess.run(
        [*torchrun, "-m", "teacher_dump", "--data", data, *map(str, (*OPTIONS, *MORE)), "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ranks.returncode == 0, ranks.stderr
    assert same_bytes(out, reference)


def test_a_second_process_is_refused(
    data: Path, start: Start, undisturbed: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one process is at work (stopped, so that it surely is) another ends with one line; the first is not
    disturbed. A store that nobody writes to is not locked, whatever became of its last writer."""
    reference, _ = undisturbed
    out = tmp_path / "store.zarr"
    process = start(out)
    while not finished(out):
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert finished(out) < 1
    assert dump(data, out, *MORE) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "is being written by another process" in error[0]
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert same_bytes(out, reference)
    assert dump(data, out, *MORE) == 0
    assert same_bytes(out, reference)
