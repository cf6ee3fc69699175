"""The training loop: epochs, steps, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.detr.categories import Categories
from common.detr.weights import save_detector
from common.errors import UserError
from common.evaluate import CocoMetrics
from common.runtime import Ranks, choose_device, log, read_ranks, seed_generators, start_logging, start_processes
from student_train.checkpoint import (
    Checkpoint,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
    write_atomically,
)
from student_train.config import OptimisationOptions, TrainConfig
from student_train.evaluate import average_precision, detect_split
from student_train.feed import Feed, TrainingBatch
from student_train.model import StudentInTraining
from student_train.objective import losses_of
from student_train.prepare import Data, prepare_data, prepare_feed, prepare_student
from student_train.run_folder import RunFolder, run_name


class Diverged(UserError):
    """A loss or the gradient is not a finite number any more."""


@dataclass
class Totals:
    """Seconds and samples since the start of this process, for the summary."""

    steps: int = 0
    samples: int = 0
    stepping_s: float = 0.0
    waiting_for_images_s: float = 0.0
    waiting_for_cache_s: float = 0.0

    def add(self, batch: TrainingBatch, step_s: float) -> None:
        self.steps += 1
        self.samples += len(batch.image_ids)
        self.stepping_s += step_s
        self.waiting_for_images_s += batch.waiting_for_images_s
        self.waiting_for_cache_s += batch.waiting_for_cache_s


@dataclass
class Training:
    """The state of a run between two steps. model: the student, wrapped where several processes train it. categories:
    of the classes it learns, which the saved student carries."""

    student: StudentInTraining
    model: nn.Module
    optimizer: torch.optim.Optimizer
    categories: Categories
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_ap: float = -math.inf
    totals: Totals = field(default_factory=Totals)

    @property
    def parameters(self) -> int:
        """Of the student alone."""
        return sum(parameter.numel() for parameter in self.student.detector.parameters())


def train(config: TrainConfig) -> CocoMetrics:
    """Train as configured; returns the last evaluation."""
    ranks = read_ranks()
    start_logging(ranks)
    device = choose_device(config.output.device, ranks)
    start_processes(ranks, device)
    data = prepare_data(config.data)
    seed_generators(config.optimisation.seed, Ranks())  # every rank starts from the same weights
    training = start(config, data, device, ranks)
    run = RunFolder(config.output.out / run_name(config), writes=ranks.is_first)
    run.start(config, data.reader.manifest if data.reader is not None else None, training.parameters)
    seed_generators(config.optimisation.seed, ranks)
    if config.output.resume:
        resume(training, load_checkpoint(run.last))
    feed = prepare_feed(config, data, ranks, device)
    try:
        return train_epochs(config, data, training, feed, run, ranks)
    finally:
        feed.close()


def start(config: TrainConfig, data: Data, device: torch.device, ranks: Ranks) -> Training:
    """A student that has seen nothing yet, on its device, with its optimiser."""
    options = config.optimisation
    student = prepare_student(config, data).to(device)
    groups = student.parameter_groups(options.lr, options.backbone_lr_factor)
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    model: nn.Module = student
    if ranks.world_size > 1:
        model = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
    return Training(student, model, optimizer, Categories(data.train.category_ids, data.train.class_names))


def train_epochs(
    config: TrainConfig, data: Data, training: Training, feed: Feed, run: RunFolder, ranks: Ranks
) -> CocoMetrics:
    """Epochs from where the training stands to the end; returns the last evaluation."""
    options, every = config.optimisation, config.output.eval_every
    total_steps = options.epochs * len(feed)
    total_steps = min(total_steps, options.max_steps or total_steps)
    log.info(description(config, data, training, len(feed), total_steps))
    metrics: CocoMetrics | None = None
    with tqdm(total=total_steps, initial=training.step, unit="step", disable=not ranks.is_first or None) as bar:
        while training.step < total_steps and training.epoch < options.epochs:
            train_epoch(training, feed, total_steps, options, run, bar)
            finished = training.step == total_steps or training.epoch == options.epochs
            if finished or (every and training.step_in_epoch == 0 and training.epoch % every == 0):
                metrics = evaluate_student(config, data, training, run, ranks)
            save(training, run, ranks)
    if metrics is None:  # a run that had finished was continued
        metrics = evaluate_student(config, data, training, run, ranks)
    log.info(summary(training, run, feed))
    return metrics


def train_epoch(
    training: Training, feed: Feed, total_steps: int, options: OptimisationOptions, run: RunFolder, bar: tqdm[None]
) -> None:
    """The steps of one epoch, from where the training stands to its end or to the last step of all."""
    device = next(training.student.parameters()).device
    training.model.train()
    for batch in feed.epoch(training.epoch, training.step_in_epoch):
        begun = time.perf_counter()
        factor = learning_rate_factor(training.step, len(feed), total_steps, options)
        for group in training.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        losses, gradient_norm = train_step(training, batch.to(device), options)
        step_s = time.perf_counter() - begun
        training.step, training.step_in_epoch = training.step + 1, batch.step + 1
        training.totals.add(batch, step_s)
        run.write_metrics(step_line(training, batch, losses, gradient_norm, step_s, factor * options.lr))
        bar.set_postfix(loss=f"{sum(losses.values()):.2f}", refresh=False)
        bar.update()
        if training.step == total_steps:
            break
    if training.step < total_steps or training.step_in_epoch == len(feed):
        training.epoch, training.step_in_epoch = training.epoch + 1, 0


def train_step(
    training: Training, batch: TrainingBatch, options: OptimisationOptions
) -> tuple[dict[str, float], float]:
    """One step of the optimiser; returns the weighted losses by name and the norm of the gradient before clipping.

    Raises Diverged, with the weights as they were, where a loss or the gradient is not finite.
    """
    output = training.model(batch.batch.images, batch.batch.padding_mask)
    losses = losses_of(output, batch.batch.targets, batch.cached, training.student.options)
    values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist(), strict=True))
    check_finite(values, training.step, batch)

    training.optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), options.clip or math.inf).item()
    check_finite({"gradient": norm}, training.step, batch)
    training.optimizer.step()
    return values, norm


def learning_rate_factor(step: int, steps_per_epoch: int, total_steps: int, options: OptimisationOptions) -> float:
    """The factor on every learning rate in a step: the schedule's, rising linearly from 0 in the first steps."""
    if options.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    else:
        factor = 0.1 if step >= options.lr_drop * steps_per_epoch else 1.0
    return factor * min(1.0, (step + 1) / (options.warmup_steps + 1))


def check_finite(values: dict[str, float], step: int, batch: TrainingBatch) -> None:
    """Raise Diverged with the names of the values that are not finite, the step and the images."""
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise Diverged(
            f"training diverged: {', '.join(broken)} at step {step} (images {', '.join(map(str, batch.image_ids))});"
            " the last checkpoint is from before: lower --lr or raise --warmup-steps"
        )


def step_line(
    training: Training,
    batch: TrainingBatch,
    losses: dict[str, float],
    gradient_norm: float,
    step_s: float,
    learning_rate: float,
) -> dict[str, object]:
    """What metrics.jsonl says of one step, losses weighted, samples of this process."""
    whole_s = step_s + batch.waiting_for_images_s + batch.waiting_for_cache_s
    return {
        "step": training.step,
        "epoch": training.epoch,
        "loss": sum(losses.values()),
        "losses": losses,
        "gradient_norm": gradient_norm,
        "lr": learning_rate,
        "step_s": round(step_s, 4),
        "waiting_for_images_s": round(batch.waiting_for_images_s, 4),
        "waiting_for_cache_s": round(batch.waiting_for_cache_s, 4),
        "samples_per_s": round(len(batch.image_ids) / whole_s, 3),
    }


def evaluate_student(config: TrainConfig, data: Data, training: Training, run: RunFolder, ranks: Ranks) -> CocoMetrics:
    """AP on the validation split; keeps the student if it is its best so far."""
    options = config.data
    results = detect_split(
        training.student.detector,
        data.val,
        data.eval_policy,
        batch_size=max(1, config.optimisation.batch_size // ranks.world_size),
        workers=options.workers,
        ranks=ranks,
    )
    metrics = average_precision(data.val, results)
    log.info(f"step {training.step}, epoch {training.epoch}: {metrics}")
    run.write_metrics({"step": training.step, "epoch": training.epoch, "evaluation": vars(metrics)})
    if metrics.ap > training.best_ap:
        training.best_ap = metrics.ap
        if ranks.is_first:
            save_student(training, run.best_weights)
    return metrics


def save(training: Training, run: RunFolder, ranks: Ranks) -> None:
    """Write what continuing needs, and the student alone."""
    if ranks.is_first:
        checkpoint = Checkpoint(
            epoch=training.epoch,
            step_in_epoch=training.step_in_epoch,
            step=training.step,
            best_ap=training.best_ap,
            student=training.student.state_dict(),
            optimizer=training.optimizer.state_dict(),
            generators=generator_states(),
        )
        save_checkpoint(run.last, checkpoint)
        save_student(training, run.last_weights)


def save_student(training: Training, path: Path) -> None:
    detector, metadata = training.student.detector, training.categories.to_metadata()
    write_atomically(path, lambda temporary: save_detector(temporary, detector, metadata))


def resume(training: Training, checkpoint: Checkpoint) -> None:
    """Put the training where the checkpoint was taken."""
    training.student.load_state_dict(checkpoint.student)
    training.optimizer.load_state_dict(checkpoint.optimizer)
    restore_generators(checkpoint.generators)
    training.epoch, training.step_in_epoch = checkpoint.epoch, checkpoint.step_in_epoch
    training.step, training.best_ap = checkpoint.step, checkpoint.best_ap


def description(config: TrainConfig, data: Data, training: Training, steps_per_epoch: int, total_steps: int) -> str:
    """What is about to happen, in a few words."""
    detector, options = training.student.detector, training.student.options
    weights = {
        "logits": options.logits_weight,
        "features": options.feature_weight,
        "assignment": options.assignment_weight,
    }
    chosen = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)
    source = "plainly"
    if data.reader is not None:
        how = f"distilling {chosen} ({options.mode})" if chosen else "plainly on the samples"
        source = f"{how} of {data.reader.path} (teacher {data.reader.manifest.teacher.name})"
    return (
        f"training {config.model.student} ({training.parameters / 1e6:.1f} M parameters) {source}:"
        f" {len(data.train.entries)} images, {total_steps} steps of {config.optimisation.batch_size} images,"
        f" {steps_per_epoch} an epoch, on {next(detector.parameters()).device}"
    )


def summary(training: Training, run: RunFolder, feed: Feed) -> str:
    """What was done, where the time went, and where the result is."""
    totals = training.totals
    whole_s = max(1e-9, totals.stepping_s + totals.waiting_for_images_s + totals.waiting_for_cache_s)
    shares = {
        "computing": totals.stepping_s,
        "waiting for images": totals.waiting_for_images_s,
        "waiting for the cache": totals.waiting_for_cache_s,
    }
    times = ", ".join(f"{name} {seconds / whole_s:.0%}" for name, seconds in shares.items())
    skipped = f"; skipped {len(feed.broken)} broken images: {', '.join(sorted(feed.broken))}" if feed.broken else ""
    return (
        f"{totals.steps} steps in {whole_s:.1f} s, {totals.samples / whole_s:.2f} samples/s ({times}){skipped}; best AP"
        f" {100 * training.best_ap:.1f}: {run.best_weights}, last: {run.last_weights}"
    )
