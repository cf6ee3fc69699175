"""Is everything in a store that should be, and is it what was written?

The layout follows from the manifest and the sample table, so every byte of a shard file has a known place: pages one
after another, each with its checksum, then the index with its own. Nothing here trusts the index to find a page.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from tqdm import tqdm

from common.ahead import map_ahead
from common.cache.plan import SampleTable
from common.cache.reader import read_constants, read_manifest
from common.cache.schema import ATTRIBUTE, CHECKSUM_BYTES, MISSING, Field, Manifest
from common.cache.writer import (
    CHECKSUMS,
    CONSTANTS_GROUP,
    SKIPPED,
    TABLE_GROUP,
    TEMPORARY,
    checksum,
    finished_shards,
    metadata_checksums,
    read_table,
    shard_path,
)
from common.runtime import log
from teacher_dump.compare import compare_with_teacher
from teacher_dump.config import VerifyConfig
from teacher_dump.tables import size

READ_BYTES = 8 * 2**20  # of one shard file at once
UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # what zarr raises for damaged arrays


@dataclass(frozen=True)
class Damage:
    """Something wrong in one file. rows: samples of the store that cannot be trusted; none where all is lost anyway."""

    path: Path
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
    leftovers: tuple[Path, ...]
    read_bytes: int

    @property
    def sound(self) -> bool:
        return not self.damages and not self.missing_shards

    @property
    def bad_shards(self) -> tuple[int, ...]:
        return tuple(sorted({damage.shard for damage in self.damages if damage.shard is not None}))


def run_verify(config: VerifyConfig) -> bool:
    """Whether all is well; prints what is not."""
    findings = examine(config.store, config.threads)
    print("\n".join(report(config.store, findings)))
    if not config.against_teacher:
        return findings.sound
    if not findings.sound:
        log.warning("damaged or missing shards are not compared with the teacher")
    return compare_with_teacher(config.store, config.source, config.against_teacher) and findings.sound


def examine(store: Path, threads: int) -> Findings:
    """Read all of a store, with a progress bar. UserError if it has no readable manifest."""
    manifest = read_manifest(store)
    damages, table = _examine_metadata(store, manifest)
    present: list[tuple[Field, int]] = []
    read_bytes = 0
    if table is not None:
        fields = manifest.fields()
        present = [
            (f, shard)
            for shard in range(manifest.layout.shards)
            for f in fields
            if shard_path(store, f, shard).exists()
        ]
        total_bytes = sum(shard_path(store, f, shard).stat().st_size for f, shard in present)
        with (
            ThreadPoolExecutor(threads, "verify") as pool,
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verify") as bar,
        ):
            checked = map_ahead(pool, lambda item: examine_shard(store, manifest, table, *item), present, 2 * threads)
            for found, file_bytes in checked:
                damages += found
                read_bytes += file_bytes
                bar.update(file_bytes)
    finished = finished_shards(store, manifest)
    leftovers = [*store.rglob(f"*{TEMPORARY}-*"), *store.parent.glob(f"{store.name}{TEMPORARY}-*")]
    missing = tuple(np.flatnonzero(~finished).tolist())
    return Findings(manifest, table, tuple(damages), missing, tuple(sorted(leftovers)), read_bytes)


def examine_shard(
    store: Path, manifest: Manifest, table: SampleTable, field: Field, shard: int
) -> tuple[list[Damage], int]:
    """What is wrong with one shard file, and its bytes."""
    path, layout = shard_path(store, field, shard), manifest.layout
    page_bytes, index_bytes = layout.page_bytes(field), layout.index_bytes(field)
    owners = _page_owners(manifest, table, field, shard)
    damages: list[Damage] = []
    try:
        with path.open("rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            expected_bytes = len(owners) * page_bytes + index_bytes
            if file_bytes != expected_bytes:
                reason = f"the file has {file_bytes} bytes, expected {expected_bytes}"
                damages.append(Damage(path, reason, shard))
            bad = [page for page, matches in enumerate(_page_sums(file, len(owners), page_bytes)) if not matches]
            index = os.pread(file.fileno(), index_bytes, len(owners) * page_bytes)
    except OSError as error:
        return [Damage(path, f"it cannot be read: {error.strerror}", shard)], 0
    for row in dict.fromkeys(owners[bad].tolist()):
        pages = [page for page in bad if owners[page] == row]
        damages.append(Damage(path, f"the checksum of page {_ranges(pages)} does not match", shard, (row,)))
    if index != _expected_index(len(owners), layout.shard_pages(field), page_bytes):
        damages.append(Damage(path, "the shard index is not what it should be", shard))
    return damages, file_bytes


def report(store: Path, findings: Findings) -> list[str]:
    """The findings, for people: a line for each damage, then a summary."""
    table, layout = findings.table, findings.manifest.layout
    lines = []
    for damage in findings.damages:
        names = [f" (image {table.image_id[row]}, view {table.view[row]})" for row in damage.rows if table is not None]
        shard = "" if damage.shard is None else f"shard {damage.shard}: "
        lines.append(f"{shard}{damage.path.relative_to(store)}: {damage.reason}{''.join(names)}")
    if findings.missing_shards:
        missing = findings.missing_shards
        lines.append(f"{len(missing)} of {layout.shards} shards are missing: {_ranges(missing)}")
    if findings.leftovers:
        lines.append(
            f"{len(findings.leftovers)} files were left by an interrupted dump, or one is at work:"
            f" {findings.leftovers[0].name}{' ...' if len(findings.leftovers) > 1 else ''}"
        )
    finished = layout.shards - len(findings.missing_shards)
    counted = f"{finished} of {layout.shards} shards, {size(findings.read_bytes)} read"
    if findings.sound:
        return [*lines, f"{store}: sound; {counted}, every checksum matches"]
    rows = {row for damage in findings.damages for row in damage.rows}
    told = [f"{len(findings.bad_shards)} damaged ({len(rows)} samples named)"] if findings.damages else []
    told += [f"{len(findings.missing_shards)} missing"] if findings.missing_shards else []
    remedy = "`python -m teacher_dump repair` writes these shards again"
    if any(damage.shard is None for damage in findings.damages):
        remedy = "its metadata is damaged too: dump it again"
    return [*lines, f"{store}: NOT sound; {counted}: {', '.join(told)}; {remedy}"]


def _examine_metadata(store: Path, manifest: Manifest) -> tuple[list[Damage], SampleTable | None]:
    """Everything but the fields' shards: what a store is and where its samples are."""
    damages = []
    recorded = zarr.open_group(store, mode="r").attrs.asdict().get(CHECKSUMS)
    for name, value in metadata_checksums(store, manifest).items():
        if not isinstance(recorded, dict) or recorded.get(name) != value:
            path = store / ("zarr.json" if name == ATTRIBUTE else name)
            damages.append(Damage(path, "it is not what was written"))
    table: SampleTable | None = None
    try:
        table = read_table(store)
    except UNREADABLE as error:
        damages.append(Damage(store / TABLE_GROUP, f"the sample table cannot be read: {error}"))
    try:
        read_constants(store)
    except UNREADABLE as error:
        damages.append(Damage(store / CONSTANTS_GROUP, f"the teacher's constants cannot be read: {error}"))
    for path in sorted((store / SKIPPED / "c").glob("*")):
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if path.name.isdigit() and not np.array_equal(checksum(data[:-CHECKSUM_BYTES]), data[-CHECKSUM_BYTES:]):
            damages.append(Damage(path, "its checksum does not match", int(path.name)))
    return damages, table


def _page_owners(manifest: Manifest, table: SampleTable, field: Field, shard: int) -> npt.NDArray[np.int64]:
    """(pages,) the row of the store that each page of a shard file belongs to."""
    layout = manifest.layout
    rows = np.arange(shard * layout.shard_samples, min(layout.samples, (shard + 1) * layout.shard_samples))
    pages = -(-table.token_count[rows] // layout.page_tokens) if field.per == "token" else 1
    return np.repeat(rows, pages)


def _page_sums(file: io.FileIO, pages: int, page_bytes: int) -> Iterator[bool]:
    """Whether the checksum after each page matches; a page that the file does not hold does not."""
    at_once = max(1, READ_BYTES // page_bytes)
    for first in range(0, pages, at_once):
        count = min(at_once, pages - first)
        data = np.frombuffer(os.pread(file.fileno(), count * page_bytes, first * page_bytes), dtype=np.uint8)
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
