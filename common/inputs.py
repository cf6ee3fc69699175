"""Whether what a command is to read is there at all, and what it is to write can be: asked before PyTorch is imported,
and by what reads it then."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from common.errors import UserError

BUCKET = re.compile(r"(s3a?|gs|az|abfss?|memory):/+(.*)")  # pathlib folds s3://bucket to s3:/bucket


def is_missing(path: Path) -> bool:
    """Whether nothing is there. What cannot be looked at is left to whoever opens it, who can say why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def annotation_file(data: Path, split: str, image_folder: Path | None = None) -> Path:
    """The json of a data set in COCO's layout. UserError where it or its images' folder, by default data/split, is
    not there."""
    file, image_folder = data / "annotations" / f"instances_{split}.json", image_folder or data / split
    for path, there in ((file, file.is_file()), (image_folder, image_folder.is_dir())):
        if not there:
            raise UserError(
                f"expected {image_folder}/*.jpg and {file}, but {path} does not exist: name the data set with --data"
                " and the split with --split (`make demo` needs no data)"
            )
    return file


def check_checkpoint(path: Path) -> None:
    """UserError where there is no such file or folder."""
    if is_missing(path):
        raise UserError(f"expected a checkpoint file, found nothing at {path}; check the path")


def check_store(store: str | Path) -> None:
    """UserError where a folder is no store; whether a bucket has one, its reader asks."""
    if not BUCKET.match(str(store)) and is_missing(Path(store) / "zarr.json"):
        raise no_store(store)


def no_store(store: object) -> UserError:
    return UserError(
        f"{store}: expected a store written by `python -m teacher_dump`, found nothing of that kind (no zarr.json);"
        " name the store with --cache"
    )


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written after long work. UserError where that could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): name another place") from None
