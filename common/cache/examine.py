"""What a shard file must be, and what is wrong with one.

The layout follows from the manifest and the sample table, so every byte of a shard file has a known place: pages one
after another, each with its checksum, then the seal, then the index with its checksum. Nothing here trusts the index to
find a page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from common.cache import crc32c
from common.cache.plan import SampleTable
from common.cache.schema import CHECKSUM_BYTES, MISSING, SEAL_BYTES, SKIPPED, TABLE_GROUP, Field, Layout, Manifest
from common.cache.seal import MAGIC, Owner, Seal, field_sum, owners, pages_sum
from common.cache.storage import Bytes, Folder, Storage, checked
from common.cache.validate import check_record

READ_BYTES = 8 * 2**20  # of one shard file at once


@dataclass(frozen=True)
class Damage:
    """Something wrong in one file of a store. rows: the samples concerned, where it can be told."""

    key: str
    reason: str
    shard: int | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShardFiles:
    """What a store's shard files must be.

    sealed: whether each must have a seal. skipped: rows without an image, whose records are blank. owner: whose the
    files of a shard are.
    """

    layout: Layout
    fields: tuple[Field, ...]
    table: SampleTable
    sealed: bool
    skipped: npt.NDArray[np.intp]
    owner: Callable[[int], Owner]

    @staticmethod
    def of(manifest: Manifest, table: SampleTable, sealed: bool, skipped: npt.NDArray[np.intp]) -> ShardFiles:
        owner = lru_cache(owners(manifest, table, skipped))
        return ShardFiles(manifest.layout, manifest.fields(), table, sealed, skipped, owner)

    def page_rows(self, field: Field, shard: int) -> npt.NDArray[np.int64]:
        """(pages,) the row of the store that each page of a shard file belongs to."""
        layout = self.layout
        rows = np.arange(shard * layout.shard_samples, min(layout.samples, (shard + 1) * layout.shard_samples))
        pages = -(-self.table.token_count[rows] // layout.page_tokens) if field.per == "token" else 1
        return np.repeat(rows, pages)

    def file_bytes(self, field: Field, shard: int) -> int:
        return len(self.page_rows(field, shard)) * self.layout.page_bytes(field) + self.layout.tail_bytes(field)

    def index(self, field: Field, shard: int) -> Bytes:
        """The index of a shard file without its checksum: pages side by side from the file's first byte on."""
        pages, page_bytes = len(self.page_rows(field, shard)), self.layout.page_bytes(field)
        index = np.full((self.layout.shard_pages(field), 2), MISSING, dtype="<u8")
        index[:pages, 0] = np.arange(pages, dtype=np.uint64) * np.uint64(page_bytes)
        index[:pages, 1] = page_bytes
        return index.reshape(-1).view(np.uint8)

    def examine_tail(self, key: str, tail: Bytes, field: Field, shard: int) -> list[Damage]:
        """What is wrong by a file's last `tail_bytes`, or by all its bytes where it has fewer. A seal is looked at
        wherever there is one, also where there need not be."""
        index_bytes = self.layout.index_bytes(field)
        try:
            if len(tail) < index_bytes:
                raise ValueError("the file ends before it")
            if not np.array_equal(checked(tail[-index_bytes:]), self.index(field, shard)):
                raise ValueError("it does not agree with the sample table")
        except ValueError as error:
            return [Damage(key, f"its index cannot be used: {error}", shard)]
        try:
            seal = Seal.from_bytes(tail[:-index_bytes].tobytes())
        except ValueError as error:
            return [Damage(key, str(error), shard)]
        if seal is None:
            return [Damage(key, "it has no seal, so it was not written for this store", shard)] if self.sealed else []
        found, expected = seal.owner, self.owner(shard)
        if found.store != expected.store:
            return [Damage(key, "it was written for another store", shard)]
        if seal.field != field_sum(field):
            names = [other.name for other in self.fields if field_sum(other) == seal.field]
            return [Damage(key, f"it was written as a file of {' or '.join(names) or 'another field'}", shard)]
        if found.shard != shard:
            return [Damage(key, f"it was written as shard {found.shard}", shard)]
        if found.samples != expected.samples:
            return [Damage(TABLE_GROUP, f"it lists other samples than shard {shard} was written for", shard)]
        if found.skipped != expected.skipped:
            reason = f"it does not mark the samples that shard {shard} was written without"
            return [Damage(f"{SKIPPED}/c/{shard}", reason, shard)]
        return []

    def examine(self, storage: Storage, key: str, field: Field, shard: int, *, meaning: bool = False) -> list[Damage]:
        """What is wrong with a whole shard file, which stands under this key; with `meaning`, also which of its records
        cannot be a teacher's answer, whatever their checksums say."""
        rows, page_bytes = self.page_rows(field, shard), self.layout.page_bytes(field)
        try:
            with _opened(storage, key) as (file_bytes, read):
                bad, sums = _read_pages(read, len(rows), page_bytes)
                tail = np.frombuffer(read(len(rows) * page_bytes, self.layout.tail_bytes(field)), dtype=np.uint8)
                senseless = self._senseless(read, key, field, shard, rows[bad]) if meaning else []
        except OSError as error:
            return [Damage(key, f"it cannot be read: {error.strerror or error}", shard)]
        sealed = self.sealed or tail.tobytes().startswith(MAGIC)
        expected_bytes = self.file_bytes(field, shard) - (0 if sealed else SEAL_BYTES)
        damages = []
        if file_bytes != expected_bytes:
            damages.append(Damage(key, f"it has {file_bytes} bytes, expected {expected_bytes}", shard))
        for row in dict.fromkeys(rows[bad].tolist()):
            pages_of_row = [page for page in bad.tolist() if rows[page] == row]
            damages.append(Damage(key, f"the checksum of page {ranges(pages_of_row)} does not match", shard, (row,)))
        damages += self.examine_tail(key, tail, field, shard)
        if not damages and sealed:
            seal = Seal.from_bytes(tail[:SEAL_BYTES].tobytes())
            if seal is not None and seal.pages != pages_sum(sums):
                damages.append(Damage(key, "its pages are not those that it was written with", shard))
        return damages + senseless

    def _senseless(
        self, read: Callable[[int, int], bytes], key: str, field: Field, shard: int, damaged: npt.NDArray[np.int64]
    ) -> list[Damage]:
        """Records that make no sense, of those that are neither blank nor among the rows `damaged`."""
        if field.dtype in ("int8", "uint8"):  # of which every value means something
            return []
        table, page_bytes, damages = self.table, self.layout.page_bytes(field), []
        rows, first, pages = np.unique(self.page_rows(field, shard), return_index=True, return_counts=True)
        looked_at = ~np.isin(rows, damaged) & ~np.isin(rows, self.skipped)
        for row, start, count in np.stack([rows, first, pages], axis=1)[looked_at].tolist():
            stored = np.frombuffer(read(start * page_bytes, count * page_bytes), np.uint8).reshape(count, page_bytes)
            values = np.ascontiguousarray(stored[:, :-CHECKSUM_BYTES]).view(np.dtype(field.dtype).newbyteorder("<"))
            values = values.reshape(-1, *field.row_shape)
            tokens = int(table.level_shapes[row].prod(axis=1, dtype=np.int64).sum())
            try:
                check_record(field, values[: table.token_count[row]] if field.per == "token" else values[0], tokens)
            except ValueError as error:
                damages.append(Damage(key, str(error), shard, (row,)))
        return damages


def ranges(numbers: Sequence[int]) -> str:
    """3, 5-9, 12"""
    array = np.asarray(sorted(numbers))
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _read_pages(
    read: Callable[[int, int], bytes], pages: int, page_bytes: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint32]]:
    """Which pages do not match their checksums, or are not there, and the checksums (pages,) that stand after them."""
    at_once = max(1, READ_BYTES // page_bytes)
    matches, sums = np.zeros(pages, dtype=bool), np.zeros(pages, dtype=np.uint32)
    for first in range(0, pages, at_once):
        wanted = min(at_once, pages - first)
        data = np.frombuffer(read(first * page_bytes, wanted * page_bytes), dtype=np.uint8)
        there = data[: len(data) // page_bytes * page_bytes].reshape(-1, page_bytes)
        here = slice(first, first + len(there))
        sums[here] = np.ascontiguousarray(there[:, -CHECKSUM_BYTES:]).view("<u4")[:, 0]
        matches[here] = crc32c.of_rows(there, page_bytes - CHECKSUM_BYTES) == sums[here]
    return np.flatnonzero(~matches), sums


@contextmanager
def _opened(storage: Storage, key: str) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Bytes of a file, and a function of offset and size that reads it. A file is not mapped into memory here: bad
    blocks of a disk shall be an OSError, not the end of the process."""
    if isinstance(storage, Folder):
        with (storage.root / key).open("rb", buffering=0) as file:
            descriptor = file.fileno()
            yield os.fstat(descriptor).st_size, lambda offset, size: os.pread(descriptor, size, offset)
    else:
        data = storage.read(key)
        yield len(data), lambda offset, size: data[offset : offset + size]
