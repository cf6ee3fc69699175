"""TensorBoard event files: what metrics.jsonl says, for `tensorboard --logdir runs`. Needs the package tensorboard.

Other trackers read these files, too (Weights & Biases, MLflow, Aim import them), so that no run depends on any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.runtime import log

FLUSH_S = 10  # what a killed run may lose of its curves here; metrics.jsonl loses nothing


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


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values of one line: AP and recall in percent, losses, times in seconds, each group under a name."""
    if "evaluation" in line:
        numbers = {name: value for name, value in line["evaluation"].items() if name != "class_ap"}
        yield from ((f"evaluation/{name}", 100 * value) for name, value in numbers.items() if value >= 0)
        yield from ((f"class AP/{name}", 100 * value) for name, value in line["evaluation"]["class_ap"].items())
        return
    yield "loss", line["loss"]
    yield from ((f"loss/{name}", value) for name, value in line["losses"].items())
    for name, value in line.items():
        if name.endswith("_s") and name != "samples_per_s":
            yield f"time/{name}", value
        elif isinstance(value, (int, float)) and name not in ("step", "loss"):
            yield name, value
