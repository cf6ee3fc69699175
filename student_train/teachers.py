"""The teachers of a store, and which of them each sample is learnt from.

- average: every teacher teaches every sample, and its losses count 1/M.
- random: each sample has one teacher in each epoch, drawn anew. Over the draws, the expected loss is the average's.
- best: each sample has the teacher whose predictions fit its ground truth best, by what is cached of their quality.

So a teacher teaches a sample with one weight, or not at all, and what it does not teach is not read. The losses are
divided by what all samples of a step have, whoever teaches them (`step_counts`), so that those of equal teachers add up
to those of one. (The contrastive loss, which sets the samples of a lesson against each other, is the exception.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from common.cache.buffers import BatchBuffers
from common.cache.members import member_names, member_path, nearest
from common.cache.plan import SampleTable
from common.cache.reader import CacheReader, CorruptRecord
from common.cache.schema import differences
from common.errors import UserError
from common.philox import choose, philox_words
from common.records import CachedBatch
from common.runtime import log
from kernels import to_device

Choice = Literal["average", "random", "best"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
DRAW_KEY = 0x7EAC4E25  # the generator's second key: teachers are drawn independently of all else
ROWS_AT_ONCE = 256
HOST_FIELDS = ("token_offsets", "level_shapes", "level_strides", "assignment")

Taught = tuple[int, Tensor | None]  # a teacher, and the places (n,) int64 of the samples that it teaches; None for all
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Lesson:
    """What one teacher says of n samples of a micro-batch.

    teacher: which, by its place among the store's. samples: (n,) int64 on the host, their places in the micro-batch,
    ascending; None for all of it. weight: that its losses are multiplied by.
    """

    cached: CachedBatch
    teacher: int = 0
    samples: Tensor | None = None
    weight: float = 1.0

    def to(self, device: torch.device) -> Lesson:
        """The records on a device, but for HOST_FIELDS."""
        fields = vars(self.cached).items()
        moved = {
            name: to_device(value, device) for name, value in fields if value is not None and name not in HOST_FIELDS
        }
        return replace(self, cached=replace(self.cached, **moved))


class CachedTeachers:
    """The stores of one or several teachers of the same samples. A sample is named by its row in the first store."""

    def __init__(self, names: Sequence[str], readers: Sequence[CacheReader], choice: Choice = "average") -> None:
        """names: of the readers' members. UserError unless all hold the same samples, and all of them."""
        self.names, self.readers, self.choice = tuple(names), tuple(readers), choice
        first, *others = self.readers
        for name, other in zip(self.names[1:], others, strict=True):
            _check_same_samples(self.names[0], first, name, other)
        if others:
            _check_complete(self.names, self.readers)
        self._rows = [_rows_in(first.table, reader.table) for reader in self.readers]
        for name, reader, rows in zip(self.names, self.readers, self._rows, strict=True):
            _check_same_views(self.names[0], first.table, name, reader.table, rows)
        readable = np.ones(len(first), dtype=bool)
        for rows, reader in zip(self._rows, self.readers, strict=True):
            readable &= np.isin(rows, reader.rows())
        if others:
            first.keep_rows(readable)
        self._seed = 0
        self._best: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.readers)

    def __str__(self) -> str:
        if len(self) == 1:
            return f"teacher {self.readers[0].manifest.teacher.name}"
        return f"{self.choice} of the teachers {', '.join(self.names)}"

    def prepare(self, fields: Collection[str], seed: int) -> None:
        """Before the first `read`: what to read of a record, and the seed of random teachers."""
        self._seed = seed
        if self.choice == "best" and len(self) > 1:
            self._best = best_teachers(self.readers, self._rows)
            counts = np.bincount(self._best, minlength=len(self))
            shares = [f"{name} {count / len(self._best):.1%}" for name, count in zip(self.names, counts, strict=True)]
            log.info(f"the best teacher of each sample, by the cached quality of its predictions: {', '.join(shares)}")
        for reader in self.readers:
            reader.choose_fields(fields)

    def buffers(self, *, pin: bool = False) -> list[BatchBuffers]:
        """What `read` reads a micro-batch into."""
        return [BatchBuffers(pin=pin) for _ in self.readers]

    def read(
        self, rows: Sequence[int], epoch: int, buffers: Sequence[BatchBuffers], *, sound: bool = False
    ) -> tuple[tuple[Lesson, ...], tuple[CorruptRecord, ...]]:
        """The lessons on these samples in an epoch; one for each teacher who teaches any of them.

        CorruptRecord where a record is damaged or, with `sound`, what is damaged, the lessons being without it.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        lessons: list[Lesson] = []
        damaged: tuple[CorruptRecord, ...] = ()
        for teacher, places in self.taught(wanted, epoch):
            reader, own_rows = self.readers[teacher], self._rows[teacher][wanted[places]]
            if sound:
                cached, bad = reader.read_sound(own_rows, buffers[teacher])
                damaged += bad
            else:
                cached = reader.read(own_rows, buffers[teacher])
            samples = None if len(places) == len(wanted) else torch.from_numpy(places)
            weight = 1 / len(self) if self.choice == "average" else 1.0
            lessons.append(Lesson(cached, teacher, samples, weight))
        return tuple(lessons), damaged

    def taught(self, rows: npt.NDArray[np.int64], epoch: int) -> list[tuple[int, npt.NDArray[np.intp]]]:
        """Each teacher who teaches any of these samples in an epoch, and the places of those samples in `rows`."""
        if self.choice == "average" or len(self) == 1:
            return [(teacher, np.arange(len(rows))) for teacher in range(len(self))]
        if self.choice == "random":
            chosen = random_teachers(len(self), self._seed, self.readers[0].table.image_id[rows], epoch)
        else:
            assert self._best is not None, "prepare comes first"
            chosen = self._best[rows]
        return [(teacher, np.flatnonzero(chosen == teacher)) for teacher in np.unique(chosen).tolist()]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def open_teachers(store: str, chosen: str | None, local_cache: Path | None = None) -> CachedTeachers:
    """The teachers of a store to learn from. chosen: a Choice, by default average, or the name of one of several.

    UserError if there is none of that name, or if they are not teachers of the same samples.
    """
    names = member_names(store)
    if chosen is not None and chosen not in (*CHOICES, *names):
        if not names:
            raise UserError(
                f"--teachers {chosen} is for a store of several teachers, found one in {store}: leave it out"
            )
        raise UserError(
            f"expected --teachers {'|'.join((*CHOICES, *names))}, found {chosen}: is it"
            f" {nearest(chosen, (*CHOICES, *names))}?"
        )
    if chosen in names:
        names = (chosen,)
    paths = [member_path(store, name) for name in names] or [store]
    readers = [CacheReader(path, local_cache=local_cache) for path in paths]
    choice: Choice = next((choice for choice in CHOICES if choice == chosen), "average")
    return CachedTeachers(names or (readers[0].manifest.teacher.name,), readers, choice)


def random_teachers(count: int, seed: int, image_ids: Integers, epoch: int) -> npt.NDArray[np.int64]:
    """One of `count` teachers for each image in an epoch, by Philox under (seed, image id, epoch), as on every rank."""
    counters = np.zeros((len(image_ids), 4), dtype=np.uint64)
    counters[:, 0], counters[:, 1] = image_ids, epoch
    return choose(philox_words((seed, DRAW_KEY), counters)[:, 0], count)


def best_teachers(readers: Sequence[CacheReader], rows: Sequence[npt.NDArray[np.intp]]) -> npt.NDArray[np.int64]:
    """(N,) the teacher with the largest sum of cached quality over the queries of its last layer; of equals the first.

    Quality is score^.5 IoU^.5 with the ground-truth box that a query was assigned, so the sum says how well all boxes
    of a sample are found. rows: of each reader, (N,) its rows of the samples.
    """
    fit = np.zeros((len(readers), len(rows[0])))
    for reader, own_rows, of_teacher in zip(readers, rows, fit, strict=True):
        reader.choose_fields({"quality"})
        buffers, readable = BatchBuffers(), np.isin(own_rows, reader.rows())
        wanted = np.flatnonzero(readable)
        for start in tqdm(range(0, len(wanted), ROWS_AT_ONCE), desc="quality", unit=" x 256 samples", leave=False):
            places = wanted[start : start + ROWS_AT_ONCE]
            batch, damaged = reader.read_sound(own_rows[places], buffers)
            sound = places[~np.isin(own_rows[places], [error.row for error in damaged])]
            of_teacher[sound] = batch.quality[:, -1].sum(dim=-1).numpy()
    best: npt.NDArray[np.int64] = fit.argmax(axis=0)
    return best


def _rows_in(table: SampleTable, other: SampleTable) -> npt.NDArray[np.intp]:
    """(N,) the rows of another table with the same samples, in the order of this one.

    The order differs where teachers were given their samples in batches of different sizes.
    """
    if np.array_equal(table.image_id, other.image_id) and np.array_equal(table.view, other.view):
        return np.arange(len(table))
    rows = np.empty(len(table), dtype=np.intp)
    rows[np.lexsort((table.image_id, table.view))] = np.lexsort((other.image_id, other.view))
    return rows


def _check_same_samples(name: str, reader: CacheReader, other_name: str, other: CacheReader) -> None:
    ours, theirs = reader.manifest, other.manifest
    different = [
        line
        for line in differences(theirs, ours)
        if line.startswith(("data.", "views."))  # which images, and how they were augmented
    ]
    if different:
        raise UserError(
            f"expected teachers of the same samples, found {other_name} against {name} with {'; '.join(different)}:"
            " dump both with the same options, or choose one with --teachers NAME"
        )


def _check_same_views(
    name: str, table: SampleTable, other_name: str, other: SampleTable, rows: npt.NDArray[np.intp]
) -> None:
    """rows: of the other table with the samples of this one."""
    for column in ("image_id", "view", "augmentation"):
        if not np.array_equal(getattr(other, column)[rows], getattr(table, column)):
            raise UserError(
                f"expected teachers of the same samples, found {other_name} with another {column} than {name}: one of"
                " their sample tables is not what its manifest says; dump it again"
            )


def _check_complete(names: Sequence[str], readers: Sequence[CacheReader]) -> None:
    for name, reader in zip(names, readers, strict=True):
        if not reader.complete:
            raise UserError(
                f"expected the complete records of every teacher, found {int(reader.finished_shards.sum())} of"
                f" {len(reader.finished_shards)} shards of {name}: run its `python -m teacher_dump` command again to"
                " complete it, or choose another with --teachers NAME"
            )
