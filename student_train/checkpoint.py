"""Files that a run leaves behind, each written whole or not at all.

runs/<name>/
  run.json               configuration, versions, command, the store's manifest
  metrics.jsonl          one line per step and per evaluation
  last.pt                everything that continuing needs; tensors and numbers only, no pickled code
  last.safetensors       the student alone, as `--teacher`, `evaluate` and `--init` read it
  best.safetensors       the same at its best AP
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    epoch and step_in_epoch: the next step's. step: steps done so far. student: parameters and buffers, projections
    included. optimizer: torch's state dict. generators: states of torch's generators by device.
    """

    epoch: int
    step_in_epoch: int
    step: int
    best_ap: float
    student: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    content = {"format_version": FORMAT_VERSION} | vars(checkpoint)
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote. UserError if it is something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"expected a checkpoint at {path}, found nothing: start the run without --resume") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): is it complete?") from None
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: expected a training checkpoint of version {FORMAT_VERSION}, found {version}")
    return Checkpoint(**content)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
        _to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): is there space and permission?"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    _to_disk(path.parent)  # the rename itself


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def generator_states() -> dict[str, Tensor]:
    """States of torch's generators, on the CPU and on every CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
