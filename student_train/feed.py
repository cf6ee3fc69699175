"""Batches for training: pixels decoded and replayed in threads, cached targets read beside them, ahead of the step.

Which samples a step has follows from (seed, epoch, step) alone, so that any step can be started from. Decoding and
resizing release the GIL, and so does reading the cache: threads of the training process do both, without pipes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.augment import AugmentPolicy, apply_boxes, apply_image, draw
from common.cache.reader import BatchBuffers, CacheReader
from common.coco import Annotations
from common.errors import UserError
from common.images import collate, load_image, normalise
from common.records import Augmentation, Batch, CachedBatch, ImageEntry, Targets
from common.runtime import Ranks, log


@dataclass(frozen=True)
class Sample:
    """One view of one image; row: of its record in the store, -1 where nothing is cached."""

    entry: ImageEntry
    augmentation: Augmentation
    row: int = -1


@dataclass(frozen=True)
class TrainingBatch:
    """What one step trains on. step: its number in the epoch. waiting_*_s: seconds that it stood still for."""

    step: int
    image_ids: tuple[int, ...]
    batch: Batch
    cached: CachedBatch | None
    waiting_for_images_s: float
    waiting_for_cache_s: float

    def to(self, device: torch.device) -> TrainingBatch:
        return replace(self, batch=batch_to(self.batch, device), cached=cached_to(self.cached, device))


class SampleSource(Protocol):
    """Where the samples of an epoch come from: `FreshViews` or `CachedViews`."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def sample(self, epoch: int, index: int) -> Sample: ...


@dataclass(frozen=True)
class FreshViews:
    """Plain training: every image of the annotations, a new view of each in every epoch."""

    annotations: Annotations
    policy: AugmentPolicy
    seed: int

    def __len__(self) -> int:
        return len(self.annotations.entries)

    def sample(self, epoch: int, index: int) -> Sample:
        entry = self.annotations.entries[index]
        return Sample(entry, draw(self.seed, entry.image_id, epoch, entry.width, entry.height, self.policy))


class CachedViews:
    """The samples of a store: view e mod V in epoch e, with the augmentations that the teacher saw."""

    def __init__(self, annotations: Annotations, reader: CacheReader) -> None:
        self._entries = {entry.image_id: entry for entry in annotations.entries}
        self._table = reader.table
        self._rows = [reader.rows(view) for view in range(reader.manifest.views.views)]

    def __len__(self) -> int:
        return min(len(rows) for rows in self._rows)

    def sample(self, epoch: int, index: int) -> Sample:
        row = int(self._rows[epoch % len(self._rows)][index])
        flip, *rest = self._table.augmentation[row].tolist()
        return Sample(self._entries[int(self._table.image_id[row])], Augmentation(bool(flip), *rest), row)


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..samples-1 that depends on (seed, epoch) only: a stable sort of Philox's raw stream."""
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(samples), kind="stable").tolist()  # type: ignore[no-any-return]


def steps_per_epoch(samples: int, batch_size: int, ranks: Ranks) -> int:
    """Steps of `batch_size` images over all ranks; an incomplete last one counts unless a rank would get nothing."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest >= ranks.world_size)


def rank_share(order: Sequence[int], step: int, batch_size: int, ranks: Ranks) -> Sequence[int]:
    """The samples that this rank takes of one step's batch."""
    return order[step * batch_size : (step + 1) * batch_size][ranks.rank :: ranks.world_size]


def replay(sample: Sample, annotations: Annotations) -> tuple[Tensor, Targets]:
    """Decode a sample's image and replay its augmentation: normalised pixels (3, h, w) and ground truth.

    Raises UserError where the file is missing, broken or not of the annotated size.
    """
    entry = sample.entry
    image = load_image(annotations.image_path(entry), (entry.width, entry.height))
    return normalise(apply_image(image, sample.augmentation)), apply_boxes(entry, sample.augmentation)


class Feed:
    """Yields the batches of an epoch, prepared ahead by threads. Close it when done."""

    def __init__(
        self,
        source: SampleSource,
        annotations: Annotations,
        reader: CacheReader | None,
        *,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        workers: int,
        prefetch: int,
        skip_broken: bool = False,
        pin: bool = False,
    ) -> None:
        """reader: None where the cached targets are not needed. batch_size: images of a step over all ranks."""
        self._source, self._annotations, self._reader = source, annotations, reader
        self._batch_size, self._seed, self._ranks = batch_size, seed, ranks
        self._prefetch, self._skip_broken, self._pin = prefetch, skip_broken, pin
        self._images = ThreadPoolExecutor(workers, "images")
        self._cache = ThreadPoolExecutor(1, "cache")
        # One buffer for the batch in use and one for each that is prepared meanwhile.
        self._buffers = [BatchBuffers(pin=pin) for _ in range(prefetch + 1)]
        self.broken: set[str] = set()

    def __len__(self) -> int:
        """Steps of an epoch."""
        return steps_per_epoch(len(self._source), self._batch_size, self._ranks)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[TrainingBatch]:
        """The batches of one epoch from `first_step` on. The cached tensors of a batch are valid until the next one."""
        order = epoch_order(len(self._source), self._seed, epoch)
        pending: deque[_Pending] = deque()
        for step in range(first_step, len(self) + self._prefetch):
            if step < len(self):
                share = rank_share(order, step, self._batch_size, self._ranks)
                samples = [self._source.sample(epoch, index) for index in share]
                pending.append(self._start(step, samples, self._buffers[step % len(self._buffers)]))
            if step >= first_step + self._prefetch and pending:
                batch = self._finish(pending.popleft())
                if batch is not None:
                    yield batch

    def close(self) -> None:
        self._images.shutdown(cancel_futures=True)
        self._cache.shutdown(cancel_futures=True)

    def _start(self, step: int, samples: list[Sample], buffers: BatchBuffers) -> _Pending:
        cached = None
        if self._reader is not None:
            cached = self._cache.submit(self._reader.read, [sample.row for sample in samples], buffers)
        images = [self._images.submit(replay, sample, self._annotations) for sample in samples]
        return _Pending(step, samples, images, cached, buffers)

    def _finish(self, pending: _Pending) -> TrainingBatch | None:
        """Wait for a batch; None if none of its images could be decoded."""
        start = time.perf_counter()
        loaded = [self._result(sample, image) for sample, image in zip(pending.samples, pending.images, strict=True)]
        images_there = time.perf_counter()
        cached = pending.cached.result() if pending.cached is not None else None
        cache_there = time.perf_counter()
        whole = [(sample, image) for sample, image in zip(pending.samples, loaded, strict=True) if image is not None]
        if not whole:
            return None
        if cached is not None and self._reader is not None and len(whole) < len(loaded):
            cached = self._reader.read([sample.row for sample, _ in whole], pending.buffers)  # without the broken ones
        batch = collate([image for _, image in whole])
        if self._pin:
            batch = replace(batch, images=batch.images.pin_memory())
        image_ids = tuple(sample.entry.image_id for sample, _ in whole)
        return TrainingBatch(pending.step, image_ids, batch, cached, images_there - start, cache_there - images_there)

    def _result(self, sample: Sample, image: Future[tuple[Tensor, Targets]]) -> tuple[Tensor, Targets] | None:
        try:
            return image.result()
        except UserError as error:
            if not self._skip_broken:
                raise UserError(f"{error} (--skip-broken goes on without it)") from None
            if sample.entry.file_name not in self.broken:
                log.warning("skipped: %s", error)
                self.broken.add(sample.entry.file_name)
            return None


@dataclass(frozen=True)
class _Pending:
    """A batch in preparation."""

    step: int
    samples: list[Sample]
    images: list[Future[tuple[Tensor, Targets]]]
    cached: Future[CachedBatch] | None
    buffers: BatchBuffers


def batch_to(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.images.to(device, non_blocking=True),
        batch.padding_mask.to(device, non_blocking=True),
        [targets.to(device) for targets in batch.targets],
    )


def cached_to(cached: CachedBatch | None, device: torch.device) -> CachedBatch | None:
    if cached is None or device.type == "cpu":
        return cached
    moved = {name: value.to(device, non_blocking=True) for name, value in vars(cached).items() if value is not None}
    return replace(cached, **moved)
