"""Files that a run leaves behind, each written whole or not at all.

runs/<name>/
  run.json                   configuration, versions, command, the store's manifest
  metrics.jsonl              one line per step and per evaluation
  checkpoints/step-*.pt      the newest: everything that continuing needs; tensors and numbers only, no pickled code
  last.safetensors           the student alone, as `--teacher`, `evaluate` and `--init` read it
  best.safetensors           the same at its best AP
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.runtime import log

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps. Samples and random numbers of a step follow from its number, so that no
    sampler and no generator has a state of its own.

    epoch and step_in_epoch: the next step's. step: steps done so far. evaluated_step: when the student was last
    evaluated, -1 for never. student: parameters and buffers, projections included. average: of the detector's moving
    average, None without one. optimizer, scaler: torch's state dicts. balance: of balanced losses.
    """

    epoch: int
    step_in_epoch: int
    step: int
    evaluated_step: int
    best_ap: float
    student: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    balance: dict[str, dict[str, float]] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint to a folder of them and delete all but the newest `keep`; returns its file."""
    path = folder / f"step-{checkpoint.step:08d}.pt"
    content = {"format_version": FORMAT_VERSION} | vars(checkpoint)
    folder.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: torch.save(content, temporary))
    for old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_newest(folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; says which ones are not. UserError if none is."""
    found = checkpoints(folder)
    if not found:
        raise UserError(f"expected checkpoints in {folder}, found none: start the run without --resume")
    return _first_whole(found)


def _first_whole(found: list[Path]) -> Checkpoint:
    newest, *older = found
    try:
        return load_checkpoint(newest)
    except UserError as error:
        if not older:
            raise
        log.warning(f"{error}; going back to {older[0].name}")
        return _first_whole(older)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote. UserError if it is something else, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True) if damaged is None else None
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): is it complete?") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of its {damaged} is wrong")
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or version != FORMAT_VERSION:
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
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): is there space and permission?") from None
    finally:
        temporary.unlink(missing_ok=True)
    _to_disk(path.parent)  # the rename itself


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
