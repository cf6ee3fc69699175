"""Is everything in a store that should be, and is it what was written?"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from common.ahead import map_ahead
from common.cache.examine import Damage, ShardFiles, ranges
from common.cache.members import member_names, member_path
from common.cache.plan import SampleTable
from common.cache.reader import read_constants, read_manifest
from common.cache.schema import (
    ATTRIBUTE,
    CHECKSUMS,
    CONSTANTS_GROUP,
    SKIPPED,
    TABLE_GROUP,
    Field,
    Layout,
    Manifest,
)
from common.cache.seal import SEALED, is_sealed
from common.cache.storage import ARRIVALS, TEMPORARY, Folder, Location, Storage, locate
from common.cache.validate import UNREADABLE, metadata_damage
from common.cache.writer import examine_skipped, finished_shards, metadata_checksums, read_table, shard_key
from common.errors import UserError
from common.runtime import BAR_INTERVAL_S, log
from teacher_dump.compare import compare_with_teacher
from teacher_dump.config import VerifyConfig
from teacher_dump.tables import size


@dataclass(frozen=True)
class Findings:
    """What was found in a store. table: None if it cannot be read. sealed: whether every shard file must be."""

    manifest: Manifest
    table: SampleTable | None
    damages: tuple[Damage, ...]
    missing_shards: tuple[int, ...]
    leftovers: tuple[str, ...]
    read_bytes: int
    sealed: bool

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
    sealed, read_bytes = is_sealed(storage), 0
    damages, table = _examine_metadata(store, manifest, sealed)
    skipped, unreadable = examine_skipped(storage, manifest.layout)
    damages += [Damage(f"{SKIPPED}/c/{shard}", reason, shard) for shard, reason in unreadable.items()]
    if table is not None:
        files = ShardFiles.of(manifest, table, sealed, skipped)
        there = [
            (field, shard) for field in manifest.fields() for shard in present_shards(storage, field, manifest.layout)
        ]
        total_bytes = sum(files.file_bytes(*file) for file in there)
        with (
            ThreadPoolExecutor(threads, "verify") as pool,
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verify", mininterval=BAR_INTERVAL_S) as bar,
        ):
            found = map_ahead(pool, lambda file: _examine(storage, files, *file), there, 2 * threads)
            for file, damage in zip(there, found, strict=True):
                damages += damage
                bar.update(files.file_bytes(*file))
            read_bytes = total_bytes
    # Without a table nobody knows that there are as many samples as the manifest says.
    missing = () if table is None else tuple(np.flatnonzero(~finished_shards(store, manifest)).tolist())
    once = tuple(dict.fromkeys(damages))  # what is wrong with `skipped` is found in each file of the shard
    return Findings(manifest, table, once, missing, _leftovers(storage), read_bytes, sealed)


def _examine(storage: Storage, files: ShardFiles, field: Field, shard: int) -> list[Damage]:
    """What is wrong with one shard file; what comes damaged from a bucket is asked for again."""
    for _ in range(1 if isinstance(storage, Folder) else ARRIVALS):
        damages = files.examine(storage, shard_key(field, shard), field, shard, meaning=True)
        if not damages:
            break
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
        lines.append(f"{len(missing)} of {layout.shards} shards are missing: {ranges(missing)}")
    if findings.leftovers:
        lines.append(
            f"{len(findings.leftovers)} files were left by an interrupted dump, or one is at work:"
            f" {findings.leftovers[0]}{' ...' if len(findings.leftovers) > 1 else ''}"
        )
    finished = layout.shards - len(findings.missing_shards)
    counted = f"{finished} of {layout.shards} shards, {size(findings.read_bytes)} read"
    if findings.sound:
        places = "" if findings.sealed else "; without seals: whether each shard is in its own place cannot be checked"
        return [*lines, f"{locate(store)}: sound; {counted}, every checksum matches{places}"]
    rows = {row for damage in findings.damages for row in damage.rows}
    told = [f"{len(findings.bad_shards)} damaged ({len(rows)} samples named)"] if findings.bad_shards else []
    told += [f"{len(findings.missing_shards)} missing"] if findings.missing_shards else []
    remedy = "`python -m teacher_dump repair` writes these shards again"
    if any(damage.shard is None for damage in findings.damages):
        told.append("metadata damaged")
        remedy = "what all else depends on cannot be mended: dump it again to another place"
    return [*lines, f"{locate(store)}: NOT sound; {counted}: {', '.join(told)}; {remedy}"]


def _examine_metadata(store: Location, manifest: Manifest, sealed: bool) -> tuple[list[Damage], SampleTable | None]:
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
    attributes = {ATTRIBUTE: manifest.to_json(), CHECKSUMS: checksums} | ({SEALED: True} if sealed else {})
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
    return damages, table


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
