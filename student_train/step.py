"""One step of the optimiser: forward and backward passes of its micro-batches, then the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.detr.detector import DeformableDetr
from common.devices import mean_over_ranks
from common.errors import UserError
from common.runtime import Ranks
from kernels import to_device
from student_train.balance import Balance
from student_train.config import OptimisationOptions
from student_train.ema import MovingAverage
from student_train.feed import TrainingStep
from student_train.model import StudentInTraining
from student_train.objective import add_up, separate_losses
from student_train.step_counts import StepCounts, own_counts

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_LOSS_SCALE = 2.0**-10  # fp16: where even losses scaled down this far overflow, training has diverged


class Diverged(UserError):
    """A loss or the gradient is not a finite number any more."""


@dataclass
class Training:
    """The state of a run between two steps. model: the student, wrapped where several processes train it.
    balance: the scales of the distillation losses, None where they are not balanced.

    epoch and step_in_epoch are the next step's, step counts those done, evaluated_step is when the student was last
    evaluated.
    """

    student: StudentInTraining
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: MovingAverage | None = None
    balance: Balance | None = None
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    evaluated_step: int = -1
    best_ap: float = -math.inf

    @property
    def detector(self) -> DeformableDetr:
        """The student that is evaluated and saved: the moving average where there is one."""
        return self.student.detector if self.average is None else self.average.student

    @property
    def scales(self) -> dict[str, float] | None:
        """Of balanced losses, as of now."""
        return None if self.balance is None else self.balance.scales

    @property
    def parameters(self) -> int:
        """Of the student alone."""
        return sum(parameter.numel() for parameter in self.student.detector.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device


def agree(training: Training, step: TrainingStep, stop: bool) -> tuple[list[StepCounts], bool]:
    """What the losses of a step are divided by, for each teacher, and whether some rank was told to stop.

    All ranks call this at once.
    """
    student = training.student
    own = own_counts(step.box_counts, student.detector.config.queries, student.teacher_queries)
    mean = mean_over_ranks(to_device(torch.cat((own.flatten(), own.new_tensor([stop]))), training.device))
    stopping = stop if isinstance(training.model, StudentInTraining) else bool(mean[-1] > 0)
    return [StepCounts.of_mean(of_teacher) for of_teacher in mean[:-1].view_as(own)], stopping


def train_step(
    training: Training, step: TrainingStep, counts: Sequence[StepCounts], *, clip: float, amp: str = "off"
) -> tuple[dict[str, float], float]:
    """One step; returns this rank's weighted losses by name and the norm of the gradient before clipping. Balanced
    losses are listed without their scales.

    The gradients of the micro-batches add up to the gradient of the step as one batch, batch norm's statistics aside
    (which are frozen wherever the backbone was pretrained). Raises Diverged, with the weights as they were, where a
    loss or the gradient is not finite.
    """
    device, scaler, balance = training.device, training.scaler, training.balance
    measuring = balance is not None and balance.is_due(training.step)
    training.optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    squares: list[Tensor] = []
    for index, part in enumerate(step.parts):
        part = part.to(device)
        with _gradients_shared(training.model, last=index == len(step.parts) - 1):
            with autocast(device, amp):
                output = training.model(part.batch.images, part.batch.padding_mask, part.taught)
            own, taught = separate_losses(output, part.batch.targets, part.lessons, training.student.options, counts)
            losses = minimised = add_up(own, taught)
            if balance is not None:
                if measuring:
                    squares.append(balance.measure(own, taught, output.output.neck, scaler.scale))
                minimised = add_up(own, balance.scaled(taught))
            scaler.scale(torch.stack(list(minimised.values())).sum()).backward()  # type: ignore[no-untyped-call]
        sums = {name: sums[name] + loss.detach() if sums else loss.detach() for name, loss in losses.items()}
    scaler.unscale_(training.optimizer)
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), clip or math.inf)
    # The host waits for the device here, and in the matchings, and nowhere else.
    numbers = torch.stack([*sums.values(), norm])
    measured = mean_over_ranks(torch.stack(squares).sum(dim=0)) if measuring else numbers.new_zeros(0)
    read = torch.cat((numbers.double(), measured.flatten())).cpu()
    *values, gradient_norm = read[: len(numbers)].tolist()
    named = dict(zip(sums, values, strict=True))
    # fp16's first steps overflow until the scale is found: the scaler leaves those out.
    scaling = scaler.is_enabled() and scaler.get_scale() > LEAST_LOSS_SCALE
    check_finite(named if scaling else named | {"gradient": gradient_norm}, training.step, step)
    scaler.step(training.optimizer)
    scaler.update()
    if balance is not None and measuring:  # for the steps to come: all of this one's parts went before
        balance.update(read[len(numbers) :].view(measured.shape))
    if training.average is not None:
        training.average.update(training.student.detector, training.step + 1)
    return named, gradient_norm


def learning_rate_factor(step: int, steps_per_epoch: int, total_steps: int, options: OptimisationOptions) -> float:
    """The factor on every learning rate in a step: the schedule's, rising linearly from 0 in the first steps."""
    if options.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    else:
        factor = 0.1 if step >= options.lr_drop * steps_per_epoch else 1.0
    return factor * min(1.0, (step + 1) / (options.warmup_steps + 1))


def seed_step(seed: int, step: int, ranks: Ranks) -> None:
    """Seed torch's generators for one step of one rank: its random numbers depend on nothing that was before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1, np.uint64)[0]))


def check_finite(values: dict[str, float], step: int, trained_on: TrainingStep) -> None:
    """Raise Diverged with the names of the values that are not finite, the step and the images."""
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise Diverged(
            f"training diverged: {', '.join(broken)} at step {step} (images"
            f" {', '.join(map(str, trained_on.image_ids))}): lower --lr, raise --warmup-steps or lower --clip"
        )


def is_finite(training: Training) -> bool:
    """Whether all weights are finite."""
    return all(bool(parameter.isfinite().all()) for parameter in training.student.parameters())


@contextmanager
def autocast(device: torch.device, amp: str) -> Iterator[None]:
    with torch.autocast(device.type, AMP_TYPES[amp]) if amp in AMP_TYPES else nullcontext():
        yield


@contextmanager
def _gradients_shared(model: nn.Module, last: bool) -> Iterator[None]:
    """Ranks add up their gradients once, in the backward pass of the last micro-batch."""
    with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield
