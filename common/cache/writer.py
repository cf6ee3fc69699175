"""Creating a store and writing its shards, each whole and all at once.

A shard of a field is streamed to a temporary file beside its final place: pages in row order, each followed by its
crc32c, then its seal and the index. When all fields of the shard are on disk they are renamed into place. A killed
process leaves at most temporary files, which the next one removes; a shard counts as written when every field's file is
there.
In a bucket a shard is assembled in memory (about SHARD_BYTES; twice that while the one before is on its way) and put.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from common.cache.plan import Plan, SampleTable
from common.cache.schema import (
    ATTRIBUTE,
    CHECKSUMS,
    CONSTANTS_GROUP,
    MISSING,
    SKIPPED,
    TABLE_GROUP,
    Field,
    Layout,
    Manifest,
)
from common.cache.seal import SEALED, Owner, Seal, field_sum, owners, pages_sum
from common.cache.storage import Location, NewFile, Storage, locate, publish_all, read_checked
from common.cache.validate import check_constants, check_manifest, check_table, manifest_checksum, read_array
from common.errors import UserError

Record = Mapping[str, npt.NDArray[Any]]


def create_store(
    store: Location,
    manifest: Manifest,
    plan: Plan,
    constants: Mapping[str, npt.NDArray[np.float32]],
    *,
    sealed: bool = True,
) -> None:
    """Write everything of a store but its shards; the store appears all at once.

    constants: what the teacher has once and not per sample, such as its query embeddings. sealed: False where shard
    files of an older store, which have no seals, are to be shared. UserError where constants or plan are such that no
    reader would take them.
    """
    try:
        check_manifest(manifest)
        check_table(manifest, plan.table)
        check_constants(manifest, constants)
    except ValueError as error:
        raise UserError(f"{store} cannot be written, for no reader would take it: {error}") from None

    def build(folder: Path) -> None:
        group = zarr.create_group(folder, zarr_format=3, attributes={ATTRIBUTE: manifest.to_json()})
        for field in manifest.fields():
            _create_field(group, field, manifest.layout)
        for name, arrays in ((TABLE_GROUP, vars(plan.table)), (CONSTANTS_GROUP, constants)):
            inner = group.create_group(name)
            for array_name, array in arrays.items():
                # One chunk: the reader maps it into memory instead of reading it.
                inner.create_array(
                    array_name,
                    data=array,
                    chunks=array.shape,
                    compressors=[Crc32cCodec()],
                    config={"write_empty_chunks": True},  # a chunk of zeros, too, must be there with its checksum
                )
        group.create_array(
            SKIPPED,
            shape=(len(plan.table),),
            chunks=(manifest.layout.shard_samples,),
            dtype="uint8",
            compressors=[Crc32cCodec()],
            fill_value=0,
        )
        group.update_attributes({CHECKSUMS: metadata_checksums(folder, manifest)} | ({SEALED: True} if sealed else {}))

    locate(store).create(build)


def metadata_checksums(store: Location, manifest: Manifest) -> dict[str, int]:
    """crc32c of the manifest, as json without spaces and with sorted keys, and of the bytes of every other zarr.json.

    Shards and the sample table carry their own checksums; these cover the rest of a store. -1 for a missing file.
    """
    storage = locate(store)
    folders = [TABLE_GROUP, CONSTANTS_GROUP, SKIPPED, *(field.name for field in manifest.fields())]
    folders += [f"{group}/{name}" for group in (TABLE_GROUP, CONSTANTS_GROUP) for name in storage.folders(group)]
    keys = sorted(f"{folder}/zarr.json" for folder in folders)
    return {ATTRIBUTE: manifest_checksum(manifest.to_json())} | {key: _checksum_of(storage, key) for key in keys}


def _checksum_of(storage: Storage, key: str) -> int:
    try:
        return int(google_crc32c.value(storage.read(key)))
    except FileNotFoundError:
        return -1


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
        chunk_key_encoding={"name": "default", "separator": "."},  # all shards of a field in one folder
    )


def shard_key(field: Field, shard: int) -> str:
    """Where Zarr's default chunk key encoding, with dots, puts a shard: only the first dimension is cut."""
    return f"{field.name}/{_shard_name(field, shard)}"


def _shard_name(field: Field, shard: int) -> str:
    return f"c.{shard}" + ".0" * len(field.row_shape)


def finished_shards(store: Location, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """(shards,) True where every field's file is in place. Lists each field's folder once."""
    storage, shards = locate(store), range(manifest.layout.shards)
    here = np.ones(len(shards), dtype=bool)
    for field in manifest.fields():
        names = set(storage.names(field.name))
        here &= np.fromiter((_shard_name(field, shard) in names for shard in shards), dtype=bool, count=len(shards))
    return here


class ShardWriter:
    """Writes one shard of every field: `add` the shard's records in store order, then `commit`.

    When anything fails, nothing of the shard remains. table: the store's.
    """

    def __init__(self, store: Location, manifest: Manifest, table: SampleTable, shard: int) -> None:
        self._storage, self._shard, self._layout = locate(store), shard, manifest.layout
        self._manifest, self._table = manifest, table
        self._files: dict[Field, _ShardFile] = {}
        try:
            for field in manifest.fields():
                new_file = self._storage.new_file(shard_key(field, shard))
                self._files[field] = _ShardFile(new_file, field, manifest.layout)
        except BaseException:
            self.discard()
            raise
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
            owner = owners(self._manifest, self._table, skipped)(self._shard)
            publish_all([file.finished(owner) for file in self._files.values()])
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()

    def _note_skipped(self, rows: Collection[int]) -> None:
        """Write this shard's chunk of the array `skipped`, or remove that of an earlier attempt."""
        key = f"{SKIPPED}/c/{self._shard}"
        if not rows:
            self._storage.remove(key)
            return
        marks = np.zeros(self._layout.shard_samples, dtype=np.uint8)
        marks[np.asarray(list(rows)) - self._shard * self._layout.shard_samples] = 1
        file = self._storage.new_file(key)
        try:
            file.write([marks, checksum(marks)])
            publish_all([file])
        finally:
            file.discard()


class _ShardFile:
    """One shard of one field, in the making."""

    def __init__(self, file: NewFile, field: Field, layout: Layout) -> None:
        self._file, self._field, self._page_rows = file, field, layout.page_rows(field)
        self._index = np.full((layout.shard_pages(field), 2), MISSING, dtype="<u8")
        self._page_bytes, self._pages = layout.page_bytes(field), 0
        self._sums = np.zeros(layout.shard_pages(field), dtype=np.uint32)
        self.discard = file.discard

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
        contents = rows.reshape(-1).view(np.uint8).reshape(pages, -1)
        sums = [checksum(page) for page in contents]
        self._file.write([part for page in zip(contents, sums, strict=True) for part in page])
        self._sums[self._pages : self._pages + pages] = np.concatenate(sums).view("<u4")
        index = self._index[self._pages : self._pages + pages]
        index[:, 1] = self._page_bytes
        index[:, 0] = np.arange(self._pages, self._pages + pages) * self._page_bytes
        self._pages += pages

    def finished(self, owner: Owner) -> NewFile:
        """The file, with its seal and its index."""
        seal = Seal(owner, field_sum(self._field), pages_sum(self._sums[: self._pages]))
        index = self._index.reshape(-1).view(np.uint8)
        self._file.write([seal.to_bytes(), index, checksum(index)])
        return self._file


def checksum(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """crc32c as Zarr's codec of that name appends it: 4 bytes, little endian."""
    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)


def remove_partial(store: Location) -> None:
    """Remove what a killed process left in the making."""
    locate(store).remove_partial()


def blank_record(manifest: Manifest, tokens: int) -> Record:
    """The record of a sample that the teacher never saw: zeros, assigned to nothing, of no weight."""
    record = {
        field.name: np.zeros(((tokens,) if field.per == "token" else ()) + field.row_shape, dtype=field.dtype)
        for field in manifest.fields()
    }
    record["assignment"].fill(-1)
    return record


def read_table(store: Location, manifest: Manifest) -> SampleTable:
    """The sample table, mapped into memory. OSError or ValueError if it is missing, damaged or makes no sense."""
    storage = locate(store)
    columns = manifest.columns().items()
    table = SampleTable(
        **{name: read_array(storage, f"{TABLE_GROUP}/{name}", shape, dtype) for name, (shape, dtype) in columns}
    )
    check_table(manifest, table)
    return table


def read_skipped(store: Location, layout: Layout) -> npt.NDArray[np.intp]:
    """Rows without a teacher's answer, because their images could not be decoded. UserError if that is damaged."""
    rows, damaged = examine_skipped(store, layout)
    for shard, reason in damaged.items():
        raise UserError(
            f"{locate(store)}/{SKIPPED}/c/{shard}: {reason}; `python -m teacher_dump repair {locate(store)}` mends it"
        )
    return rows


def examine_skipped(store: Location, layout: Layout) -> tuple[npt.NDArray[np.intp], dict[int, str]]:
    """The rows of `read_skipped` that can be read, and by shard what is wrong with the others."""
    storage = locate(store)
    rows, damaged = [np.empty(0, dtype=np.intp)], {}
    for shard in sorted(int(name) for name in storage.names(f"{SKIPPED}/c") if re.fullmatch("[0-9]{1,10}", name)):
        try:
            marks = read_checked(storage, f"{SKIPPED}/c/{shard}")
            blank = shard * layout.shard_samples + np.flatnonzero(marks)
            if len(marks) != layout.shard_samples or (blank >= layout.samples).any():
                raise ValueError("it does not have a mark for each sample of a shard")
            rows.append(blank)
        except (OSError, ValueError) as error:
            damaged[shard] = str(error)
    return np.concatenate(rows), damaged
