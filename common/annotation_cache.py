"""Large annotations, checked once and kept as arrays in a file that every process maps into its memory.

The file is named by the sha256 of the json. A note of the json's size and times saves hashing it each time. Both are in
`annotations` of the folder that DETRCACHE_CACHE_FOLDER names, by default of the user's cache folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from common.entries import GroundTruth, ImageEntries
from common.instances_json import Instances, read_instances
from common.runtime import log

FOLDER_VARIABLE = "DETRCACHE_CACHE_FOLDER"
SMALLEST_BYTES = 2**20  # of a json that is kept: a smaller one is read in a moment
CLOCK_NS = 2 * 10**9  # file systems note a change to two seconds at worst
# Raise the number whenever other arrays are kept or other things checked, so that the json is read again.
MAGIC = b"detrcache annotations 1\n"
CHECKSUM_BYTES = 8
HEADER_AT = len(MAGIC) + CHECKSUM_BYTES + 8


def load_instances(annotation_file: Path, image_folder: Path) -> Instances:
    """`read_instances`, from the kept arrays if the file is large and has been read before. Without a folder to keep
    them in, which is said in a line, the json is read every time."""
    if annotation_file.stat().st_size < SMALLEST_BYTES:
        return read_instances(annotation_file, image_folder)
    found = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = _known_sha256(annotation_file, folder)
        if (kept := _open_kept(folder, sha256, image_folder)) is not None:
            return kept
        with _only_process(folder / f"{sha256}.lock"):
            if (kept := _open_kept(folder, sha256, image_folder)) is not None:  # by another process, meanwhile
                return kept
            found = read_instances(annotation_file, image_folder)
            _write(_arrays_file(folder, found.sha256), found)
            log.info(f"{annotation_file}: kept as arrays in {folder}, to be opened faster")
            return _open_kept(folder, found.sha256, image_folder) or found
    except (OSError, RuntimeError) as error:  # RuntimeError: of a user without a home
        reason = getattr(error, "strerror", None) or error
        log.info(
            f"{annotation_file} is read as a whole by each process, because its arrays cannot be kept ({reason}):"
            f" name a folder for them with {FOLDER_VARIABLE}"
        )
    return found or read_instances(annotation_file, image_folder)


def cache_folder() -> Path:
    """Where arrays are kept. RuntimeError where the user has no home and names no folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "detrcache"
    return Path(named or users).expanduser() / "annotations"


def _arrays_file(folder: Path, sha256: str) -> Path:
    return folder / f"{sha256}.arrays"


def _known_sha256(annotation_file: Path, folder: Path) -> str:
    """The sha256 of the json: noted, if it has not been touched since it was hashed."""
    note = folder / f"{hashlib.sha256(os.path.abspath(annotation_file).encode()).hexdigest()}.json"
    state, noted = _state(annotation_file), None
    try:
        noted_state, noted = json.loads(note.read_bytes())
        if noted_state == state and _arrays_file(folder, noted).exists():
            return str(noted)
    except (OSError, ValueError, TypeError):
        pass
    begun_ns = time.time_ns()
    with annotation_file.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # A file that was just written can be replaced by one of the same size within the same tick of the clock: it is not
    # noted until it is older than a tick.
    if state == _state(annotation_file) and max(state[1:3]) + CLOCK_NS < begun_ns:
        _replace(note, [json.dumps([state, sha256]).encode()])
        if noted not in (None, sha256):
            _arrays_file(folder, str(noted)).unlink(missing_ok=True)  # what the json was before
    return sha256


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextmanager
def _only_process(lock: Path) -> Iterator[None]:
    """Wait until no other process of the machine, or of the network file system, is in here for the same json."""
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that reads the same annotations")
            fcntl.flock(file, fcntl.LOCK_EX)  # it ends when the other process does
        yield


def _write(path: Path, found: Instances) -> None:
    """MAGIC, the CRC-32 of it and of all that follows, the header's length, the header, and array after array."""
    columns = {**vars(found.entries), **vars(found.entries.truth)}
    del columns["truth"]
    facts = found._asdict() | {"entries": [(name, array.dtype.str, array.shape) for name, array in columns.items()]}
    header = json.dumps(facts).encode()
    header += b" " * (-(HEADER_AT + len(header)) % 8)
    parts: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header]
    for array in columns.values():
        parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, bytes(-array.nbytes % 8)]
    checksum = zlib.crc32(MAGIC)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    for left in path.parent.glob(f"{path.name}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    _replace(path, [MAGIC, checksum.to_bytes(CHECKSUM_BYTES, "little"), *parts])


def _replace(path: Path, parts: list[bytes | memoryview]) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _open_kept(folder: Path, sha256: str, image_folder: Path) -> Instances | None:
    """The arrays kept of a json, mapped; None where there are none that can be used."""
    path = _arrays_file(folder, sha256)
    try:
        with path.open("rb") as file:
            magic, expected = file.read(len(MAGIC)), int.from_bytes(file.read(CHECKSUM_BYTES), "little")
            checksum = zlib.crc32(magic)
            while piece := file.read(2**20):
                checksum = zlib.crc32(piece, checksum)
            if magic != MAGIC or checksum != expected:
                log.info(f"{path} is damaged, or of another version: the annotations are read again")
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    at = HEADER_AT + int.from_bytes(content[HEADER_AT - 8 : HEADER_AT], "little")
    facts = json.loads(content[HEADER_AT:at])
    if facts["sha256"] != sha256 or facts["names_folder"] not in ("", os.path.abspath(image_folder)):
        return None
    columns = {}
    for name, dtype, shape in facts["entries"]:
        columns[name] = np.frombuffer(content, dtype, int(np.prod(shape)), at).reshape(shape)
        at += -(-columns[name].nbytes // 8) * 8
    truth = GroundTruth(**{field.name: columns.pop(field.name) for field in fields(GroundTruth)})
    entries = ImageEntries(**columns, truth=truth)
    lists = {"category_ids": tuple(facts["category_ids"]), "class_names": tuple(facts["class_names"])}
    return Instances(**(facts | lists | {"entries": entries}))
