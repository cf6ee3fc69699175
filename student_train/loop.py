"""The training loop: epochs, steps, evaluation, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import config as functorch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.cache.reader import CacheReader
from common.cache.schema import TeacherInfo
from common.categories import Categories
from common.detr.attention import FeedForward
from common.detr.detector import DeformableDetr
from common.detr.weights import save_detector
from common.devices import choose_device, others_lost, seed_generators, start_processes
from common.errors import UserError
from common.evaluate import CocoMetrics
from common.files import write_atomically
from common.runtime import Ranks, log, read_ranks, start_logging
from student_train.balance import Balance
from student_train.checkpoint import Checkpoint, save_checkpoint
from student_train.config import DistillationOptions, TrainConfig
from student_train.ema import MovingAverage
from student_train.evaluate import POLICY_KEY, average_precision, detect_split
from student_train.feed import Feed, TrainingStep, Work
from student_train.interruption import Interrupted, StopRequest
from student_train.prepare import Data, prepare_data, prepare_feed, prepare_student
from student_train.progress import FIRST_STEPS, STEPS_FOR_ADVICE, Account, Progress, bottleneck, step_record, time_spent
from student_train.run_folder import RunFolder, run_name
from student_train.selection import Shards, finished_ranges
from student_train.step import Diverged, Training, agree, is_finite, learning_rate_factor, seed_step, train_step

Value = TypeVar("Value")


def train(config: TrainConfig, begun_s: float | None = None) -> CocoMetrics:
    """Train as configured; returns the last evaluation.

    begun_s: when the command began, by `time.perf_counter`, from which on it says where the time went.

    Raises Interrupted, with everything saved, after SIGTERM and Ctrl-C, Diverged where a loss is not finite, and
    UserError where another process of the training was lost.
    """
    account, ranks = Account(begun_s), read_ranks()
    start_logging(ranks)
    device = choose_device(config.output.device, ranks)
    start_processes(ranks, device)
    folder = RunFolder(config.output.out / run_name(config), writes=ranks.is_first)
    data = prepare_data(
        config.data, lambda reader: _of_first_rank(lambda: shards_of_run(config, folder, reader), ranks)
    )
    seed_generators(config.optimisation.seed)  # every rank starts from the same weights
    training = start(config, data, device, ranks)
    feed = prepare_feed(config, data, ranks, device)
    try:
        if config.output.resume:
            folder.go_on(config, several(data))
            checkpoint = _of_first_rank(folder.newest, ranks)
            if checkpoint is not None:
                resume(training, checkpoint)
            folder.forget_after(training.step, training.evaluated_step)
        else:
            reader = data.reader
            manifest, shards = (None, None) if reader is None else (reader.manifest, finished_ranges(reader))
            folder.start(config, manifest, training.parameters, shards, several(data))
        with StopRequest().listening() as stop:
            metrics = Run(config, data, training, feed, folder, ranks, stop, account).to_the_end()
        folder.finish(config)
        return metrics
    except RuntimeError as error:
        if ranks.world_size == 1 or not others_lost(error):
            raise
        raise UserError(
            f"another process of this training ended or cannot be reached ({str(error).splitlines()[0]}); see its own"
            f" last lines, then go on with `--config {folder.record} --resume` on all hosts"
        ) from None
    finally:
        folder.close()
        feed.close()


def several(data: Data) -> dict[str, TeacherInfo] | None:
    """The teachers by name where there are several."""
    if data.teachers is None or len(data.teachers) == 1:
        return None
    return {n: reader.manifest.teacher for n, reader in zip(data.teachers.names, data.teachers.readers, strict=True)}


def shards_of_run(config: TrainConfig, folder: RunFolder, reader: CacheReader) -> Shards:
    """The shards that the run began with, or begins with now: those that are finished."""
    return folder.shards(reader.manifest) if config.output.resume else finished_ranges(reader)


def start(config: TrainConfig, data: Data, device: torch.device, ranks: Ranks) -> Training:
    """A student that has seen nothing yet, on its device, with its optimiser."""
    options = config.optimisation
    student = prepare_student(config, data).to(device)
    student.detector.placed(device)
    student.detector.encoder.checkpointed = config.speed.checkpoint_encoder
    groups = student.parameter_groups(options.scaled_lr, options.backbone_lr_factor)
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=config.speed.amp == "fp16")
    average = MovingAverage(student.detector, options.ema) if options.ema is not None else None
    balance = start_balance(student.options, data)
    if config.speed.compile:
        # Balancing goes back through a graph more than once, which compiled parts refuse where they reuse its buffers.
        functorch.donated_buffer = functorch.donated_buffer and balance is None
        compile_parts(student.detector, backbone=device.type != "cpu")
    model: nn.Module = student
    if ranks.world_size > 1:
        model = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
    return Training(student, model, optimizer, scaler, average, balance)


def start_balance(options: DistillationOptions, data: Data) -> Balance | None:
    """The scales of the student's distillation losses, where they are asked for and there are any losses."""
    if not (options.balance and options.active):
        return None
    one = data.teachers is None or options.live_teacher is not None
    return Balance(options.weights, ("",) if one or data.teachers is None else data.teachers.names)


def compile_parts(detector: DeformableDetr, backbone: bool) -> None:
    """Compile what PyTorch can fuse, for images of any size: the feed-forward layers, all of them from one piece of
    code, and the backbone. The attention has kernels of its own.

    backbone: not on a CPU, where its C++ takes minutes and torch 2.14's backward pass of it crashed
    (aten.convolution_backward of a strided 1x1 convolution in the layout that inductor chooses).
    """
    if backbone:
        detector.backbone.compile(dynamic=True)
    for module in detector.modules():
        if isinstance(module, FeedForward):
            module.compile(dynamic=True)


def resume(training: Training, checkpoint: Checkpoint) -> None:
    """Put the training where the checkpoint was taken."""
    training.student.load_state_dict(checkpoint.student)
    if training.average is not None and checkpoint.average is not None:
        training.average.student.load_state_dict(checkpoint.average)
    for group, saved in zip(training.optimizer.param_groups, checkpoint.optimizer["param_groups"], strict=True):
        saved["fused"] = group["fused"]  # follows from the device, which may be another now
    training.optimizer.load_state_dict(checkpoint.optimizer)
    for parameter, state in training.optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:  # in the parameter's layout, which follows from the device, too
                state[name] = torch.empty_like(parameter).copy_(value)
    training.scaler.load_state_dict(checkpoint.scaler)
    if training.balance is not None and checkpoint.balance is not None:
        training.balance.load_state_dict(checkpoint.balance)
    training.epoch, training.step_in_epoch = checkpoint.epoch, checkpoint.step_in_epoch
    training.step, training.evaluated_step = checkpoint.step, checkpoint.evaluated_step
    training.best_ap = checkpoint.best_ap


@dataclass(frozen=True)
class Run:
    """A training with all it needs to go on."""

    config: TrainConfig
    data: Data
    training: Training
    feed: Feed
    folder: RunFolder
    ranks: Ranks
    stop: StopRequest
    account: Account

    @property
    def total_steps(self) -> int:
        options = self.config.optimisation
        steps = options.epochs * len(self.feed)
        return min(steps, options.max_steps or steps)

    @property
    def finished(self) -> bool:
        return self.training.step >= self.total_steps

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most device memory that tensors of this process took; None on a CPU."""
        device = self.training.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def to_the_end(self) -> CocoMetrics:
        """Train and evaluate from where the training stands; returns the last evaluation."""
        log.info(self.description())
        self.account.started()
        metrics, training = None, self.training
        progress = Progress(self.config.output.log_every, self.ranks.world_size)
        hidden = not self.ranks.is_first or None
        with tqdm(total=self.total_steps, initial=training.step, unit="step", disable=hidden) as bar:
            while True:
                if self.evaluation_is_due():
                    metrics = self.evaluate()
                    self.save()
                if self.finished:
                    break
                self.epoch(progress, bar)
                self.save()  # evaluating may take long
        if metrics is None:
            log.info(f"nothing is left to do: all {training.step} steps are done")
            return _of_first_rank(self.folder.last_evaluation, self.ranks)
        log.info(self.summary())
        return metrics

    def epoch(self, progress: Progress, bar: tqdm[None]) -> None:
        """The steps of one epoch, from where the training stands to its end or to the last step of all."""
        training, total_steps, every = self.training, self.total_steps, self.config.output.checkpoint_every
        training.model.train()
        for step in self.feed.epoch(training.epoch, training.step_in_epoch):
            loss, step_s, lr = self.step(step)
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update()
            line = progress.line(training.step, total_steps, step, step_s, loss, lr, training.scales)
            if line is not None:
                log.info(line)
            if training.step == total_steps:
                break
            if every and training.step % every == 0 and training.step_in_epoch < len(self.feed):
                self.save()
        if training.step_in_epoch == len(self.feed):
            training.epoch, training.step_in_epoch = training.epoch + 1, 0

    def step(self, step: TrainingStep) -> tuple[float, float, float]:
        """One step, put on record; returns its loss, its duration in seconds and the learning rate.

        Raises Interrupted before it where some rank was told to stop, and Diverged; both with the state saved.
        """
        training, options = self.training, self.config.optimisation
        begun = time.perf_counter()
        scales = training.scales  # this step's; it may find others
        counts, stopping = agree(training, step, self.stop.requested)
        if stopping:
            self.save()
            self.interrupted()
        seed_step(options.seed, training.step, self.ranks)
        factor = learning_rate_factor(training.step, len(self.feed), self.total_steps, options)
        for group in training.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        try:
            losses, gradient_norm = train_step(training, step, counts, clip=options.clip, amp=self.config.speed.amp)
        except Diverged as error:
            raise self.diverged(error) from None
        step_s = time.perf_counter() - begun
        training.step, training.step_in_epoch = training.step + 1, step.number + 1
        loss, lr = sum(losses.values()), factor * options.scaled_lr
        self.account.add(step, step_s, loss)
        if self.account.step_count == FIRST_STEPS:
            self.feed.work = Work()  # what the later steps took
        record = step_record(training.step, training.epoch, step, losses, gradient_norm, step_s, lr, scales)
        self.folder.write_metrics(record)
        return loss, step_s, lr

    def evaluation_is_due(self) -> bool:
        training, every = self.training, self.config.output.eval_every
        after_epoch = training.step_in_epoch == 0 and training.epoch > 0 and every and training.epoch % every == 0
        return training.evaluated_step != training.step and bool(self.finished or after_epoch)

    def evaluate(self) -> CocoMetrics:
        """AP on the validation split; keeps the student if it is its best so far."""
        training, options = self.training, self.config.optimisation
        if self.stop.requested:
            self.interrupted()
        try:
            with self.stop.at_once(), self.account.spent("evaluating"):
                results = detect_split(
                    training.detector,
                    self.data.val,
                    self.data.eval_policy,
                    batch_size=max(1, options.batch_size // (self.ranks.world_size * self.config.speed.accumulate)),
                    workers=self.config.data.workers,
                    ranks=self.ranks,
                )
                metrics = average_precision(self.data.val, results)
        except KeyboardInterrupt:  # the state was saved before
            self.interrupted()
        epoch = f"{training.epoch + 1}, unfinished" if training.step_in_epoch else f"{training.epoch}"
        log.info(f"step {training.step}, epoch {epoch}: {metrics}")
        evaluation: dict[str, Any] = {"step": training.step, "epoch": training.epoch, "evaluation": vars(metrics)}
        if self.peak_memory_bytes is not None:
            evaluation["peak_memory_bytes"] = self.peak_memory_bytes
        self.folder.write_metrics(evaluation)
        training.evaluated_step = training.step
        if metrics.ap > training.best_ap or metrics.ap < 0:  # without boxes none is better: the last
            training.best_ap = metrics.ap
            if self.ranks.is_first:
                with self.account.spent("saving"):
                    self.save_student(self.folder.best_weights)
        return metrics

    def save(self) -> None:
        """Write what continuing needs, and the student alone."""
        training = self.training
        if self.ranks.is_first:
            checkpoint = Checkpoint(
                epoch=training.epoch,
                step_in_epoch=training.step_in_epoch,
                step=training.step,
                evaluated_step=training.evaluated_step,
                best_ap=training.best_ap,
                student=training.student.state_dict(),
                average=training.average.student.state_dict() if training.average is not None else None,
                optimizer=training.optimizer.state_dict(),
                scaler=training.scaler.state_dict(),
                balance=training.balance.state_dict() if training.balance is not None else None,
            )
            with self.account.spent("saving"):
                save_checkpoint(self.folder.checkpoints, checkpoint, self.config.output.keep)
                self.save_student(self.folder.last_weights)

    def save_student(self, path: Path) -> None:
        """The student alone; its file says which categories it tells apart, and at what size it was evaluated."""
        train = self.data.train
        metadata = Categories(train.category_ids, train.class_names).to_metadata()
        metadata[POLICY_KEY] = json.dumps(asdict(self.data.eval_policy))
        write_atomically(path, lambda temporary: save_detector(temporary, self.training.detector, metadata))

    def interrupted(self) -> NoReturn:
        """Raise Interrupted; the state has been saved."""
        raise Interrupted(
            f"stopped after step {self.training.step}, which is saved; go on with `python -m student_train --config"
            f" {self.folder.record} --resume`",
            self.stop.exit_status,
        )

    def diverged(self, error: Diverged) -> Diverged:
        """Keep the last good state, and say where it is."""
        if not is_finite(self.training):
            return Diverged(f"{error}; the last good state is the newest in {self.folder.checkpoints}")
        self.save()
        return Diverged(f"{error}; the state before it is kept: --init {self.folder.last_weights} starts there")

    def description(self) -> str:
        """What is about to happen, in a few words."""
        data, training, options = self.data, self.training, self.config.optimisation
        distillation = training.student.options
        weights = vars(distillation.weights)
        chosen = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)
        mode = f"{distillation.mode}, balanced" if training.balance is not None else distillation.mode
        source = "plainly"
        if data.teachers is not None:
            how = f"distilling {chosen} ({mode})" if chosen else "plainly on the samples"
            source = f"{how} of {self.config.data.cache} ({data.teachers})"
        if training.student.live is not None:
            source = f"distilling {chosen} ({mode}), teacher {training.student.live.info.name} run live"
        scaled = f" ({options.lr:g} x {options.batch_size} / 32)" if options.scale_lr else ""
        accumulate = self.config.speed.accumulate
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        return (
            f"training {self.config.model.student} ({training.parameters / 1e6:.1f} M parameters) {source}:"
            f" {len(data.train.entries)} images, {self.total_steps} steps of {options.batch_size} images{parts},"
            f" {len(self.feed)} an epoch, learning rate {options.scaled_lr:.3g}{scaled}, on {training.device}"
        )

    def summary(self) -> str:
        """What was done, where the time went, what to change, and where the result is."""
        account, feed = self.account, self.feed
        lines = [time_spent(account)]
        if account.steps.steps >= STEPS_FOR_ADVICE:
            lines.append(bottleneck(account.steps, feed.work, self.config.data.workers))
        if self.peak_memory_bytes is not None:
            lines.append(f"peak memory of {self.training.device}: {self.peak_memory_bytes / 1e9:.1f} GB")
        lines += self.data.train.rule.report()
        if feed.broken:
            lines.append(f"skipped {len(feed.broken)} broken images: {', '.join(sorted(feed.broken))}")
        if feed.corrupt:
            named = ", ".join(f"image {image_id} view {view}" for image_id, view in sorted(feed.corrupt))
            lines.append(f"skipped {len(feed.corrupt)} damaged records: {named}")
        ap = f"{100 * self.training.best_ap:.1f}" if self.training.best_ap >= 0 else "-"
        best = f"best AP {ap}: {self.folder.best_weights}"
        return "\n".join([*lines, f"{best}, last: {self.folder.last_weights}"])


def _of_first_rank(value: Callable[[], Value], ranks: Ranks) -> Value:
    """What the first rank gets, on every rank: the others may not see its files."""
    if ranks.world_size == 1:
        return value()
    shared = [value() if ranks.is_first else None]
    dist.broadcast_object_list(shared)
    return cast(Value, shared[0])
