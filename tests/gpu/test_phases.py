"""Both phases by their commands on the device, with the demo's teacher and student; stores and runs against the CPU's.

On the CPU results are equal bit for bit, and asked to be. On a GPU sums are added in no fixed order (the gradient of
deformable attention, convolutions), and each step builds on the last: there, bounds are stated.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from common.synthetic import draw_data_set
from student_train import loop
from student_train.__main__ import main
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    SpeedOptions,
    TrainConfig,
)
from tests.dump_cases import command as teacher_dump
from tests.training_cases import REPOSITORY, run_command_line, run_ranks, start_process, steps_of, wait_for_steps

TEACHER = REPOSITORY / "docs" / "demo" / "teacher.safetensors"
SIDE = 64
STEPS = {"cpu": 5, "cuda": 20}
PATH_BOUND = 0.02  # relative, of the sum of the losses in each step on a GPU
FIRST_STEP_BOUND = 1e-4  # relative, of every loss before anything was added in another order


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and two validation images."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    draw_data_set(folder, train_images=10, val_images=2)
    return folder


def dump(scenes: Path, out: Path, device: str, *options: object) -> Path:
    data = ("--data", scenes, "--sizes", SIDE, "--views", 2, "--workers", 2)
    assert teacher_dump(*data, "--teacher", TEACHER, "--device", device, "--out", out, *options) == 0
    return out


@pytest.fixture(scope="module")
def stores(scenes: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full.zarr: lossless, each sample alone, as a live teacher sees it. default.zarr: without options."""
    folder = tmp_path_factory.mktemp("stores")
    dump(scenes, folder / "full.zarr", device, "--preset", "full", "--batch-size", 1)
    dump(scenes, folder / "default.zarr", device)
    return folder


def configuration(scenes: Path, store: Path, out: Path, device: str, steps: int) -> TrainConfig:
    return TrainConfig(
        DataOptions(store, data=scenes, workers=2, prefetch=2),
        ModelOptions("tiny"),
        DistillationOptions(),
        OptimisationOptions(epochs=20, max_steps=steps, batch_size=4, lr=1e-3),
        OutputOptions(out, "run", eval_every=0, device=device, log_every=0),
    )


def losses_of(config: TrainConfig) -> list[dict[str, float]]:
    """Train; the losses of each step."""
    loop.train(config)
    return [step["losses"] for step in steps_of(config.output.out / "run")]


def assert_same_path(found: list[dict[str, float]], expected: list[dict[str, float]], device: str) -> None:
    """Bit for bit on the CPU, within the bounds on a GPU."""
    assert len(found) == len(expected)
    if device == "cpu":
        assert found == expected
    else:
        assert found[0] == pytest.approx(expected[0], rel=FIRST_STEP_BOUND)
        for one, other in zip(found, expected, strict=True):
            assert sum(one.values()) == pytest.approx(sum(other.values()), rel=PATH_BOUND)


@pytest.mark.parametrize("store", ["full.zarr", "default.zarr"])
def test_the_store_is_the_cpus(scenes: Path, stores: Path, store: str) -> None:
    """Every byte is there, and every sample's record is what the teacher says on the CPU, within the codec's error and
    1e-3 of each field's root mean square: `verify` and `verify --against-teacher`."""
    assert teacher_dump("verify", stores / store) == 0
    source = ("--teacher", TEACHER, "--data", scenes, "--device", "cpu")
    assert teacher_dump("verify", stores / store, "--against-teacher", 20, *source) == 0


def test_training_by_command(scenes: Path, stores: Path, device: str, tmp_path: Path) -> None:
    """`python -m student_train` from the default store and the teacher's weights, then `evaluate`: finite losses of
    which the last are the smaller, and a file that the CPU reads too."""
    options = f"--student tiny --max-steps 8 --lr 1e-3 --epochs 8 --eval-every 0 --device {device} --name run".split()
    paths = ("--cache", stores / "default.zarr", "--data", scenes, "--init", TEACHER, "--out", tmp_path)
    student_train(*paths, *options)
    totals = [sum(step["losses"].values()) for step in steps_of(tmp_path / "run")]
    assert all(math.isfinite(total) for total in totals)
    assert sum(totals[-3:]) < sum(totals[:3])
    checkpoint = ("--checkpoint", tmp_path / "run" / "last.safetensors", "--data", scenes, "--sizes", SIDE)
    for name in {"cpu", device}:
        student_train("evaluate", *checkpoint, "--device", name, "--record", tmp_path / name)
        assert 0 <= json.loads((tmp_path / name / "metrics.jsonl").read_text())["evaluation"]["ap"] <= 1


def student_train(*arguments: object) -> None:
    """`python -m student_train ARGUMENTS...` in this process."""
    with mock.patch.object(sys, "argv", ["student_train", *map(str, arguments)]):
        main()


def test_cached_and_live(scenes: Path, stores: Path, device: str, tmp_path: Path) -> None:
    """20 steps (5 on the CPU) from the lossless store against as many with the teacher beside the student."""
    cached = configuration(scenes, stores / "full.zarr", tmp_path / "cached", device, STEPS[device])
    live = replace(
        cached,
        distillation=DistillationOptions(live_teacher=TEACHER),
        output=replace(cached.output, out=tmp_path / "live"),
    )
    assert_same_path(losses_of(cached), losses_of(live), device)


def test_the_device_follows_the_cpu(scenes: Path, stores: Path, device: str, tmp_path: Path) -> None:
    """20 steps on the device against as many on the CPU, from one store."""
    paths = []
    for name in (device, "cpu"):
        paths.append(
            losses_of(configuration(scenes, stores / "full.zarr", tmp_path / f"{len(paths)}", name, STEPS[device]))
        )
    assert_same_path(*paths, device)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(scenes: Path, stores: Path, device: str, tmp_path: Path, amp: Any) -> None:
    """Three steps under autocast: the first one's losses within 5% of float32's, all finite, the weights moved."""
    config = configuration(scenes, stores / "default.zarr", tmp_path / "off", device, steps=3)
    rounded = replace(config, speed=SpeedOptions(amp=amp), output=replace(config.output, out=tmp_path / amp))
    expected, found = losses_of(config), losses_of(rounded)
    assert found[0] != expected[0]
    assert found[0] == pytest.approx(expected[0], rel=0.05)
    assert all(math.isfinite(loss) for step in found for loss in step.values())


def test_compile(scenes: Path, stores: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps with --compile against six without. On a GPU inductor compiles; on the CPU, where that takes minutes,
    the graphs are captured and run as they are."""
    if device == "cpu":
        compile_module = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", partial_method(compile_module, backend="eager"))
    plain = configuration(scenes, stores / "default.zarr", tmp_path / "plain", device, steps=6)
    compiled = replace(plain, speed=SpeedOptions(compile=True), output=replace(plain.output, out=tmp_path / "compiled"))
    for found, expected in zip(losses_of(compiled), losses_of(plain), strict=True):
        assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=PATH_BOUND)


def partial_method(method: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda module, **others: method(module, **options, **others)


def test_resume(scenes: Path, stores: Path, device: str, tmp_path: Path) -> None:
    """Five steps and, from their checkpoint, five more, against ten; from a copy of the checkpoint, five more again:
    the sixth step's losses are the same, for nothing has been added in another order yet."""
    whole = configuration(scenes, stores / "default.zarr", tmp_path / "whole", device, steps=10)
    parts = replace(whole, output=replace(whole.output, out=tmp_path / "parts"))
    loop.train(replace(parts, optimisation=replace(parts.optimisation, max_steps=5)))
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    again = replace(parts, output=replace(parts.output, resume=True))
    found = losses_of(again)
    assert_same_path(found, losses_of(whole), device)
    copied = losses_of(replace(again, output=replace(again.output, out=tmp_path / "copy")))
    assert copied[5] == pytest.approx(found[5], rel=0 if device == "cpu" else FIRST_STEP_BOUND)


def test_sigterm(scenes: Path, stores: Path, device: str, tmp_path: Path) -> None:
    """A training told to stop ends with status 143 and a line with the command that goes on; that command ends it."""
    run = tmp_path / "run"
    options = f"--student tiny --epochs 500 --batch-size 4 --name run --eval-every 0 --device {device}".split()
    paths = ["--cache", str(stores / "default.zarr"), "--data", str(scenes), "--out", str(tmp_path)]
    process = start_process(run_command_line, [*paths, *options], tmp_path / "first.txt")
    wait_for_steps(run, 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert f"--config {run / 'run.json'} --resume" in (tmp_path / "first.txt").read_text().splitlines()[-1]
    steps = len(steps_of(run)) + 2
    again = ["--config", str(run / "run.json"), "--resume", "--max-steps", str(steps)]
    process = start_process(run_command_line, again, tmp_path / "second.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "second.txt").read_text()
    assert [step["step"] for step in steps_of(run)] == list(range(1, steps + 1))


def train_in_a_group(config: TrainConfig) -> None:
    """Train as one of several processes, or as one that is a group by itself: its sums go through the backend too."""
    backend = "gloo" if config.output.device == "cpu" else "nccl"
    dist.init_process_group(backend)
    loop.train(config)
    assert dist.get_backend() == backend


@pytest.mark.parametrize("ranks", [1, 2])
def test_process_groups(scenes: Path, stores: Path, device: str, tmp_path: Path, ranks: int) -> None:
    """Four steps in a process group (nccl on a GPU, gloo on the CPU) against four without: the images of a step are the
    same, only shared out, so that the losses of a single rank are those of none, and two ranks' are finite."""
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip("needs two CUDA devices")
    alone = configuration(scenes, stores / "default.zarr", tmp_path / "alone", device, steps=4)
    grouped = replace(alone, output=replace(alone.output, out=tmp_path / "grouped"))
    run_ranks(train_in_a_group, grouped, ranks=ranks)
    steps = [step["losses"] for step in steps_of(tmp_path / "grouped" / "run")]
    if ranks == 1:
        assert_same_path(steps, losses_of(alone), device)
    assert len(steps) == 4
    assert all(math.isfinite(loss) for step in steps for loss in step.values())
