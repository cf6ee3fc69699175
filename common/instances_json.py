"""An 'instances' json of COCO's format -> checked arrays, whoever wrote the file.

What is plainly meant is understood: numbers as strings, a missing or null area or crowd flag, missing names. All else
is a UserError that says what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import os.path
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.box_conventions import check_convention
from common.entries import Floats, GroundTruth, ImageEntries, Integers
from common.errors import UserError
from common.json_stream import Objects, UnexpectedKind, read_lists

Columns = tuple[npt.NDArray[Any], ...]

LONGEST_SIDE_PX = 2**24  # up to here float32, in which boxes are clipped, has every whole number
LONGEST_NAME_BYTES = 255  # of a file or folder, on all common file systems
UNUSABLE = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")  # lone surrogates are no text
CROWD = {None: False, 0: False, 1: True, "0": False, "1": True, "false": False, "true": True}


class Instances(NamedTuple):
    """What an 'instances' json says: its images, and its K categories, ascending by id.

    sha256: of the file's bytes. warning: about its boxes, empty if there is none. names_folder: the absolute folder of
    images, if file names in the json lead to it in another way than they do here; empty if they are the same.
    """

    entries: ImageEntries
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    sha256: str
    warning: str
    names_folder: str


def read_instances(annotation_file: Path, image_folder: Path) -> Instances:
    """Read and check the file. UserError, which does not name the file, where something in it is broken.

    image_folder: that file names are relative to, and must not leave.
    """
    found, sha256 = _read_columns(annotation_file)
    image_ids, file_names, sizes, names_folder = _checked_images(image_folder, *found.pop("images"))
    encoded = [name.encode() for name in file_names]
    category_ids, names = _checked_categories(*found.pop("categories"))
    in_images, of_categories, boxes_xywh_px, areas_px, crowd = found.pop("annotations")
    rows = _positions(in_images, image_ids, "image")
    labels = _positions(of_categories, np.array(category_ids), "category")
    warning = check_convention(boxes_xywh_px, sizes[rows])
    order = np.argsort(rows, kind="stable")
    entries = ImageEntries(
        image_ids,
        sizes,
        np.frombuffer(b"".join(encoded), np.uint8),
        _bounds(np.array([len(name) for name in encoded])),
        _bounds(np.bincount(rows, minlength=len(image_ids))),
        GroundTruth(labels[order], boxes_xywh_px[order], areas_px[order], crowd[order]),
    )
    return Instances(entries, category_ids, names, sha256, warning, names_folder)


def _bounds(lengths: Integers) -> Integers:
    """Where each begins and ends (N, 2), of things of these lengths (N,) one after another."""
    ends = np.cumsum(lengths)
    return np.stack((ends - lengths, ends), axis=1)


def _read_columns(annotation_file: Path) -> tuple[dict[str, Columns], str]:
    """What is needed of the file's images, categories and annotations, as columns, and its sha256.

    The file is read in pieces, and of its polygons, nine tenths of COCO's json, nothing stays.
    """
    columns_of = {"images": _image_columns, "categories": _category_columns, "annotations": _annotation_columns}
    blocks: dict[str, list[Columns]] = {name: [] for name in columns_of}
    digest = hashlib.sha256()
    with annotation_file.open("rb", buffering=0) as file:

        def read(size: int) -> bytes:
            data = file.read(size)
            digest.update(data)
            return data

        try:
            for name, objects in read_lists(read, columns_of, unread="segmentation"):
                blocks[name].append(columns_of[name](objects))
        except UnexpectedKind as error:
            raise _not_instances(str(error) or "images") from None
        except UnicodeDecodeError as error:
            raise UserError(f"expected json in UTF-8, found other bytes ({error}): save it as UTF-8") from None
        except ValueError as error:  # broken json
            raise UserError(f"expected json, found: {error}; is the file complete?") from None
    for name in ("images", "categories", "annotations"):
        if not blocks[name]:
            raise _not_instances(name)
        if not len(blocks[name][0][0]) and name != "annotations":
            raise UserError(f"expected {name}, found an empty list")
    return {name: _joined(found) for name, found in blocks.items()}, digest.hexdigest()


def _joined(blocks: list[Columns]) -> Columns:
    """Each column of all blocks in one array. The blocks are let go of on the way: there is memory for them once."""
    columns = [list(parts) for parts in zip(*blocks, strict=True)]
    blocks.clear()
    return tuple(np.concatenate(columns.pop(0)) for _ in range(len(columns)))


def _not_instances(name: str) -> UserError:
    return UserError(f"expected a list of objects named '{name}': is it an 'instances' file?")


def _column(items: Objects, key: str) -> list[Any]:
    try:
        return [item[key] for item in items]
    except KeyError:
        first = next(item for item in items if key not in item)
        raise UserError(f"expected '{key}' in every object, not found in {str(first)[:80]}") from None


def _integers(items: Objects, key: str) -> Integers:
    values = _column(items, key)
    for value in values:  # numpy would quietly convert a string, a float or a truth value
        if type(value) is not int or not -(2**63) <= value < 2**63:
            kind = "a whole number of at most 63 bits" if type(value) is int else "a whole number"
            raise UserError(f"expected '{key}' to be {kind} everywhere, found {str(value)[:40]!r}")
    return np.array(values, dtype=np.int64)


def _numbers(values: list[Any], shape: tuple[int, ...], expected: str) -> Floats:
    """Numbers, or strings of numbers; a null is NaN."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"expected {expected}, found another value") from None
    if values and numbers.shape != shape:
        raise UserError(f"expected {expected}, found {str(values[0])[:80]}")
    return numbers.reshape(shape)


def _image_columns(images: Objects) -> Columns:
    """Ids (N,), file names (N,), and sizes (N, 2) as width, height."""
    sizes = np.stack((_integers(images, "width"), _integers(images, "height")), axis=1)
    return _integers(images, "id"), np.array(_column(images, "file_name"), dtype=object), sizes


def _category_columns(categories: Objects) -> Columns:
    """Ids (N,) and names (N,); where a category has no name, its id."""
    ids = _integers(categories, "id")
    names = [category.get("name") for category in categories]
    return ids, np.array([str(i if name is None else name) for i, name in zip(ids, names, strict=True)], dtype=object)


def _annotation_columns(annotations: Objects) -> Columns:
    """Image ids (A,), category ids (A,), boxes_xywh_px (A, 4), areas_px (A,) and whether crowd (A,)."""
    count = len(annotations)
    boxes_xywh_px = _numbers(_column(annotations, "bbox"), (count, 4), "four numbers as every 'bbox'")
    if not np.isfinite(boxes_xywh_px).all():
        raise UserError("expected four finite numbers as every 'bbox', found an infinite one or NaN")
    areas_px = _numbers([annotation.get("area") for annotation in annotations], (count,), "a number as every 'area'")
    if np.isinf(areas_px).any() or (areas_px < 0).any():
        raise UserError(f"expected every 'area' to be 0 or above and finite, found {areas_px.min()}, {areas_px.max()}")
    areas_px = np.where(np.isnan(areas_px), boxes_xywh_px[:, 2] * boxes_xywh_px[:, 3], areas_px)
    crowd = np.array([_crowd(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    return _integers(annotations, "image_id"), _integers(annotations, "category_id"), boxes_xywh_px, areas_px, crowd


def _crowd(value: Any) -> bool:
    try:
        return CROWD[value.lower() if isinstance(value, str) else value]
    except (KeyError, TypeError):
        raise UserError(f"expected 0 or 1 as every 'iscrowd', found {str(value)[:40]!r}") from None


def _check_unique(values: Sequence[object], what: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"expected every {what} once, found {len(repeated)} repeated, the first is {repeated[0]}")


def _checked_images(
    image_folder: Path, ids: Integers, names: npt.NDArray[Any], sizes: Integers
) -> tuple[Integers, list[str], Integers, str]:
    """Image ids (N,) ascending, file names, sizes (N, 2) as width, height, and `Instances.names_folder`."""
    _check_unique(ids.tolist(), "image id")
    root = os.path.join(os.path.abspath(image_folder), "")
    written = names.tolist()
    names[:] = [_name_inside(name, root) for name in written]
    names_folder = "" if names.tolist() == written else os.path.abspath(image_folder)
    _check_unique(names.tolist(), "file name")
    for row in np.flatnonzero((sizes.min(axis=1) <= 0) | (sizes.max(axis=1) > LONGEST_SIDE_PX)).tolist():
        width, height = sizes[row].tolist()
        raise UserError(
            f"expected a width and height above 0 (and up to {LONGEST_SIDE_PX}), found {width} x {height} for"
            f" {names[row]}"
        )
    order = np.argsort(ids)
    return ids[order], names[order].tolist(), sizes[order], names_folder


def _name_inside(name: object, root: str) -> str:
    """A file's name relative to the folder of images. UserError where it is none, or of a file outside.

    root: the folder's absolute path with its final slash.
    """
    shown = ascii(name)[:80]
    if not isinstance(name, str) or not name:
        raise UserError(f"expected a name as every 'file_name', found {shown}")
    if UNUSABLE.search(name):
        raise UserError(f"expected every 'file_name' without backslashes and control characters, found {shown}")
    if "/" in name or name in (".", ".."):
        path = os.path.normpath(root + name if not name.startswith("/") else name)
        if not path.startswith(root):
            raise UserError(
                f"expected every 'file_name' to stay inside the folder of images, {root}, found {shown}:"
                " name the folder that holds the images with --image-folder"
            )
        name = path.removeprefix(root)
    if max(len(os.fsencode(part)) for part in name.split("/")) > LONGEST_NAME_BYTES:
        raise UserError(f"expected every 'file_name' to have up to {LONGEST_NAME_BYTES} bytes, found {shown}...")
    return name


def _checked_categories(ids: Integers, names: npt.NDArray[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    _check_unique(ids.tolist(), "category id")
    if ids.min() < 0:
        raise UserError(f"expected category ids of 0 and above, found {ids.min()}")
    order = np.argsort(ids)
    return tuple(ids[order].tolist()), tuple(names[order].tolist())


def _positions(values: Integers, ascending: Integers, what: str) -> Integers:
    """Index of each value among the ascending ones; UserError where it is not there."""
    found = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1).astype(np.int64)
    unknown = values[ascending[found] != values]
    if len(unknown):
        raise UserError(
            f"expected annotations of listed {what} ids only, found {len(unknown)} of others, the first of {unknown[0]}"
        )
    return found
