"""A step of the optimiser: parts and ranks add up to one batch, mixed precision, compilation, the moving average."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.detr.detector import DeformableDetr
from common.devices import start_processes
from common.runtime import Ranks, read_ranks
from student_train import loop
from student_train.config import DistillationOptions, OptimisationOptions, SpeedOptions, TrainConfig
from student_train.ema import MovingAverage
from student_train.prepare import prepare_data, prepare_feed
from student_train.step import Diverged, Training, agree, learning_rate_factor, train_step
from tests.training_cases import configuration, make_store, run_ranks, steps_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("steps"))


def one_step(config: TrainConfig, out: Path, epoch: int = 0, number: int = 0) -> None:
    """Save the gradients of one step, and the losses of this rank."""
    ranks = read_ranks()
    start_processes(ranks, CPU)
    torch.manual_seed(0)
    data = prepare_data(config.data)
    training = loop.start(config, data, CPU, ranks)
    training.model.eval()  # batch norm by its running statistics: those of a batch differ with its size
    feed = prepare_feed(config, data, ranks, CPU)
    step = next(iter(feed.epoch(epoch, number)))
    counts, _ = agree(training, step, stop=False)
    losses, _ = train_step(training, step, counts, clip=0, amp=config.speed.amp)
    feed.close()
    gradients = {name: p.grad for name, p in training.student.named_parameters() if p.grad is not None}
    torch.save({"gradients": gradients, "losses": losses}, out.with_name(f"{out.name}.{ranks.rank}"))


def results_of(out: Path, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    content = torch.load(out.with_name(f"{out.name}.{rank}"), weights_only=True)
    return content["gradients"], content["losses"]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to the norm of all of `one`."""
    assert one.keys() == other.keys()
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    return max(float((one[name] - other[name]).norm() / norm) for name in one)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_two_processes_have_the_gradient_of_one(folder: Path, tmp_path: Path, mode: str) -> None:
    """The gradient of a step of three samples, with all losses that are sums over samples, by one process, and by two
    with two and one samples, whose numbers of boxes differ: every parameter's differs by less than 1e-4 of the whole
    gradient's norm; and the mean of the ranks' losses is the loss of one process, to 1e-4."""
    config = configuration(folder, tmp_path)
    config = replace(
        config,
        distillation=DistillationOptions(mode, contrastive_weight=0),  # type: ignore[arg-type]
        optimisation=replace(config.optimisation, batch_size=3),
    )
    one_step(config, tmp_path / "one")
    run_ranks(one_step, config, tmp_path / "two")
    one, losses = results_of(tmp_path / "one")
    two, _ = results_of(tmp_path / "two")
    assert distance(one, two) < 1e-4
    shares = [results_of(tmp_path / "two", rank)[1] for rank in range(2)]
    for name, value in losses.items():
        assert math.isclose((shares[0][name] + shares[1][name]) / 2, value, rel_tol=1e-4), name


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_micro_batches_have_the_gradient_of_the_step(folder: Path, tmp_path: Path, mode: str) -> None:
    """A step of four samples, with all losses that are sums over samples, against three parts of two, one and one
    samples, and a last step of two samples against two parts: every parameter's gradient to 1e-4 of the whole
    gradient's norm, losses to 1e-4."""
    options = DistillationOptions(mode, contrastive_weight=0)  # type: ignore[arg-type]
    whole = replace(configuration(folder, tmp_path), distillation=options)
    parted = replace(whole, speed=SpeedOptions(accumulate=3))
    for number in (0, 2):
        one_step(whole, tmp_path / "whole", number=number)
        one_step(parted, tmp_path / "parted", number=number)
        (one, losses), (other, sums) = results_of(tmp_path / "whole"), results_of(tmp_path / "parted")
        assert distance(one, other) < 1e-4
        assert losses == pytest.approx(sums, rel=1e-4)


def test_ranks_and_micro_batches_together(folder: Path, tmp_path: Path) -> None:
    """A step of seven samples by one process, and by two of four and three samples in two parts each: the same gradient
    to 1e-4."""
    config = configuration(folder, tmp_path)
    config = replace(config, optimisation=replace(config.optimisation, batch_size=7))
    one_step(config, tmp_path / "one")
    run_ranks(one_step, replace(config, speed=SpeedOptions(accumulate=2)), tmp_path / "two")
    assert distance(results_of(tmp_path / "one")[0], results_of(tmp_path / "two")[0]) < 1e-4


def test_bf16_follows_float32(folder: Path, tmp_path: Path) -> None:
    """The losses of a step under bf16 autocast against float32's: they differ, as rounding to 8 bits must, by less than
    5%; weights and gradients stay float32."""
    config = configuration(folder, tmp_path)
    one_step(config, tmp_path / "float32")
    one_step(replace(config, speed=SpeedOptions(amp="bf16")), tmp_path / "bf16")
    (_, losses), (gradients, rounded) = results_of(tmp_path / "float32"), results_of(tmp_path / "bf16")
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=0.05)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_compiled_parts_compute_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a step with --compile against the one without, to 1e-4. The graphs are captured as for a GPU and
    run by PyTorch's own operators: generating C++ for a CPU takes minutes. On a CPU the backbone would be left out."""
    compile_module, compiled = torch.nn.Module.compile, []

    def capture(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    compile_parts, on_cpu = loop.compile_parts, []

    def compile_all(detector: DeformableDetr, backbone: bool) -> None:
        on_cpu.append(backbone)
        compile_parts(detector, backbone=True)

    monkeypatch.setattr(loop, "compile_parts", compile_all)
    config = configuration(folder, tmp_path)
    one_step(config, tmp_path / "eager")
    assert not compiled
    one_step(replace(config, speed=SpeedOptions(compile=True)), tmp_path / "compiled")
    assert on_cpu == [False]
    assert compiled == ["Backbone"] + ["FeedForward"] * 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert distance(results_of(tmp_path / "eager")[0], results_of(tmp_path / "compiled")[0]) < 1e-4


def test_fp16_leaves_out_steps_that_overflow(folder: Path, tmp_path: Path) -> None:
    """At a loss scale of 2^127 the gradients overflow: the weights stay as they are and the scale is halved. At 2^8 the
    weights move."""
    config = configuration(folder, tmp_path)
    config = replace(config, speed=SpeedOptions(amp="fp16"))
    data = prepare_data(config.data)
    training = loop.start(config, data, CPU, Ranks())
    feed = prepare_feed(config, data, Ranks(), CPU)
    step = next(iter(feed.epoch(0)))
    feed.close()
    counts, _ = agree(training, step, stop=False)
    before = [parameter.clone() for parameter in training.student.parameters()]
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**127})
    train_step(training, step, counts, clip=0.1, amp="fp16")
    assert all(torch.equal(p, old) for p, old in zip(training.student.parameters(), before, strict=True))
    assert training.scaler.state_dict()["scale"] == 2.0**126
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**8})
    train_step(training, step, counts, clip=0.1, amp="fp16")
    assert not all(torch.equal(p, old) for p, old in zip(training.student.parameters(), before, strict=True))


def test_the_moving_average(folder: Path, tmp_path: Path) -> None:
    """Three updates of the average against the recursion written out in float64, to 1e-6; a run with --ema saves the
    average as its student, a run without it the weights."""
    config = configuration(folder, tmp_path)
    training = loop.start(config, prepare_data(config.data), CPU, Ranks())
    detector = training.student.detector
    average = MovingAverage(detector, decay=0.15)
    expected = {name: value.double() for name, value in detector.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 3):
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        average.update(detector, steps)
        decay = min(0.15, (1 + steps) / (10 + steps))
        expected = {n: decay * expected[n] + (1 - decay) * value.double() for n, value in detector.state_dict().items()}
    for name, value in average.student.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)

    averaged = replace(config, optimisation=replace(config.optimisation, max_steps=2, ema=0.5))
    loop.train(averaged)
    saved = load_file(tmp_path / "run" / "last.safetensors")
    (file,) = (tmp_path / "run" / "checkpoints").iterdir()
    checkpoint = torch.load(file, weights_only=True)
    assert all(torch.equal(saved[name], checkpoint["average"][name]) for name in saved)
    assert not all(torch.equal(saved[name], checkpoint["student"][f"detector.{name}"]) for name in saved)


def test_divergence_names_loss_step_and_images(folder: Path, tmp_path: Path) -> None:
    """A NaN weight: the error names the losses, the step and the images, and no optimiser step is made."""
    config = configuration(folder, tmp_path)
    data = prepare_data(config.data)
    training = loop.start(config, data, CPU, Ranks())
    with torch.no_grad():
        training.student.detector.decoder.class_heads[0].weight[0, 0] = float("nan")
    before = [parameter.clone() for parameter in training.student.parameters()]
    feed = prepare_feed(config, data, Ranks(), CPU)
    step = next(iter(feed.epoch(0)))
    feed.close()
    counts, _ = agree(training, step, stop=False)
    with pytest.raises(Diverged, match=r"detection/class is nan.* at step 0 \(images \d+, \d+, \d+, \d+\)"):
        train_step(training, step, counts, clip=0.1)
    for parameter, old in zip(training.student.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), old.nan_to_num())


def test_a_diverged_run_keeps_the_state_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that diverges in its fourth step leaves a checkpoint of three steps whose weights are finite, and the
    error names the student's file that holds them."""
    step = loop.train_step

    def diverge(training: Training, *rest: object, **options: object) -> object:
        if training.step == 3:
            raise Diverged("training diverged")
        return step(training, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", diverge)
    with pytest.raises(Diverged, match=r"--init .*last\.safetensors"):
        loop.train(configuration(folder, tmp_path))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    checkpoint = torch.load(newest, weights_only=True)
    assert checkpoint["step"] == 3
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "run" / "last.safetensors").values())
    assert len(steps_of(tmp_path / "run")) == 3


def test_schedules() -> None:
    """The step schedule drops to a tenth at --lr-drop, the cosine ends near 0, and both rise over the warm-up. The
    learning rate is scaled with the images of a step where that was asked for, and not otherwise."""
    options = OptimisationOptions(lr_drop=2, warmup_steps=3)
    factors = [learning_rate_factor(step, 10, 30, options) for step in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:20]) == {1.0}
    assert set(factors[20:]) == {0.1}
    cosine = [learning_rate_factor(step, 10, 30, replace(options, schedule="cosine")) for step in range(30)]
    assert cosine[15] == pytest.approx(0.5)
    assert 0 < cosine[29] < 0.01
    assert OptimisationOptions(lr=1e-3, batch_size=8).scaled_lr == 1e-3
    assert OptimisationOptions(lr=1e-3, batch_size=8, scale_lr=True).scaled_lr == 2.5e-4
