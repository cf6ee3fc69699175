"""Runs that are stopped, killed or damaged, and go on: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.detr.presets import PRESETS
from common.errors import UserError
from student_train import loop
from student_train.checkpoint import checkpoints, load_checkpoint
from student_train.config import SpeedOptions, TrainConfig
from student_train.interruption import Interrupted
from student_train.step import Training
from tests.training_cases import (
    configuration,
    make_store,
    run_command_line,
    run_ranks,
    start_process,
    steps_of,
    wait_for_steps,
)

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module", autouse=True)
def dropout() -> Iterator[None]:
    """Random numbers count in every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", partial(PRESETS["tiny"], dropout=0.1))
        yield


def ten_steps(folder: Path, out: Path) -> TrainConfig:
    """Of three and a third epochs, in two parts each, with a moving average and a checkpoint every fourth step."""
    config = configuration(folder, out)
    return replace(
        config,
        optimisation=replace(config.optimisation, epochs=4, max_steps=STEPS, ema=0.9, warmup_steps=4),
        speed=SpeedOptions(accumulate=2),
        output=replace(config.output, checkpoint_every=4, log_every=0),
    )


def resumed(config: TrainConfig) -> TrainConfig:
    return replace(config, output=replace(config.output, resume=True))


@pytest.fixture(scope="module")
def whole(folder: Path, dropout: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    loop.train(ten_steps(folder, out))
    return out / "run"


def state_of(run: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint."""
    return vars(load_checkpoint(checkpoints(run / "checkpoints")[0]))


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested values differ, tensors bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        places = [place + f"/{key}" for key in one.keys() ^ other.keys()]
        return places + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{place}/{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [place]


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, projections, optimiser, average, counters, losses of every step and the student's file: bit for bit."""
    one, other = (state_of(path) | {"best_ap": None} for path in (run, whole))  # of other evaluations
    assert differences(one, other) == []
    one, other = load_file(run / "last.safetensors"), load_file(whole / "last.safetensors")
    assert differences(one, other) == []
    found, expected = ([(line["step"], line["losses"]) for line in steps_of(path)] for path in (run, whole))
    assert found == expected


def interrupt_at(step: int, what: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let something happen in the middle of a step (the steps done before it are `step`), once."""
    train_step, happened = loop.train_step, []

    def interrupted(training: Training, *rest: Any, **options: Any) -> Any:
        result = train_step(training, *rest, **options)
        if training.step == step and not happened:
            happened.append(step)
            what()
        return result

    patch.setattr(loop, "train_step", interrupted)


def test_five_steps_and_five_are_ten(folder: Path, tmp_path: Path, whole: Path) -> None:
    """Five steps, the second epoch's middle, then --resume up to ten, against ten at once: bit for bit."""
    config = ten_steps(folder, tmp_path)
    loop.train(replace(config, optimisation=replace(config.optimisation, max_steps=5)))
    torch.manual_seed(12345)  # what the generator did meanwhile must not matter
    loop.train(resumed(config))
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_and_saves(
    folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    """A signal within the seventh step: that step is finished and saved, the exit status is the signal's, the message
    says how to go on; going on ends as the run never interrupted, bit for bit. Handlers are as before afterwards."""
    before = signal.getsignal(number)
    interrupt_at(6, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Interrupted, match=r"after step 7, .*--config .*run\.json --resume") as stopped:
        loop.train(ten_steps(folder, tmp_path))
    assert stopped.value.exit_status == status
    assert signal.getsignal(number) is before
    assert state_of(tmp_path / "run")["step"] == 7
    loop.train(resumed(ten_steps(folder, tmp_path)))
    assert_same_end(tmp_path / "run", whole)


def test_a_signal_while_evaluating(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during the evaluation after the first epoch ends it at once, with the epoch saved; going on evaluates
    that epoch before it trains."""
    config = ten_steps(folder, tmp_path)
    config = replace(config, output=replace(config.output, eval_every=1))
    detect = loop.detect_split

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(loop, "detect_split", interrupted)
    with pytest.raises(Interrupted, match="after step 3"):
        loop.train(config)
    monkeypatch.setattr(loop, "detect_split", detect)
    loop.train(resumed(config))
    text = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["evaluation" in line for line in text[:5]] == [False, False, False, True, False]


def test_a_crash_loses_the_steps_since_the_last_checkpoint(
    folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in the tenth step, two after a checkpoint by number and one after one by epoch; the newest checkpoint is
    damaged besides: going on says so, starts from the one before, and ends as the whole run, bit for bit."""

    def crash() -> None:
        raise MemoryError

    interrupt_at(9, crash, monkeypatch)
    with pytest.raises(MemoryError):
        loop.train(ten_steps(folder, tmp_path))
    newest, older = checkpoints(tmp_path / "run" / "checkpoints")
    assert (newest.name, older.name) == ("step-00000009.pt", "step-00000008.pt")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(newest)
    lines: list[str] = []
    monkeypatch.setattr(loop.log, "warning", lines.append)
    loop.train(resumed(ten_steps(folder, tmp_path)))
    assert any("step-00000009.pt is damaged" in line and "step-00000008.pt" in line for line in lines)
    assert_same_end(tmp_path / "run", whole)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 2
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        loop.train(resumed(ten_steps(folder, tmp_path)))


def test_resuming_a_finished_run_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """--resume on a run that is done returns its last evaluation and leaves every file but run.json as it was."""
    config = ten_steps(folder, tmp_path)
    config = replace(config, optimisation=replace(config.optimisation, max_steps=2))
    metrics = loop.train(config)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert loop.train(resumed(config)) == metrics
    assert {p for p, data in files.items() if p.read_bytes() != data} == {tmp_path / "run" / "run.json"}
    changed = replace(config, optimisation=replace(config.optimisation, lr=5e-4))
    with pytest.raises(UserError, match=r"another optimisation\.lr"):
        loop.train(resumed(changed))


def test_a_run_from_before_an_option_existed(folder: Path, tmp_path: Path) -> None:
    """A record without an option, as an earlier version wrote it, is one with that option's default: it goes on with
    the default and is refused with another value."""
    config = ten_steps(folder, tmp_path)
    config = replace(config, optimisation=replace(config.optimisation, max_steps=2))
    metrics = loop.train(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["config"]["distillation"]["balance"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert loop.train(resumed(config)) == metrics
    changed = replace(config, distillation=replace(config.distillation, balance=True))
    with pytest.raises(UserError, match=r"another distillation\.balance"):
        loop.train(resumed(changed))


def command(folder: Path, out: Path) -> list[str]:
    return [
        "--cache", str(folder / "store.zarr"), "--data", str(folder / "scenes"), "--student", "tiny", "--epochs", "200",
        "--batch-size", "4", "--out", str(out), "--name", "run", "--workers", "1", "--device", "cpu",
        "--eval-every", "0", "--checkpoint-every", "2", "--keep", "3",
    ]  # fmt: skip


def test_a_process_told_to_stop_and_one_killed(folder: Path, tmp_path: Path) -> None:
    """The command in a process of its own. SIGTERM: status 143, a line on stderr with the command that goes on.
    That command, killed by SIGKILL and once more going on: all steps from first to last are there, once each."""
    run = tmp_path / "run"
    process = start_process(run_command_line, command(folder, tmp_path), tmp_path / "first.txt")
    wait_for_steps(run, 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    last = (tmp_path / "first.txt").read_text().splitlines()[-1]
    assert f"--config {run / 'run.json'} --resume" in last
    done = state_of(run)["step"]
    assert done == steps_of(run)[-1]["step"]

    again = ["--config", str(run / "run.json"), "--resume"]
    process = start_process(run_command_line, again, tmp_path / "second.txt")
    wait_for_steps(run, done + 3)
    process.kill()
    process.join()
    killed_after = steps_of(run)[-1]["step"]
    assert done < state_of(run)["step"] >= killed_after - 2
    last_step = str(killed_after + 1)
    process = start_process(run_command_line, [*again, "--max-steps", last_step], tmp_path / "third.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "third.txt").read_text()
    assert [line["step"] for line in steps_of(run)] == list(range(1, int(last_step) + 1))
    assert len(checkpoints(run / "checkpoints")) == 3


def train_as_rank(config: TrainConfig, stopped_rank: int | None = None) -> None:
    """Train on one of several ranks; the given one gets a SIGTERM within the second step."""
    if stopped_rank == int(os.environ["RANK"]):
        interrupt_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM), pytest.MonkeyPatch())
    if stopped_rank is None:
        loop.train(config)
    else:
        with pytest.raises(Interrupted, match="after step 2"):
            loop.train(config)


def test_ranks_stop_together_and_go_on(folder: Path, tmp_path: Path) -> None:
    """Two ranks, of which the second alone is told to stop: both stop after the same step, and go on to the end of a
    run of two ranks never interrupted, bit for bit."""
    whole, stopped = (ten_steps(folder, tmp_path / name) for name in ("whole", "stopped"))
    whole, stopped = (
        replace(config, optimisation=replace(config.optimisation, max_steps=4)) for config in (whole, stopped)
    )
    run_ranks(train_as_rank, whole)
    run_ranks(train_as_rank, stopped, 1)
    assert state_of(tmp_path / "stopped" / "run")["step"] == 2
    run_ranks(train_as_rank, resumed(stopped))
    assert_same_end(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")
