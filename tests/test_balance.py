"""Loss weights that find themselves: the balanced gradients against brute force; ranks, parts, resumption, records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.devices import start_processes
from common.runtime import Ranks, read_ranks
from student_train import loop
from student_train.balance import AT_FIRST, EVERY, Balance
from student_train.checkpoint import checkpoints, load_checkpoint
from student_train.config import DistillationOptions, LossWeights, SpeedOptions, TrainConfig
from student_train.feed import TrainingStep
from student_train.model import StudentOutput
from student_train.objective import Losses
from student_train.prepare import prepare_data, prepare_feed
from student_train.step import Training, agree, train_step
from student_train.step_counts import StepCounts
from student_train.tracking import scalars
from tests.training_cases import PLAIN as NO_LOSSES
from tests.training_cases import configuration, losses_of, make_store, run_ranks, steps_of

CPU = torch.device("cpu")
WEIGHTS = {"logits": 2.0, "features": 3.0, "assignment": 0.5, "fgd": 0.25}
BALANCED = DistillationOptions(logits_weight=2, feature_weight=3, assignment_weight=0.5, fgd_weight=0.25, balance=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("balance"))


def balanced(folder: Path, out: Path, options: DistillationOptions = BALANCED) -> TrainConfig:
    return replace(configuration(folder, out), distillation=options)


def begin(config: TrainConfig, ranks: Ranks | None = None) -> tuple[Training, TrainingStep, list[StepCounts]]:
    """A training before its first step, and that step. Batch norm by its running statistics: those of a batch differ
    with its size."""
    ranks = ranks or Ranks()
    torch.manual_seed(0)
    data = prepare_data(config.data)
    training = loop.start(config, data, CPU, ranks)
    training.model.eval()
    feed = prepare_feed(config, data, ranks, CPU)
    step = next(iter(feed.epoch(0)))
    feed.close()
    return training, step, agree(training, step, stop=False)[0]


def forward(training: Training, step: TrainingStep, counts: list[StepCounts]) -> tuple[StudentOutput, Losses]:
    """The only part of a step through the student, and its weighted losses without scales."""
    part = step.parts[0].to(CPU)
    output = training.student(part.batch.images, part.batch.padding_mask, part.taught)
    return output, losses_of(output, part.batch.targets, part.lessons, training.student.options, counts)


def length(losses: Losses, prefix: str, at: Tensor | list[Tensor], scale: float = 1.0) -> float:
    """Of the gradient of the losses with this prefix, by autograd."""
    total = scale * torch.stack([loss for name, loss in losses.items() if name.startswith(prefix + "/")]).sum()
    gradients = torch.autograd.grad(total, at, retain_graph=True)
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def plain_features(losses: Losses) -> Losses:
    """With a prefix for every name."""
    return {name if "/" in name else f"{name}/": loss for name, loss in losses.items()}


def test_gradients_are_as_long_as_their_weights_say(folder: Path, tmp_path: Path) -> None:
    """After one step with four losses of weights 2, 3, .5 and .25, at the weights before it (learning rate 0): the
    length of the gradient of each loss, weighted and scaled, over that of the detection losses, both by autograd of
    another forward pass, is its weight, to 1e-5."""
    config = balanced(folder, tmp_path)
    training, step, counts = begin(replace(config, optimisation=replace(config.optimisation, lr=0.0)))
    assert training.balance is not None
    assert training.balance.scales == dict.fromkeys(WEIGHTS, 0.0)
    train_step(training, step, counts, clip=0)
    output, losses = forward(training, step, counts)
    losses = plain_features(losses)
    detection = length(losses, "detection", output.output.neck)
    assert training.balance.scales.keys() == WEIGHTS.keys()
    for name, scale in training.balance.scales.items():
        assert length(losses, name, output.output.neck, scale) / detection == pytest.approx(WEIGHTS[name], rel=1e-5)
    unscaled = length(losses, "features", output.output.neck) / detection
    assert not 0.5 < unscaled / WEIGHTS["features"] < 2  # there was something to balance


def test_the_step_goes_down_the_scaled_losses(folder: Path, tmp_path: Path) -> None:
    """The gradient of a step that measures, at scales of an earlier measurement, against autograd of the sum of losses
    times scales in another forward pass, every parameter to 1e-5 of the largest; the losses it returns are without
    scales, equal to those of the pass."""
    training, step, counts = begin(balanced(folder, tmp_path))
    assert training.balance is not None
    given = {"logits": 0.5, "features": 40.0, "assignment": 2.0, "fgd": 3.0}
    training.balance.logarithms = {name: math.log(scale) for name, scale in given.items()}
    _, losses = forward(training, step, counts)
    minimised = [loss * given.get(name.partition("/")[0], 1.0) for name, loss in losses.items()]
    parameters = dict(training.student.named_parameters())
    wanted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    expected = torch.autograd.grad(torch.stack(minimised).sum(), list(wanted.values()), allow_unused=True)
    assert training.balance.is_due(training.step)
    found, _ = train_step(training, step, counts, clip=0)
    largest = max(float(gradient.norm()) for gradient in expected if gradient is not None)
    for (name, parameter), gradient in zip(wanted.items(), expected, strict=True):
        if gradient is not None:
            assert parameter.grad is not None
            assert float((parameter.grad - gradient).norm()) < 1e-5 * largest, name
    assert found == pytest.approx({name: float(loss.detach()) for name, loss in losses.items()}, rel=1e-5)


def measure(config: TrainConfig, out: Path) -> None:
    """Save the scales that a first step finds on this rank."""
    ranks = read_ranks()
    start_processes(ranks, CPU)
    training, step, counts = begin(config, ranks)
    assert training.balance is not None
    train_step(training, step, counts, clip=0)
    torch.save(training.balance.scales, out.with_name(f"{out.name}.{ranks.rank}"))


def test_ranks_and_parts_find_the_scales_of_one_batch(folder: Path, tmp_path: Path) -> None:
    """A step of four samples at once, in two parts, and by two ranks of two parts each: the same scales to 1e-4, and
    the very same ones on both ranks."""
    config = balanced(folder, tmp_path)
    parted = replace(config, speed=SpeedOptions(accumulate=2))
    measure(config, tmp_path / "whole")
    measure(parted, tmp_path / "parts")
    run_ranks(measure, parted, tmp_path / "ranks")
    whole, parts, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.0", "parts.0", "ranks.0", "ranks.1")
    )
    assert whole.keys() == WEIGHTS.keys()
    assert parts == pytest.approx(whole, rel=1e-4)
    assert first == pytest.approx(whole, rel=1e-4)
    assert first == second


def test_a_balanced_run_resumes(folder: Path, tmp_path: Path) -> None:
    """Five steps, then --resume up to eight, against eight at once: scales of every step and the whole state of the
    balance, equal; weights bit for bit. The scales are on record for every step, 0 in the first, and as TensorBoard
    gets them; a run without --balance has none and its checkpoint's is None."""
    config = balanced(folder, tmp_path / "whole")
    config = replace(config, optimisation=replace(config.optimisation, epochs=3, max_steps=8))
    loop.train(config)
    again = replace(config, output=replace(config.output, out=tmp_path / "again"))
    loop.train(replace(again, optimisation=replace(again.optimisation, max_steps=5)))
    loop.train(replace(again, output=replace(again.output, resume=True)))
    runs = [tmp_path / name / "run" for name in ("whole", "again")]
    one, other = (load_checkpoint(checkpoints(run / "checkpoints")[0]) for run in runs)
    assert one.balance is not None
    assert one.balance == other.balance
    assert one.balance["measured"] == dict.fromkeys(WEIGHTS, 8)
    assert all(torch.equal(value, other.student[name]) for name, value in one.student.items())
    lines, resumed = (steps_of(run) for run in runs)
    assert [line["scales"] for line in lines] == [line["scales"] for line in resumed]
    assert lines[0]["scales"] == dict.fromkeys(WEIGHTS, 0.0)
    assert all(min(line["scales"].values()) > 0 for line in lines[1:])
    assert dict(scalars(lines[-1]))["scale/features"] == lines[-1]["scales"]["features"]
    plain = configuration(folder, tmp_path / "plain")
    loop.train(replace(plain, optimisation=replace(plain.optimisation, max_steps=1)))
    run = tmp_path / "plain" / "run"
    assert load_checkpoint(checkpoints(run / "checkpoints")[0]).balance is None
    assert "scales" not in steps_of(run)[0]


def test_the_moving_average() -> None:
    """Seven measurements, one of them without gradient and one not finite, against the geometric mean of the first five
    and a fifth of each further one, written out, to 1e-12; what cannot be measured leaves scale and count."""
    balance = Balance(LossWeights(logits=1, features=0, assignment=0, contrastive=0, fgd=0))
    ratios = [4.0, 9.0, 1.0, 0.25, 16.0, 2.0, 3.0]
    for ratio in ratios:
        balance.update(torch.tensor([[[1.0, ratio**2]]], dtype=torch.float64))
        for broken in ([0.0, 1.0], [1.0, 0.0], [math.inf, 1.0], [1.0, math.nan]):
            before = balance.state_dict()
            balance.update(torch.tensor([[broken]], dtype=torch.float64))
            assert balance.state_dict() == before
    expected = math.prod(ratios[:5]) ** (1 / 5)
    for ratio in ratios[5:]:
        expected = expected**0.8 * ratio**0.2
    assert balance.scales == {"logits": pytest.approx(expected, rel=1e-12)}


def test_when_to_measure() -> None:
    """In the first steps until every loss had ten measurements, and every fiftieth step; not for ever where a loss
    never has a gradient."""
    balance = Balance(LossWeights(logits=1, features=1, assignment=0, contrastive=0, fgd=0))
    due = []
    for step in range(120):
        if balance.is_due(step):
            due.append(step)
            balance.update(torch.ones(1, 2, 2, dtype=torch.float64))
    assert due == [*range(AT_FIRST), EVERY, 2 * EVERY]
    assert [Balance(balance.weights).is_due(step) for step in (EVERY - 1, EVERY + 1)] == [True, False]


def test_each_teacher_has_scales_of_its_own() -> None:
    """Two teachers of one sample each, losses a * |x|^2 / 2 on it whose gradients a * x are known: scales are the
    detection's gradient on that same sample over the loss's, at weight 1, to 1e-6; the scaled losses have the weight
    times the detection's length; a teacher that taught nothing is left as it was."""
    from student_train.teachers import Lesson

    weights = LossWeights(logits=0, features=3, assignment=0, contrastive=0, fgd=0)
    balance = Balance(weights, ("small", "large"))
    neck = torch.tensor([[[3.0, 4.0]], [[6.0, 8.0]]], requires_grad=True)  # lengths 5 and 10
    detection = (torch.tensor([2.0, 7.0]) * neck.square().sum(dim=(1, 2)) / 2).sum()
    lessons = []
    for teacher, factor in ((0, 0.5), (1, 100.0)):
        lesson = Lesson(None, teacher, torch.tensor([teacher]), weight=0.5)  # type: ignore[arg-type]
        loss = 3 * 0.5 * factor * neck[teacher].square().sum() / 2
        lessons.append((lesson, {"features": loss}))
    balance.update(balance.measure({"detection/l1": detection}, lessons[:1], neck))
    assert balance.scales == {"features/small": pytest.approx(2 / 0.5), "features/large": 0}
    balance.update(balance.measure({"detection/l1": detection}, lessons, neck))
    assert balance.scales == pytest.approx({"features/small": 2 / 0.5, "features/large": 7 / 100}, rel=1e-6)
    for (lesson, losses), of_detection in zip(balance.scaled(lessons), (2 * 5.0, 7 * 10.0), strict=True):
        (gradient,) = torch.autograd.grad(losses["features"], neck)
        assert float(gradient.norm()) == pytest.approx(3 * lesson.weight * of_detection, rel=1e-6)


def test_nothing_to_balance(folder: Path, tmp_path: Path) -> None:
    """Plain training with --balance, by weights 0 or without a store, has no scales. Default weights are ratios."""
    for config in (
        balanced(folder, tmp_path, replace(NO_LOSSES, balance=True)),
        replace(configuration(folder, tmp_path, cached=False), distillation=BALANCED),
    ):
        assert loop.start(config, prepare_data(config.data), CPU, Ranks()).balance is None
    assert DistillationOptions(balance=True).weights == LossWeights(1, 10, 1, 0, 0)
    assert DistillationOptions(balance=True, feature_weight=4).weights.features == 4
    assert DistillationOptions().weights.features == 20
