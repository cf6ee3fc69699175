"""Both phases on a CUDA device that is only pretended: no operation mixes devices, and the host waits for the device
where it has to and nowhere else."""

from __future__ import annotations

import inspect
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from common.cache.reader import CacheReader
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.runtime import Ranks
from common.synthetic import draw_data_set
from kernels import deformable_triton, feature_loss, feature_loss_triton, hungarian_start
from student_train import loop
from student_train.checkpoint import Checkpoint, load_newest
from student_train.compare import read_run
from student_train.config import DistillationOptions, SpeedOptions, TrainConfig
from student_train.evaluate import detect_split
from student_train.loop import start, train
from student_train.prepare import prepare_data, prepare_feed
from student_train.step import Training, agree, train_step
from tests import deformable_cases, feature_loss_cases
from tests.dump_cases import command
from tests.pretended_cuda import CUDA, Device, OnCuda, pretended_cuda
from tests.training_cases import IMAGES, PLAIN, SIDE, configuration, steps_of

MATCHING = "kernels/matching.py:solve event"
LOSSES = "student_train/step.py:train_step copy to the host"
SCALE = "student_train/step.py:train_step aten._local_scalar_dense"
CONTRAST = {"contrastive_weight": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/. store.zarr: two views by a teacher of the student's feature levels, with all that losses learn from.
    two.zarr: one view by two teachers. teacher.safetensors."""
    folder = tmp_path_factory.mktemp("pretended")
    draw_data_set(folder / "scenes", train_images=IMAGES, val_images=2)
    torch.manual_seed(0)
    teacher = folder / "teacher.safetensors"
    save_detector(teacher, DeformableDetr(PRESETS["tiny_teacher"](7, queries=20)))
    data = ("--data", folder / "scenes", "--sizes", SIDE, "--workers", 1, "--device", "cpu")
    stored = ("--preset", "compact", "--keep-tokens", 1, "--neck", "--queries", "True")
    assert command(*data, *stored, "--views", 2, "--teacher", teacher, "--out", folder / "store.zarr") == 0
    two = (f"a={teacher}", "b=random:tiny")
    assert command(*data, *stored, "--teacher", *two, "--out", folder / "two.zarr") == 0
    return folder


def config_of(folder: Path, out: Path, **changes: object) -> TrainConfig:
    """The tiny student on the pretended device; changes: of the parts of the configuration, or the store's name."""
    config = configuration(folder, out)
    store = changes.pop("store", "store.zarr")
    data = replace(config.data, cache=str(folder / str(store)))
    output = replace(config.output, device="cuda")
    model = replace(config.model, encoder_layers=1, decoder_layers=2)
    return replace(config, data=data, model=model, output=output, **changes)


def steps(config: TrainConfig, device: torch.device, pretended: Device | None, count: int = 2) -> list[list[float]]:
    """The losses and the gradient's norm of the first steps of a training; what it waits for is on record of the last
    alone."""
    torch.manual_seed(0)
    data, ranks = prepare_data(config.data), Ranks()
    training, feed = start(config, data, device, ranks), prepare_feed(config, data, ranks, device)
    training.model.train()
    found = []
    try:
        for step, _ in zip(feed.epoch(0), range(count), strict=False):
            if pretended is not None:
                pretended.waits.clear()
            torch.manual_seed(1)
            counts, _ = agree(training, step, stop=False)
            losses, norm = train_step(training, step, counts, clip=0.1, amp=config.speed.amp)
            training.step += 1
            found.append([*losses.values(), norm])
    finally:
        feed.close()
    return found


MODES: dict[str, tuple[dict[str, object], int]] = {  # what is changed, and how many matchings a step then has
    "plain": ({"distillation": PLAIN}, 1),
    "two-stage": ({"distillation": PLAIN, "two_stage": True}, 2),
    "paper": ({}, 3),
    "released": ({"distillation": DistillationOptions("released", **CONTRAST)}, 3),  # type: ignore[arg-type]
    "fgd": ({"distillation": DistillationOptions(fgd_weight=1.0)}, 3),
    "balance": ({"distillation": DistillationOptions(balance=True)}, 3),
    "average of two teachers": ({"store": "two.zarr"}, 5),
    "random of two teachers": ({"store": "two.zarr", "teachers": "random"}, 5),
    "two parts": ({"speed": SpeedOptions(accumulate=2)}, 6),
    "encoder computed twice": ({"speed": SpeedOptions(checkpoint_encoder=True)}, 3),
    "bf16": ({"speed": SpeedOptions(amp="bf16")}, 3),
    "fp16": ({"speed": SpeedOptions(amp="fp16")}, 3),
    "moving average": ({"ema": 0.9}, 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_waits_of_a_step(folder: Path, tmp_path: Path, mode: str) -> None:
    """The second step of each mode waits for its matchings and once for the losses (with fp16 for its scale too), and
    for nothing else. Losses and gradients of both steps against the same steps on the CPU, where kernels, but not the
    optimiser, are the same: 1e-4; half precision rounds each sum: 2%."""
    changes, matchings = dict(MODES[mode][0]), MODES[mode][1]
    ema, teachers, two_stage = (changes.pop(name, None) for name in ("ema", "teachers", "two_stage"))
    config = config_of(folder, tmp_path, **changes)
    config = replace(
        config,
        optimisation=replace(config.optimisation, ema=ema),
        data=replace(config.data, teachers=teachers),
        model=replace(config.model, two_stage=bool(two_stage)),
    )
    with pretended_cuda() as pretended:
        found = steps(config, CUDA, pretended)
    expected = Counter({MATCHING: matchings, LOSSES: 1} | ({SCALE: 1} if mode == "fp16" else {}))
    assert pretended.waits == expected
    on_cpu = steps(config, torch.device("cpu"), None)
    near = 0.02 if "16" in mode else 1e-4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(on_cpu), rtol=near, atol=1e-5, equal_nan=True)


def test_a_run_and_its_resuming(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the pretended device, its checkpoints, evaluation, and going on after the first of two
    epochs, against the undisturbed run: the same losses. Going on from there on the CPU: 1e-3, since steps add up.

    Evaluation goes without inference mode, in which operations come to the pretended device whole."""
    monkeypatch.setattr(loop, "detect_split", torch.no_grad()(inspect.unwrap(detect_split)))
    whole = config_of(folder, tmp_path / "whole")
    whole = replace(whole, optimisation=replace(whole.optimisation, batch_size=5))
    first = config_of(folder, tmp_path / "stopped", optimisation=replace(whole.optimisation, epochs=1))
    second = replace(first, optimisation=whole.optimisation, output=replace(first.output, resume=True))
    with pretended_cuda():
        metrics = train(whole)
        train(first)
        shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
        assert train(second).ap == metrics.ap
    train(replace(second, output=replace(second.output, out=tmp_path / "moved", device="cpu")))
    expected, resumed, moved = (
        torch.tensor([list(step["losses"].values()) for step in steps_of(tmp_path / name / "run")])
        for name in ("whole", "stopped", "moved")
    )
    assert torch.equal(expected, resumed)
    assert read_run(tmp_path / "whole" / "run").peak_memory_bytes is not None
    torch.testing.assert_close(expected, moved, rtol=1e-3, atol=1e-5)


def test_layouts_follow_the_device(folder: Path, tmp_path: Path) -> None:
    """The backbone's weights are channels last on the GPU, with the optimiser's moments, and not on the CPU, wherever
    the checkpoint was written. CUDA's fused AdamW takes equal layouts only."""
    config = config_of(folder, tmp_path)
    config = replace(config, output=replace(config.output, device="cpu"))
    train(config)
    written = load_newest(tmp_path / "run" / "checkpoints")
    assert written is not None
    data, ranks = prepare_data(config.data), Ranks()
    with pretended_cuda():
        training = start(config, data, CUDA, ranks)
        loop.resume(training, written)
        assert layouts(training) == {True}
        assert training.optimizer.defaults["fused"]
        moved = Checkpoint(**vars(written) | {"optimizer": on_host(training.optimizer.state_dict())})
    training = start(config, data, torch.device("cpu"), ranks)
    loop.resume(training, moved)
    assert layouts(training) == {False}


def layouts(training: Training) -> set[bool]:
    """Whether the 3 x 3 weights of the backbone, and the optimiser's moments of each, are channels last."""
    weights = [p for p in training.student.detector.backbone.parameters() if p.dim() == 4 and p.shape[-1] == 3]
    states = [training.optimizer.state[weight] for weight in weights]
    tensors = [*weights, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]
    return {tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors}


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state as a checkpoint's file gives it back: layouts are kept."""
    return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, state)  # type: ignore[no-any-return]


def test_a_live_teacher(folder: Path, tmp_path: Path) -> None:
    """A live teacher waits for its own matching of each sample and once for the sizes of all."""
    distillation = DistillationOptions(live_teacher=folder / "teacher.safetensors")
    with pretended_cuda() as pretended:
        steps(config_of(folder, tmp_path, distillation=distillation), CUDA, pretended)
    looked = {"student_train/live.py:look copy to the host": 1}
    assert pretended.waits == Counter({MATCHING: 3 + 4, LOSSES: 1} | looked)


@pytest.mark.parametrize("preset", ["compact", "full"])
def test_a_dump(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """A dump on the pretended device, of a codec that has to be calibrated and of one with the neck, against the same
    on the CPU, its backbone laid out as on a GPU, which changes the last bits: all fields of all records are equal. It
    waits for matchings, for what is stored, and to learn whether it is finite."""

    def placed(model: DeformableDetr, device: torch.device) -> DeformableDetr:
        model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(device)

    monkeypatch.setattr(DeformableDetr, "placed", placed)
    data = ("--data", folder / "scenes", "--sizes", SIDE, "--workers", 1, "--preset", preset)
    teacher = ("--teacher", folder / "teacher.safetensors")
    assert command(*data, *teacher, "--device", "cpu", "--out", tmp_path / "cpu.zarr") == 0
    with pretended_cuda() as pretended:
        pretended.waits.clear()
        assert command(*data, *teacher, "--device", "cuda", "--out", tmp_path / "cuda.zarr") == 0
    loading = {
        "teacher_dump/teachers.py:_load copy to the device",
        "common/teacher.py:detector_teacher copy to the host",
    }
    storing = {"common/finite.py:check_finite copy to the host", "teacher_dump/encode.py:_arrays copy to the host"}
    assert set(pretended.waits) - loading == {MATCHING, *storing}
    found, expected = (CacheReader(tmp_path / name) for name in ("cuda.zarr", "cpu.zarr"))
    rows = expected.rows()
    for name, value in vars(expected.read(rows)).items():
        if value is not None:
            assert torch.equal(getattr(found.read(rows), name), value), name


class Launched:
    """In the place of a Triton kernel: takes the launch, and looks at what it is given."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            self.launches += 1
            assert all(isinstance(x, OnCuda) for x in arguments if isinstance(x, torch.Tensor))

        return launch


def test_host_code_of_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds the launches of both operators, forward and backward, reads nothing from the device, and hands
    over tensors of the device alone. (The kernels themselves: test_kernels_triton.py.)"""
    kernels = [Launched() for _ in range(4)]
    for (module, name), kernel in zip(
        [(module, name) for module in (deformable_triton, feature_loss_triton) for name in ("_forward", "_backward")],
        kernels,
        strict=True,
    ):
        monkeypatch.setattr(module, name, kernel)
        monkeypatch.setattr(module, "on_device_of", lambda tensor: torch.no_grad())
    shape = deformable_cases.SHAPES["odd width"]
    sizes = [side for level in shape.levels for side in level]
    case = feature_loss_cases.inputs("int8")
    with pretended_cuda() as pretended:
        inputs = [x.detach().float().to(CUDA) for x in deformable_cases.inputs(shape, torch.float64)]
        there = [None if x is None else x.detach().to(CUDA) for x in case.arguments()]
        deformable_triton.forward(inputs[0], sizes, *inputs[1:])  # the table of levels is made once
        pretended.waits.clear()
        grad = deformable_triton.forward(inputs[0], sizes, *inputs[1:])
        deformable_triton.backward(grad, inputs[0], sizes, *inputs[1:])
        student, tokens, positions, weights, offsets, *decoding = there
        rows = feature_loss._rows(positions, offsets, student.shape[1])
        loss = feature_loss_triton.forward(student, tokens, rows, weights, *decoding)
        feature_loss_triton.backward(loss, student, tokens, rows, weights, *decoding)
    assert not pretended.waits
    assert [kernel.launches for kernel in kernels] == [2, 1, 1, 1]


# The pretended device itself -----------------------------------------------------------------------------------------


def test_it_notices() -> None:
    """What a GPU refuses is refused, and each way of waiting for it is on record."""
    with pretended_cuda() as pretended:
        there, here = torch.arange(4.0, device=CUDA), torch.arange(4.0)
        for mixing in (lambda: there + here, lambda: there[here.long()], lambda: torch.cat((there, here))):
            with pytest.raises(RuntimeError, match="on cuda and on the CPU"):
                mixing()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not pretended.waits
        waiting: list[Callable[[], object]] = [
            lambda: there.sum().item(),
            lambda: bool((there > 1).any()),
            lambda: there.tolist(),
            lambda: there.nonzero(),
            lambda: there[there > 1],
            lambda: there.cpu(),
            lambda: here.to(CUDA),
            lambda: here.to(CUDA, non_blocking=True),
            lambda: torch.tensor([1.0], device=CUDA),
            lambda: torch.repeat_interleave(there.long()),
        ]
        for number, wait in enumerate(waiting, start=1):
            wait()
            assert pretended.waits.total() == number
        here.pin_memory().to(CUDA, non_blocking=True)
        assert (there + 1 + torch.tensor(2.0)).sum().device == CUDA
        assert pretended.waits.total() == len(waiting)


def test_asynchronous_copies_arrive_when_waited_for() -> None:
    """Costs copied to the host are nonsense until the event of their copy is waited for, and the matching waits."""
    with pretended_cuda() as pretended:
        there, host = torch.arange(4.0, device=CUDA), torch.empty(4, pin_memory=True)
        host.copy_(there, non_blocking=True)
        assert not torch.equal(host, torch.arange(4.0))
        torch.cuda.Event().synchronize()  # type: ignore[no-untyped-call]
        assert torch.equal(host, torch.arange(4.0))
        pretended.waits.clear()
        costs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert hungarian_start(costs.to(CUDA)).result().tolist() == [1, 0]
        assert pretended.waits[MATCHING] == 1
