"""Where the lines of metrics.jsonl go besides: TensorBoard's event files, and a tracker of the user's choice.

The event files are for `tensorboard --logdir runs`. Each needs its own package, and nothing else does.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.runtime import log

FLUSH_S = 10  # what a killed run may lose of its curves here; metrics.jsonl loses nothing
PROJECT = "detrcache"


class EventFile:
    """An event file in a run's folder, opened with the first line of metrics. Without tensorboard it says so, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._missing = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl. A run that goes on hides what an interrupted one did beyond its checkpoint."""
        if self._writer is None and not self._missing:
            self._writer = self._open(line["step"])
        if self._missing:
            return
        for tag, value in scalars(line):
            self._writer.add_scalar(tag, value, line["step"])
        if "evaluation" in line:
            self._writer.flush()

    def _open(self, first_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._missing = True
            log.info("no TensorBoard events are written: python -m pip install 'detrcache[tensorboard]' for them")
            return None
        return SummaryWriter(  # type: ignore[no-untyped-call]
            str(self._folder), purge_step=first_step, flush_secs=FLUSH_S
        )


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
