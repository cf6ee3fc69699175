"""Sweeps: the list as written, the runs as done, skipped and continued; and the event files that runs leave."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.synthetic import draw_data_set
from student_train.checkpoint import checkpoints
from student_train.config import SweepConfig, TrainConfig, parse_train
from student_train.run_folder import RunFolder
from student_train.sweep import flags, read_sweep, state_of, sweep

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "scenes"
    draw_data_set(folder, train_images=4, val_images=2)
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def plan(folder: Path, scenes: Path, steps: int = 2) -> Path:
    """Two plain runs of the tiny student."""
    return written(
        folder,
        f"""
        [defaults]
        data = "{scenes}"
        sizes = [64]
        student = "tiny"
        out = "{folder / "runs"}"
        batch-size = 2
        max-steps = {steps}
        workers = 1
        device = "cpu"
        eval-every = 0

        [[run]]
        name = "a"

        [[run]]
        name = "b"
        queries = 20
        lr = 1e-3
        refine = false
        """,
    )


def test_the_list_becomes_configurations(tmp_path: Path, scenes: Path) -> None:
    """Defaults and the runs' own options, by hand; and the flags of a configuration parse to the same one, also where
    every option has another value than the usual one."""
    a, b = read_sweep(plan(tmp_path, scenes))
    assert (a.output.name, a.model.student, a.data.sizes, a.optimisation.max_steps) == ("a", "tiny", (64,), 2)
    assert (b.output.name, b.model.queries, b.optimisation.lr, b.model.refine) == ("b", 20, 1e-3, False)
    assert replace(a, output=b.output, model=b.model, optimisation=b.optimisation) == b
    for config in (a, b, TrainConfig(), unusual()):
        assert parse_train(flags(config)) == config


def unusual() -> TrainConfig:
    """Every option changed."""
    config = TrainConfig()
    others = {
        "mode": "released",
        "schedule": "cosine",
        "amp": "bf16",
        "on_corrupt": "skip",
        "student": "r18",
        "ema": 0.9,
        "subset": 0.5,
        "exif": "ignore",
        "track": "wandb",
    }
    groups = {}
    for name, group in vars(config).items():
        if not dataclasses.is_dataclass(group):
            continue
        changed: dict[str, object] = {}
        for field, value in vars(group).items():
            kind = str(type(group).__dataclass_fields__[field].type)
            if field in others:
                changed[field] = others[field]
            elif isinstance(value, bool):
                changed[field] = not value
            elif isinstance(value, (int, float)):
                changed[field] = value + 1
            elif "Ints" in kind or "Sides" in kind:
                changed[field] = (64, 96)
            elif "Int" in kind:
                changed[field] = 64
            elif "Float" in kind:
                changed[field] = 0.5
            elif isinstance(value, Path) or "Path" in kind:
                changed[field] = Path("elsewhere")
            else:
                changed[field] = "else"
        groups[name] = replace(group, **changed)
    return replace(config, **groups)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[default]\n[[run]]\nname = 'a'", r"found 'default', the nearest is 'defaults'"),
        ("[[run]]\nname = 'a'\nbatchsize = 4", r"\[\[run\]\] a: unknown key 'batchsize', the nearest is 'batch-size'"),
        ("[[run]]\nname = 'a'\nbatch-size = 'four'", r"\[\[run\]\] a: batch-size = 'four'"),
        ("[[run]]\nname = 'a'\nstudent = 'r19'", r"found --student r19: is it r1?8"),
        ("[[run]]\nstudent = 'r18'", r"\[\[run\]\] 1: expected a name"),
        ("[[run]]\nname = 'a'\n[[run]]\nname = 'a'", r"expected every name once, found 2 runs for runs/a"),
        ("[[run]]\nname = '../../evil'", r"expected --name of letters.* stays below --out, found '\.\./\.\./evil'"),
        ("[defaults]\nname = '/evil'\n[[run]]\nlr = 1", r"expected --name of letters.* found '/evil'"),
        ("[run]\nname = 'a'", r"expected at least one \[\[run\]\] table"),
        ("[[run]\n", r"expected TOML, found a mistake"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong with the list, with the nearest name, before anything runs."""
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def command(file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "student_train", "sweep", str(file), *more]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def test_a_sweep_does_and_skips(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in parallel by the command line: a table of both, a log, metrics and TensorBoard events in each folder.
    The same command again starts nothing; lengthened, both are to go on. With another learning rate under the same
    name: UserError."""
    file = plan(tmp_path, scenes)
    done = subprocess.run(
        command(file, "--parallel", "2"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()[-3:]
    assert "AP50" in header
    assert [row.split()[0] for row in rows] == ["a", "b"]
    for config in read_sweep(file):
        folder = tmp_path / "runs" / str(config.output.name)
        assert state_of(config) == "finished"
        assert (folder / "log.txt").stat().st_size
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
        assert events(folder) == {line["step"]: pytest.approx(line["loss"]) for line in lines if "loss" in line}

    monkeypatch.setattr(subprocess, "Popen", None)
    assert sweep(SweepConfig(file)) == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    monkeypatch.undo()

    plan(tmp_path, scenes, steps=3)
    assert [state_of(config) for config in read_sweep(file)] == ["interrupted", "interrupted"]

    file.write_text(file.read_text().replace("lr = 1e-3", "lr = 2e-3"))
    with pytest.raises(UserError, match=r"runs/b was started with another optimisation\.lr"):
        sweep(SweepConfig(file))


def events(folder: Path) -> dict[int, float]:
    """The loss of each step, as TensorBoard's own reader finds it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder)).Reload()
    assert {"loss", "loss/detection/l1", "lr", "time/step_s", "evaluation/ap"} <= set(reader.Tags()["scalars"])
    return {event.step: event.value for event in reader.Scalars("loss")}


def test_interrupted_and_failed_runs(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to the sweep in the middle of a run: the run saves itself and goes on later. A run without its data
    fails, the others are done, and the error names it."""
    file = plan(tmp_path, scenes, steps=100_000)
    process = subprocess.Popen(command(file), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    first, _ = read_sweep(file)
    checkpoint, *_ = checkpoints(RunFolder(tmp_path / "runs" / "a", writes=False).checkpoints)
    steps = int(checkpoint.stem.removeprefix("step-"))
    assert state_of(first) == "interrupted"

    plan(tmp_path, scenes, steps=steps + 1)
    text = file.read_text()
    file.write_text(text + f'\n[[run]]\nname = "c"\ndata = "{tmp_path / "nothing"}"\n')
    done = subprocess.run(
        command(file, "--parallel", "3"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "1 of 3 runs failed (c)" in done.stderr
    assert [state_of(config) for config in read_sweep(file)] == ["finished", "finished", "new"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 2))
    assert list(events(metrics.parent)) == list(range(1, steps + 2))
    assert "nothing" in (tmp_path / "runs" / "c" / "log.txt").read_text()
