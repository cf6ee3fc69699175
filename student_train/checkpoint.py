"""Files that a run leaves behind, each written whole or not at all.

runs/<name>/
  run.json                   configuration, versions, command, the store's manifest
  metrics.jsonl              one line per step and per evaluation
  checkpoints/step-*.pt      the newest: everything that continuing needs; tensors and numbers only, no pickled code
  last.safetensors           the student alone, as `--teacher`, `evaluate` and `--init` read it
  best.safetensors           the same at its best AP
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically
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

    def write(temporary: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(content, temporary)

    write_atomically(path, write)
    for old in checkpoints(folder)[keep:]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; says which are not. None if there are none, UserError if none is whole."""
    found = checkpoints(folder)
    return _first_whole(found) if found else None


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
