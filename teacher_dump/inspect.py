"""What is in a store, in words. The picture of one sample is `teacher_dump.drawing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from common.augment import AugmentPolicy
from common.cache.codec import SCORE_ERROR, STEP_ERROR
from common.cache.members import member_names, member_path
from common.cache.plan import field_bytes, store_bytes
from common.cache.reader import CacheReader
from common.cache.schema import Manifest
from common.coco import load_annotations
from common.errors import UserError
from teacher_dump.config import InspectConfig
from teacher_dump.drawing import draw_sample
from teacher_dump.tables import facts, size, table
from teacher_dump.weight_map import inside_ratio


def run_inspect(config: InspectConfig) -> str:
    """What to print: a description of the store, or of one sample that was drawn. UserError if there is none."""
    if config.image_id is None and (names := member_names(config.store)):
        members = [replace(config, store=Path(member_path(config.store, name))) for name in names]
        return "\n\n".join(run_inspect(member) for member in members)
    reader = CacheReader(config.store)
    try:
        if config.image_id is None:
            return "\n".join([*describe(reader), *_where_it_looks(reader, config)])
        out = config.out or Path(f"image-{config.image_id}-view-{config.view}.png")
        data = config.data or Path("data/coco")
        return draw_sample(reader, data, config.image_folder, config.image_id, config.view, out)
    finally:
        reader.close()


def _where_it_looks(reader: CacheReader, config: InspectConfig) -> list[str]:
    """The ratio of weight inside and outside ground-truth boxes, where --data names these: COCO's take long to read."""
    if config.data is None:
        return []
    annotations = load_annotations(config.data, reader.manifest.data.split, config.image_folder)
    if annotations.sha256 != reader.manifest.data.annotations_sha256:
        raise UserError(
            f"{reader.path} was dumped with other annotations than {annotations.annotation_file}: name the data it was"
            " dumped from with --data"
        )
    ratio = inside_ratio(config.store, annotations)
    return [] if ratio is None else ["", str(ratio)]


def describe(reader: CacheReader) -> list[str]:
    """A screenful on what a store is, what it holds and how much of it is there."""
    manifest, samples = reader.manifest, reader.table
    teacher, data, views, layout = manifest.teacher, manifest.data, manifest.views, manifest.layout
    total_bytes, count = store_bytes(manifest, samples), len(samples)
    tokens = samples.level_shapes.prod(axis=2, dtype=np.int64).sum(axis=1)
    finished, skipped = int(reader.finished_shards.sum()), int(reader.blank.sum())
    state = "complete" if reader.complete else "UNFINISHED: dump again to complete it; training uses what is there"
    rows = [("field", "dtype", "of", "a row", "a sample", "in all", "share")]
    for field in manifest.fields():
        in_all = field_bytes(manifest, samples, field)
        shape = " x ".join(map(str, field.row_shape)) or "1"
        each, share = size(in_all / count), f"{in_all / total_bytes:.1%}"
        rows.append((field.name, field.dtype, field.per, shape, each, size(in_all), share))
    rows.append(("all", "", "", "", size(total_bytes / count), size(total_bytes), "100.0%"))
    readable = len(reader.rows())
    return [
        *facts(
            [
                ("store", f"{reader.path}, format version {manifest.format_version}"),
                ("state", f"{finished} of {layout.shards} shards: {state}"),
                ("samples", f"{count}, of which {readable} can be read" + (f", {skipped} broken" if skipped else "")),
                (
                    "data",
                    f"{data.split}: {data.images} images, {manifest.num_classes} classes"
                    f" ({_some(data.class_names)}); annotations {data.annotations_sha256[:12]}",
                ),
                ("views", f"{views.views} of each image, seed {views.seed}, {_policy(views.policy)}"),
                (
                    "teacher",
                    f"{teacher.name}{_hash(teacher.weights_sha256)}: {teacher.layers} layers,"
                    f" {teacher.queries} queries, {teacher.channels} channels, strides {_some(teacher.strides)}"
                    + (f"; run in {teacher.amp}" if teacher.amp else "")
                    + ("" if teacher.trained else "; UNTRAINED, for trials only"),
                ),
                (
                    "tokens",
                    f"{tokens.mean():.0f} a sample ({tokens.min()} to {tokens.max()}),"
                    f" {samples.token_count.sum() / tokens.sum():.1%} kept as {manifest.codec.tokens}",
                ),
                ("fidelity", fidelity(manifest, reader.constants)),
                (
                    "layout",
                    f"{layout.shard_samples} samples a shard ({size(total_bytes / layout.shards)}), pages of"
                    f" {layout.page_tokens} tokens, crc32c on each; teacher's batches of {manifest.batch_size}",
                ),
                ("software", ", ".join(f"{name} {version}" for name, version in manifest.software.items())),
            ]
        ),
        "",
        *table(rows),
    ]


def fidelity(manifest: Manifest, constants: Mapping[str, Tensor]) -> str:
    """What storing may have changed, at most."""
    codec = manifest.codec
    floats = [*(["queries"] if codec.queries else []), *(["logits"] if codec.logits == "float" else [])]
    found = []
    if codec.components:
        found.append(
            f"tokens as one of 256 codes for each {codec.components} of their components, with a squared error of"
            f" {constants['codebook_error'].item():.1%} of their variance, right on average"
        )
    elif codec.quantised:
        how = "to nearest" if codec.rounding == "nearest" else "stochastically: right on average"
        found.append(
            f"tokens within {STEP_ERROR[codec.rounding]:.3g} steps (token scale x channel scale), rounded {how}"
        )
    else:
        floats.insert(0, "tokens")
    if floats:
        found.append(f"{', '.join(floats)} {'exact' if codec.tokens == 'fp32' else 'within 2^-11 of each value'}")
    if codec.logits == "uint8":
        found.append(f"scores within {SCORE_ERROR:.4f}")
    sampling = (
        "all tokens" if codec.keep_tokens == 1 else "tokens drawn by weight, the feature loss exact in expectation"
    )
    return f"{'; '.join(found)}; boxes, quality, assignment and weights exact; {sampling}"


def _policy(policy: AugmentPolicy) -> str:
    sides = policy.short_sides
    sizes = f"{sides[0]}" if len(sides) == 1 else f"{min(sides)}..{max(sides)}"
    crops = f", {policy.crop_probability:.0%} cropped" if policy.crop_probability else ""
    mirrored = f"{policy.flip_probability:.0%} mirrored"
    return f"{policy.name}: short side {sizes}, long side up to {policy.max_long_side}, {mirrored}{crops}"


def _hash(sha256: str) -> str:
    return f" ({sha256[:12]})" if sha256 else ""


def _some(values: tuple[object, ...], most: int = 6) -> str:
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")
