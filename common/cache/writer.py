"""Creating a store and writing its shards, each whole and all at once.

A shard of a field is streamed to a temporary file beside its final place: pages in row order, each followed by its
crc32c, then the index. When all fields of the shard are on disk they are renamed into place. A killed process leaves
at most temporary files, which the next one removes; a shard counts as written when every field's file is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from common.cache.plan import Plan, SampleTable
from common.cache.schema import ATTRIBUTE, MISSING, Field, Layout, Manifest

TABLE_GROUP, CONSTANTS_GROUP = "samples", "teacher"
TABLE_CHUNK_ROWS = 65536
TEMPORARY = ".partial"
SKIPPED = "skipped"  # array of a store: 1 for each sample whose image could not be decoded
CHECKSUMS = "crc32c"  # group attribute: checksum of the manifest and of every array's zarr.json

Record = Mapping[str, npt.NDArray[Any]]


def create_store(path: Path, manifest: Manifest, plan: Plan, constants: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write everything of a store but its shards; the store appears at `path` by one rename.

    constants: what the teacher has once and not per sample, such as its query embeddings.
    """
    building = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    group = zarr.create_group(building, zarr_format=3, attributes={ATTRIBUTE: manifest.to_json()})
    for field in manifest.fields():
        _create_field(group, field, manifest.layout)
    table = group.create_group(TABLE_GROUP)
    for name, column in vars(plan.table).items():
        chunks = (min(TABLE_CHUNK_ROWS, len(column)), *column.shape[1:])
        table.create_array(name, data=column, chunks=chunks, compressors=[Crc32cCodec()])
    teacher = group.create_group(CONSTANTS_GROUP)
    for name, constant in constants.items():
        teacher.create_array(name, data=constant, chunks=constant.shape, compressors=[Crc32cCodec()])
    shard_samples = (manifest.layout.shard_samples,)
    group.create_array(
        SKIPPED,
        shape=(len(plan.table),),
        chunks=shard_samples,
        dtype="uint8",
        compressors=[Crc32cCodec()],
        fill_value=0,
    )
    group.attrs[CHECKSUMS] = metadata_checksums(building, manifest)
    building.rename(path)


def metadata_checksums(store: Path, manifest: Manifest) -> dict[str, int]:
    """crc32c of the manifest, as json without spaces and with sorted keys, and of the bytes of every other zarr.json.

    Shards and the sample table carry their own checksums; these cover the rest of a store.
    """
    canonical = json.dumps(manifest.to_json(), sort_keys=True, separators=(",", ":")).encode()
    files = sorted(
        str(path.relative_to(store)) for pattern in ("*", "*/*") for path in store.glob(f"{pattern}/zarr.json")
    )
    return {ATTRIBUTE: google_crc32c.value(canonical)} | {
        name: google_crc32c.value((store / name).read_bytes()) for name in files
    }


def _create_field(group: zarr.Group, field: Field, layout: Layout) -> None:
    rows = layout.shards * layout.shard_tokens if field.per == "token" else layout.samples
    group.create_array(
        field.name,
        shape=(rows, *field.row_shape),
        chunks=(layout.page_rows(field), *field.row_shape),
        shards=(layout.shard_rows(field), *field.row_shape),
        dtype=field.dtype,
        compressors=[Crc32cCodec()],
        fill_value=0,
    )


def shard_path(store: Path, field: Field, shard: int) -> Path:
    """Where Zarr's default chunk key encoding puts a shard: only the first dimension is cut."""
    return store.joinpath(field.name, "c", str(shard), *("0" for _ in field.row_shape))


def finished_shards(store: Path, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """(shards,) True where every field's file is in place."""
    fields = manifest.fields()
    here = np.zeros(manifest.layout.shards, dtype=bool)
    for shard in range(len(here)):
        here[shard] = all(shard_path(store, field, shard).exists() for field in fields)
    return here


class ShardWriter:
    """Writes one shard of every field: `add` the shard's records in store order, then `commit`.

    When anything fails, nothing of the shard remains.
    """

    def __init__(self, store: Path, manifest: Manifest, shard: int) -> None:
        self._files = {
            field: _ShardFile(shard_path(store, field, shard), field, manifest.layout) for field in manifest.fields()
        }
        self._store, self._shard, self._layout = store, shard, manifest.layout
        first = shard * manifest.layout.shard_samples
        self._missing = min(manifest.layout.samples - first, manifest.layout.shard_samples)

    def add(self, records: Iterable[Record]) -> None:
        """Append records of samples: for each field its rows, (kept tokens, ...) or the sample's one row."""
        try:
            for record in records:
                for field, file in self._files.items():
                    rows = record[field.name]
                    file.append(rows if field.per == "token" else rows[None])
                self._missing -= 1
        except BaseException:
            self.discard()
            raise

    def commit(self, skipped: Collection[int] = ()) -> None:
        """Bring all files to the disk, then to their places. skipped: rows of the store whose records are blank."""
        try:
            if self._missing:
                raise ValueError(f"{self._missing} records of the shard were not added")
            self._note_skipped(skipped)
            for file in self._files.values():
                file.finish()
            for file in self._files.values():
                file.publish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()

    def _note_skipped(self, rows: Collection[int]) -> None:
        """Write this shard's chunk of the array `skipped`, or remove that of an earlier attempt."""
        path = self._store / SKIPPED / "c" / str(self._shard)
        if not rows:
            path.unlink(missing_ok=True)
            return
        marks = np.zeros(self._layout.shard_samples, dtype=np.uint8)
        marks[np.asarray(list(rows)) - self._shard * self._layout.shard_samples] = 1
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
        partial.write_bytes(marks.tobytes() + checksum(marks).tobytes())
        partial.rename(path)


class _ShardFile:
    """One shard of one field, in the making."""

    def __init__(self, path: Path, field: Field, layout: Layout) -> None:
        self._path, self._field, self._page_rows = path, field, layout.page_rows(field)
        self._index = np.full((layout.shard_pages(field), 2), MISSING, dtype="<u8")
        self._page_bytes, self._pages = layout.page_bytes(field), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
        self._file = self._partial.open("wb", buffering=0)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write the rows of one sample as whole pages, the last one filled up with zeros."""
        field = self._field
        if rows.shape[1:] != field.row_shape:
            raise ValueError(f"{field.name}: expected rows of shape {field.row_shape}, found {rows.shape[1:]}")
        pages = -(-len(rows) // self._page_rows)
        padding = pages * self._page_rows - len(rows)
        rows = np.ascontiguousarray(rows, dtype=np.dtype(field.dtype).newbyteorder("<"))
        if padding:
            rows = np.concatenate([rows, np.zeros((padding, *field.row_shape), dtype=rows.dtype)])
        self._write(
            [part for page in rows.reshape(-1).view(np.uint8).reshape(pages, -1) for part in (page, checksum(page))]
        )
        index = self._index[self._pages : self._pages + pages]
        index[:, 1] = self._page_bytes
        index[:, 0] = np.arange(self._pages, self._pages + pages) * self._page_bytes
        self._pages += pages

    def finish(self) -> None:
        index = self._index.reshape(-1).view(np.uint8)
        self._write([index, checksum(index)])
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        self._partial.rename(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, buffers: list[npt.NDArray[np.uint8]]) -> None:
        limit = os.sysconf("SC_IOV_MAX")
        for start in range(0, len(buffers), limit):
            part = buffers[start : start + limit]
            left = sum(len(buffer) for buffer in part) - os.writev(self._file.fileno(), part)
            if left:  # a disk that fills up writes less than asked before it fails
                raise OSError(f"{self._partial}: {left} bytes could not be written; is the disk full?")


def checksum(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """crc32c as Zarr's codec of that name appends it: 4 bytes, little endian."""
    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)


def remove_partial(store: Path) -> None:
    """Remove what a killed process left in the making."""
    for partial in store.rglob(f"*{TEMPORARY}-*"):
        partial.unlink(missing_ok=True)


def read_table(store: Path) -> SampleTable:
    group = zarr.open_group(store, path=TABLE_GROUP, mode="r")
    columns = dict(group.arrays())
    return SampleTable(**{name: np.asarray(columns[name][:]) for name in SampleTable.__dataclass_fields__})


def blank_record(manifest: Manifest, tokens: int) -> Record:
    """The record of a sample that the teacher never saw: zeros, assigned to nothing, of no weight."""
    record = {
        field.name: np.zeros(((tokens,) if field.per == "token" else ()) + field.row_shape, dtype=field.dtype)
        for field in manifest.fields()
    }
    record["assignment"].fill(-1)
    return record


def read_skipped(store: Path) -> npt.NDArray[np.intp]:
    """Rows without a teacher's answer, because their images could not be decoded."""
    array = zarr.open_array(store, path=SKIPPED, mode="r")
    size = array.chunks[0]
    shards = sorted(int(path.name) for path in (store / SKIPPED / "c").glob("*") if path.name.isdigit())
    rows = [shard * size + np.flatnonzero(array[shard * size : (shard + 1) * size]) for shard in shards]
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.intp)
