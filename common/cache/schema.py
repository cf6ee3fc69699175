"""What a store holds: its fields, their layout on disk and the manifest that says what it is.

A store is a standard Zarr v3 group; docs/cache-format.md is its specification. Every field is one array cut into
shards, and shard k of every field belongs to the same samples, so that one rank writes a block of whole records.
Sample fields have one row per sample. Token fields have one row per kept token, and each sample starts on a new page
(inner chunk), so that a sample is one contiguous byte range of a shard file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from common.augment import AugmentPolicy
from common.errors import UserError
from common.pixel_rule import Exif

FORMAT_VERSION = 1
ATTRIBUTE = "detrcache"  # the group attribute that holds the manifest
CHECKSUMS = "crc32c"  # group attribute: checksum of the manifest and of every array's zarr.json
TABLE_GROUP, CONSTANTS_GROUP = "samples", "teacher"
SKIPPED = "skipped"  # array of a store: 1 for each sample whose image could not be decoded
QUERY_EMBEDDINGS = "query_embeddings"  # the constant that not every teacher has
CHECKSUM_BYTES = 4  # crc32c after every page and after the index
SEAL_BYTES = 32  # between the pages and the index of a shard file
INDEX_ENTRY_BYTES = 16  # offset and length of one page, as uint64
MISSING = 2**64 - 1  # offset and length of a page that a shard does not hold

TokenCodec = Literal["fp32", "fp16", "int8", "int4", "pq4", "pq8"]
LogitsCodec = Literal["float", "uint8"]
Rounding = Literal["nearest", "stochastic"]
TeacherAmp = Literal["tf32", "bf16"]
GROUP = 64  # channels that share a scale of int4, at most: groups of 32 take 6% more bytes for 7% less error


@dataclass(frozen=True)
class Field:
    """One array of the store. row_shape: shape of one row, a sample's or a token's; dtype: numpy's name."""

    name: str
    per: Literal["sample", "token"]
    row_shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """How rows fall into shards and pages.

    Shard k holds samples k * shard_samples onwards. Its token rows start at row k * shard_tokens: shards have a fixed
    number of token rows, of which the pages beyond the last sample's are never written. A page has page_tokens rows of
    a token field or one row of a sample field.
    """

    samples: int
    shard_samples: int
    shard_tokens: int
    page_tokens: int

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    def page_rows(self, field: Field) -> int:
        return self.page_tokens if field.per == "token" else 1

    def shard_rows(self, field: Field) -> int:
        return self.shard_tokens if field.per == "token" else self.shard_samples

    def shard_pages(self, field: Field) -> int:
        return self.shard_rows(field) // self.page_rows(field)

    def page_bytes(self, field: Field) -> int:
        """Bytes of one page on disk, its checksum included."""
        return self.page_rows(field) * field.row_bytes + CHECKSUM_BYTES

    def index_bytes(self, field: Field) -> int:
        return self.shard_pages(field) * INDEX_ENTRY_BYTES + CHECKSUM_BYTES

    def tail_bytes(self, field: Field) -> int:
        """Bytes of a shard file after its pages: the seal and the index."""
        return SEAL_BYTES + self.index_bytes(field)


@dataclass(frozen=True)
class TeacherInfo:
    """The teacher that made the records, and the shapes of what it gave."""

    name: str
    weights_sha256: str
    trained: bool
    """False for a randomly initialised teacher, which is good for trials only."""
    layers: int
    queries: int
    channels: int
    strides: tuple[int, ...]
    """Pixels of the teacher's input per token, one for each feature level, fine to coarse."""
    input_size: tuple[int, int] | None = None
    """Height and width that the teacher resizes every sample to; None: its input is the sample's own pixels."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """What the teacher makes of its logits. The store's logits are always for the sigmoid (docs/teachers.md)."""
    amp: TeacherAmp | None = None
    """The lower precision that the teacher ran in. None: float32."""


@dataclass(frozen=True)
class DataInfo:
    """The annotated images that were dumped."""

    split: str
    annotations_sha256: str
    images: int
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ViewInfo:
    """How every sample was augmented; the parameters themselves are stored with each sample."""

    seed: int
    views: int
    policy: AugmentPolicy
    pixel_fingerprint: str
    exif: Exif | None = None
    """How files became pixels (`common.pixel_rule`). None: as before there was a choice."""


@dataclass(frozen=True)
class CodecInfo:
    """What is kept of the teacher's tokens and how it is stored.

    keep_tokens: fraction in (0, 1]; 1 keeps all. neck: the encoder's input is stored too, in the same way, with the
    released code's weight map over it; it takes all tokens. rounding: of int8 and int4. queries: the decoder's output
    vectors are stored, which only the contrastive loss reads. logits: float (float32 with fp32 tokens, else float16),
    or uint8, scores on 256 levels.
    """

    tokens: TokenCodec
    keep_tokens: float
    neck: bool = False
    rounding: Rounding = "nearest"
    queries: bool = True
    logits: LogitsCodec = "float"

    @property
    def quantised(self) -> bool:
        """As int8 or int4, with scales."""
        return self.tokens in ("int8", "int4")

    @property
    def components(self) -> int:
        """Numbers in a byte of product quantisation; 0 where tokens are stored otherwise."""
        return {"pq4": 4, "pq8": 8}.get(self.tokens, 0)

    @property
    def calibrated(self) -> bool:
        """Whether the store holds what was measured of some tokens before any was encoded."""
        return self.quantised or self.components > 0

    def width(self, channels: int) -> int:
        """Elements of a stored token of so many channels. UserError where these do not fill whole bytes."""
        packed = 2 if self.tokens == "int4" else self.components or 1
        if channels % packed:
            raise UserError(
                f"expected features whose channels are a multiple of {packed} for {self.tokens}, found {channels};"
                " use --tokens int8"
            )
        return channels // packed

    def scales(self, channels: int) -> int:
        """Scales of a token of so many channels: one for int8, one a group for int4."""
        if self.tokens == "int8":
            return 1
        return next(groups for groups in range(-(-channels // GROUP), channels + 1) if channels % groups == 0)


@dataclass(frozen=True)
class Manifest:
    """The identity of a store. Two dumps with equal manifests write equal bytes."""

    teacher: TeacherInfo
    data: DataInfo
    views: ViewInfo
    codec: CodecInfo
    layout: Layout
    batch_size: int
    software: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        return len(self.data.category_ids)

    def fields(self) -> tuple[Field, ...]:
        """All fields that the records of this store have, in the order in which they are written."""
        layers, queries, channels = self.teacher.layers, self.teacher.queries, self.teacher.channels
        query_dtype = "float32" if self.codec.tokens == "fp32" else "float16"
        fields = self._features("tokens", "token_scales")
        if self.codec.keep_tokens < 1:
            fields.append(Field("token_positions", "token", (), "int32"))
        fields.append(Field("token_weights", "token", (), "float32"))
        if self.codec.neck:
            fields += [*self._features("neck", "neck_scales"), Field("neck_weights", "token", (), "float32")]
        if self.codec.queries:
            fields.append(Field("queries", "sample", (layers, queries, channels), query_dtype))
        return (
            *fields,
            Field(
                "logits",
                "sample",
                (layers, queries, self.num_classes),
                "uint8" if self.codec.logits == "uint8" else query_dtype,
            ),
            Field("boxes_cxcywh", "sample", (layers, queries, 4), "float32"),
            Field("quality", "sample", (layers, queries), "float32"),
            Field("assignment", "sample", (layers, queries), "int16"),
        )

    def _features(self, name: str, scales: str) -> list[Field]:
        """The fields of features in the store's codec."""
        codec, channels = self.codec, self.teacher.channels
        dtype = {"fp32": "float32", "fp16": "float16", "int8": "int8"}.get(codec.tokens, "uint8")
        values = Field(name, "token", (codec.width(channels),), dtype)
        return [values, Field(scales, "token", (codec.scales(channels),), "float16")] if codec.quantised else [values]

    def columns(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each column of the sample table."""
        samples = self.layout.samples
        return {
            "image_id": ((samples,), "int64"),
            "view": ((samples,), "int32"),
            "augmentation": ((samples, 7), "int32"),
            "level_shapes": ((samples, len(self.teacher.strides), 2), "int32"),
            "token_count": ((samples,), "int32"),
            "token_offset": ((samples,), "int64"),
        }

    def constants(self) -> dict[str, tuple[int, ...]]:
        """Shape of each float32 array that the codec needs once. Query embeddings, which not all teachers have, are no
        part of it."""
        channels, components = self.teacher.channels, self.codec.components
        if self.codec.quantised:
            shapes: dict[str, tuple[int, ...]] = {"channel_scale": (channels,), "channel_shift": (channels,)}
        elif components:
            books = (channels // components, 256, components)
            shapes = {"rotation": (channels, channels), "codebooks": books, "centroids": books}
            shapes |= {"component_scale": (channels,), "codebook_error": (1,)}
        else:
            shapes = {}
        return shapes | ({f"neck_{name}": shape for name, shape in shapes.items()} if self.codec.neck else {})

    def row_bytes(self, per: Literal["sample", "token"]) -> int:
        """Bytes of one row of all sample fields, or of all token fields."""
        return sum(field.row_bytes for field in self.fields() if field.per == per)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = _MANIFEST.dump_python(self, mode="json")
        if self.codec.logits == "float":  # as the manifests that were written before there was a choice
            del value["codec"]["logits"]
        if self.teacher.amp is None:
            del value["teacher"]["amp"]
        if self.views.exif is None:
            del value["views"]["exif"]
        return value

    @staticmethod
    def from_json(value: Any, where: str) -> Manifest:
        """The manifest that `to_json` wrote. UserError if it is another version's or not a manifest at all."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            found = "no DETRCache manifest" if version is None else f"format version {version}"
            raise UserError(
                f"{where}: expected a store of format version {FORMAT_VERSION}, found {found}; dump it again"
            )
        try:
            return _MANIFEST.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: the manifest is damaged at {place} ({first['msg']}); dump it again") from None


_MANIFEST = TypeAdapter(Manifest)


def differences(ours: Manifest, theirs: Manifest) -> list[str]:
    """The fields in which two manifests differ, each as 'name: ours, theirs'."""
    return _differences(ours.to_json(), theirs.to_json(), "")


def _differences(ours: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [
            line for key in keys for line in _differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if ours == theirs else [f"{name}: {ours!r} against {theirs!r}"]
