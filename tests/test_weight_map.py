"""The ratio of the feature loss's weights inside and outside of ground-truth boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.cache.reader import CacheReader
from common.coco import Annotations, load_annotations
from common.replay import apply_image
from common.synthetic import draw_data_set
from teacher_dump.job import augmentation_of
from teacher_dump.weight_map import InsideRatio, inside_ratio
from tests.dump_cases import TEACHER, command

STRIDES = (8, 16, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    draw_data_set(folder, train_images=6, val_images=1, size=256)
    return folder


def dump(data: Path, out: Path, *more: object) -> CacheReader:
    options = ("--data", data, "--teacher", TEACHER, "--device", "cpu", "--workers", "1", "--views", "1", "--out", out)
    assert command(*options, *more) == 0
    return CacheReader(out)


def ratio_of_pixels(reader: CacheReader, annotations: Annotations) -> list[float]:
    """For each level, what `inside_ratio` finds, from boxes that are drawn as images and augmented as images are."""
    sums, entries = np.zeros((len(STRIDES), 2, 2)), {entry.image_id: entry for entry in annotations.entries}
    for row in reader.rows(view=0):
        entry, augmentation = entries[int(reader.table.image_id[row])], augmentation_of(reader.table.augmentation[row])
        painted = torch.zeros((3, entry.height, entry.width), dtype=torch.uint8)
        for left, top, right, bottom in entry.boxes_xyxy_px.round().astype(int):
            painted[:, top:bottom, left:right] = 255
        seen, record, start = apply_image(painted, augmentation)[0].numpy(), reader.read([row]), 0
        weights = dict(zip(record.token_positions.tolist(), record.token_weights.tolist(), strict=True))
        for level, (height, width) in enumerate(reader.table.level_shapes[row].tolist()):
            for position in range(height * width):
                y, x = (int((at + 0.5) * STRIDES[level]) for at in divmod(position, width))
                inside = int(y < seen.shape[0] and x < seen.shape[1] and seen[y, x] > 127)
                sums[level, inside] += weights.get(start + position, 0.0), 1
            start += height * width
    means = sums[..., 0] / sums[..., 1]
    return (means[:, 1] / means[:, 0]).tolist()


@pytest.mark.parametrize("kept", ["1", "0.5"])
def test_ratio_is_that_of_painted_boxes(data: Path, tmp_path: Path, kept: str) -> None:
    """Mirrored, cropped and resized views, all or half of the tokens: within 3 % of a count over pixels of images on
    which the boxes were painted, which differ from boxes by half a pixel."""
    reader = dump(data, tmp_path / "store.zarr", "--keep-tokens", kept)
    annotations = load_annotations(data, "train2017")
    found = inside_ratio(reader.path, annotations)
    assert found is not None
    assert found.samples == 6
    assert found.ratios == pytest.approx(ratio_of_pixels(reader, annotations), rel=0.03)
    assert found.strides == STRIDES


def test_ratio_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of a dump and by `inspect --data`, in the same line; `inspect` refuses the boxes of other data."""
    out = tmp_path / "store.zarr"
    dump(data, out, "--sizes", "64")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the weight map" in line]
    assert line == str(inside_ratio(out, load_annotations(data, "train2017")))
    assert command("inspect", out) == 0
    assert "the weight map" not in capsys.readouterr().out
    assert command("inspect", out, "--data", data) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    draw_data_set(tmp_path / "other", train_images=2, val_images=1, size=64)
    assert command("inspect", out, "--data", tmp_path / "other") == 2
    assert "was dumped with other annotations" in capsys.readouterr().err


def test_levels_without_a_ratio() -> None:
    """A level whose tokens all lie in boxes, or none of which does, has a dash."""
    assert "weighs 1.25, -, - times" in str(InsideRatio((1.25, float("nan"), float("inf")), (8, 16, 32), 1))
