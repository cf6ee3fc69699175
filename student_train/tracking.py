"""Where the lines of metrics.jsonl go besides: TensorBoard's event files, and a tracker of the user's choice.

The event files are for `tensorboard --logdir runs`. Each needs its own package, and nothing else does.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from common.errors import UserError
from common.runtime import log

PROJECT = "detrcache"


class EventFile:
    """An event file in a run's folder, opened with the first line of metrics. It is the least that a run writes:
    without tensorboard, or where it cannot be written, the run says so, once, and goes on.

    TensorBoard's own writer does this on a thread, whose error on a full disk is a traceback.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._given_up = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl. A run that goes on hides what an interrupted one did beyond its checkpoint."""
        if self._given_up:
            return
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line)]
            if self._file is None:
                self._file = self._open()
                self._write(Event(file_version="brain.Event:2"))
                self._write(Event(step=line["step"], session_log=SessionLog(status=SessionLog.START)))
            self._write(Event(step=line["step"], summary=Summary(value=values)))
        except ImportError:
            self._given_up = True
            log.info("no TensorBoard events are written: python -m pip install 'detrcache[tensorboard]' for them")
        except OSError as error:
            self._given_up = True
            log.warning(f"no more TensorBoard events are written to {self._folder}: {error.strerror or error}")

    def _open(self) -> IO[bytes]:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        return (self._folder / name).open("ab", buffering=0)

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        assert self._file is not None
        if self._file.write(record.getvalue()) < record.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Tracker(Protocol):
    """Where `--track` reports to. A continued run is a new run there, which begins at a later step."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl."""
        ...

    def close(self) -> None: ...


class WandbTracker:
    """A run of Weights & Biases. Its project and server are as its own environment variables say."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        wandb = _module("wandb", "wandb")
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=dict(config))

    def add(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow, in the experiment and on the server that its own environment variables name."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow = _module("mlflow", "mlflow-skinny")
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(flat(config))

    def add(self, line: Mapping[str, Any]) -> None:
        values = {_mlflow_name(tag): value for tag, value in scalars(line)}
        self._mlflow.log_metrics(values, step=line["step"])

    def close(self) -> None:
        self._mlflow.end_run()


def _mlflow_name(tag: str) -> str:
    """As MLflow takes it: few signs, and no name that is another's folder, as "loss" would be that of "loss/logits"."""
    return re.sub(r"[^\w /.:-]", "_", tag if tag == "loss" or not tag.startswith("loss/") else f"losses/{tag[5:]}")


TRACKERS: Mapping[str, Callable[[str, Mapping[str, Any]], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--track {name} needs the package {package}: python -m pip install {package}") from None


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"data": {"split": ...}} -> {"data.split": ...}, with lists and None as text."""
    groups = {name: group for name, group in config.items() if isinstance(group, Mapping)}
    options = {f"{name}.{option}": value for name, group in groups.items() for option, value in group.items()}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in options.items()}


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values of one line: AP, recall in percent, losses, scales, times in seconds, each group under a name."""
    if "evaluation" in line:
        numbers = {name: value for name, value in line["evaluation"].items() if name != "class_ap"}
        yield from ((f"evaluation/{name}", 100 * value) for name, value in numbers.items() if value >= 0)
        yield from ((f"class AP/{name}", 100 * value) for name, value in line["evaluation"]["class_ap"].items())
        return
    yield "loss", line["loss"]
    yield from ((f"loss/{name}", value) for name, value in line["losses"].items())
    yield from ((f"scale/{name}", value) for name, value in line.get("scales", {}).items())
    for name, value in line.items():
        if name.endswith("_s") and name != "samples_per_s":
            yield f"time/{name}", value
        elif isinstance(value, (int, float)) and name not in ("step", "loss"):
            yield name, value
