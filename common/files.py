"""Files that appear whole or not at all, and stay when the power fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LITTLE_BYTES = 2**20  # left on a disk that is called full


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file next to `path`, bring it to the disk, and only then give it its name.

    UserError where it cannot be written; what was there before is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
        _to_disk(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _to_disk(path.parent)  # the rename itself


def unwritable(path: Path, error: Exception) -> UserError:
    """What to tell a user whose file could not be written."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free < LITTLE_BYTES:
        reason = os.strerror(errno.ENOSPC)  # torch speaks of streams
    return UserError(f"{path} could not be written ({reason}): is there space and permission?")


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` was about to write in a folder when its process was killed."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, of the same bytes for the same tensors and metadata.

    safetensors writes metadata in an order that differs from call to call: it is put in order in the finished header,
    a json object of the same length, before which stands that length in 8 bytes.
    """
    save_file(tensors, path, metadata=dict(metadata))
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
