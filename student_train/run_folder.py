"""The folder of a run: what it was started with, what it measured, what it saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.cache.schema import Manifest, TeacherInfo, differences
from common.errors import UserError
from common.evaluate import CocoMetrics
from common.runtime import software_versions
from student_train.checkpoint import write_atomically, write_json
from student_train.config import TrainConfig
from student_train.selection import Shards
from student_train.tracking import TRACKERS, EventFile, Tracker

Teachers = Mapping[str, TeacherInfo] | None  # of a store of several, by name

TIME = "%Y-%m-%dT%H:%M:%S%z"
RUN, METRICS = "run.json", "metrics.jsonl"  # how a run was started; a line for each step and evaluation

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
        if self.record.exists():
            raise UserError(f"{self.path} holds a run already: choose another --name, or continue it with --resume")
        self._track(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path} could not be made ({error.strerror}): name another folder with --out"
            ) from None
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
        self._track(config)
        record["continued"] = [*record.get("continued", []), _circumstances()]
        write_json(self.record, record)

    def forget_after(self, step: int) -> None:
        """Drop from the metrics what was done after the step that the run continues from: it is done again."""
        if self._writes and self.metrics.exists():
            kept = [line for line in self._lines() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.metrics, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def last_evaluation(self) -> CocoMetrics:
        """The newest on record. UserError if there is none."""
        evaluations = [line["evaluation"] for line in self._lines() if "evaluation" in line]
        if not evaluations:
            raise UserError(f"expected an evaluation in {self.metrics}, found none: `evaluate` {self.last_weights}")
        return CocoMetrics(**evaluations[-1])

    def _lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; a last one that a crash cut off is left out."""
        lines = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, at once: a run that is killed keeps its curve."""
        if self._writes:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._events.add(line)
            if self._tracker is not None:
                self._tracker.add(line)

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
        except (OSError, ValueError, KeyError):
            raise UserError(f"expected a run to continue in {self.path}, found none: leave --resume out") from None
        return record


def record_evaluation(folder: Path, what: str, parameters: int, metrics: CocoMetrics) -> None:
    """Note the evaluation of a finished detector as a run without steps, so that `compare` can set it beside others.

    UserError where a training run is there already.
    """
    check_free_of_runs(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} could not be made ({error.strerror}): name another with --record") from None
    line = json.dumps({"step": 0, "epoch": 0, "evaluation": vars(metrics)}) + "\n"
    write_atomically(folder / METRICS, lambda temporary: temporary.write_text(line, encoding="utf-8"))
    write_json(folder / RUN, {"what": what, "parameters": parameters, **_circumstances()})


def check_free_of_runs(folder: Path) -> None:
    """UserError where a training run is, which a recorded evaluation must not replace; another evaluation it may."""
    try:
        trained = "config" in json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if trained:
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
