"""Which samples a step has, and which of them a rank and a micro-batch: it follows from (seed, epoch, step) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from common.images import PADDING_MULTIPLE
from common.runtime import Ranks

Indices = npt.NDArray[np.int64]
Sizes = npt.NDArray[np.integer[Any]]

WINDOW_SAMPLES = 2048  # that are sorted by size at a time: enough to save padding, and batches differ in each epoch


def epoch_order(samples: int, seed: int, epoch: int) -> Indices:
    """A permutation of 0..samples-1 that depends on (seed, epoch) only: a stable sort of Philox's raw stream."""
    return _shuffled(samples, seed, epoch, 0)


def group_by_size(order: Indices, sizes: Sizes, batch_size: int, seed: int, epoch: int) -> Indices:
    """The same order with samples of similar size side by side, so that batches need little padding.

    sizes: (N, 2) height and width in pixels of the samples 0..N-1. Windows of about WINDOW_SAMPLES of the order are
    sorted by size and cut into batches, and the batches of a window are shuffled. An incomplete last batch stays last.
    Measured with the recipe's augmentation on sizes of 48 COCO images: of the pixels of batches of 4, 37% are padding
    in random order, 7% so.
    """
    grouped = [order[:0]]
    window_samples = max(1, WINDOW_SAMPLES // batch_size) * batch_size
    for number, first in enumerate(range(0, len(order), window_samples), start=1):
        window = order[first : first + window_samples]
        # What makes no whole batch is taken off unsorted: which samples it has must not depend on their size.
        whole = len(window) // batch_size * batch_size
        window, rest = window[:whole], window[whole:]
        heights, widths = sizes[window].T
        batches = window[np.lexsort((widths, -(-heights // PADDING_MULTIPLE)))].reshape(-1, batch_size)
        grouped += [batches[_shuffled(len(batches), seed, epoch, number)].reshape(-1), rest]
    return np.concatenate(grouped)


def steps_per_epoch(samples: int, batch_size: int, ranks: Ranks) -> int:
    """Steps of `batch_size` images over all ranks; an incomplete last one counts unless a rank would get nothing."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest >= ranks.world_size)


def rank_share(order: Indices, step: int, batch_size: int, ranks: Ranks) -> Indices:
    """The samples that this rank takes of one step's batch: neighbours, which are of similar size."""
    batch = order[step * batch_size : (step + 1) * batch_size]
    return np.array_split(batch, ranks.world_size)[ranks.rank]


def micro_batches(share: Indices, parts: int) -> list[Indices]:
    """A rank's share of a step in up to `parts` parts, none of them empty."""
    return np.array_split(share, min(parts, len(share)))


def _shuffled(count: int, seed: int, epoch: int, stream: int) -> Indices:
    generator = np.random.Philox(counter=[0, 0, 0, stream], key=[seed, epoch])
    return np.argsort(generator.random_raw(count), kind="stable")
