"""What a store says of itself, checked before anything relies on it: a store is input.

A checksum says that bytes are as they were written, not that they make sense. Numbers of a store decide how much memory
is asked for, and where compiled code reads and writes; so manifest, table and constants leave the functions that read
them (`read_manifest`, `read_table`, `read_constants`) only when they have passed here. `create_store` asks the same of
what it writes. What does not pass is a ValueError that says what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cache import crc32c
from common.cache.plan import SampleTable, grids, token_counts, token_offsets
from common.cache.schema import (
    CHECKSUMS,
    CONSTANTS_GROUP,
    QUERY_EMBEDDINGS,
    SKIPPED,
    TABLE_GROUP,
    Field,
    Layout,
    Manifest,
)
from common.cache.storage import Storage, read_checked
from common.entries import ImageEntries
from common.errors import UserError
from common.ranges import MAX_SEED, MAX_SIDE_PX

# Far above what detectors have, and low enough that what follows from them fits into memory (docs/cache-format.md).
MAX_IMAGE_SIDE_PX = 2**20
MAX_LEVELS = 16
MAX_SIZE = 2**16  # layers, queries, channels, classes
MAX_COUNT = 2**31 - 1  # samples, images, views
MAX_TOGETHER = 2**20  # samples of a shard or of the teacher's batch, tokens of a page
MAX_SHARD_PAGES = 2**22  # of a token field: an index of 64 MiB
MAX_RECORD_BYTES = 2**30

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what damaged metadata raise
Array = npt.NDArray[Any]


@contextmanager
def damage_explained(storage: Storage) -> Iterator[None]:
    """UserError in place of what damaged metadata raise."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(
            f"{storage}: the sample table or another array that all samples need is damaged ({error}); dump it again"
        ) from None


def check_manifest(manifest: Manifest) -> None:
    """Every number within its limits, and all of them in agreement."""
    teacher, codec, layout, views = manifest.teacher, manifest.codec, manifest.layout, manifest.views
    _check_range("teacher.layers", teacher.layers, 1, MAX_SIZE)
    _check_range("teacher.queries", teacher.queries, 1, MAX_SIZE)
    _check_range("teacher.channels", teacher.channels, 1, MAX_SIZE)
    _check_range("the number of teacher.strides", len(teacher.strides), 1, MAX_LEVELS)
    for stride in teacher.strides:
        _check_range("teacher.strides", stride, 1, MAX_SIDE_PX)
    for side in teacher.input_size or ():
        _check_range("teacher.input_size", side, 1, MAX_SIDE_PX)
    _check_range("data.images", manifest.data.images, 1, MAX_COUNT)
    _check_range("the number of data.category_ids", manifest.num_classes, 1, MAX_SIZE)
    _check(len(manifest.data.class_names) == manifest.num_classes, "data: expected as many class names as category ids")
    _check_range("views.views", views.views, 1, MAX_COUNT)
    _check_range("views.seed", views.seed, 0, MAX_SEED)
    _check_range("views.policy.max_long_side", views.policy.max_long_side, 1, MAX_SIDE_PX)
    _check(0 < codec.keep_tokens <= 1, f"codec.keep_tokens: expected above 0 and at most 1, found {codec.keep_tokens}")
    _check(codec.keep_tokens == 1 or not codec.neck, "codec: expected all tokens with the neck's features")
    _check_range("batch_size", manifest.batch_size, 1, MAX_TOGETHER)
    _check_range("layout.samples", layout.samples, 1, MAX_COUNT)
    found = f"{layout.samples} samples of {manifest.data.images} images and {views.views} views"
    _check(layout.samples == manifest.data.images * views.views, f"expected a sample of every view, found {found}")
    _check_range("layout.shard_samples", layout.shard_samples, 1, MAX_TOGETHER)
    _check_range("layout.page_tokens", layout.page_tokens, 1, MAX_TOGETHER)
    _check_range("layout.shard_tokens", layout.shard_tokens, 1, MAX_SHARD_PAGES * layout.page_tokens)
    _check(layout.shard_tokens % layout.page_tokens == 0, "layout.shard_tokens: expected a multiple of page_tokens")
    try:
        token_bytes = manifest.row_bytes("token")
    except UserError as error:  # channels that do not fill the codec's bytes
        raise ValueError(str(error)) from None
    _check_range("the bytes of a record's sample fields", manifest.row_bytes("sample"), 1, MAX_RECORD_BYTES)
    _check_range("the bytes of a page", layout.page_tokens * token_bytes, 1, MAX_RECORD_BYTES)


def check_table(manifest: Manifest, table: SampleTable) -> None:
    """Every sample of the manifest once, within its images, with the grids, tokens and place that `plan` gives it.

    The columns have the shapes and dtypes of `Manifest.columns`.
    """
    teacher, layout, views = manifest.teacher, manifest.layout, manifest.views
    view = table.view.reshape(views.views, -1)
    _check_rows((view == np.arange(views.views)[:, None]).reshape(-1), "view: expected one view after another")
    ids = np.sort(table.image_id.reshape(views.views, -1), axis=1)
    _check(bool((ids[0, 1:] > ids[0, :-1]).all()), "image_id: expected every image once in a view")
    _check(bool((ids == ids[0]).all()), "image_id: expected the same images in all views")

    flip, top, left, crop_height, crop_width, height, width = table.augmentation.T
    side = min(views.policy.max_long_side, MAX_SIDE_PX)
    for name, column, least, most in (
        ("flip", flip, 0, 1),
        ("crop top", top, 0, MAX_IMAGE_SIDE_PX),
        ("crop left", left, 0, MAX_IMAGE_SIDE_PX),
        ("crop height", crop_height, 1, MAX_IMAGE_SIDE_PX),
        ("crop width", crop_width, 1, MAX_IMAGE_SIDE_PX),
        ("height", height, 1, side),
        ("width", width, 1, side),
    ):
        _check_rows((column >= least) & (column <= most), f"augmentation: expected a {name} of {least} to {most}")
    if not views.policy.crop_probability:
        _check_rows((top == 0) & (left == 0), "augmentation: expected whole images, as the policy crops none")

    expected = grids(table.augmentation, teacher.strides, teacher.input_size)
    right = (table.level_shapes == expected).reshape(len(table), -1).all(axis=1)
    _check_rows(right, "level_shapes: expected the grids of the sample's size")
    tokens = (table.level_shapes[..., 0].astype(np.int64) * table.level_shapes[..., 1]).sum(axis=1)
    kept = token_counts(tokens, manifest.codec.keep_tokens, layout.page_tokens)
    _check_rows(table.token_count == kept, "token_count: expected the share keep_tokens of the grids")
    most_bytes = int(table.token_count.max()) * manifest.row_bytes("token") + manifest.row_bytes("sample")
    _check_range("the bytes of the largest record", most_bytes, 1, MAX_RECORD_BYTES)
    _check_rows(table.token_offset == token_offsets(table.token_count, layout), "token_offset: expected page by page")
    shard = np.arange(len(table)) // layout.shard_samples
    end = table.token_offset + table.token_count - shard * layout.shard_tokens
    _check_rows(end <= layout.shard_tokens, "token_count: expected no more than layout.shard_tokens in a shard")


def check_constants(manifest: Manifest, constants: Mapping[str, Array]) -> None:
    """What the codec needs is there, and can be decoded with."""
    needed = manifest.constants()
    missing = [name for name in needed if name not in constants]
    _check(not missing, f"{CONSTANTS_GROUP}: expected {', '.join(needed)}, found no {', '.join(missing)}")
    for name, shape in constant_shapes(manifest, constants).items():
        value = constants[name]
        found = f"{value.dtype} of {value.shape}"
        fits = value.shape == shape and value.dtype == np.float32
        _check(fits, f"{name}: expected float32 of {shape}, found {found}")
        _check(bool(np.isfinite(value).all()), f"{name}: expected finite numbers")
        if name.endswith("_scale"):
            _check(bool((value > 0).all()), f"{name}: expected numbers above 0")
        if name.endswith("rotation"):
            turned = value.T @ value - np.eye(len(value), dtype=np.float32)
            _check(bool((np.abs(turned) < 1e-3).all()), f"{name}: expected an orthogonal matrix")


def check_record(field: Field, rows: Array, tokens: int) -> None:
    """What a sample holds of one field can be what a teacher said; not for the zeros of a sample without an image.

    rows: the sample's, (S, ...) of a token field and row_shape of a sample field. tokens: T, all of its grids.
    """
    name = field.name
    if rows.dtype == np.float16:  # no exponent of ones; numpy's isfinite takes twenty times as long
        _check(int((rows.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00, f"{name}: expected finite numbers")
    elif rows.dtype.kind == "f":
        _check(bool(np.isfinite(rows).all()), f"{name}: expected finite numbers")
    if name.endswith(("quality", "weights", "scales")):
        _check(bool((rows >= 0).all()), f"{name}: expected numbers of 0 and above")
    if name == "token_positions":
        ascending = bool((rows[1:] > rows[:-1]).all()) and rows[0] >= 0 and rows[-1] < tokens
        _check(ascending, f"{name}: expected ascending positions of 0 to {tokens - 1}")
    if name == "assignment":  # every box is some query's, unless there are more boxes than queries
        _check(bool((rows >= -1).all()), f"{name}: expected boxes, or -1")
        for layer in rows:
            boxes = np.sort(layer[layer >= 0])
            once = bool((boxes[1:] > boxes[:-1]).all())
            all_of_them = len(boxes) == rows.shape[1] or not len(boxes) or boxes[-1] == len(boxes) - 1
            _check(once and all_of_them, f"{name}: expected each box of the sample once in a layer")


def constant_shapes(manifest: Manifest, there: Sequence[str] | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the constants that a store of this manifest has; `there` says whether the query embeddings are."""
    teacher = manifest.teacher
    embeddings = {QUERY_EMBEDDINGS: (teacher.queries, 2 * teacher.channels)} if QUERY_EMBEDDINGS in there else {}
    return manifest.constants() | embeddings


def check_crops(table: SampleTable, entries: ImageEntries) -> None:
    """The crops of those samples whose image is among `entries` are inside it."""
    rows = entries.rows_of(table.image_id)
    end = table.augmentation[:, 1:3] + table.augmentation[:, 3:5]
    inside = (end <= entries.sizes[rows][:, ::-1]).all(axis=1)
    _check_rows((rows < 0) | inside, "augmentation: expected crops inside their images")


def check_metadata(storage: Storage, manifest: Manifest) -> None:
    """Every array's zarr.json is what was written and describes what the format has there."""
    for key, reason in metadata_damage(storage, manifest):
        raise ValueError(f"{key}: {reason}")


def metadata_damage(storage: Storage, manifest: Manifest) -> list[tuple[str, str]]:
    """Key of every array's zarr.json that is missing, is not the one that was written, or describes another array than
    the format has there, with what is wrong with it."""
    attributes = json.loads(storage.read("zarr.json"))["attributes"]
    recorded, damage = attributes[CHECKSUMS], []
    for name, expected in _arrays(manifest, [key.split("/")[1] for key in recorded if key.startswith(CONSTANTS_GROUP)]):
        key = f"{name}/zarr.json"
        try:
            content = storage.read(key)
            if crc32c.value(np.frombuffer(content, np.uint8)) != recorded.get(key):
                raise ValueError("it is not what was written")
            found = _described(json.loads(content))
            if found != expected:
                wrong = next(part for part in expected if found[part] != expected[part])
                raise ValueError(f"expected {wrong} {expected[wrong]}, found {str(found[wrong])[:200]}")
        except FileNotFoundError:
            damage.append((key, "it is missing"))
        except (*UNREADABLE, AttributeError, IndexError) as error:
            damage.append((key, str(error)))
    return damage


def manifest_checksum(manifest: Any) -> int:
    """crc32c of a manifest's json without spaces and with sorted keys."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return crc32c.value(np.frombuffer(canonical, np.uint8))


def read_array(storage: Storage, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    """An array of a store that is one chunk with a crc32c, read-only and mapped from the file where there is one.

    shape, dtype: what the format says of it; the file's own word is not taken. OSError if it is missing, ValueError if
    it is damaged or of another size.
    """
    content = read_checked(storage, "/".join([name, "c", *("0" for _ in shape)]))
    stored = np.dtype(dtype).newbyteorder("<")
    expected = int(np.prod(shape, dtype=object)) * stored.itemsize
    _check(len(content) == expected, f"{name}: expected {expected} bytes, found {len(content)}")
    return np.ndarray(shape, stored, buffer=content.data)


def _arrays(manifest: Manifest, constants: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every array of a store, and what its zarr.json must say."""
    layout = manifest.layout
    for field in manifest.fields():
        yield field.name, _sharded(field, layout)
    for name, (shape, dtype) in manifest.columns().items():
        yield f"{TABLE_GROUP}/{name}", _plain(shape, dtype, shape)
    for name, shape in constant_shapes(manifest, constants).items():
        yield f"{CONSTANTS_GROUP}/{name}", _plain(shape, "float32", shape)
    yield SKIPPED, _plain((layout.samples,), "uint8", (layout.shard_samples,))


def _sharded(field: Field, layout: Layout) -> dict[str, Any]:
    rows = layout.shards * layout.shard_tokens if field.per == "token" else layout.samples
    about = _plain((rows, *field.row_shape), field.dtype, (layout.shard_rows(field), *field.row_shape))
    pages = [layout.page_rows(field), *field.row_shape]
    return {**about, "separator": ".", "codecs": [("sharding_indexed", pages, BYTES, BYTES, "end")]}


BYTES = [("bytes", "little"), "crc32c"]


def _plain(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> dict[str, Any]:
    about = {"node_type": "array", "zarr_format": 3, "shape": list(shape), "data_type": dtype}
    return {**about, "chunk_shape": list(chunk), "separator": "/", "codecs": BYTES}


def _described(about: Any) -> dict[str, Any]:
    """What a zarr.json says of the bytes of an array."""
    same = {name: about[name] for name in ("node_type", "zarr_format", "shape", "data_type")}
    grid, keys = about["chunk_grid"], about["chunk_key_encoding"]
    _check((grid["name"], keys["name"]) == ("regular", "default"), f"found {grid['name']}, {keys['name']}")
    chunk_shape = grid["configuration"]["chunk_shape"]
    separator = keys.get("configuration", {}).get("separator", "/")
    return {**same, "chunk_shape": chunk_shape, "separator": separator, "codecs": _codecs(about["codecs"])}


def _codecs(found: Any) -> list[Any]:
    """Codecs as what distinguishes them. Bytes have no order where an element is one: they say so, or "little"."""
    told: list[Any] = []
    for codec in found:
        name, settings = codec["name"], codec.get("configuration") or {}
        if name == "bytes":
            told.append((name, settings.get("endian") or "little"))
        elif name == "sharding_indexed":
            inner, index = _codecs(settings["codecs"]), _codecs(settings["index_codecs"])
            told.append((name, settings["chunk_shape"], inner, index, settings.get("index_location", "end")))
        else:
            told.append(name)
    return told


def _check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _check_range(name: str, value: int, least: int, most: int) -> None:
    _check(least <= value <= most, f"{name}: expected {least} to {most}, found {value}")


def _check_rows(good: npt.NDArray[np.bool_], message: str) -> None:
    """good: (N,)"""
    if not good.all():
        wrong = np.flatnonzero(~good)
        raise ValueError(f"{message}, found otherwise in {len(wrong)} rows, the first is {wrong[0]}")
