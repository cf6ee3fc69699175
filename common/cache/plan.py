"""The plan of a store: every sample's size and place, from annotations and parameters alone.

Nothing here decodes an image or asks the teacher. The order of the samples is part of the plan: views follow one
another; within a view, samples of nearly equal size stand together in groups of the teacher's batch size, so that no
batch wastes padding, and the groups are shuffled, so that any prefix of a store is a fair sample of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.augment import AugmentPolicy, draw_many
from common.cache.schema import Field, Layout, Manifest, TeacherInfo

Integers = npt.NDArray[np.integer[Any]]

SHARD_BYTES = 256 * 2**20  # a rank's unit of work and of loss: large enough for object stores, small enough to redo
MIN_SHARDS = 32  # so that small data sets too are split among ranks and lose little to an interruption
MAX_SHARD_SAMPLES = 1024
PAGE_TOKENS = (16, 256)  # smallest and largest page; padding to 256 costs 0.8% of a dense COCO store


@dataclass(frozen=True)
class SampleTable:
    """One row per sample, in the order of the store.

    image_id (N,) int64. view (N,) int32. augmentation (N, 7) int32, the integers of `records.Augmentation`.
    level_shapes (N, levels, 2) int32. token_count (N,) int32, the kept tokens. token_offset (N,) int64, the sample's
    first row in the token fields.
    """

    image_id: npt.NDArray[np.int64]
    view: npt.NDArray[np.int32]
    augmentation: npt.NDArray[np.int32]
    level_shapes: npt.NDArray[np.int32]
    token_count: npt.NDArray[np.int32]
    token_offset: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_id)


@dataclass(frozen=True)
class Plan:
    """The samples of a store and how they are laid out."""

    table: SampleTable
    layout: Layout


def make_plan(
    image_id: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    *,
    seed: int,
    views: int,
    policy: AugmentPolicy,
    strides: Sequence[int],
    input_size: tuple[int, int] | None = None,
    keep_tokens: float,
    token_bytes: int,
    sample_bytes: int,
    group: int,
) -> Plan:
    """Plan `views` samples of every image.

    image_id: (N,). sizes: (N, 2), their width and height in pixels.
    strides, input_size: as in `TeacherInfo`. token_bytes, sample_bytes: of one row of all token fields and of all
    sample fields. group: samples that the teacher sees at once.
    """
    columns = []
    for view in range(views):
        drawn = draw_many(seed, image_id, np.full(len(image_id), view), sizes[:, 0], sizes[:, 1], policy)
        order = _order(drawn[:, 5], drawn[:, 6], seed + view, group)
        columns.append((image_id[order], np.full(len(image_id), view, dtype=np.int32), drawn[order]))
    ids, view_column, augmentation = (np.concatenate(column) for column in zip(*columns, strict=True))

    return lay_out(
        ids,
        view_column,
        augmentation,
        grids(augmentation, strides, input_size),
        keep_tokens=keep_tokens,
        token_bytes=token_bytes,
        sample_bytes=sample_bytes,
        group=group,
    )


def lay_out(
    image_id: npt.NDArray[np.int64],
    view: npt.NDArray[np.int32],
    augmentation: npt.NDArray[np.int32],
    level_shapes: npt.NDArray[np.int32],
    *,
    keep_tokens: float,
    token_bytes: int,
    sample_bytes: int,
    group: int,
) -> Plan:
    """Give samples that are drawn and in order, as the columns of a SampleTable, their places in a store."""
    tokens = level_shapes.prod(axis=2, dtype=np.int64).sum(axis=1)
    page = _page_tokens(tokens, keep_tokens)
    kept = token_counts(tokens, keep_tokens, page)
    shard_samples = _shard_samples(len(image_id), float(kept.mean()) * token_bytes + sample_bytes, group)
    pages = _to_pages(kept, page)
    shard_pages = int((_page_in_shard(pages, shard_samples) + pages).max())
    layout = Layout(len(image_id), shard_samples, shard_pages * page, page)
    table = SampleTable(
        image_id=image_id,
        view=view,
        augmentation=augmentation,
        level_shapes=level_shapes,
        token_count=kept.astype(np.int32),
        token_offset=token_offsets(kept, layout),
    )
    return Plan(table, layout)


def grids(
    augmentation: npt.NDArray[np.int32], strides: Sequence[int], input_size: tuple[int, int] | None
) -> npt.NDArray[np.int32]:
    """level_shapes (N, levels, 2) of samples with these augmentations (N, 7), by a teacher as `TeacherInfo` says."""
    sizes = augmentation[:, 5:7]
    if input_size is not None:  # the teacher resizes every sample, so that all have the same grids
        sizes = np.full_like(sizes, input_size)
    return np.stack([-(-sizes // stride) for stride in strides], axis=1)


def token_counts(tokens: npt.NDArray[np.int64], keep_tokens: float, page: int) -> npt.NDArray[np.int64]:
    """How many tokens (N,) samples of so many keep: whole pages, so that sampled records need no padding."""
    if keep_tokens == 1:
        return tokens
    return np.minimum(tokens, np.maximum(1, np.rint(tokens * keep_tokens / page)).astype(np.int64) * page)


def token_offsets(token_count: Integers, layout: Layout) -> npt.NDArray[np.int64]:
    """Where the tokens of each sample (N,) begin: page after page within a shard, and shards of one length."""
    page, shard = layout.page_tokens, np.arange(len(token_count)) // layout.shard_samples
    in_shard = _page_in_shard(_to_pages(token_count, page), layout.shard_samples) * page
    return shard * layout.shard_tokens + in_shard


def level_strides(teacher: TeacherInfo, heights: Integers, widths: Integers) -> npt.NDArray[np.float32]:
    """Pixels of each sample (N,) from one of its teacher's tokens to the next, (N, levels, 2): down and across."""
    sizes = np.stack([heights, widths], axis=1)
    scale = np.ones(sizes.shape) if teacher.input_size is None else sizes / np.array(teacher.input_size)
    return (np.array(teacher.strides)[:, None] * scale[:, None, :]).astype(np.float32)


def field_bytes(manifest: Manifest, table: SampleTable, field: Field) -> int:
    """Exact bytes of the shard files of one field."""
    layout = manifest.layout
    pages = len(table) if field.per == "sample" else int(_to_pages(table.token_count, layout.page_tokens).sum())
    return pages * layout.page_bytes(field) + layout.shards * layout.tail_bytes(field)


def store_bytes(manifest: Manifest, table: SampleTable) -> int:
    """Exact bytes of all shard files; the sample table and the json files come on top (under 100 bytes a sample)."""
    return sum(field_bytes(manifest, table, field) for field in manifest.fields())


def _order(heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32], key: int, group: int) -> npt.NDArray[np.intp]:
    """Samples of nearly equal size in groups, the groups shuffled; the incomplete group stays last."""
    padded_area = -(-heights // 64) * -(-widths // 64)
    by_size = np.lexsort((widths, heights, padded_area, heights > widths))
    whole = len(by_size) // group * group
    groups = by_size[:whole].reshape(-1, group)
    # Philox's raw stream and a stable sort: the same order from every version of numpy.
    shuffled = groups[np.argsort(np.random.Philox(key=key).random_raw(len(groups)), kind="stable")]
    return np.concatenate([shuffled.reshape(-1), by_size[whole:]])


def _page_in_shard(pages: npt.NDArray[np.int64], shard_samples: int) -> npt.NDArray[np.int64]:
    """Pages (N,) before each sample's own in its shard."""
    start = np.cumsum(pages) - pages
    return start - np.repeat(start[::shard_samples], shard_samples)[: len(start)]


def _to_pages(tokens: npt.NDArray[np.generic], page: int) -> npt.NDArray[np.int64]:
    return -(-tokens.astype(np.int64) // page)


def _page_tokens(tokens: npt.NDArray[np.int32], keep_tokens: float) -> int:
    """A power of two of about a sixteenth of a sample, so that padding to whole pages costs little."""
    smallest, largest = PAGE_TOKENS
    sixteenth = max(1, int(tokens.mean() * keep_tokens / 16))
    return min(largest, max(smallest, 1 << (sixteenth.bit_length() - 1)))


def _shard_samples(samples: int, mean_record_bytes: float, group: int) -> int:
    """Samples of a shard: whole groups, about SHARD_BYTES, and at least MIN_SHARDS shards where there are enough."""
    by_bytes = min(MAX_SHARD_SAMPLES, int(SHARD_BYTES / mean_record_bytes))
    wanted = min(by_bytes, -(-samples // MIN_SHARDS))
    return max(1, wanted // group) * group
