"""Reading records for training: byte ranges of shard files straight into batch buffers.

zarr-python reads any store too (the tests compare every byte) but re-reads the shard index on each call and fetches
page by page. Here a sample's pages, which stand side by side, are read by compiled code without the GIL, in a few
threads of the training process: DataLoader workers would send megabytes through a pipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.members import member_names, member_path
from common.cache.pages import REASONS, WHOLE, Pieces, Placement, memory_at, read_pieces
from common.cache.plan import SampleTable, level_strides
from common.cache.schema import ATTRIBUTE, CHECKSUM_BYTES, Manifest
from common.cache.shards import DamagedShard, LocalCopies, LocalShard, OpenShards, RemoteShard
from common.cache.storage import Bucket, Location, Storage, locate, read_array
from common.cache.writer import CONSTANTS_GROUP, finished_shards, read_skipped, read_table, shard_key
from common.errors import UserError
from common.records import CachedBatch

READ_THREADS = 2  # more gain nothing from a page cache; from a fast disk that is not cached they may
LEFT_BYTES = 3 * 2**19  # of a batch, that the other threads read while this one puts it together
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
    _whole: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    _last: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)
    _address: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def address(self, name: str, count: int, row_shape: tuple[int, ...], dtype: str) -> int:
        """Where `count` rows begin."""
        key = name, row_shape
        whole = self._whole.get(key)
        if whole is None or len(whole) < count:
            shape = (count + count // 4, *row_shape)
            self._whole[key] = torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=self.pin)
            self._last[key], self._address[key] = self._whole[key], self._whole[key].data_ptr()
        return self._address[key]

    def rows(self, name: str, count: int, row_shape: tuple[int, ...], dtype: str) -> Tensor:
        """They, as a tensor (count, *row_shape). What was given last is given again if it is as long: a view costs
        torch tens of microseconds after reading has emptied the processor's caches."""
        self.address(name, count, row_shape, dtype)
        key = name, row_shape
        if len(self._last[key]) != count:
            self._last[key] = self._whole[key].narrow(0, 0, count)
        return self._last[key]


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
        self.finished_shards = finished_shards(self.storage, self.manifest)
        self._readable = np.repeat(self.finished_shards, self.manifest.layout.shard_samples)[: len(self.table)]
        self._readable[skipped] = False
        self._verify = verify
        self.choose_fields({field.name for field in self.manifest.fields()})
        teacher = self.manifest.teacher
        self._assigned = (teacher.layers, teacher.queries)
        # Plain views: memory maps take several times as long to index.
        self._token_count, self._token_offset = np.asarray(self.table.token_count), np.asarray(self.table.token_offset)
        self._no_queries = torch.empty((0, teacher.layers, teacher.queries, teacher.channels), dtype=torch.float16)
        self._every_position = np.arange(self.table.token_count.max(initial=0), dtype=np.int32)
        self._strides = torch.tensor(teacher.strides, dtype=torch.float32)[:, None].expand(-1, 2)
        remote = isinstance(self.storage, Bucket)
        self.copies: LocalCopies | None = None
        if isinstance(self.storage, Bucket) and local_cache is not None:
            self.copies = LocalCopies(self.storage, self.manifest, local_cache, local_cache_bytes)
        self._shards = OpenShards(self.storage, self.manifest, self.table, self.copies)
        self._helpers = threads - 1
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

    def keep_shards(self, shards: npt.NDArray[np.bool_]) -> None:
        """From now on only these (shards,) count as finished, as if the others were still to be written."""
        self.finished_shards &= shards
        self._readable &= np.repeat(shards, self.manifest.layout.shard_samples)[: len(self.table)]

    def keep_rows(self, rows: npt.NDArray[np.bool_]) -> None:
        """From now on only these (N,) can be read, of those that could."""
        self._readable &= rows

    def choose_fields(self, names: Collection[str]) -> None:
        """From now on read only the store's fields of these names: what no loss needs takes no bandwidth.

        The other fields of a CachedBatch have no rows. Not to be called while another thread reads.
        """
        layout, every = self.manifest.layout, self.manifest.fields()
        self._file_of_field = [index for index, field in enumerate(every) if field.name in names]  # in an open shard
        self.fields = tuple(every[index] for index in self._file_of_field)
        self._left_out = {
            field.name: torch.empty((0, *field.row_shape), dtype=getattr(torch, field.dtype))
            for field in every
            if field.name not in names
        }
        self._verified = np.zeros(len(self.table), dtype=bool)
        self._per_token = np.array([f.per == "token" for f in self.fields])
        self._row_bytes = np.array([f.row_bytes for f in self.fields])
        self._page_bytes = np.array([layout.page_bytes(f) - CHECKSUM_BYTES for f in self.fields])

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
        layout = self.manifest.layout
        token_offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self._token_count[rows], out=token_offsets[1:])
        tokens = int(token_offsets[-1])
        wanted = [(f.name, tokens if f.per == "token" else len(rows), f.row_shape, f.dtype) for f in self.fields]
        shards, row_in_shard = np.divmod(rows, layout.shard_samples)
        placement = Placement(
            row_in_shard=row_in_shard,
            page_in_shard=(self._token_offset[rows] - shards * layout.shard_tokens) // layout.page_tokens,
            token_offsets=token_offsets,
            address=np.array([buffers.address(*of_field) for of_field in wanted]),
            per_token=self._per_token,
            row_bytes=self._row_bytes,
            page_bytes=self._page_bytes,
        )
        opened = self._shards.get(shards.tolist())
        local = {index: shard for index, shard in enumerate(opened) if isinstance(shard, LocalShard)}
        damaged, remote = {}, {}
        if len(local) < len(opened):
            damaged = {index: shard for index, shard in enumerate(opened) if isinstance(shard, DamagedShard)}
            remote = {index: shard for index, shard in enumerate(opened) if isinstance(shard, RemoteShard)}
        verify = self._verify == "always" or (self._verify == "first" and not self._verified[rows].all())
        under_way = [self._start_remote(remote, placement)] if remote else []
        under_way += [self._read_local(local, placement, shards, verify)] if local else []
        read = {of_field[0]: buffers.rows(*of_field) for of_field in wanted} | self._left_out
        batch = self._batch(rows, token_offsets, read, buffers)  # while the others read
        for finish in under_way:
            damaged |= finish()
        np.copyto(batch.assignment.numpy(), read["assignment"].numpy())  # a fifth of what torch takes
        if verify:
            self._verified[np.delete(rows, list(damaged))] = True
        return batch, tuple(self._corrupt(int(rows[index]), damage) for index, damage in sorted(damaged.items()))

    def _read_local(
        self, local: dict[int, LocalShard], placement: Placement, shards: Rows, verify: bool
    ) -> Callable[[], dict[int, DamagedShard]]:
        """Read samples of open files, with the other threads, but for the last few pieces. Calling the result reads
        these and returns which samples are damaged.

        Every thread takes pieces in one call: between calls they would wait for the GIL. The others go on while this
        one puts the batch together.
        """
        samples = np.fromiter(local, dtype=np.int64, count=len(local))
        files = np.array([opened.descriptors for opened in local.values()])[:, self._file_of_field]
        pieces = Pieces.of(samples, files)
        for _ in range(self._helpers):
            self._pool.submit(read_pieces, placement, pieces, 1, verify)
        if self._helpers:
            read_pieces(placement, pieces, LEFT_BYTES, verify)

        def finish() -> dict[int, DamagedShard]:
            read_pieces(placement, pieces, 0, verify)
            found = pieces.found
            return {
                int(samples[i]): DamagedShard(
                    shard_key(self.fields[f], int(shards[samples[i]])), REASONS[int(found[i, f])]
                )
                for i, f in (np.argwhere(found != WHOLE) if found.any() else ())
            }

        return finish

    def _start_remote(
        self, remote: dict[int, RemoteShard], placement: Placement
    ) -> Callable[[], dict[int, DamagedShard]]:
        """Begin to fetch samples of a bucket, REQUESTS fields at a time. Calling the result returns the damaged."""

        def read(index: int, f: int) -> DamagedShard | None:
            offset, address, size = placement.range_of(index, f)
            try:
                file, page_bytes = self._file_of_field[f], int(self._page_bytes[f])
                remote[index].read_pages(file, offset, page_bytes, memory_at(address, size))
            except DamagedShard as error:
                return error
            return None

        asked = {index: [self._pool.submit(read, index, f) for f in range(len(self.fields))] for index in remote}

        def finish() -> dict[int, DamagedShard]:
            wait([future for futures in asked.values() for future in futures])  # none may write to buffers any more
            results = ((index, future.result()) for index, futures in asked.items() for future in futures)
            return {index: damage for index, damage in results if damage is not None}

        return finish

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
        positions = read.get("token_positions")
        if positions is None:
            positions = buffers.rows("token_positions", int(token_offsets[-1]), (), "int32")
            filled = positions.numpy()  # torch.cat would wait for threads that are busy reading
            for begin, end in pairwise(token_offsets.tolist()):
                filled[begin:end] = self._every_position[: end - begin]
        if self.manifest.teacher.input_size is None:
            strides = self._strides.expand(len(rows), -1, -1)
        else:
            heights, widths = self.table.augmentation[rows, 5:7].T
            strides = torch.from_numpy(level_strides(self.manifest.teacher, heights, widths))
        return CachedBatch(
            tokens=read["tokens"],
            token_scales=read.get("token_scales"),
            channel_scale=self.constants.get("channel_scale"),
            channel_shift=self.constants.get("channel_shift"),
            token_positions=positions,
            token_weights=read["token_weights"],
            token_offsets=torch.from_numpy(token_offsets),
            level_shapes=torch.from_numpy(self.table.level_shapes[rows].astype(np.int64)),
            queries=read.get("queries", self._no_queries),
            logits=read["logits"],
            boxes_cxcywh=read["boxes_cxcywh"],
            quality=read["quality"],
            assignment=buffers.rows("assignment as int64", len(read["assignment"]), self._assigned, "int64"),
            level_strides=strides,
            codebooks=self.constants.get("codebooks"),
            rotation=self.constants.get("rotation"),
            neck=read.get("neck"),
            neck_scales=read.get("neck_scales"),
            neck_channel_scale=self.constants.get("neck_channel_scale"),
            neck_channel_shift=self.constants.get("neck_channel_shift"),
            neck_codebooks=self.constants.get("neck_codebooks"),
            neck_rotation=self.constants.get("neck_rotation"),
            neck_weights=read.get("neck_weights"),
        )


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
    if ATTRIBUTE not in attributes and (names := member_names(storage)):
        raise UserError(
            f"expected a store of one teacher, found {storage}, which has several ({', '.join(names)}): name one of"
            f" them, such as {member_path(storage, names[0])}"
        )
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
