"""Finished shards, opened for reading: local files, objects of a bucket, and local copies of those.

Where a page is follows from the plan. The index at the end of a shard file says the same to any other reader of Zarr,
and the seal before it whose file it is: both are compared once, so that damage and files in the wrong place do not go
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from common.cache.examine import ShardFiles
from common.cache.schema import CHECKSUM_BYTES, Field, Manifest
from common.cache.storage import Bucket, Bytes, Folder, Storage, ask_again, checked
from common.cache.writer import finished_shards, shard_key
from common.errors import UserError
from common.runtime import log

MOST_OPEN_FILES = 16384
DAMAGE = (OSError, EOFError, ValueError)


class DamagedShard(ValueError):
    """key: the file or object. reason: what is wrong with it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class LocalShard:
    """The files of one shard, open. descriptors: int32, one for each field, valid as long as this object."""

    def __init__(self, folder: Folder, keys: list[str]) -> None:
        opened: list[int] = []
        weakref.finalize(self, _close_all, opened)
        try:
            for key in keys:
                opened.append(os.open(folder.root / key, os.O_RDONLY))  # noqa: PERF401 - closed if one fails
        except OSError as error:
            raise DamagedShard(keys[len(opened)], error.strerror or str(error)) from None
        self._opened = opened
        self.descriptors = np.array(opened, np.int32).tobytes()

    def read_tail(self, field_index: int, size: int) -> Bytes:
        descriptor = self._opened[field_index]
        start = max(0, os.fstat(descriptor).st_size - size)
        return np.frombuffer(os.pread(descriptor, size, start), dtype=np.uint8)


@dataclass(frozen=True)
class RemoteShard:
    """The objects of one shard, one for each field."""

    bucket: Bucket
    keys: list[str]

    def read_tail(self, field_index: int, size: int) -> Bytes:
        return self.bucket.read_tail(self.keys[field_index], size)

    def read_pages(self, field_index: int, offset: int, page_bytes: int, into: Bytes) -> None:
        """Fetch the pages from `offset` on whose rows fill `into`, and check them. DamagedShard."""
        pages, stored_bytes = -(-len(into) // page_bytes), page_bytes + CHECKSUM_BYTES

        def read() -> None:
            data = self.bucket.read_range(self.keys[field_index], offset, pages * stored_bytes)
            if len(data) != pages * stored_bytes:
                raise EOFError("the object ends too early")
            for page, stored in enumerate(data.reshape(pages, stored_bytes)):
                rows = into[page * page_bytes : (page + 1) * page_bytes]
                rows[:] = checked(stored)[: len(rows)]

        try:
            ask_again(read)
        except DAMAGE as error:
            raise DamagedShard(self.keys[field_index], str(error)) from None


OpenShard = LocalShard | RemoteShard


class OpenShards:
    """The shards of a store, opened when they are first asked for; the most recently used stay open.

    A shard that falls out of use is closed when the last reader lets go of it, so that no thread reads a closed file.
    """

    def __init__(self, storage: Storage, files: ShardFiles, copies: LocalCopies | None) -> None:
        self._storage, self._files, self._copies = storage, files, copies
        self._fields = files.fields
        self._tail_is_sound = np.zeros(files.layout.shards, dtype=bool)
        self._most_open = max(1, _open_file_limit() // len(self._fields))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def get(self, shards: Iterable[int]) -> list[OpenShard | DamagedShard]:
        """Open shards; DamagedShard for those of which a file is missing or an index is not what it should be."""
        with self._lock:
            return [self._get(shard) for shard in shards]

    def remove_copy(self, shard: int, damage: DamagedShard) -> bool:
        """Whether it is a local copy that is damaged: it is given up, and the shard is read from the bucket."""
        with self._lock:
            if self._copies is None or not self._copies.has(shard):
                return False
            log.warning(f"{self._copies.folder}/{damage}; this copy is removed, and fetched again")
            self._copies.remove(shard)
            self._open.pop(shard, None)
            self._tail_is_sound[shard] = False
            return True

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _get(self, shard: int) -> OpenShard | DamagedShard:
        opened = self._open.get(shard)
        if opened is None or (isinstance(opened, RemoteShard) and self._copies and self._copies.has(shard)):
            try:
                opened = self._open_shard(shard)
            except DamagedShard as error:
                return error
            self._open[shard] = opened
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return opened

    def _open_shard(self, shard: int) -> OpenShard:
        keys = [shard_key(field, shard) for field in self._fields]
        opened: OpenShard
        if isinstance(self._storage, Folder):
            opened = LocalShard(self._storage, keys)
        elif self._copies is not None and self._copies.has(shard):
            opened = LocalShard(self._copies.folder, keys)
        else:
            opened = RemoteShard(self._storage, keys)
            if self._copies is not None:
                self._copies.fetch(shard)
        if not self._tail_is_sound[shard]:
            for index in range(len(self._fields)):
                self._check_tail(opened, shard, index)
            self._tail_is_sound[shard] = True
        return opened

    def _check_tail(self, opened: OpenShard, shard: int, field_index: int) -> None:
        field = self._fields[field_index]
        key = shard_key(field, shard)

        def check() -> None:
            tail = opened.read_tail(field_index, self._files.layout.tail_bytes(field))
            for damage in self._files.examine_tail(key, tail, field, shard):
                raise DamagedShard(damage.key, damage.reason)

        try:
            ask_again(check)
        except (OSError, EOFError) as error:
            raise DamagedShard(key, str(error)) from None


class LocalCopies:
    """A folder that holds copies of a bucket's shards, fetched behind the reader for the epochs to come.

    A shard is fetched whole when it is first asked for, and checked, all of it, before its files are shown; until it is
    there it is read from the bucket. The folder fills up to `most_bytes` and then stays as it is: epochs visit every
    shard alike, so evicting one for another gains nothing. Several processes, also later ones, can share a folder:
    files appear whole, by renaming.
    """

    def __init__(
        self, bucket: Bucket, manifest: Manifest, files: ShardFiles, folder: Path, most_bytes: int | None
    ) -> None:
        identity = json.dumps([bucket.url, manifest.to_json()], sort_keys=True)
        self.folder = Folder(folder / hashlib.sha256(identity.encode()).hexdigest()[:16])
        self._bucket, self._files, self._most_bytes = bucket, files, most_bytes
        # At most; only the last pages of a token field's shard may never be written.
        layout = files.layout
        self._shard_bytes = sum(
            layout.shard_pages(f) * layout.page_bytes(f) + layout.tail_bytes(f) for f in files.fields
        )
        self._whole = set(np.flatnonzero(finished_shards(self.folder, manifest)).tolist())
        self._asked: dict[int, Future[None]] = {}
        self._removed: set[int] = set()
        self._full = False
        self._pool = ThreadPoolExecutor(1, "local-copies")

    def has(self, shard: int) -> bool:
        return shard in self._whole

    def fetch(self, shard: int) -> None:
        """Begin to copy a shard, unless that has been asked for or there is no room."""
        if shard not in self._asked and not self._full:
            self._asked[shard] = self._pool.submit(self._copy, shard)

    def remove(self, shard: int) -> None:
        """Give up the copy of a shard, which is damaged. The first time it is fetched again when it is asked for."""
        self._whole.discard(shard)
        for field in self._files.fields:
            with suppress(OSError):  # a folder that cannot be written to is not used for this shard any more
                self.folder.remove(shard_key(field, shard))
        if shard not in self._removed:
            self._removed.add(shard)
            self._asked.pop(shard, None)

    def wait(self) -> None:
        """Return when all copies asked for are there, or given up."""
        for future in list(self._asked.values()):
            future.exception()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _copy(self, shard: int) -> None:
        if self._full or (self._most_bytes is not None and self._used_bytes() + self._shard_bytes > self._most_bytes):
            self._full = True
            return
        try:
            for field in self._files.fields:
                self._copy_file(field, shard)
            self._whole.add(shard)
        except (UserError, FileNotFoundError, DamagedShard) as error:
            log.warning(f"shard {shard} was not copied to {self.folder}: {error}")
        except OSError as error:
            log.warning(f"{self.folder} takes no more copies of shards: {error.strerror or error}")
            self._full = True

    def _copy_file(self, field: Field, shard: int) -> None:
        key = shard_key(field, shard)

        def check(arrived: Path) -> None:
            here = arrived.relative_to(self.folder.root).as_posix()
            for damage in self._files.examine(self.folder, here, field, shard):
                raise DamagedShard(f"{self._bucket}/{key}", f"it arrives damaged: {damage.reason}")

        if not self.folder.exists(key):
            ask_again(lambda: self._bucket.download(key, self.folder.root / key, check))

    def _used_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.root.rglob("*") if path.is_file())


def _open_file_limit() -> int:
    """Half of what the system lets this process open."""
    return min(MOST_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
