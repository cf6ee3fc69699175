"""Runs on machines that fail: kills at bad moments, full disks, closed terminals. What is on record stays true."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.errors import UserError
from student_train import loop, tracking
from student_train.checkpoint import checkpoints
from student_train.compare import read_metrics
from student_train.config import TrainConfig
from student_train.run_folder import RunFolder
from student_train.sweep import state_of
from student_train.tracking import EventFile
from tests.training_cases import (
    REPOSITORY,
    configuration,
    make_store,
    run_command_line,
    start_process,
    steps_of,
    wait_for_steps,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("faults"))


def plain(folder: Path, out: Path, **output: Any) -> TrainConfig:
    """Four steps of plain training, in epochs of three."""
    config = configuration(folder, out, cached=False)
    return replace(
        config,
        optimisation=replace(config.optimisation, max_steps=4),
        output=replace(config.output, log_every=0, **output),
    )


class Killed(BaseException):
    """Instead of SIGKILL: nothing in the product catches it."""


def evaluated(run: Path) -> list[int]:
    """The steps of the evaluations on record."""
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if "evaluation" in line]


def test_an_evaluation_is_on_record_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the line of the evaluation after the first epoch and the checkpoint that knows of it: going on
    evaluates again, and the record has one evaluation of each step, as that of a run never killed."""
    evaluate = loop.Run.evaluate

    def killed(run: loop.Run) -> None:
        evaluate(run)
        raise Killed

    config = plain(folder, tmp_path, eval_every=1)
    monkeypatch.setattr(loop.Run, "evaluate", killed)
    with pytest.raises(Killed):
        loop.train(config)
    monkeypatch.setattr(loop.Run, "evaluate", evaluate)
    assert evaluated(tmp_path / "run") == [3]
    loop.train(replace(config, output=replace(config.output, resume=True)))
    assert evaluated(tmp_path / "run") == [3, 4]
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", [True, False])
def test_killed_before_the_first_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Killed after two steps, with no checkpoint yet, while a file was being written: both --resume and the same
    command again begin at the first step and end with every step on record once; a sweep calls it new. The temporary
    files are gone."""
    config = plain(folder, tmp_path)
    write, lines = RunFolder.write_metrics, list[int]()

    def killed(run: RunFolder, line: dict[str, Any]) -> None:
        write(run, line)
        lines.append(line["step"])
        if len(lines) == 2:
            raise Killed

    monkeypatch.setattr(RunFolder, "write_metrics", killed)
    with pytest.raises(Killed):
        loop.train(config)
    monkeypatch.setattr(RunFolder, "write_metrics", write)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir()
    leftovers = [run / ".run.json.123.tmp", run / "checkpoints" / ".step-00000003.pt.123.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    assert state_of(config) == "new"
    loop.train(replace(config, output=replace(config.output, resume=resume)))
    assert [line["step"] for line in steps_of(run)] == [1, 2, 3, 4]
    assert not any(leftover.exists() for leftover in leftovers)
    with pytest.raises(UserError, match="holds a run already"):
        loop.train(config)


def test_what_is_left_of_a_run_is_never_written_over(folder: Path, tmp_path: Path) -> None:
    """A finished run whose checkpoints, or whose run.json, were removed: neither the same command nor --resume writes
    there, and what --resume says is not to leave it out."""
    config = plain(folder, tmp_path)
    resumed = replace(config, output=replace(config.output, resume=True))
    loop.train(config)
    run = tmp_path / "run"
    before = (run / "last.safetensors").read_bytes()
    for path in checkpoints(run / "checkpoints"):
        path.unlink()
    with pytest.raises(UserError, match="holds a run already"):
        loop.train(config)
    with pytest.raises(UserError, match=r"expected checkpoints in .*, found none: --init .*last\.safetensors"):
        loop.train(resumed)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="holds a run already"):
        loop.train(config)
    with pytest.raises(UserError, match=r"run\.json cannot be read: --init"):
        loop.train(resumed)
    assert (run / "last.safetensors").read_bytes() == before


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    """A run under way, as another process sees it, is neither replaced nor continued."""
    config = plain(folder, tmp_path)
    under_way = RunFolder(tmp_path / "run", writes=True)
    under_way.start(config, None, 1)
    for resume in (False, True):
        with pytest.raises(UserError, match="is being trained by another process"):
            loop.train(replace(config, output=replace(config.output, resume=resume)))
    under_way.close()
    loop.train(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB: room for two to four checkpoints of the tiny student."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line(folder: Path, small_disk: Path, tmp_path: Path) -> None:
    """A checkpoint after every step, all of them kept, on a disk of 32 MB: exit status 2, one line that names the file
    and the reason, no traceback; the last checkpoint is whole, and with fewer kept the run goes on to its end."""
    arguments = [
        "--data", str(folder / "scenes"), "--sizes", "64", "--student", "tiny", "--batch-size", "4", "--workers", "1",
        "--device", "cpu", "--eval-every", "0", "--checkpoint-every", "1", "--out", str(small_disk), "--name", "run",
    ]  # fmt: skip
    process = start_process(run_command_line, [*arguments, "--keep", "99"], tmp_path / "full.txt")
    process.join()
    printed = (tmp_path / "full.txt").read_text()
    assert process.exitcode == 2, printed
    assert "Traceback" not in printed
    assert re.search(r"^error: .*could not be written \(.*No space left on device", printed.splitlines()[-1]), printed
    run = small_disk / "run"
    kept = checkpoints(run / "checkpoints")
    assert not list(run.rglob(".*.tmp"))
    for path in kept[1:]:
        path.unlink()
    steps = int(kept[0].stem.removeprefix("step-")) + 2
    more = [*arguments, "--keep", "1", "--max-steps", str(steps), "--resume"]
    process = start_process(run_command_line, more, tmp_path / "again.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "again.txt").read_text()
    assert [line["step"] for line in steps_of(run)] == list(range(1, steps + 1))


def test_metrics_and_event_files_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to /dev/full. Metrics: one line that names the file. Events: one warning, and the run goes on."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    line = {"step": 1, "loss": 0.5, "losses": {"detection/l1": 0.5}}
    folder = RunFolder(tmp_path, writes=True)
    folder.metrics = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full could not be written \(No space left on device\)"):
        folder.write_metrics(line)
    warnings: list[str] = []
    monkeypatch.setattr(tracking.log, "warning", warnings.append)
    events = EventFile(tmp_path)
    monkeypatch.setattr(events, "_open", lambda: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    for _ in range(3):
        events.add(line)
    assert warnings == [f"no more TensorBoard events are written to {tmp_path}: No space left on device"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server goes away after the start: one warning, and every line in metrics.jsonl."""

    class Gone:
        def add(self, line: dict[str, Any]) -> None:
            raise ConnectionError("no route to host")

    warnings: list[str] = []
    monkeypatch.setattr(tracking.log, "warning", warnings.append)
    folder = RunFolder(tmp_path, writes=True)
    folder._tracker = Gone()  # type: ignore[assignment]
    for step in (1, 2):
        folder.write_metrics({"step": step, "loss": 0.5, "losses": {"detection/l1": 0.5}})
    assert warnings == ["nothing more is reported to --track (ConnectionError: no route to host); the run goes on"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_closed_terminal(folder: Path, tmp_path: Path) -> None:
    """The command in a terminal of its own, which is closed in mid-run: the system sends SIGHUP, and nothing can be
    printed any more. The step under way is finished and saved, and the exit status is 129."""
    arguments = [
        "--data", str(folder / "scenes"), "--sizes", "64", "--student", "tiny", "--batch-size", "4", "--workers", "1",
        "--device", "cpu", "--eval-every", "0", "--log-every", "1", "--out", str(tmp_path), "--name", "run",
        "--epochs", "1000", "--checkpoint-every", "0",
    ]  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-m", "student_train", *arguments])
    os.set_blocking(terminal, False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    begun = time.monotonic()
    while not metrics.exists() and time.monotonic() < begun + 120:
        drain(terminal)
        time.sleep(0.05)
    wait_for_steps(tmp_path / "run", 2)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    newest = int(checkpoints(tmp_path / "run" / "checkpoints")[0].stem.removeprefix("step-"))
    assert newest == steps_of(tmp_path / "run")[-1]["step"]


def drain(terminal: int) -> None:
    """Read what was printed, so that printing never waits."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        pass


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """One detector saved 20 times with the same remarks: one hash. safetensors' own reader finds the weights and the
    remarks that went in, signs beyond ASCII and quotes among them."""
    torch.manual_seed(0)
    detector = DeformableDetr(PRESETS["tiny"](3))
    remarks = {"categories": json.dumps(["Äpfel\n", 'a "pear"', "\x7f\x01"], ensure_ascii=False), "more": "x", "a": "y"}
    paths = [tmp_path / f"{number}.safetensors" for number in range(20)]
    for path in paths:
        save_detector(path, detector, remarks)
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1
    found = load_file(paths[0])
    assert found.keys() == detector.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in detector.state_dict().items())
    with safe_open(paths[0], "pt") as file:
        assert remarks.items() <= file.metadata().items()
