"""`make gpu` without a GPU: what it says, how it ends what hangs, and each benchmark in small on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu.benchmarks import BENCHMARKS, run
from tests.gpu.measuring import Place

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    """`make gpu` ends with status 2 and one line on stderr, besides what make itself adds."""
    make = ["make", "--silent", "gpu", f"PYTHON={sys.executable}"]
    environment = os.environ | {"MAKEFLAGS": "", "MAKELEVEL": "0"}  # of a make that runs the tests
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert lines == [f"make gpu: expected a CUDA device, but torch {torch.__version__} finds none; nothing was run"]


def test_the_limits_add_up() -> None:
    """All jobs at their limits take twelve minutes at most, each is a file of tests or a benchmark that exists, and
    docs/gpu.md says its limit."""
    assert sum(job.limit_s + command.GRACE_S for job in command.JOBS) <= command.LIMIT_S == 720
    assert {job.name for job in command.JOBS if not job.tests} == BENCHMARKS.keys()
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `{job.name}` | {job.limit_s} s |" in page for job in command.JOBS)
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {job.name for job in command.JOBS if job.tests} == files


class Scripted(command.Job):
    """A job that runs a script of this test's."""

    def command(self, device: str, out: Path) -> list[str]:
        return [sys.executable, "-c", self.name, str(out)]


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_job_that_hangs_is_ended_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that writes its rows and sleeps for an hour, with a child that does: both end at the limit of a second,
    and the rows count. One that fails is told from one that passes."""
    pid = tmp_path / "child"
    sleeps = f"""
import json, subprocess, sys, time
open(sys.argv[1], "w").write(json.dumps([1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(3600)"""
    monkeypatch.setattr(command, "out_of", lambda job, folder: folder / "out")
    hung = command.run(Scripted(sleeps, limit_s=3), "cpu", tmp_path)
    assert (hung.passed, hung.rows, hung.ended) == (False, [1], "ended at its limit of 3 s")
    begun = time.monotonic()
    while is_running(pid.read_text()):  # a killed process takes a moment to go
        assert time.monotonic() < begun + 20
        time.sleep(0.05)
    failed = command.run(Scripted("raise SystemExit(3)", limit_s=60), "cpu", tmp_path)
    passed = command.run(Scripted("", limit_s=60), "cpu", tmp_path)
    assert [(outcome.ended, outcome.passed, outcome.rows) for outcome in (failed, passed)] == [
        ("exit status 3", False, []),
        ("done", True, []),
    ]


def test_a_rehearsal_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command itself, with one file of tests and one benchmark: status 0, the table, and gpu.json with versions,
    the result of each test with what it noted, and rows."""
    arguments = ["tests.gpu", "sizes", "feature-loss", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert command.main() == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert (report["machine"]["device"], report["machine"]["torch"]) == ("cpu", torch.__version__.split("+")[0])
    sizes, loss = report["jobs"]
    assert {test["result"] for test in sizes["tests"].values()} == {"passed"}
    assert all(int(test["batch size"]) == 2 for test in sizes["tests"].values())
    assert len(loss["rows"]) == 8
    assert "2 passed, 0 failed, 0 skipped" in capfd.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_run_in_small(name: str, tmp_path: Path) -> None:
    """Each benchmark gives rows of finite figures, written as they come."""
    run(name, Place(torch.device("cpu"), small=True), tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    for row in rows:
        assert "refused" not in row["figures"], row
        assert all(isinstance(figure, str) or math.isfinite(figure) for figure in row["figures"].values())
