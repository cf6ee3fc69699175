"""Smaller stores from larger ones, without the teacher."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from common.cache.codec import decode_tokens, encode_logits, encode_tokens
from common.cache.plan import Plan, SampleTable, lay_out, store_bytes
from common.cache.reader import CacheReader
from common.cache.sampling import draw_tokens
from common.cache.schema import SKIPPED, CodecInfo, Manifest
from common.cache.storage import TEMPORARY, Folder, locate
from common.cache.writer import Record, blank_record, shard_key
from common.errors import UserError
from common.runtime import BAR_INTERVAL_S, Ranks, log
from teacher_dump.config import PruneConfig, TranscodeConfig, rounding_of
from teacher_dump.encode import (
    Statistics,
    calibrate,
    calibration_of,
    calibration_rows,
    encode_neck,
    read_statistics,
    statistics_of,
    storable,
    stored_neck,
    stored_tokens,
)
from teacher_dump.job import batches
from teacher_dump.records import stored_records
from teacher_dump.store import (
    Batches,
    Constants,
    missing_shards,
    shard_rows,
    writable_store,
    write_errors,
    write_shards,
)
from teacher_dump.tables import size

ROWS_AT_ONCE = 8
TOKEN_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.5, "pq4": 0.25, "pq8": 0.125}


def run_transcode(config: TranscodeConfig) -> None:
    """Draw tokens of every record of one store and encode them into another; resumable as a dump is.

    UserError if the source is incomplete, or holds less than is asked for.
    """
    source = CacheReader(config.store)
    if not source.complete:
        missing = int((~source.finished_shards).sum())
        raise UserError(
            f"expected a complete store, but {missing} shards of {config.store} are missing; dump them first"
        )
    manifest, plan = _target(source, config)
    before_bytes, after_bytes = store_bytes(source.manifest, source.table), store_bytes(manifest, plan.table)
    log.info(
        f"{config.out}: {len(plan.table)} samples, {size(after_bytes)} in {manifest.layout.shards} shards,"
        f" {after_bytes / before_bytes:.1%} of {config.store}"
    )
    statistics, blank = read_statistics(config.store), set(np.flatnonzero(source.blank).tolist())
    with writable_store(config.out, manifest, plan, lambda: _constants(source, manifest, blank), Ranks()):
        new_statistics = read_statistics(config.out)
        shards = missing_shards(config.out, manifest, Ranks())
        left = sum(len(shard_rows(shard, manifest.layout)) for shard in shards)
        with tqdm(total=left, unit=" samples", desc="transcode", mininterval=BAR_INTERVAL_S) as bar:

            def encoded(rows: list[int]) -> list[Record]:
                return [
                    blank_record(manifest, int(plan.table.token_count[row]))
                    if row in blank
                    else _transcode(record, row, source.manifest, manifest, plan, statistics, new_statistics)
                    for row, record in zip(rows, stored_records(source, rows), strict=True)
                ]

            def batches_of(shard: int) -> Batches:
                for rows in batches(shard_rows(shard, manifest.layout), ROWS_AT_ONCE):
                    yield partial(encoded, rows), [row for row in rows if row in blank]
                    bar.update(len(rows))

            write_shards(config.out, manifest, plan, shards, batches_of)
    source.close()


def run_prune(config: PruneConfig) -> None:
    """A store with fewer views, without the neck or the queries, which shares the shard files of another.

    UserError if there is nothing to leave out.
    """
    old, new = locate(config.store), locate(config.out)
    if not (isinstance(old, Folder) and isinstance(new, Folder)):
        raise UserError(f"expected two folders, which can share files, found {old} and {new}; use transcode instead")
    source = CacheReader(config.store)
    there = source.manifest
    views = there.views.views if config.views is None else _fewer_views(there, config.views)
    codec = replace(there.codec, neck=there.codec.neck and config.neck, queries=there.codec.queries and config.queries)
    if views == there.views.views and codec == there.codec:
        raise UserError(
            f"expected something to leave out of {old}, by --views below {views}, or --no-neck or --no-queries where"
            " they are there"
        )
    samples = int((source.table.view < views).sum())  # views follow one another
    layout = replace(there.layout, samples=samples)
    manifest = replace(there, views=replace(there.views, views=views), layout=layout, codec=codec)
    plan = Plan(SampleTable(**{name: column[:samples] for name, column in vars(source.table).items()}), layout)
    constants = {n: value.numpy() for n, value in source.constants.items() if codec.neck or not n.startswith("neck_")}
    blank = set(np.flatnonzero(source.blank).tolist())

    def batches_of(shard: int) -> Batches:
        for rows in batches(shard_rows(shard, layout), ROWS_AT_ONCE):
            yield partial(stored_records, source, rows), [row for row in rows if row in blank]

    with writable_store(config.out, manifest, plan, lambda: constants, Ranks(), needs_room=False, sealed=source.sealed):
        for shard in missing_shards(config.out, manifest, Ranks()):
            if not source.finished_shards[shard]:
                continue
            if shard_rows(shard, layout) == shard_rows(shard, source.manifest.layout):
                with write_errors(config.out):
                    _share_shard(old, new, manifest, shard)
            else:  # the shard where the last view that is kept ends
                write_shards(config.out, manifest, plan, [shard], batches_of)
    source.close()
    kept_bytes = store_bytes(manifest, plan.table)
    log.info(
        f"{config.out}: {len(plan.table)} samples, {size(kept_bytes)}, shared with {config.store}; remove that one to"
        f" free {size(store_bytes(source.manifest, source.table) - kept_bytes)}"
    )


def _target(source: CacheReader, config: TranscodeConfig) -> tuple[Manifest, Plan]:
    """What a dump with the new settings would have planned: the order of the samples stays."""
    there = source.manifest.codec
    keep_tokens = config.keep_tokens or there.keep_tokens
    tokens = config.tokens or there.tokens
    codec = CodecInfo(
        tokens,
        keep_tokens,
        neck=there.neck and config.neck and keep_tokens == 1,
        rounding=there.rounding if tokens == there.tokens else rounding_of(tokens, config.rounding),
        queries=there.queries and config.queries,
        logits=config.logits or there.logits,
    )
    if not 0 < codec.keep_tokens <= 1:
        raise UserError(f"expected --keep-tokens above 0 and at most 1, found {codec.keep_tokens}")
    if there.keep_tokens < 1 and codec.keep_tokens != there.keep_tokens:
        raise UserError(
            f"expected --keep-tokens {there.keep_tokens:g}, which {config.store} was sampled with, found"
            f" {codec.keep_tokens:g}; other fractions need a store of all tokens"
        )
    if TOKEN_BYTES[codec.tokens] > TOKEN_BYTES[there.tokens]:
        raise UserError(f"expected --tokens no larger than the {there.tokens} of {config.store}, found {codec.tokens}")
    if (there.logits, codec.logits) == ("uint8", "float"):
        raise UserError(f"expected --logits uint8, as in {config.store}, found float; that needs a store of floats")
    views = source.manifest.views.views if config.views is None else _fewer_views(source.manifest, config.views)
    manifest = replace(source.manifest, views=replace(source.manifest.views, views=views), codec=codec)
    columns = source.table
    samples = int((columns.view < views).sum())
    plan = lay_out(
        columns.image_id[:samples],
        columns.view[:samples],
        columns.augmentation[:samples],
        columns.level_shapes[:samples],
        keep_tokens=codec.keep_tokens,
        token_bytes=manifest.row_bytes("token"),
        sample_bytes=manifest.row_bytes("sample"),
        group=manifest.batch_size,
    )
    return replace(manifest, layout=plan.layout), plan


def _constants(source: CacheReader, manifest: Manifest, blank: set[int]) -> Constants:
    """The source's constants; where the new codec needs others, with what a dump would have found."""
    constants = {name: value.numpy() for name, value in source.constants.items()}
    here, there = manifest.codec, source.manifest.codec
    if (here.quantised, here.components) == (there.quantised, there.components):
        return constants
    statistics, table, samples = statistics_of(constants), source.table, []
    for rows in calibration_rows(len(table), manifest.batch_size):
        whole = [row for row in rows if row not in blank]
        for row, record in zip(whole, stored_records(source, whole), strict=True):
            key = (manifest.views.seed, int(table.image_id[row]), int(table.view[row]))
            features = [decode_tokens(stored_tokens(record), statistics.tokens), record["token_weights"]]
            if here.neck:
                features += [decode_tokens(stored_neck(record), statistics.neck), record["neck_weights"]]
            samples.append(calibration_of(key, *features))
    kept = {name: value for name, value in constants.items() if name == "query_embeddings"}
    return kept | calibrate(manifest, samples)


def _transcode(
    record: Record,
    row: int,
    there: Manifest,
    here: Manifest,
    plan: Plan,
    statistics: Statistics,
    new_statistics: Statistics,
) -> Record:
    """One record with the tokens that the new store keeps, in its codec. What is stored alike is taken as it is."""
    if there.codec == here.codec:
        return record
    tokens = stored_tokens(record)
    kept: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
    if there.codec.keep_tokens == here.codec.keep_tokens:
        kept = {name: record[name] for name in ("token_positions", "token_weights") if name in record}
    else:
        table = plan.table
        sample = (here.views.seed, int(table.image_id[row]), int(table.view[row]))
        positions, weights = draw_tokens(record["token_weights"], int(table.token_count[row]), sample)
        tokens = {name: stored[positions] for name, stored in tokens.items()}
        kept = {"token_positions": positions, "token_weights": weights}
    image_id, view = int(plan.table.image_id[row]), int(plan.table.view[row])
    if there.codec.tokens != here.codec.tokens:
        key = (here.views.seed, image_id, view, 0)
        decoded = decode_tokens(tokens, statistics.tokens)
        tokens = encode_tokens(decoded, here.codec.tokens, new_statistics.tokens, here.codec.rounding, key)
        if here.codec.neck:
            neck = decode_tokens(stored_neck(record), statistics.neck)
            tokens |= encode_neck(here, image_id, view, neck, new_statistics)
    if there.codec.logits != here.codec.logits:
        kept["logits"] = encode_logits(record["logits"].astype(np.float32))
    return storable(here, {**record, **tokens, **kept}, image_id, view)


def _fewer_views(manifest: Manifest, views: int) -> int:
    if not 1 <= views <= manifest.views.views:
        raise UserError(f"expected --views of 1 to {manifest.views.views}, as many as the store has, found {views}")
    return views


def _share_shard(source: Folder, out: Folder, manifest: Manifest, shard: int) -> None:
    for key in (f"{SKIPPED}/c/{shard}", *(shard_key(field, shard) for field in manifest.fields())):
        if not source.exists(key):
            continue
        (out.root / key).parent.mkdir(parents=True, exist_ok=True)
        out.remove(key)
        try:
            os.link(source.root / key, out.root / key)
        except OSError:  # another file system, or one without links
            partial = out.root / f"{key}{TEMPORARY}-{os.getpid()}"
            shutil.copyfile(source.root / key, partial)
            partial.rename(out.root / key)
