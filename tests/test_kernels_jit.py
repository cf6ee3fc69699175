"""Compiled code where it cannot be kept: every command works, and says so once."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import google_crc32c
import pytest

from kernels import jit

REPOSITORY = Path(__file__).resolve().parents[1]
EVERY_COMMAND = """
import numpy as np
from common.cache import crc32c
from student_train import compare, evaluate, export, loop, sweep
from teacher_dump import dump, inspect, plan_report, repair, transcode, verify
print("sum", crc32c.value(np.arange(5000, dtype=np.uint8)))
"""


def test_nothing_can_be_written(tmp_path: Path) -> None:
    """A copy of the packages, in whose folders no __pycache__ can be made, with a home that is no folder: what every
    command runs is imported, and a compiled checksum is google's. stderr has one line."""
    for package in ("kernels", "common", "student_train", "teacher_dump"):
        copytree(REPOSITORY / package, tmp_path / package, ignore=ignore_patterns("__pycache__"))
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()
    environment = {"PATH": os.environ["PATH"], "HOME": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = google_crc32c.value(bytes(n % 256 for n in range(5000)))
    assert done.stdout.splitlines()[-1] == f"sum {expected}"
    (line,) = done.stderr.splitlines()
    assert line.startswith("compiled code cannot be kept")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where numba keeps what these tests compile."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit.log, "handlers", [])  # where a command set them up
    monkeypatch.setattr(jit.log, "propagate", True)
    jit._say_that_nothing_is_kept.cache_clear()
    yield tmp_path
    jit._say_that_nothing_is_kept.cache_clear()


def compiled() -> list[Any]:
    """Two functions that nobody has called yet."""

    def add(x: int, y: int) -> int:
        return x + y

    def multiply(x: int, y: int) -> int:
        return x * y

    return [jit.jit()(function) for function in (add, multiply)]


def test_a_full_disk(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file may be longer than 50 bytes: the results of two functions are right, and there is one warning."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    add, multiply = compiled()
    with caplog.at_level(logging.WARNING, "detrcache"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        try:
            assert (add(2, 3), multiply(2, 3)) == (5, 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.message[:28] for record in caplog.records] == ["compiled code cannot be kept"]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_file_is_not_believed(folder: Path, kind: str) -> None:
    """Index or code cut off after 20 bytes, as a crash leaves them: compiled again, with the right results."""
    assert [function(2, 3) for function in compiled()] == [5, 6]
    kept = list(folder.rglob(f"*.{kind}"))
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert [function(2, 3) for function in compiled()] == [5, 6]
