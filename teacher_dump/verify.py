"""Is everything in a store that should be, and is it what was written?

The layout follows from the manifest and the sample table, so every byte of a shard file has a known place: pages one
after another, each with its checksum, then the index with its own. Nothing here trusts the index to find a page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common.ahead import map_ahead
from common.cache.members import member_names, member_path
from common.cache.plan import SampleTable
from common.cache.reader import read_constants, read_manifest
from common.cache.schema import (
    ATTRIBUTE,
    CHECKSUM_BYTES,
    CHECKSUMS,
    CONSTANTS_GROUP,
    MISSING,
    SKIPPED,
    TABLE_GROUP,
    Field,
    Layout,
    Manifest,
)
from common.cache.storage import TEMPORARY, Folder, Location, Storage, locate
from common.cache.validate import UNREADABLE, check_record, metadata_damage
from common.cache.writer import (
    finished_shards,
    marked_shards,
    metadata_checksums,
    read_marks,
    read_table,
    shard_key,
)
from common.errors import UserError
from common.runtime import BAR_INTERVAL_S, log
from teacher_dump.compare import compare_with_teacher
from teacher_dump.config import VerifyConfig
from teacher_dump.tables import size

READ_BYTES = 8 * 2**20  # of one shard file at once


@dataclass(frozen=True)
class Damage:
    """Something wrong in one file of a store. rows: the samples concerned, where it can be told."""

    key: str
    reason: str
    shard: int | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What was found in a store. table: None if it cannot be read."""

    manifest: Manifest
    table: SampleTable | None
    damages: tuple[Damage, ...]
    missing_shards: tuple[int, ...]
    leftovers: tuple[str, ...]
    read_bytes: int

    @property
    def sound(self) -> bool:
        return not self.damages and not self.missing_shards

    @property
    def bad_shards(self) -> tuple[int, ...]:
        return tuple(sorted({damage.shard for damage in self.damages if damage.shard is not None}))


def run_verify(config: VerifyConfig) -> bool:
    """Whether all is well, with every teacher of several; prints what is not."""
    names = member_names(config.store)
    if names and config.against_teacher:
        raise UserError(
            f"expected a store of one teacher with --against-teacher, found {config.store}, which has several: name one"
            f" of them, such as {member_path(config.store, names[0])}"
        )
    paths = [member_path(config.store, name) for name in names] or [str(config.store)]
    sound = [_verify_teacher(replace(config, store=path)) for path in paths]  # all of them, whatever the first says
    return all(sound)


def _verify_teacher(config: VerifyConfig) -> bool:
    findings = examine(config.store, config.threads)
    print("\n".join(report(config.store, findings)))
    if not config.against_teacher or findings.table is None:
        return findings.sound
    if not findings.sound:
        log.warning("damaged or missing shards are not compared with the teacher")
    return compare_with_teacher(config.store, config.source, config.against_teacher) and findings.sound


def examine(store: Location, threads: int) -> Findings:
    """Read all of a store, with a progress bar. UserError if it has no readable manifest."""
    storage, manifest = locate(store), read_manifest(store)
    damages, table = _examine_metadata(store, manifest)
    read_bytes = 0
    if table is not None:
        files = [
            ShardFile(shard_key(field, shard), field, shard, _page_owners(manifest, table, field, shard))
            for field in manifest.fields()
            for shard in present_shards(storage, field, manifest.layout)
        ]
        total_bytes = sum(file.expected_bytes(manifest.layout) for file in files)
        with (
            ThreadPoolExecutor(threads, "verify") as pool,
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verify", mininterval=BAR_INTERVAL_S) as bar,
        ):
            blank = _blank(storage, manifest.layout)
            found = map_ahead(
                pool, lambda file: examine_file(storage, manifest.layout, file, table, blank), files, 2 * threads
            )
            for file, damage in zip(files, found, strict=True):
                damages += damage
                bar.update(file.expected_bytes(manifest.layout))
            read_bytes = total_bytes
    # Without a table nobody knows that there are as many samples as the manifest says.
    missing = () if table is None else tuple(np.flatnonzero(~finished_shards(store, manifest)).tolist())
    return Findings(manifest, table, tuple(damages), missing, _leftovers(storage), read_bytes)


@dataclass(frozen=True)
class ShardFile:
    """A shard file as it should be. owners: (pages,) the row of the store that each of its pages belongs to."""

    key: str
    field: Field
    shard: int
    owners: npt.NDArray[np.int64]

    def expected_bytes(self, layout: Layout) -> int:
        return len(self.owners) * layout.page_bytes(self.field) + layout.index_bytes(self.field)


def examine_file(
    storage: Storage, layout: Layout, file: ShardFile, table: SampleTable, blank: npt.NDArray[np.bool_]
) -> list[Damage]:
    """What is wrong with one shard file. blank: (N,) which samples have no image, so that their records are zeros."""
    page_bytes, pages = layout.page_bytes(file.field), len(file.owners)
    damages = []
    try:
        with _opened(storage, file.key) as (file_bytes, read):
            if file_bytes != file.expected_bytes(layout):
                reason = f"it has {file_bytes} bytes, expected {file.expected_bytes(layout)}"
                damages.append(Damage(file.key, reason, file.shard))
            bad = [page for page, matches in enumerate(_page_sums(read, pages, page_bytes)) if not matches]
            index = read(pages * page_bytes, layout.index_bytes(file.field))
            damages += senseless_records(
                read, layout, file, table, blank | np.isin(np.arange(len(table)), file.owners[bad])
            )
    except OSError as error:
        return [Damage(file.key, f"it cannot be read: {error.strerror or error}", file.shard)]
    for row in dict.fromkeys(file.owners[bad].tolist()):
        pages_of_row = [page for page in bad if file.owners[page] == row]
        reason = f"the checksum of page {_ranges(pages_of_row)} does not match"
        damages.append(Damage(file.key, reason, file.shard, (row,)))
    if index != _expected_index(pages, layout.shard_pages(file.field), page_bytes):
        damages.append(Damage(file.key, "its index is not what it should be", file.shard))
    return damages


def senseless_records(
    read: Callable[[int, int], bytes],
    layout: Layout,
    file: ShardFile,
    table: SampleTable,
    excepted: npt.NDArray[np.bool_],
) -> list[Damage]:
    """Records of a shard file that cannot be a teacher's answer, whatever their checksums say. excepted: (N,)"""
    field, page_bytes, damages = file.field, layout.page_bytes(file.field), []
    if field.dtype in ("int8", "uint8"):  # of which every value means something
        return []
    rows, first, pages = np.unique(file.owners, return_index=True, return_counts=True)
    for row, start, count in zip(rows.tolist(), first.tolist(), pages.tolist(), strict=True):
        if excepted[row]:
            continue
        stored = np.frombuffer(read(start * page_bytes, count * page_bytes), np.uint8).reshape(count, page_bytes)
        values = np.ascontiguousarray(stored[:, :-CHECKSUM_BYTES]).view(np.dtype(field.dtype).newbyteorder("<"))
        values = values.reshape(-1, *field.row_shape)
        tokens = int(table.level_shapes[row].prod(axis=1, dtype=np.int64).sum())
        try:
            check_record(field, values[: table.token_count[row]] if field.per == "token" else values[0], tokens)
        except ValueError as error:
            damages.append(Damage(file.key, str(error), file.shard, (row,)))
    return damages


def report(store: Location, findings: Findings) -> list[str]:
    """The findings, for people: a line for each damage, then a summary."""
    table, layout = findings.table, findings.manifest.layout
    lines = []
    for damage in findings.damages:
        names = [f" (image {table.image_id[row]}, view {table.view[row]})" for row in damage.rows if table is not None]
        shard = "" if damage.shard is None else f"shard {damage.shard}: "
        lines.append(f"{shard}{damage.key}: {damage.reason}{''.join(names)}")
    if findings.missing_shards:
        missing = findings.missing_shards
        lines.append(f"{len(missing)} of {layout.shards} shards are missing: {_ranges(missing)}")
    if findings.leftovers:
        lines.append(
            f"{len(findings.leftovers)} files were left by an interrupted dump, or one is at work:"
            f" {findings.leftovers[0]}{' ...' if len(findings.leftovers) > 1 else ''}"
        )
    finished = layout.shards - len(findings.missing_shards)
    counted = f"{finished} of {layout.shards} shards, {size(findings.read_bytes)} read"
    if findings.sound:
        return [*lines, f"{locate(store)}: sound; {counted}, every checksum matches"]
    rows = {row for damage in findings.damages for row in damage.rows}
    told = [f"{len(findings.bad_shards)} damaged ({len(rows)} samples named)"] if findings.bad_shards else []
    told += [f"{len(findings.missing_shards)} missing"] if findings.missing_shards else []
    remedy = "`python -m teacher_dump repair` writes these shards again"
    if any(damage.shard is None for damage in findings.damages):
        told.append("metadata damaged")
        remedy = "what all else depends on cannot be mended: dump it again to another place"
    return [*lines, f"{locate(store)}: NOT sound; {counted}: {', '.join(told)}; {remedy}"]


def _examine_metadata(store: Location, manifest: Manifest) -> tuple[list[Damage], SampleTable | None]:
    """Everything but the fields' shards: what a store is and where its samples are."""
    storage = locate(store)
    damages = []
    try:
        root, checksums = json.loads(storage.read("zarr.json")), metadata_checksums(storage, manifest)
        damages += [Damage(*found) for found in metadata_damage(storage, manifest)]
    except OSError as error:
        return [Damage("zarr.json", f"what it describes cannot be read: {error}")], None
    known = {damage.key for damage in damages}
    for name, value in checksums.items():
        if name not in (ATTRIBUTE, *known) and root["attributes"][CHECKSUMS].get(name) != value:
            damages.append(Damage(name, "it is not what was written"))
    attributes = {ATTRIBUTE: manifest.to_json(), CHECKSUMS: checksums}
    if not damages and root != {"attributes": attributes, "zarr_format": 3, "node_type": "group"}:
        damages.append(Damage("zarr.json", "it is not what was written"))
    table: SampleTable | None = None
    try:
        table = read_table(store, manifest)
    except UNREADABLE as error:
        damages.append(Damage(TABLE_GROUP, f"the sample table cannot be read: {error}"))
    try:
        read_constants(store, manifest)
    except UNREADABLE as error:
        damages.append(Damage(CONSTANTS_GROUP, f"the teacher's constants cannot be read: {error}"))
    for shard in marked_shards(storage):
        try:
            read_marks(storage, manifest.layout, shard)
        except UNREADABLE as error:
            damages.append(Damage(f"{SKIPPED}/c/{shard}", str(error), shard))
    return damages, table


def _blank(storage: Storage, layout: Layout) -> npt.NDArray[np.bool_]:
    """(N,) which samples have no image, as far as it can be read."""
    blank = np.zeros(layout.samples, dtype=bool)
    for shard in marked_shards(storage):
        with suppress(*UNREADABLE):
            blank[read_marks(storage, layout, shard)] = True
    return blank


def present_shards(storage: Storage, field: Field, layout: Layout) -> list[int]:
    """The shards of one field that are there."""
    names = set(storage.names(field.name))
    return [shard for shard in range(layout.shards) if shard_key(field, shard).removeprefix(f"{field.name}/") in names]


def _leftovers(storage: Storage) -> tuple[str, ...]:
    """Files of a dump that was interrupted or is at work."""
    if not isinstance(storage, Folder):
        return ()
    root = storage.root
    inside, beside = root.rglob(f"*{TEMPORARY}-*"), root.parent.glob(f"{root.name}{TEMPORARY}-*")
    return tuple(sorted(str(path.relative_to(root.parent)) for path in (*inside, *beside)))


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


def _page_owners(manifest: Manifest, table: SampleTable, field: Field, shard: int) -> npt.NDArray[np.int64]:
    """(pages,) the row of the store that each page of a shard file belongs to."""
    layout = manifest.layout
    rows = np.arange(shard * layout.shard_samples, min(layout.samples, (shard + 1) * layout.shard_samples))
    pages = -(-table.token_count[rows] // layout.page_tokens) if field.per == "token" else 1
    return np.repeat(rows, pages)


def _page_sums(read: Callable[[int, int], bytes], pages: int, page_bytes: int) -> Iterator[bool]:
    """Whether the checksum after each page matches; a page that the file does not hold does not."""
    at_once = max(1, READ_BYTES // page_bytes)
    for first in range(0, pages, at_once):
        count = min(at_once, pages - first)
        data = np.frombuffer(read(first * page_bytes, count * page_bytes), dtype=np.uint8)
        for page in range(count):
            content = data[page * page_bytes : (page + 1) * page_bytes]
            yield len(content) == page_bytes and (
                google_crc32c.value(content[:-CHECKSUM_BYTES]) == int(content[-CHECKSUM_BYTES:].view("<u4")[0])
            )


def _expected_index(pages: int, shard_pages: int, page_bytes: int) -> bytes:
    index = np.full((shard_pages, 2), MISSING, dtype="<u8")
    index[:pages, 0] = np.arange(pages, dtype=np.uint64) * np.uint64(page_bytes)
    index[:pages, 1] = page_bytes
    data = index.tobytes()
    return data + int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def _ranges(numbers: Sequence[int]) -> str:
    """3, 5-9, 12"""
    array = np.asarray(sorted(numbers))
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
