"""Beginning, resuming and writing a store: what dump, transcode and prune have in common.

One job at a time writes a store. Its first rank creates the store, or checks and tidies the one that is there, with a
lock for itself alone; then all its ranks hold a shared lock until they end, however they end. A second job asks for
the lock alone and is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from common.ahead import WriteBehind
from common.cache.plan import Plan, store_bytes
from common.cache.reader import read_manifest
from common.cache.schema import Layout, Manifest, differences
from common.cache.storage import TEMPORARY, Folder, Location, Storage, locate
from common.cache.writer import Record, ShardWriter, create_store, finished_shards, remove_partial
from common.errors import UserError
from common.runtime import Ranks, log

PATIENCE = timedelta(days=30)  # torch's own, half an hour, is less than ranks may differ by

Constants = Mapping[str, npt.NDArray[np.float32]]
# What makes the next records, to be called in the thread that writes them, and which rows of the store are blank there.
Batches = Iterable[tuple[Callable[[], Sequence[Record]], Sequence[int]]]


@contextmanager
def writable_store(
    out: Location,
    manifest: Manifest,
    plan: Plan,
    constants: Callable[[], Constants],
    ranks: Ranks,
    *,
    needs_room: bool = True,
    sealed: bool = True,
) -> Iterator[None]:
    """A store at `out` with this manifest, for this job alone: created, or found as an earlier attempt left it.

    Ranks wait for the first here and need no word of each other afterwards. UserError if there is a store of another
    configuration, if another job writes to it, or, unless not `needs_room`, if the disk has none for what is missing.
    """
    first, others = ranks.is_first, ranks.world_size > 1
    if others and not dist.is_initialized():  # once: of several teachers, a rank may wait long for the others
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size, timeout=PATIENCE)
    with write_errors(out):
        lock = _begin(out, manifest, plan, constants, needs_room, sealed) if first else None
    if others:
        dist.barrier()
    lock = lock if first else _lock(locate(out), fcntl.LOCK_SH)
    try:
        yield
    finally:
        _unlock(lock)


def write_shards(
    out: Location, manifest: Manifest, plan: Plan, shards: Iterable[int], batches_of: Callable[[int], Batches]
) -> None:
    """Write these shards from the batches that `batches_of` gives for each, encoded and written in a thread beside it.

    At most two batches wait for it. Whatever goes wrong, finished shards stay and the one in progress vanishes.
    """
    with write_errors(out), WriteBehind() as behind:
        for shard in shards:
            writer = ShardWriter(out, manifest, plan.table, shard)
            skipped: list[int] = []
            try:
                for make_records, blank_rows in batches_of(shard):
                    behind(_add, writer, make_records)
                    skipped += blank_rows
                behind(writer.commit, skipped)
            except BaseException:
                behind.wait()
                writer.discard()
                raise


def _add(writer: ShardWriter, make_records: Callable[[], Sequence[Record]]) -> None:
    writer.add(make_records())


def shard_rows(shard: int, layout: Layout) -> range:
    """The samples of a shard."""
    return range(shard * layout.shard_samples, min(layout.samples, (shard + 1) * layout.shard_samples))


def missing_shards(out: Location, manifest: Manifest, ranks: Ranks) -> list[int]:
    """This rank's share of the shards that are not there yet."""
    finished = finished_shards(out, manifest)
    if finished.any():
        log.info(f"{int(finished.sum())} of {len(finished)} shards are there already")
    return [int(shard) for shard in np.flatnonzero(~finished) if shard % ranks.world_size == ranks.rank]


@contextmanager
def locked_store(store: Location) -> Iterator[None]:
    """Keep every other job away from an existing store."""
    with write_errors(store):
        lock = _lock(locate(store), fcntl.LOCK_EX)
    try:
        yield
    finally:
        _unlock(lock)


@contextmanager
def write_errors(out: Location) -> Iterator[None]:
    """Turn what the system says against writing into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and run the same command again: finished shards stay"
        else:
            remedy = (
                "name a place that can be written to, or run the same command again once it can: what is done stays"
            )
        raise UserError(f"{out} could not be written: {reason}; {remedy}") from None


def _begin(
    out: Location, manifest: Manifest, plan: Plan, constants: Callable[[], Constants], needs_room: bool, sealed: bool
) -> int | None:
    """Create or resume; returns the lock, held."""
    storage = locate(out)
    total_bytes = store_bytes(manifest, plan.table) if needs_room else 0
    if not storage.exists("zarr.json"):
        if isinstance(storage, Folder) and os.path.lexists(storage.root):
            raise UserError(f"expected {storage} to be new or a store, found something else there; name another --out")
        _check_room(storage, total_bytes)
        try:
            create_store(storage, manifest, plan, constants(), sealed=sealed)
        except BaseException as error:
            _remove_begun(storage)
            if not (isinstance(error, OSError) and storage.exists("zarr.json")):
                raise
            # Another job was faster: go on as if the store had been there before.
    found = read_manifest(out)
    different = differences(manifest, found)
    if different:
        raise UserError(
            f"{storage} is a store of another configuration and was left as it is; asked for against found:"
            f" {'; '.join(different)}. Name another --out, or remove the store"
        )
    lock = _lock(storage, fcntl.LOCK_EX)
    _remove_begun(storage)
    remove_partial(storage)
    _check_room(storage, int(total_bytes * (1 - finished_shards(storage, found).mean())))
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock


def _remove_begun(storage: Storage) -> None:
    """Remove what came of attempts to create the store that ended early."""
    if isinstance(storage, Folder):
        for leftover in storage.root.parent.glob(f"{storage.root.name}{TEMPORARY}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _lock(storage: Storage, kind: int) -> int | None:
    """A lock on the store's zarr.json; it ends when the descriptor is closed or the process dies. None in a bucket."""
    if not isinstance(storage, Folder):
        return None
    descriptor = os.open(storage.root / "zarr.json", os.O_RDWR)  # network file systems ask for the right to write
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{storage} is being written by another process; wait for it to end, or stop it and run this command again"
        ) from None
    except OSError as error:
        log.warning(f"{storage} cannot be locked here ({error.strerror}): see to it that only one job writes to it")
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _check_room(storage: Storage, needed_bytes: int) -> None:
    free = storage.free_bytes()
    if free is not None and needed_bytes > free:
        raise UserError(
            f"{storage} needs {needed_bytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free; free some, name"
            " another --out, or store less (fewer --views, --keep-tokens 0.5)"
        )
