"""--subset: some of a split's images, the same ones for every command, seed and run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.coco import Annotations
from common.errors import UserError
from common.philox import philox_words

_KEY = (0x5B5E7, 1)  # of the order: changing it changes every subset


def take_subset(annotations: Annotations, wanted: int | float | None) -> Annotations:
    """The annotations with some of their images: a whole number of them, or a fraction in (0, 1] where it has a point.

    Images come in an order drawn from their ids alone, so that a smaller subset is part of a larger one, and the
    subset of a store dumped from a subset that of the whole split. None takes all. UserError for a number of none or of
    more than there are.
    """
    if wanted is None:
        return annotations
    count = len(annotations.entries)
    chosen: float = round(wanted * count) if isinstance(wanted, float) and wanted <= 1 else wanted
    if not (1 <= chosen <= count and chosen == int(chosen)):
        raise UserError(
            f"expected --subset of 1 to {count} images, or of a fraction of them such as 0.1, found {wanted}"
        )
    counters = np.zeros((count, 4), dtype=np.uint64)
    counters[:, 0] = annotations.entries.image_ids
    words = philox_words(_KEY, counters)[:, 0]
    kept = np.sort(np.argsort(words, kind="stable")[: int(chosen)])
    return replace(annotations, entries=annotations.entries[kept])
