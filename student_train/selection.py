"""Which samples of a store a run trains on: those of the shards that are finished when it begins, to its end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.cache.reader import CacheReader
from common.coco import Annotations
from common.errors import UserError
from common.runtime import log

Shards = list[list[int]]  # ranges [first, end) of shards, ascending: plain values for run.json and for other ranks


def finished_ranges(reader: CacheReader) -> Shards:
    """The finished shards of a store. UserError if there are none."""
    if not reader.finished_shards.any():
        raise UserError(
            f"{reader.path}: expected a store with finished shards, found none of its {reader.manifest.layout.shards}:"
            " run the same `python -m teacher_dump` command again"
        )
    edges = np.flatnonzero(np.diff(np.concatenate(([False], reader.finished_shards, [False])).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()  # type: ignore[no-any-return]


def keep_to(reader: CacheReader, shards: Shards) -> None:
    """Let a reader forget what has been finished since these shards were chosen. UserError where one of them is gone.

    Ranks must agree, and a run that goes on must go on with the samples that it began with: a store may grow meanwhile.
    """
    chosen = np.zeros(reader.manifest.layout.shards, dtype=bool)
    for first, end in shards:
        chosen[first:end] = True
    gone = np.flatnonzero(chosen & ~reader.finished_shards)
    if len(gone):
        raise UserError(
            f"{reader.path}: expected the {int(chosen.sum())} shards that the run began with, found {len(gone)} of"
            f" them missing, the first is shard {gone[0]}: complete the store with the same `python -m teacher_dump`"
            " command, or name the store of the run with --cache"
        )
    more = int((reader.finished_shards & ~chosen).sum())
    if more:
        log.warning(f"{reader.path} has {more} shards more than when this run began, which it goes on without")
    reader.keep_shards(chosen)


def in_store(annotations: Annotations, reader: CacheReader) -> Annotations:
    """The annotations with those images only of which the store has at least one finished record."""
    entries = annotations.entries
    return replace(annotations, entries=entries[np.isin(entries.image_ids, reader.table.image_id[reader.rows()])])


def say_if_unfinished(reader: CacheReader) -> None:
    """One line on what of a store there is to train on, unless it is all."""
    if not reader.complete:
        rows, images = reader.rows(), reader.table.image_id
        log.warning(
            f"{reader.path} is UNFINISHED: training on the {len(rows)} of {len(images)} samples, of"
            f" {len(np.unique(images[rows]))} of {reader.manifest.data.images} images, in"
            f" {int(reader.finished_shards.sum())} of {len(reader.finished_shards)} shards; the same `python -m"
            " teacher_dump` command again completes it"
        )
