"""The folder of a run: what it was started with, what it measured, what it saved."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from common.cache.schema import Manifest, TeacherInfo, differences
from common.errors import UserError
from common.evaluate import CocoMetrics
from common.files import remove_unfinished, unwritable, write_json, write_text
from common.runtime import log, software_versions
from student_train.checkpoint import Checkpoint, checkpoints, load_newest
from student_train.compare import read_metrics
from student_train.config import METRICS, RUN, TrainConfig
from student_train.selection import Shards
from student_train.tracking import TRACKERS, EventFile, Tracker

Teachers = Mapping[str, TeacherInfo] | None  # of a store of several, by name

TIME = "%Y-%m-%dT%H:%M:%S%z"

# What a continued run may have otherwise than the one it continues; its length, too, where no schedule depends on it.
FREE_TO_CHANGE = ("output", "recipe", "data.data", "data.cache", "data.local_cache", "data.workers", "data.prefetch")
LENGTH = ("optimisation.max_steps", "optimisation.epochs")


class RunFolder:
    """runs/<name>/, made on the first rank; other ranks get the same paths and write nothing."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self._writes = writes
        self.checkpoints = path / "checkpoints"
        self.last_weights = path / "last.safetensors"
        self.best_weights = path / "best.safetensors"
        self.metrics = path / METRICS
        self.record = path / RUN
        self._events = EventFile(path)
        self._tracker: Tracker | None = None
        self._lock: IO[str] | None = None

    def start(
        self,
        config: TrainConfig,
        manifest: Manifest | None,
        parameters: int,
        shards: Shards | None = None,
        teachers: Teachers = None,
    ) -> None:
        """Make the folder and record what decides the run. UserError if another run is there already.

        shards: of the store that the run trains on. teachers: of a store of several, whose first has the manifest.
        """
        if not self._writes:
            return
        if self.path.exists():
            self._claim()
            self._make_way()
        self._track(config)
        self._claim()
        write_json(
            self.record,
            {
                "what": what(config, manifest),
                "parameters": parameters,
                "config": as_json(config),
                **_circumstances(),
                "store": None if manifest is None else manifest.to_json(),
                "shards": shards,
                "teachers": None if teachers is None else {name: vars(teacher) for name, teacher in teachers.items()},
            },
        )

    @property
    def saved(self) -> bool:
        """Whether the run has come as far as its first checkpoint."""
        return bool(checkpoints(self.checkpoints)) or self.last_weights.exists()

    def _claim(self) -> None:
        """Make the folder, keep other processes from writing to it, and remove what a killed one was writing."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"{self.path} could not be made ({error.strerror}): name another folder with --out"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being trained by another process: choose another --name, or wait for it to end"
            ) from None
        except OSError as error:
            log.warning(f"{self.path} cannot be locked here ({error.strerror}): see to it that one job writes to it")
        for folder in (self.path, self.checkpoints):
            remove_unfinished(folder)

    def _make_way(self) -> None:
        """Remove what a run left that was killed before its first checkpoint. UserError where there is more."""
        if self.saved:
            raise UserError(f"{self.path} holds a run already: choose another --name, or continue it with --resume")
        if self.record.exists():
            if not _was_training(self.record):
                raise UserError(f"{self.path} holds the record of an evaluation: choose another --name")
            log.info(f"{self.path}: the run there ended before its first checkpoint; this one takes its place")
        self.metrics.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()

    def newest(self) -> Checkpoint | None:
        """What the run goes on from; None where it ended before its first checkpoint. UserError if that is lost."""
        checkpoint = load_newest(self.checkpoints)
        if checkpoint is None:
            if self.saved:
                raise UserError(
                    f"expected checkpoints in {self.checkpoints} to go on from, found none: --init {self.last_weights}"
                    " and another --name start from its weights"
                )
            log.info(f"{self.path}: the run ended before its first checkpoint; it begins again")
        return checkpoint

    def shards(self, manifest: Manifest) -> Shards:
        """What the run trains on of the store with this manifest. UserError if it began with another store."""
        record = self._read()
        before = record.get("store")
        if before is None:
            raise UserError(f"{self.path} was started without a store: a run continues as it began")
        different = differences(manifest, Manifest.from_json(before, str(self.record)))
        if different:
            raise UserError(
                f"{self.path} was started with another store: a run continues as it began; found against expected:"
                f" {'; '.join(different)}"
            )
        return record.get("shards") or [[0, manifest.layout.shards]]

    def go_on(self, config: TrainConfig, teachers: Teachers = None) -> None:
        """Note that the run is continued. UserError if there is none, or one of another configuration or teachers."""
        if not self._writes:
            return
        record = self._check_same(config)
        before, now = (sorted(names or ()) for names in (record.get("teachers"), teachers))
        if before != now:
            raise UserError(
                f"{self.path} was started with the teachers {', '.join(before)}, found {', '.join(now)} in the store: a"
                " run continues as it began"
            )
        self._claim()
        self._track(config)
        record["continued"] = [*record.get("continued", []), _circumstances()]
        write_json(self.record, record)

    def forget_after(self, step: int, evaluated_step: int) -> None:
        """Drop from the metrics what is done again: steps after `step`, which the run continues from, and evaluations
        after `evaluated_step`, the newest that its checkpoint knows of."""
        if self._writes and self.metrics.exists():
            lines = read_metrics(self.metrics)
            kept = [line for line in lines if line["step"] <= (evaluated_step if "evaluation" in line else step)]
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def last_evaluation(self) -> CocoMetrics:
        """The newest on record. UserError if there is none."""
        evaluations = [line["evaluation"] for line in read_metrics(self.metrics) if "evaluation" in line]
        if not evaluations:
            raise UserError(f"expected an evaluation in {self.metrics}, found none: `evaluate` {self.last_weights}")
        return CocoMetrics(**evaluations[-1])

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, at once: a run that is killed keeps its curve."""
        if self._writes:
            try:
                with self.metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise unwritable(self.metrics, error) from None
            self._events.add(line)
            self._report(line)

    def _report(self, line: dict[str, Any]) -> None:
        """To the tracker; what fails there does not end the run."""
        if self._tracker is not None:
            try:
                self._tracker.add(line)
            except Exception as error:
                self._tracker = None
                log.warning(f"nothing more is reported to --track ({type(error).__name__}: {error}); the run goes on")

    def finish(self, config: TrainConfig) -> None:
        """Note that the run has come to the end that its configuration sets."""
        if self._writes:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            record["finished"] = {"time": time.strftime(TIME), **_length(config)}
            write_json(self.record, record)
            if self._tracker is not None:
                self._tracker.close()

    def _track(self, config: TrainConfig) -> None:
        if config.output.track is not None:
            self._tracker = TRACKERS[config.output.track](self.path.name, as_json(config))

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether there is nothing left to do. UserError if there is no run, or one of another configuration."""
        finished = self._check_same(config).get("finished")
        return finished is not None and _length(config).items() <= finished.items()

    def _check_same(self, config: TrainConfig) -> dict[str, Any]:
        """The record of the run."""
        record = self._read()
        before = _filled(record["config"], as_json(TrainConfig()))  # options that came later had their defaults
        free = FREE_TO_CHANGE + (LENGTH if config.optimisation.schedule == "step" else ())
        changed = [name for name in _differing(before, as_json(config)) if not name.startswith(free)]
        if changed:
            raise UserError(f"{self.path} was started with another {', '.join(changed)}: a run continues as it began")
        return record

    def _read(self) -> dict[str, Any]:
        """run.json. UserError if it is not that of a training run."""
        try:
            record: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
            record["config"]
        except (OSError, ValueError, TypeError, KeyError):
            if self.saved:
                raise UserError(
                    f"{self.record} cannot be read: --init {self.last_weights} and another --name start from"
                    " its weights"
                ) from None
            raise UserError(f"expected a run to continue in {self.path}, found none: leave --resume out") from None
        return record


def _was_training(record: Path) -> bool:
    """Whether this run.json is of a training, or of nothing any more; else it is of an evaluation."""
    try:
        return "config" in json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True


def record_evaluation(folder: Path, what: str, parameters: int, metrics: CocoMetrics) -> None:
    """Note the evaluation of a finished detector as a run without steps, so that `compare` can set it beside others.

    UserError where a training run is there already.
    """
    check_free_of_runs(folder)
    folder.mkdir(parents=True, exist_ok=True)  # it was tried before the work
    line = json.dumps({"step": 0, "epoch": 0, "evaluation": vars(metrics)}) + "\n"
    write_text(folder / METRICS, line)
    write_json(folder / RUN, {"what": what, "parameters": parameters, **_circumstances()})


def check_free_of_runs(folder: Path) -> None:
    """UserError where a training run is, which a recorded evaluation must not replace; another evaluation it may."""
    if (folder / RUN).exists() and _was_training(folder / RUN):
        raise UserError(f"{folder} holds a training run: name another folder with --record")


def what(config: TrainConfig, manifest: Manifest | None) -> str:
    """The student and how it is trained, in a few words."""
    if manifest is None:
        return f"{config.model.student}, plain"
    chosen = [name for name, weight in vars(config.distillation.weights).items() if weight]
    return f"{config.model.student}, {' + '.join(chosen) or 'plain'}"


def run_name(config: TrainConfig) -> str:
    """The name that was chosen, or the student with date and time. UserError if --resume has nothing to go by."""
    if config.output.name is not None:
        return config.output.name
    if config.output.resume:
        raise UserError("--resume expects the run to continue as --name")
    return f"{config.model.student}-{time.strftime('%Y%m%d-%H%M%S')}"


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values: paths become strings, tuples lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[no-any-return]


def _length(config: TrainConfig) -> dict[str, int | None]:
    return {"epochs": config.optimisation.epochs, "max_steps": config.optimisation.max_steps}


def _filled(before: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A record with what it does not have taken from the defaults."""
    missing = {name: value for name, value in defaults.items() if name not in before}
    groups = {
        name: _filled(value, defaults[name])
        for name, value in before.items()
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
    }
    return before | missing | groups


def _differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differing(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(prefix + key)
    return names


def _circumstances() -> dict[str, Any]:
    """What, besides the configuration, repeating this process takes."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "started": time.strftime(TIME),
        "versions": software_versions(),
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """Of the folder that this code stands in; None where it is installed without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
