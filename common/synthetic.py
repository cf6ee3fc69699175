"""The demo's data set: drawn scenes in COCO's format.

    python -m common.synthetic --out data/demo

Seven classes of shapes, turned, stretched and scaled, in textures that say nothing about the class, overlap each other
and the border of uneven backgrounds, among strokes and specks that belong to no class, under noise: enough for a small
detector to learn in minutes, too much for it to get right.

Image i of a split depends on (seed, split, i), the size and the scale alone: a larger data set begins with the smaller
one, and any number of processes draws the same.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.errors import UserError, run_command

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SUBPIXELS = 3  # samples per pixel along each axis: edges are smooth, boxes exact to a third of a pixel
HALF_SIZES_PX = (7.0, 30.0)
LEAST_VISIBLE = 0.5  # of a shape's area, inside the image and not covered: no placement may leave a shape with less
JPEG_QUALITY = 95
FIRST_IMAGE_IDS = {"train2017": 1, "val2017": 500_001}  # unique over both splits, as COCO's are


def _star(x: Floats, y: Floats) -> Bools:
    """Five tips at radius 1, joined by straight edges to the corners between them at radius .45."""
    from_tip = np.abs((np.arctan2(y, x) * 5 / (2 * np.pi) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
    inner, corner = 0.45, np.pi / 5
    within: Bools = np.hypot(x, y) * (inner * np.sin(corner - from_tip) + np.sin(from_tip)) < inner * np.sin(corner)
    return within


# Class name -> category id, and which points are inside, in coordinates where the shape fits the unit circle.
# The ids have gaps, as COCO's have: code that takes an id for an index fails here too.
SHAPES: dict[str, tuple[int, Callable[[Floats, Floats], Bools]]] = {
    "disc": (2, lambda x, y: x * x + y * y < 1),
    "ring": (3, lambda x, y: (x * x + y * y < 1) & (x * x + y * y > 0.36)),
    "square": (5, lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.7),
    "triangle": (8, lambda x, y: (y > -0.5) & (np.abs(x) * 3**0.5 + y < 1)),
    "star": (13, _star),
    "cross": (21, lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.95)),
    "moon": (34, lambda x, y: (x * x + y * y < 1) & ((x - 0.5) ** 2 + y * y > 0.64)),
}


@dataclass(frozen=True)
class SceneObject:
    """box_xyxy_px: the extent of the shape within the image, as if no other covered it; area_px: likewise."""

    category_id: int
    box_xyxy_px: tuple[float, float, float, float]
    area_px: float


@dataclass(frozen=True)
class _Shape:
    """A placed shape: the part of the image it touches, how much of each pixel there it covers, and its own axes."""

    rows: slice
    columns: slice
    coverage: Floats  # (h, w) in 0..1
    axes: tuple[Floats, Floats]  # (h, w) each, the pixel centres in the shape's coordinates
    box_xyxy_px: tuple[float, float, float, float]
    whole_area_px: float  # outside the image included


def draw_scene(
    seed: int, split: str, index: int, size: int = 128, scale: float = 1.0
) -> tuple[npt.NDArray[np.uint8], list[SceneObject]]:
    """Image number `index` of a split: RGB pixels (size, size, 3), and its objects from back to front.

    scale: what the usual sizes of the shapes are multiplied by.
    """
    generator = np.random.default_rng((seed, FIRST_IMAGE_IDS[split], index))
    canvas = _draw_strokes(generator, _background(generator, size), count=int(generator.integers(4, 13)))
    owners = np.full((size, size), -1)  # the foremost shape at each pixel
    placed: list[_Shape] = []
    objects: list[SceneObject] = []
    for _ in range(generator.binomial(11, 0.4)):
        name = str(generator.choice(list(SHAPES)))
        category_id, inside = SHAPES[name]
        attempts = (_place(generator, inside, size, scale) for _ in range(8))
        shape = next((shape for shape in attempts if _leaves_enough_visible(shape, owners, placed)), None)
        if shape is None:  # the image is full
            continue
        area = canvas[shape.rows, shape.columns]
        area += (_texture(generator, shape.axes, area.mean(axis=(0, 1))) - area) * shape.coverage[..., None]
        owners[shape.rows, shape.columns][shape.coverage > 0.5] = len(placed)
        placed.append(shape)
        objects.append(SceneObject(category_id, shape.box_xyxy_px, float(shape.coverage.sum())))
    canvas = _draw_strokes(generator, canvas, count=int(generator.integers(0, 4)))
    canvas += generator.normal(0, generator.uniform(3, 14), canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def draw_data_set(
    folder: Path,
    train_images: int = 3000,
    val_images: int = 300,
    seed: int = 0,
    size: int = 128,
    scale: float = 1.0,
    processes: int = 1,
) -> None:
    """Draw train2017/, val2017/ and annotations/ into a new folder, which appears complete or not at all.

    Raises UserError where the folder exists or cannot be written.
    """
    if min(train_images, val_images) < 1 or seed < 0 or scale <= 0 or size < 2 * HALF_SIZES_PX[1] * scale:
        raise UserError(
            "expected at least one image of each split, a seed of 0 or above, a scale above 0 and a size of"
            f" {2 * HALF_SIZES_PX[1]:.0f} pixels times the scale or more, found {train_images} and {val_images} images,"
            f" seed {seed}, scale {scale:g}, size {size}"
        )
    if folder.exists():
        raise UserError(f"expected to make {folder}, but it exists: use it as it is, remove it, or name another")
    partial_folder = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        for split, count in (("train2017", train_images), ("val2017", val_images)):
            _draw_split(partial_folder, split, count, seed, size, scale, processes)
        partial_folder.rename(folder)
    except OSError as error:
        raise UserError(f"expected to write a data set to {folder}: {error.strerror}") from None


def _draw_split(folder: Path, split: str, count: int, seed: int, size: int, scale: float, processes: int) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    write = partial(_write_scene, folder / split, seed, split, size, scale)
    with _mapper(processes) as mapper:
        for index, objects in enumerate(
            tqdm(mapper(write, range(count)), split, total=count, unit="image", disable=None)
        ):
            image_id = FIRST_IMAGE_IDS[split] + index
            images.append(
                {"id": image_id, "file_name": _file_name(image_id), "width": size, "height": size, "license": 1}
            )
            first = len(annotations) + 1
            annotations += [_annotation(number, image_id, drawn) for number, drawn in enumerate(objects, start=first)]
    content = {
        "info": {"description": f"DETRCache drawn scenes, seed {seed}, {size} x {size} pixels", "version": "1.0"},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for name, (i, _) in SHAPES.items()],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_scene(folder: Path, seed: int, split: str, size: int, scale: float, index: int) -> list[SceneObject]:
    pixels, objects = draw_scene(seed, split, index, size, scale)
    Image.fromarray(pixels).save(folder / _file_name(FIRST_IMAGE_IDS[split] + index), quality=JPEG_QUALITY)
    return objects


def _file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _annotation(number: int, image_id: int, drawn: SceneObject) -> dict[str, Any]:
    x0, y0, x1, y1 = (round(value, 2) for value in drawn.box_xyxy_px)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": drawn.category_id,
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "area": round(drawn.area_px, 2),
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "iscrowd": 0,
    }


@contextlib.contextmanager
def _mapper(processes: int) -> Iterator[Callable[..., Any]]:
    if processes == 1:
        yield map
    else:  # spawned: forked children of a process with threads can hang
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield partial(pool.imap, chunksize=16)


def _background(generator: np.random.Generator, size: int) -> Floats:
    """Soft patches of colour at two scales, (size, size, 3)."""
    canvas = np.full((size, size, 3), generator.uniform(50, 200, 3))
    for cells, strength in ((4, 35.0), (20, 12.0)):
        coarse = np.clip(generator.normal(128, strength, (cells, cells, 3)), 0, 255).astype(np.uint8)
        canvas += np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float64) - 128
    return canvas


def _draw_strokes(generator: np.random.Generator, canvas: Floats, count: int) -> Floats:
    """Lines, arcs and specks that are no objects."""
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for kind in generator.integers(3, size=count):
        colour = (*generator.integers(256, size=3).tolist(),)
        x, y = generator.uniform(0, len(canvas), 2).tolist()
        dx, dy = generator.uniform(-30, 30, 2).tolist()
        width = int(generator.integers(1, 4))
        if kind == 0:
            draw.line((x, y, x + dx, y + dy), fill=colour, width=width)
        elif kind == 1:
            start = generator.uniform(0, 360)
            draw.arc((x, y, x + abs(dx), y + abs(dy)), start, start + generator.uniform(40, 160), colour, width)
        else:
            draw.ellipse((x, y, x + 1 + abs(dx) / 8, y + 1 + abs(dy) / 8), fill=colour)
    return np.asarray(image).astype(np.float64)


def _place(
    generator: np.random.Generator, inside: Callable[[Floats, Floats], Bools], size: int, scale: float
) -> _Shape:
    """The shape with a drawn size, stretch, angle and centre."""
    half_size = float(np.exp(generator.uniform(*np.log(HALF_SIZES_PX)))) * scale
    stretch = generator.uniform(0.75, 1.0)
    angle = generator.uniform(0, 2 * np.pi)
    centre_x, centre_y = generator.uniform(0, size, 2)

    def sample(start: int, stop: int, per_pixel: int, centre: float) -> Floats:
        return (np.arange(start * per_pixel, stop * per_pixel) + 0.5) / per_pixel - centre

    def own_axes(xs: Floats, ys: Floats) -> tuple[Floats, Floats]:
        x, y = xs[None, :] / half_size, ys[:, None] / half_size
        return x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / stretch

    left, right = int(np.floor(centre_x - half_size)), int(np.ceil(centre_x + half_size))
    top, bottom = int(np.floor(centre_y - half_size)), int(np.ceil(centre_y + half_size))
    mask = inside(*own_axes(sample(left, right, SUBPIXELS, centre_x), sample(top, bottom, SUBPIXELS, centre_y)))
    whole_area_px = mask.sum() / SUBPIXELS**2

    x0, x1, y0, y1 = max(left, 0), min(right, size), max(top, 0), min(bottom, size)
    mask = mask[(y0 - top) * SUBPIXELS : (y1 - top) * SUBPIXELS, (x0 - left) * SUBPIXELS : (x1 - left) * SUBPIXELS]
    coverage = mask.reshape(y1 - y0, SUBPIXELS, x1 - x0, SUBPIXELS).mean(axis=(1, 3))
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        box = (0.0, 0.0, 0.0, 0.0)
    else:
        low_x, high_x = columns[0] / SUBPIXELS, (columns[-1] + 1) / SUBPIXELS
        low_y, high_y = rows[0] / SUBPIXELS, (rows[-1] + 1) / SUBPIXELS
        box = (float(x0 + low_x), float(y0 + low_y), float(x0 + high_x), float(y0 + high_y))
    axes = own_axes(sample(x0, x1, 1, centre_x), sample(y0, y1, 1, centre_y))
    return _Shape(slice(y0, y1), slice(x0, x1), coverage, axes, box, float(whole_area_px))


def _leaves_enough_visible(shape: _Shape, owners: npt.NDArray[np.int64], placed: list[_Shape]) -> bool:
    """Whether LEAST_VISIBLE of this shape lies in the image, and it leaves as much of those that it covers."""
    if shape.coverage.sum() < LEAST_VISIBLE * shape.whole_area_px:
        return False
    covered = owners.copy()
    covered[shape.rows, shape.columns][shape.coverage > 0.5] = -1
    visible_px = np.bincount(covered[covered >= 0], minlength=len(placed))
    return all(px >= LEAST_VISIBLE * other.whole_area_px for px, other in zip(visible_px, placed, strict=True))


def _texture(generator: np.random.Generator, axes: tuple[Floats, Floats], behind: Floats) -> Floats:
    """Two colours in a pattern (h, w, 3): plain, stripes, checks, dots or a ramp. behind: mean colour there (3,)."""
    first, second = (
        max(generator.uniform(10, 245, (2, 3)), key=lambda colour: float(np.abs(colour - behind).sum()))
        for _ in range(2)
    )
    x, y = axes
    frequency, phase = generator.uniform(4, 11), generator.uniform(0, 2 * np.pi)
    direction = generator.uniform(0, np.pi)
    along = x * np.cos(direction) + y * np.sin(direction)
    across = y * np.cos(direction) - x * np.sin(direction)
    patterns: tuple[Callable[[], Floats], ...] = (
        lambda: np.zeros_like(x),
        lambda: (np.sin(frequency * along + phase) > 0).astype(np.float64),
        lambda: (np.sin(frequency * along) * np.sin(frequency * across) > 0).astype(np.float64),
        lambda: (np.sin(frequency * along) + np.sin(frequency * across) > 1).astype(np.float64),
        lambda: np.clip((along + 1) / 2, 0, 1),
    )
    mix = patterns[generator.integers(len(patterns))]()[..., None]
    textured: Floats = first + (second - first) * mix
    return textured


def _main(
    out: Path,
    train_images: int = 3000,
    val_images: int = 300,
    seed: int = 0,
    size: int = 128,
    scale: float = 1.0,
    processes: int = 1,
) -> None:
    """Draw a data set in COCO's format: OUT/train2017, OUT/val2017 and OUT/annotations.

    scale: what the sizes of the shapes, 14 to 60 pixels, are multiplied by.
    """
    run_command(lambda: draw_data_set(out, train_images, val_images, seed, size, scale, processes))


if __name__ == "__main__":
    tyro.cli(_main)
