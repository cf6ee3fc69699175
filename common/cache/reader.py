"""Reading records for training: byte ranges of shard files straight into batch buffers.

zarr-python reads any store too (the tests compare every byte) but re-reads the shard index on each call and fetches
page by page. Here a sample's pages, which stand side by side, are read by compiled code without the GIL, in a few
threads of the training process: DataLoader workers would send megabytes through a pipe.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.cache.buffers import BatchBuffers
from common.cache.examine import ShardFiles
from common.cache.members import member_names, member_path
from common.cache.pages import (
    PAGE_BYTES,
    REASONS,
    SHARD,
    TOKENS,
    Pieces,
    Placement,
    count_up,
    find_misplaced,
    memory_at,
    place_samples,
    read_pieces,
)
from common.cache.plan import SampleTable, level_strides
from common.cache.schema import ATTRIBUTE, CHECKSUM_BYTES, CHECKSUMS, CONSTANTS_GROUP, Field, Manifest
from common.cache.seal import is_sealed
from common.cache.shards import DamagedShard, LocalCopies, LocalShard, OpenShards, RemoteShard
from common.cache.storage import Bucket, Location, locate
from common.cache.validate import (
    UNREADABLE,
    check_constants,
    check_manifest,
    check_metadata,
    constant_shapes,
    damage_explained,
    manifest_checksum,
    read_array,
)
from common.cache.writer import finished_shards, read_skipped, read_table, shard_key
from common.errors import UserError
from common.inputs import no_store
from common.records import CachedBatch
from common.runtime import log
from kernels.threads import Helpers

READ_THREADS = 2  # more gain nothing from a page cache; from a fast disk that is not cached they may
LEFT_BYTES = 3 * 2**19  # of a batch, that the other threads read while this one puts it together
REQUESTS = 16  # to a bucket, at once

ASSIGNMENT_AS_INT64 = "assignment as int64"
DECODING = (  # constants of the store that a batch carries
    *("channel_scale", "channel_shift", "codebooks", "rotation"),
    *("neck_channel_scale", "neck_channel_shift", "neck_codebooks", "neck_rotation"),
)

Verify = Literal["first", "always", "never"]
Rows = npt.NDArray[np.int64]


class CorruptRecord(UserError):
    """A record that is damaged, or that its shard's damage puts out of reach: which one, and where it is."""

    def __init__(self, message: str, *, row: int, image_id: int, view: int, shard: int) -> None:
        super().__init__(message)
        self.row, self.image_id, self.view, self.shard = row, image_id, view, shard


class CacheReader:
    """A store, opened for reading. `complete` says whether every shard is there; `rows` lists what can be read, and
    `blank` marks the records without an image.

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
        with damage_explained(self.storage):
            check_metadata(self.storage, self.manifest)
            self.table: SampleTable = read_table(self.storage, self.manifest)
            self.constants = read_constants(self.storage, self.manifest)
            self.sealed = is_sealed(self.storage)
        skipped = read_skipped(self.storage, self.manifest.layout)
        self.finished_shards = finished_shards(self.storage, self.manifest)
        self._readable = np.repeat(self.finished_shards, self.manifest.layout.shard_samples)[: len(self.table)]
        self.blank = np.zeros(len(self.table), dtype=bool)
        self.blank[skipped] = True
        self._readable &= ~self.blank
        self._verify = verify
        self.choose_fields({field.name for field in self.manifest.fields()})
        teacher = self.manifest.teacher
        # Plain views: memory maps take several times as long to index.
        self._token_count, self._token_offset = np.asarray(self.table.token_count), np.asarray(self.table.token_offset)
        self._level_shapes = np.asarray(self.table.level_shapes)
        self._no_queries = torch.empty((0, teacher.layers, teacher.queries, teacher.channels), dtype=torch.float16)
        self._decoding = {name: self.constants.get(name) for name in DECODING}
        strides = torch.tensor(teacher.strides, dtype=torch.float32)[:, None].expand(-1, 2)
        self._strides = functools.cache(lambda samples: strides.expand(samples, -1, -1))
        remote = isinstance(self.storage, Bucket)
        self.copies: LocalCopies | None = None
        files = ShardFiles.of(self.manifest, self.table, self.sealed, skipped)
        if isinstance(self.storage, Bucket) and local_cache is not None:
            self.copies = LocalCopies(self.storage, self.manifest, files, local_cache, local_cache_bytes)
        self._shards = OpenShards(self.storage, files, self.copies)
        self._helpers, self._helper_count = Helpers("cache-reader"), threads - 1
        self._requests = ThreadPoolExecutor(REQUESTS, "cache-reader") if remote else None
        if not self.sealed:
            log.info(
                f"{self.storage} was written before shard files were sealed: whether each is in its own place cannot be"
                " checked; `python -m teacher_dump transcode` writes it anew, sealed"
            )
        self._check_blank_shards()

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
        self._unverified = len(self.table)
        rows_of_placement = (
            [f.per == "token" for f in self.fields],
            [f.row_bytes for f in self.fields],
            [layout.page_bytes(f) - CHECKSUM_BYTES for f in self.fields],
            self._file_of_field,
        )
        self._of_fields = np.array(rows_of_placement, dtype=np.int64)
        teacher = self.manifest.teacher
        made, shape = [], (teacher.layers, teacher.queries)
        if "assignment" in names:
            made.append(Field(ASSIGNMENT_AS_INT64, "sample", shape, "int64"))
        else:
            self._left_out[ASSIGNMENT_AS_INT64] = torch.empty((0, *shape), dtype=torch.int64)
        self._stored = {field.name for field in every}
        if "token_positions" not in self._stored:
            made.append(Field("token_positions", "token", (), "int32"))
        self._buffered = (*self.fields, *made)

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
        self._helpers.stop()
        if self._requests is not None:
            self._requests.shutdown(cancel_futures=True)
        if self.copies is not None:
            self.copies.close()
        self._shards.close()

    def _check_blank_shards(self) -> None:
        """CorruptRecord where a shard is marked as blank and is not: others are checked when they are read."""
        layout = self.manifest.layout
        for shard in np.setdiff1d(np.flatnonzero(self.finished_shards), self.rows() // layout.shard_samples).tolist():
            for damage in self._shards.get([shard]):
                if isinstance(damage, DamagedShard):
                    raise self._corrupt(shard * layout.shard_samples, damage)

    def _read(self, rows: Rows, buffers: BatchBuffers) -> tuple[CachedBatch, tuple[CorruptRecord, ...]]:
        """A batch; the records named as corrupt have no meaning in it. Damaged copies are read from the bucket."""
        shard_samples = self.manifest.layout.shard_samples
        while True:
            batch, damaged = self._read_once(rows, buffers)
            shards = {int(rows[index]) // shard_samples: damage for index, damage in damaged.items()}
            if not any(self._shards.remove_copy(shard, damage) for shard, damage in shards.items()):
                return batch, tuple(self._corrupt(int(rows[index]), damaged[index]) for index in sorted(damaged))

    def _read_once(self, rows: Rows, buffers: BatchBuffers) -> tuple[CachedBatch, dict[int, DamagedShard]]:
        """A batch, and what is wrong with some samples of it.

        Between batches no thread reads, and after reading all code is slow, for it has left the processor's caches. So
        little comes before the threads begin or after they are done; the batch is put together while they read.
        """
        layout = self.manifest.layout
        samples = place_samples(
            rows, self._token_count, self._token_offset, layout.shard_samples, layout.shard_tokens, layout.page_tokens
        )
        tokens = int(samples[TOKENS, -1])
        address = buffers.fit(self._buffered, len(rows), tokens)
        placement = Placement(samples, self._of_fields, address[: len(self.fields)])
        opened = self._shards.get(samples[SHARD, :-1].tolist())
        verify = self._verify == "always" or (
            self._verify == "first" and self._unverified > 0 and not self._verified[rows].all()
        )
        local = {index: shard for index, shard in enumerate(opened) if isinstance(shard, LocalShard)}
        damaged: dict[int, DamagedShard] = {}
        under_way: list[Callable[[], dict[int, DamagedShard]]] = []
        if len(local) < len(opened):
            damaged = {index: shard for index, shard in enumerate(opened) if isinstance(shard, DamagedShard)}
            remote = {index: shard for index, shard in enumerate(opened) if isinstance(shard, RemoteShard)}
            under_way.append(self._start_remote(remote, placement))
        if local:
            under_way.append(self._read_local(local, placement, verify))
        read = {f.name: buffers.rows(f.name, tokens if f.per == "token" else len(rows)) for f in self._buffered}
        read |= self._left_out
        batch = self._batch(rows, samples[TOKENS], read)
        for finish in under_way:
            damaged |= finish()
        if verify:
            damaged = self._senseless(samples, rows, read) | damaged
        np.copyto(batch.assignment.numpy(), read["assignment"].numpy())  # a fifth of what torch takes
        if verify:
            self._verified[np.delete(rows, list(damaged))] = True
            self._unverified = len(self._verified) - int(np.count_nonzero(self._verified))
        return batch, damaged

    def _senseless(self, samples: Rows, rows: Rows, read: dict[str, Tensor]) -> dict[int, DamagedShard]:
        """Records whose numbers would be used as indices and are none: right checksums do not rule that out."""
        names = {field.name: field for field in self.fields}
        wrong: dict[str, npt.NDArray[np.bool_]] = {}
        if "token_positions" in names:
            tokens = self._level_shapes[rows].prod(axis=2, dtype=np.int64).sum(axis=1)
            misplaced = np.zeros(len(rows), dtype=bool)
            find_misplaced(samples[TOKENS], read["token_positions"].numpy(), tokens, misplaced)
            wrong["token_positions"] = misplaced & ~self.blank[rows]
        if "assignment" in names:
            wrong["assignment"] = read["assignment"].numpy().reshape(len(rows), -1).min(axis=1, initial=-1) < -1
        return {
            index: DamagedShard(shard_key(names[name], int(samples[SHARD, index])), "its numbers cannot be indices")
            for name, found in wrong.items()
            for index in np.flatnonzero(found).tolist()
        }

    def _read_local(
        self, local: dict[int, LocalShard], placement: Placement, verify: bool
    ) -> Callable[[], dict[int, DamagedShard]]:
        """Read samples of open files, with the other threads, but for the last few pieces. Calling the result reads
        these and returns which samples are damaged."""
        descriptors = b"".join([shard.descriptors for shard in local.values()])
        files = np.frombuffer(descriptors, np.int32).reshape(len(local), -1)
        found = np.zeros((len(local), len(self.fields)), np.int8)
        pieces = Pieces(np.array(list(local)), files, np.zeros(4, np.int64), found)
        errors: list[Exception] = []

        def tell(error: Exception) -> None:  # nobody will do the piece that the thread had taken
            errors.append(error)
            pieces.progress[3] = 1

        self._helpers.start(self._helper_count, read_pieces, placement, pieces, 1, verify, tell=tell)
        if self._helper_count:
            read_pieces(placement, pieces, LEFT_BYTES, verify)

        def finish() -> dict[int, DamagedShard]:
            whole = read_pieces(placement, pieces, 0, verify)
            if errors:
                raise errors[0]
            if whole:
                return {}
            damaged = {}
            for i, f in np.argwhere(found).tolist():
                sample = int(pieces.samples[i])
                key = shard_key(self.fields[f], int(placement.samples[SHARD, sample]))
                damaged[sample] = DamagedShard(key, REASONS[int(found[i, f])])
            return damaged

        return finish

    def _start_remote(
        self, remote: dict[int, RemoteShard], placement: Placement
    ) -> Callable[[], dict[int, DamagedShard]]:
        """Begin to fetch samples of a bucket, REQUESTS fields at a time. Calling the result returns the damaged."""

        def read(index: int, f: int) -> DamagedShard | None:
            offset, address, size = placement.range_of(index, f)
            try:
                file, page_bytes = self._file_of_field[f], int(placement.fields[PAGE_BYTES, f])
                remote[index].read_pages(file, offset, page_bytes, memory_at(address, size))
            except DamagedShard as error:
                return error
            return None

        pool = cast(ThreadPoolExecutor, self._requests)
        asked = {index: [pool.submit(read, index, f) for f in range(len(self.fields))] for index in remote}

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

    def _batch(self, rows: Rows, token_offsets: Rows, read: dict[str, Tensor]) -> CachedBatch:
        """The batch, while its fields are read; its assignment, which is stored in another dtype, follows later."""
        if "token_positions" not in self._stored:
            count_up(token_offsets, read["token_positions"].numpy())
        if self.manifest.teacher.input_size is None:
            strides = self._strides(len(rows))
        else:
            heights, widths = self.table.augmentation[rows, 5:7].T
            strides = torch.from_numpy(level_strides(self.manifest.teacher, heights, widths))
        return CachedBatch(
            tokens=read["tokens"],
            token_scales=read.get("token_scales"),
            token_positions=read["token_positions"],
            token_weights=read["token_weights"],
            token_offsets=torch.from_numpy(token_offsets),
            level_shapes=torch.from_numpy(self._level_shapes[rows].astype(np.int64)),
            queries=read.get("queries", self._no_queries),
            logits=read["logits"],
            boxes_cxcywh=read["boxes_cxcywh"],
            quality=read["quality"],
            assignment=read[ASSIGNMENT_AS_INT64],
            level_strides=strides,
            neck=read.get("neck"),
            neck_scales=read.get("neck_scales"),
            neck_weights=read.get("neck_weights"),
            **self._decoding,
        )


def read_manifest(store: Location) -> Manifest:
    """The manifest of a store. UserError if there is none, or if it is damaged or makes no sense."""
    storage = locate(store)
    try:
        metadata = storage.read("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise no_store(storage) from None
    except OSError as error:
        raise UserError(f"{storage}/zarr.json cannot be read: {error.strerror or error}") from None
    try:
        attributes = dict(json.loads(metadata)["attributes"])
    except UNREADABLE as error:
        raise UserError(f"{storage}/zarr.json is not a Zarr v3 group ({error!r}); dump the store again") from None
    if ATTRIBUTE not in attributes and (names := member_names(storage)):
        raise UserError(
            f"expected a store of one teacher, found {storage}, which has several ({', '.join(names)}): name one of"
            f" them, such as {member_path(storage, names[0])}"
        )
    manifest, checksums = Manifest.from_json(attributes.get(ATTRIBUTE), str(storage)), attributes.get(CHECKSUMS)
    if not isinstance(checksums, dict) or checksums.get(ATTRIBUTE) != manifest_checksum(attributes[ATTRIBUTE]):
        raise UserError(f"{storage}/zarr.json: the manifest's checksum does not match; dump the store again")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise UserError(f"{storage}/zarr.json: the manifest makes no sense ({error}); dump the store again") from None
    return manifest


def read_constants(store: Location, manifest: Manifest) -> dict[str, Tensor]:
    """The teacher's constants, on the CPU. OSError or ValueError if one is missing, damaged or makes no sense."""
    storage = locate(store)
    shapes = constant_shapes(manifest, storage.folders(CONSTANTS_GROUP)).items()
    arrays = {name: read_array(storage, f"{CONSTANTS_GROUP}/{name}", shape, "float32") for name, shape in shapes}
    check_constants(manifest, arrays)
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
