"""Synthetic stores for timing the reader: random bytes of the right shapes, written by the project's own writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.augment import flip_policy
from common.cache.plan import Plan, lay_out
from common.cache.schema import CodecInfo, DataInfo, Layout, Manifest, TeacherInfo, ViewInfo
from common.cache.writer import Record, ShardWriter, create_store

STRIDES = (8, 16, 32, 64)


def make_inputs(
    samples: int, codec: CodecInfo, *, layers: int, queries: int, mean_side_px: int, seed: int = 0
) -> tuple[Manifest, Plan]:
    """A manifest and plan of samples whose sides vary around `mean_side_px`, with 256 channels and 91 classes."""
    generator = np.random.default_rng(seed)
    sides = (mean_side_px * generator.uniform(0.85, 1.15, (samples, 2))).astype(np.int32)
    draft = Manifest(
        teacher=TeacherInfo("synthetic", "", False, layers=layers, queries=queries, channels=256, strides=STRIDES),
        data=DataInfo("train2017", "", samples, tuple(range(91)), tuple(map(str, range(91)))),
        views=ViewInfo(0, 1, flip_policy(int(mean_side_px * 1.15)), ""),
        codec=codec,
        layout=Layout(0, 1, 1, 1),
        batch_size=8,
        software={},
    )
    augmentation = np.zeros((samples, 7), dtype=np.int32)
    augmentation[:, 3:5] = augmentation[:, 5:7] = sides
    plan = lay_out(
        np.arange(samples, dtype=np.int64),
        np.zeros(samples, dtype=np.int32),
        augmentation,
        np.stack([-(-sides // stride) for stride in STRIDES], axis=1).astype(np.int32),
        keep_tokens=codec.keep_tokens,
        token_bytes=draft.row_bytes("token"),
        sample_bytes=draft.row_bytes("sample"),
        group=draft.batch_size,
    )
    return replace(draft, layout=plan.layout), plan


def plain_constants(manifest: Manifest) -> dict[str, npt.NDArray[np.float32]]:
    """Constants with which a codec can decode: nothing is rotated or scaled, every code stands for zeros."""
    constants = {name: np.zeros(shape, np.float32) for name, shape in manifest.constants().items()}
    for name, value in constants.items():
        if name.endswith("_scale"):
            value.fill(1)
        if name.endswith("rotation"):
            np.fill_diagonal(value, 1)
    return constants


def make_record(manifest: Manifest, plan: Plan, row: int) -> Record:
    """Random bytes in every field but those that are indices, decided by the row."""
    generator, count = np.random.default_rng(row), int(plan.table.token_count[row])

    def field_rows(field: Any) -> Any:
        shape = ((count,) if field.per == "token" else ()) + field.row_shape
        size = int(np.prod(shape)) * np.dtype(field.dtype).itemsize
        return np.frombuffer(generator.bytes(size), dtype=field.dtype).reshape(shape)

    record = {field.name: field_rows(field) for field in manifest.fields()}
    record["assignment"] = np.full_like(record["assignment"], -1)
    if "token_positions" in record:
        tokens = int(plan.table.level_shapes[row].prod(axis=1).sum())
        record["token_positions"] = np.sort(generator.permutation(tokens)[:count]).astype(np.int32)
    return record


def write_store(store: Path, manifest: Manifest, plan: Plan) -> None:
    create_store(store, manifest, plan, plain_constants(manifest))
    for shard in range(manifest.layout.shards):
        writer = ShardWriter(store, manifest, plan.table, shard)
        first = shard * manifest.layout.shard_samples
        last = min(first + manifest.layout.shard_samples, len(plan.table))
        writer.add(make_record(manifest, plan, row) for row in range(first, last))
        writer.commit()
