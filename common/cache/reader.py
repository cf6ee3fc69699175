"""Reading records for training: byte ranges of shard files straight into batch buffers.

zarr-python reads any store too (the tests compare every byte) but re-reads the shard index on each call and fetches
page by page. Here a sample's pages, which stand side by side, are read by compiled code without the GIL, in a few
threads of the training process: DataLoader workers would send megabytes through a pipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.pages import REASONS, WHOLE, Ranges, memory_at, read_pages
from common.cache.plan import SampleTable, level_strides
from common.cache.schema import ATTRIBUTE, CHECKSUM_BYTES, Manifest
from common.cache.shards import DamagedShard, LocalCopies, LocalShard, OpenShard, OpenShards, RemoteShard
from common.cache.storage import Bucket, Location, Storage, locate, read_array
from common.cache.writer import CONSTANTS_GROUP, finished_shards, read_skipped, read_table, shard_key
from common.errors import UserError
from common.records import CachedBatch

READ_THREADS = 2  # more gain nothing from a page cache; from a fast disk that is not cached they may
REQUESTS = 16  # to a bucket, at once

Verify = Literal["first", "always", "never"]
Rows = npt.NDArray[np.int64]


class CorruptRecord(UserError):
    """A record that is damaged, or that its shard's damage puts out of reach: which one, and where it is."""

    def __init__(self, message: str, *, row: int, image_id: int, view: int, shard: int) -> None:
        super().__init__(message)
        self.row, self.image_id, self.view, self.shard = row, image_id, view, shard


@dataclass
class BatchBuffers:
    """Memory that one batch is read into, reused by later batches: it grows to the largest batch and stays.

    The tensors of a CachedBatch are views of it; they are valid until it is passed to `read` again.
    """

    pin: bool = False
    _flat: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64))
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = torch.empty(size + size // 4, dtype=getattr(torch, dtype), pin_memory=self.pin)
            self._flat[name] = flat
        return flat[:size].view(*shape)

    def converted(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in another type."""
        return self.tensor(f"{name} as {dtype}", tensor.shape, str(dtype).removeprefix("torch.")).copy_(tensor)


class CacheReader:
    """A store, opened for reading. `complete` says whether every shard is there; `rows` lists what can be read.

    store: a folder, or a URL such as s3://bucket/store.zarr. verify: compare checksums when this process reads a record
    for the first time (a training run reads each many times, and memory is not what breaks), always, or never.
    local_cache: where to keep copies of a bucket's shards, at most local_cache_bytes of them.
    """

    def __init__(
        self,
        store: Location,
        *,
        verify: Verify = "first",
        threads: int = READ_THREADS,
        local_cache: Path | None = None,
        local_cache_bytes: int | None = None,
    ) -> None:
        self.storage = locate(store)
        self.path = store
        self.manifest = read_manifest(self.storage)
        with _damage_explained(self.storage):
            self.table: SampleTable = read_table(self.storage)
            self.constants = read_constants(self.storage)
            skipped = read_skipped(self.storage)
        self.fields = self.manifest.fields()
        self.finished_shards = finished_shards(self.storage, self.manifest)
        self._readable = np.repeat(self.finished_shards, self.manifest.layout.shard_samples)[: len(self.table)]
        self._readable[skipped] = False
        self._verify = verify
        self._verified = np.zeros(len(self.table), dtype=bool)
        layout = self.manifest.layout
        self._per_token = np.array([f.per == "token" for f in self.fields])
        self._row_bytes = np.array([f.row_bytes for f in self.fields])
        self._page_bytes = np.array([layout.page_bytes(f) - CHECKSUM_BYTES for f in self.fields])
        remote = isinstance(self.storage, Bucket)
        self.copies: LocalCopies | None = None
        if isinstance(self.storage, Bucket) and local_cache is not None:
            self.copies = LocalCopies(self.storage, self.manifest, local_cache, local_cache_bytes)
        self._shards = OpenShards(self.storage, self.manifest, self.table, self.copies)
        self._threads = threads
        self._pool = ThreadPoolExecutor(REQUESTS if remote else max(1, threads - 1), "cache-reader")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def complete(self) -> bool:
        return bool(self.finished_shards.all())

    def rows(self, view: int | None = None) -> npt.NDArray[np.intp]:
        """The rows of all samples that are in finished shards, of one view or of all."""
        chosen = self._readable if view is None else self._readable & (self.table.view == view)
        return np.flatnonzero(chosen)

    def read(self, rows: Sequence[int] | npt.NDArray[np.intp], buffers: BatchBuffers | None = None) -> CachedBatch:
        """The records of these samples, in this order. CorruptRecord names the sample and the shard."""
        batch, damaged = self._read(np.asarray(rows, dtype=np.int64), buffers or BatchBuffers())
        if damaged:
            raise damaged[0]
        return batch

    def read_sound(
        self, rows: Sequence[int] | npt.NDArray[np.intp], buffers: BatchBuffers | None = None
    ) -> tuple[CachedBatch, tuple[CorruptRecord, ...]]:
        """The records of those samples that can be read, in this order, and what is wrong with each of the others."""
        left, buffers = np.asarray(rows, dtype=np.int64), buffers or BatchBuffers()
        dropped: tuple[CorruptRecord, ...] = ()
        while True:
            batch, damaged = self._read(left, buffers)
            if not damaged:
                return batch, dropped
            dropped += damaged
            left = left[~np.isin(left, [error.row for error in damaged])]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self.copies is not None:
            self.copies.close()
        self._shards.close()

    def _read(self, rows: Rows, buffers: BatchBuffers) -> tuple[CachedBatch, tuple[CorruptRecord, ...]]:
        """A batch; the records named as corrupt have no meaning in it."""
        counts = self.table.token_count[rows].astype(np.int64)
        token_offsets = np.concatenate([[0], np.cumsum(counts)])
        tensors = [
            buffers.tensor(f.name, (int(token_offsets[-1]) if f.per == "token" else len(rows), *f.row_shape), f.dtype)
            for f in self.fields
        ]
        # What to read, (samples, fields): where it begins in its shard file, where it goes, how much it is.
        layout = self.manifest.layout
        shards, row_in_shard = np.divmod(rows, layout.shard_samples)
        page_in_shard = (self.table.token_offset[rows] - shards * layout.shard_tokens) // layout.page_tokens
        first_page = np.where(self._per_token, page_in_shard[:, None], row_in_shard[:, None])
        first_row = np.where(self._per_token, token_offsets[:-1, None], np.arange(len(rows))[:, None])
        parts = _Parts(
            offset=first_page * (self._page_bytes + CHECKSUM_BYTES),
            address=first_row * self._row_bytes + np.array([tensor.data_ptr() for tensor in tensors]),
            size=np.where(self._per_token, counts[:, None], 1) * self._row_bytes,
        )

        opened = {index: self._open(int(shard)) for index, shard in enumerate(shards)}
        damaged = {index: shard for index, shard in opened.items() if isinstance(shard, DamagedShard)}
        local = {index: shard for index, shard in opened.items() if isinstance(shard, LocalShard)}
        remote = {index: shard for index, shard in opened.items() if isinstance(shard, RemoteShard)}
        verify = self._verify == "always" or (self._verify == "first" and not self._verified[rows].all())
        if local:
            damaged |= self._read_local(local, parts, shards, verify)
        if remote:
            damaged |= self._read_remote(remote, parts)
        if verify:
            self._verified[np.delete(rows, list(damaged))] = True
        read = {field.name: tensor for field, tensor in zip(self.fields, tensors, strict=True)}
        errors = tuple(self._corrupt(int(rows[index]), damage) for index, damage in sorted(damaged.items()))
        return self._batch(rows, token_offsets, read, buffers), errors

    def _open(self, shard: int) -> OpenShard | DamagedShard:
        try:
            return self._shards.get(shard)
        except DamagedShard as error:
            return error

    def _read_local(
        self, local: dict[int, LocalShard], parts: _Parts, shards: Rows, verify: bool
    ) -> dict[int, DamagedShard]:
        """Read samples of open files; returns what is wrong with those that are damaged."""
        chosen = np.array(list(local))
        size = parts.size[chosen].reshape(-1)
        ranges = Ranges(
            file=np.array([opened.descriptors for opened in local.values()], dtype=np.int64).reshape(-1),
            offset=parts.offset[chosen].reshape(-1),
            page_bytes=np.tile(self._page_bytes, len(chosen)),
            address=parts.address[chosen].reshape(-1),
            size=size,
        )
        # Each thread gets neighbouring ranges of about the same number of bytes; the last is this one.
        ends = np.cumsum(size)
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, self._threads) // self._threads).tolist()
        *spans, own = zip([0, *cuts], [*cuts, len(size)], strict=True)
        others = [self._pool.submit(read_pages, ranges, *span, verify) for span in spans]
        found = [read_pages(ranges, *own, verify)]
        states = np.concatenate([other.result() for other in others] + found).reshape(len(chosen), len(self.fields))
        return {
            int(chosen[i]): DamagedShard(shard_key(self.fields[f], int(shards[chosen[i]])), REASONS[int(states[i, f])])
            for i, f in np.argwhere(states != WHOLE)
        }

    def _read_remote(self, remote: dict[int, RemoteShard], parts: _Parts) -> dict[int, DamagedShard]:
        """Read samples of a bucket, REQUESTS fields at a time; returns what is wrong with those that are damaged."""

        def read(index: int, f: int) -> DamagedShard | None:
            into = memory_at(int(parts.address[index, f]), int(parts.size[index, f]))
            try:
                remote[index].read_pages(f, int(parts.offset[index, f]), int(self._page_bytes[f]), into)
            except DamagedShard as error:
                return error
            return None

        asked = {index: [self._pool.submit(read, index, f) for f in range(len(self.fields))] for index in remote}
        wait([future for futures in asked.values() for future in futures])  # none may write to the buffers any more
        results = ((index, future.result()) for index, futures in asked.items() for future in futures)
        return {index: damage for index, damage in results if damage is not None}

    def _corrupt(self, row: int, damage: DamagedShard) -> CorruptRecord:
        image_id, view = int(self.table.image_id[row]), int(self.table.view[row])
        return CorruptRecord(
            f"{self.storage}/{damage.key}: the record of image {image_id}, view {view} is damaged: {damage.reason};"
            f" `python -m teacher_dump verify {self.storage}` lists all damage, `repair` mends it",
            row=row,
            image_id=image_id,
            view=view,
            shard=row // self.manifest.layout.shard_samples,
        )

    def _batch(self, rows: Rows, token_offsets: Rows, read: dict[str, Tensor], buffers: BatchBuffers) -> CachedBatch:
        if "token_positions" in read:
            positions = buffers.converted("token_positions", read["token_positions"], torch.int64)
        else:
            counts = np.diff(token_offsets)
            positions = torch.from_numpy(np.arange(token_offsets[-1]) - np.repeat(token_offsets[:-1], counts))
        sizes = self.table.augmentation[rows, 5:7]  # height, width
        return CachedBatch(
            tokens=read["tokens"],
            token_scales=read.get("token_scales"),
            channel_scale=self.constants.get("channel_scale"),
            channel_shift=self.constants.get("channel_shift"),
            token_positions=positions,
            token_weights=read["token_weights"],
            token_offsets=torch.from_numpy(token_offsets),
            level_shapes=torch.from_numpy(self.table.level_shapes[rows].astype(np.int64)),
            queries=read["queries"],
            logits=read["logits"],
            boxes_cxcywh=read["boxes_cxcywh"],
            quality=read["quality"],
            assignment=buffers.converted("assignment", read["assignment"], torch.int64),
            level_strides=torch.from_numpy(level_strides(self.manifest.teacher, sizes[:, 0], sizes[:, 1])),
        )


@dataclass(frozen=True)
class _Parts:
    """What to read of a batch, each (samples, fields) int64: byte offset in a shard file, address, size in bytes."""

    offset: Rows
    address: Rows
    size: Rows


def read_manifest(store: Location) -> Manifest:
    """The manifest of a store. UserError if there is none."""
    storage = locate(store)
    try:
        metadata = storage.read("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{storage}: expected a store written by `python -m teacher_dump`, found nothing of that kind"
            " (no zarr.json); name the store with --cache"
        ) from None
    try:
        attributes = json.loads(metadata)["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{storage}/zarr.json is not a Zarr v3 group ({error!r}); dump the store again") from None
    return Manifest.from_json(attributes.get(ATTRIBUTE), str(storage))


def read_constants(store: Location) -> dict[str, Tensor]:
    """The teacher's constants. OSError or ValueError if they are missing or damaged."""
    storage = locate(store)
    names = sorted(storage.folders(CONSTANTS_GROUP))
    return {name: torch.from_numpy(read_array(storage, f"{CONSTANTS_GROUP}/{name}").copy()) for name in names}


@contextmanager
def _damage_explained(storage: Storage) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{storage}: the sample table or another array that all samples need is damaged ({error}); dump it again"
        ) from None
