"""Steps for training: pixels decoded and replayed in threads, cached targets read beside them, ahead of the step.

Which samples a step has follows from (seed, epoch, step) alone (`batching`), so that any step can be started from.
Decoding and resizing release the GIL, and so does reading the cache: threads of the training process do both, without
pipes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.augment import AugmentPolicy, draw, draw_many
from common.cache.buffers import BatchBuffers
from common.cache.reader import CacheReader, CorruptRecord
from common.coco import Annotations
from common.errors import UserError
from common.images import BrokenImage, batch_to, collate, decode_image, read_image
from common.records import Augmentation, Batch, ImageEntry, Targets
from common.replay import apply_boxes, apply_image
from common.runtime import Ranks, log
from student_train.batching import (
    Indices,
    Sizes,
    epoch_order,
    group_by_size,
    micro_batches,
    rank_share,
    steps_per_epoch,
)
from student_train.teachers import CachedTeachers, Lesson, Taught

Rows = npt.NDArray[np.intp]
Buffers = list[BatchBuffers]  # one for each teacher


@dataclass(frozen=True)
class Sample:
    """One view of one image; row: of its record in the store, -1 where nothing is cached."""

    entry: ImageEntry
    augmentation: Augmentation
    row: int = -1


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the student at once: a step, or a part of one, and what teachers say of it."""

    image_ids: tuple[int, ...]
    batch: Batch
    lessons: tuple[Lesson, ...]

    @property
    def taught(self) -> list[Taught]:
        """Which of its samples each teacher teaches."""
        return [(lesson.teacher, lesson.samples) for lesson in self.lessons]

    def to(self, device: torch.device) -> MicroBatch:
        lessons = tuple(lesson.to(device) for lesson in self.lessons)
        return replace(self, batch=batch_to(self.batch, device), lessons=lessons)


@dataclass(frozen=True)
class TrainingStep:
    """What one step of this rank trains on. number: in the epoch. waiting_*_s: seconds that it stood still for."""

    number: int
    parts: tuple[MicroBatch, ...]
    waiting_for_images_s: float
    waiting_for_cache_s: float

    @property
    def image_ids(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(part.image_ids for part in self.parts))

    @property
    def box_counts(self) -> list[int]:
        """Ground-truth boxes of each sample."""
        return [len(targets.labels) for part in self.parts for targets in part.batch.targets]


class SampleSource(Protocol):
    """Where the samples of an epoch come from: `FreshViews` or `CachedViews`."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def sample(self, epoch: int, index: int) -> Sample: ...

    def sizes(self, epoch: int) -> Sizes:
        """Height and width (N, 2) in pixels of each sample of an epoch."""
        ...


class FreshViews:
    """Plain training: every image of the annotations, a new view of each in every epoch."""

    def __init__(self, annotations: Annotations, policy: AugmentPolicy, seed: int) -> None:
        self.annotations, self.policy, self._seed = annotations, policy, seed

    def __len__(self) -> int:
        return len(self.annotations.entries)

    def sample(self, epoch: int, index: int) -> Sample:
        entry = self.annotations.entries[index]
        return Sample(entry, draw(self._seed, entry.image_id, epoch, entry.width, entry.height, self.policy))

    def sizes(self, epoch: int) -> Sizes:
        image_ids, (widths, heights) = self.annotations.entries.image_ids, self.annotations.entries.sizes.T
        return draw_many(self._seed, image_ids, np.full(len(self), epoch), widths, heights, self.policy)[:, 5:7]


class CachedViews:
    """The samples of a store, with the augmentations that the teacher saw: view e mod V in epoch e.

    Of an unfinished store, every epoch has each image of which a view is there, and such views of it by turns.
    """

    def __init__(self, annotations: Annotations, reader: CacheReader) -> None:
        self._entries = annotations.entries
        self._table, rows = reader.table, reader.rows()
        rows = rows[self._entries.rows_of(self._table.image_id[rows]) >= 0]
        self._by_image = rows[np.lexsort((self._table.view[rows], self._table.image_id[rows]))]
        self._first, self._views = np.unique(
            self._table.image_id[self._by_image], return_index=True, return_counts=True
        )[1:]
        self._epoch, self._rows = -1, rows

    def __len__(self) -> int:
        return len(self._first)

    def rows(self, epoch: int) -> Rows:
        """The rows of an epoch's samples, ascending."""
        if epoch != self._epoch:
            self._rows = np.sort(self._by_image[self._first + epoch % self._views])
            self._epoch = epoch
        return self._rows

    def sample(self, epoch: int, index: int) -> Sample:
        row = int(self.rows(epoch)[index])
        flip, *rest = self._table.augmentation[row].tolist()
        return Sample(self._entries.of_image(int(self._table.image_id[row])), Augmentation(bool(flip), *rest), row)

    def sizes(self, epoch: int) -> Sizes:
        return self._table.augmentation[self.rows(epoch), 5:7]


@dataclass
class Work:
    """Seconds that the threads of a feed spent, all of them together, and what they got for it."""

    images: int = 0
    reading_images_s: float = 0.0
    decoding_s: float = 0.0
    reading_cache_s: float = 0.0
    cache_bytes: int = 0


@dataclass(frozen=True)
class Replayed:
    """A sample for the student: uint8 pixels (3, h, w), ground truth, and the seconds that it took."""

    image: Tensor
    targets: Targets
    reading_s: float
    decoding_s: float


def replay(sample: Sample, annotations: Annotations) -> Replayed:
    """Decode a sample's image and replay its augmentation.

    Raises BrokenImage where the file cannot be decoded, UserError where it is missing or not of the annotated size.
    """
    entry, path = sample.entry, annotations.image_path(sample.entry)
    begun = time.perf_counter()
    data = read_image(path)
    read = time.perf_counter()
    image = decode_image(data, str(path), (entry.width, entry.height), annotations.rule)
    pixels = apply_image(image, sample.augmentation)
    targets = apply_boxes(entry, sample.augmentation)
    return Replayed(pixels, targets, read - begun, time.perf_counter() - read)


@dataclass(frozen=True)
class FeedOptions:
    """batch_size: images of a step over all ranks, `accumulate` parts of it to go through the student one by one.

    similar_sizes: batch samples of similar size. workers: threads that replay images. prefetch: steps prepared ahead.
    skip_broken, skip_corrupt: put another sample in the place of one whose image, or record, cannot be read.
    """

    batch_size: int
    seed: int
    accumulate: int = 1
    similar_sizes: bool = True
    workers: int = 4
    prefetch: int = 3
    skip_broken: bool = False
    skip_corrupt: bool = False


class Feed:
    """Yields the steps of an epoch, prepared ahead by threads. Close it when done.

    broken, corrupt: what had to be skipped so far. work: what the threads did.
    """

    def __init__(
        self,
        source: SampleSource,
        annotations: Annotations,
        teachers: CachedTeachers | None,
        options: FeedOptions,
        ranks: Ranks | None = None,
        pin: bool = False,
    ) -> None:
        """teachers: None where the cached targets are not needed. pin: they are read into page-locked memory, for a
        GPU."""
        self._source, self._annotations, self._teachers = source, annotations, teachers
        self._options, self._ranks = options, ranks or Ranks()
        self._images = ThreadPoolExecutor(options.workers, "images")
        self._cache = ThreadPoolExecutor(1, "cache")
        # Buffers for the step in use and for each that is prepared meanwhile.
        self._buffers = [
            [[] if teachers is None else teachers.buffers(pin=pin) for _ in range(options.accumulate)]
            for _ in range(options.prefetch + 1)
        ]
        self.broken: set[str] = set()
        self.corrupt: set[tuple[int, int]] = set()
        self.work = Work()

    def __len__(self) -> int:
        """Steps of an epoch."""
        return steps_per_epoch(len(self._source), self._options.batch_size, self._ranks)

    def order(self, epoch: int) -> Indices:
        """The samples of an epoch in the order of training."""
        options = self._options
        order = epoch_order(len(self._source), options.seed, epoch)
        if not options.similar_sizes:
            return order
        return group_by_size(order, self._source.sizes(epoch), options.batch_size, options.seed, epoch)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[TrainingStep]:
        """The steps of one epoch from `first_step` on. The cached tensors of a step are valid until the next one."""
        order, prefetch = self.order(epoch), self._options.prefetch
        pending: deque[tuple[int, list[_Pending]]] = deque()
        for number in range(first_step, len(self) + prefetch):
            if number < len(self):
                share = rank_share(order, number, self._options.batch_size, self._ranks)
                parts = zip(
                    micro_batches(share, self._options.accumulate), self._buffers[number % (prefetch + 1)], strict=False
                )
                pending.append((number, [self._start(epoch, part, order, buffers) for part, buffers in parts]))
            if number >= first_step + prefetch and pending:
                yield self._finish(*pending.popleft())

    def close(self) -> None:
        self._images.shutdown(cancel_futures=True)
        self._cache.shutdown(cancel_futures=True)

    def _start(self, epoch: int, indices: Indices, order: Indices, buffers: Buffers) -> _Pending:
        samples = [self._source.sample(epoch, index) for index in indices.tolist()]
        pending = _Pending(epoch, indices, order, samples, buffers)
        if self._teachers is not None:
            pending.cached = self._cache.submit(self._read, self._teachers, samples, epoch, buffers)
        pending.images = [self._images.submit(replay, sample, self._annotations) for sample in samples]
        return pending

    def _finish(self, number: int, parts: list[_Pending]) -> TrainingStep:
        """Wait for a step."""
        begun = time.perf_counter()
        images = [[self._image(*both) for both in zip(part.samples, part.images, strict=True)] for part in parts]
        images_there = time.perf_counter()
        cached = [part.cached.result() if part.cached is not None else None for part in parts]
        cache_there = time.perf_counter()
        finished = tuple(self._micro_batch(*part) for part in zip(parts, images, cached, strict=True))
        waiting_for_images_s = images_there - begun + time.perf_counter() - cache_there  # to pad them, too
        return TrainingStep(number, finished, waiting_for_images_s, cache_there - images_there)

    def _micro_batch(self, part: _Pending, images: list[Replayed | None], read: _Read | None) -> MicroBatch:
        samples, lessons = part.samples, read.lessons if read is not None else ()
        damaged = {error.image_id for error in read.damaged} if read is not None else set()
        if None in images or damaged:
            samples, images = self._mended(part, images, damaged)
            if self._teachers is not None:
                lessons = self._read(self._teachers, samples, part.epoch, part.buffers).lessons
        loaded = [image for image in images if image is not None]
        batch = collate([(image.image, image.targets) for image in loaded])
        for lesson in lessons:
            self._check_assignment(lesson, samples, batch.targets)
        return MicroBatch(tuple(sample.entry.image_id for sample in samples), batch, lessons)

    def _check_assignment(self, lesson: Lesson, samples: list[Sample], targets: list[Targets]) -> None:
        """UserError where a record speaks of a ground-truth box that its sample does not have."""
        places = range(len(samples)) if lesson.samples is None else lesson.samples.tolist()
        for place, assignment in zip(places, lesson.cached.assignment, strict=False):  # empty where no loss needs it
            box, boxes = int(assignment.max()), len(targets[place].labels)
            if box >= boxes and self._teachers is not None:
                raise UserError(
                    f"{self._teachers.readers[lesson.teacher].path}: the record of image"
                    f" {samples[place].entry.image_id} assigns a query to box {box + 1} of {boxes}: it is not of these"
                    " annotations; dump the store again"
                )

    def _mended(
        self, part: _Pending, images: list[Replayed | None], damaged: set[int]
    ) -> tuple[list[Sample], list[Replayed | None]]:
        """The samples with sound ones, the next in the epoch's order, in the place of those that cannot be used.

        Batches so keep their size, and no rank is ever left with nothing to do.
        """
        samples = list(part.samples)
        following = np.roll(part.order, -1 - int(np.flatnonzero(part.order == part.indices[-1])[0]))
        others = (self._source.sample(part.epoch, index) for index in following.tolist())
        for place, sample in enumerate(part.samples):
            if images[place] is not None and sample.entry.image_id not in damaged:
                continue
            for other in others:
                image = self._image(other, self._images.submit(replay, other, self._annotations))
                if image is not None and self._is_sound(other, part.epoch):
                    samples[place], images[place] = other, image
                    break
            else:
                raise UserError("no sample of the epoch can be read: look at the images and the store")
        return samples, images

    def _image(self, sample: Sample, replayed: Future[Replayed]) -> Replayed | None:
        try:
            result = replayed.result()
        except BrokenImage as error:
            if not self._options.skip_broken:
                raise UserError(f"{error} (--skip-broken goes on without it)") from None
            if sample.entry.file_name not in self.broken:
                log.warning("skipped: %s", error)
                self.broken.add(sample.entry.file_name)
            return None
        self.work.images += 1
        self.work.reading_images_s += result.reading_s
        self.work.decoding_s += result.decoding_s
        return result

    def _is_sound(self, sample: Sample, epoch: int) -> bool:
        teachers = self._teachers
        return teachers is None or not self._read(teachers, [sample], epoch, teachers.buffers()).damaged

    def _read(self, teachers: CachedTeachers, samples: list[Sample], epoch: int, buffers: Buffers) -> _Read:
        """Records of the store; what is damaged is left out, or is an error."""
        begun = time.perf_counter()
        rows = [sample.row for sample in samples]
        try:
            read = _Read(*teachers.read(rows, epoch, buffers, sound=self._options.skip_corrupt))
        except CorruptRecord as error:
            raise UserError(f"{error} (--on-corrupt skip goes on without it)") from None
        self.work.reading_cache_s += time.perf_counter() - begun
        fields = [value for lesson in read.lessons for value in vars(lesson.cached).values()]
        self.work.cache_bytes += sum(value.nbytes for value in fields if value is not None)
        for damage in read.damaged:
            if (damage.image_id, damage.view) not in self.corrupt:
                log.warning("skipped: %s", damage)
                self.corrupt.add((damage.image_id, damage.view))
        return read


@dataclass(frozen=True)
class _Read:
    """What the teachers say, by the records that could be read, and what is wrong with the others."""

    lessons: tuple[Lesson, ...]
    damaged: tuple[CorruptRecord, ...]


@dataclass
class _Pending:
    """A micro-batch in preparation. indices: of its samples in the epoch, order: of all."""

    epoch: int
    indices: Indices
    order: Indices
    samples: list[Sample]
    buffers: Buffers
    images: list[Future[Replayed]] = field(default_factory=list)
    cached: Future[_Read] | None = None
