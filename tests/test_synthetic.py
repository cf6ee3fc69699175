"""The drawn data set: the same from the same seed, read alike by our reader and pycocotools, boxes round the shapes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from common import synthetic
from common.coco import check_images, load_annotations
from common.errors import UserError
from common.images import load_image


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of every file by its name within the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    synthetic.draw_data_set(folder, train_images=40, val_images=10, seed=3)
    return folder


def test_processes_draw_the_same_files_as_one(drawn: Path, tmp_path: Path) -> None:
    """Two spawned processes through the command line against the fixture's one: every file equal, byte for byte."""
    arguments = ["--train-images", "40", "--val-images", "10", "--seed", "3", "--processes", "2"]
    command = [sys.executable, "-m", "common.synthetic", "--out", str(tmp_path / "demo"), *arguments]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], capture_output=True)
    assert len(fingerprints(drawn)) == 52
    assert fingerprints(tmp_path / "demo") == fingerprints(drawn)


def test_a_larger_data_set_begins_with_the_smaller_and_seeds_and_splits_differ(drawn: Path, tmp_path: Path) -> None:
    """Image files compared by their bytes."""
    synthetic.draw_data_set(tmp_path / "smaller", train_images=7, val_images=7, seed=3)
    synthetic.draw_data_set(tmp_path / "other", train_images=7, val_images=7, seed=4)
    large, small, other = (fingerprints(folder) for folder in (drawn, tmp_path / "smaller", tmp_path / "other"))
    images = [name for name in small if name.endswith(".jpg")]
    assert len({small[name] for name in images}) == 14
    assert all(small[name] == large[name] for name in images)
    assert not any(other[name] == large[name] for name in images)


def test_both_readers_see_the_same_objects(drawn: Path) -> None:
    """Our reader against pycocotools: images, boxes (1e-4 px) and categories; every file is there and of its size."""
    annotations = load_annotations(drawn, "train2017")
    check_images(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations.annotation_file))
    assert annotations.category_ids == tuple(sorted(coco.getCatIds()))
    assert annotations.category_ids != tuple(range(len(annotations.category_ids)))
    assert [entry.image_id for entry in annotations.entries] == sorted(coco.getImgIds())
    for entry in annotations.entries:
        load_image(annotations.image_path(entry), (entry.width, entry.height))
        truth = coco.imgToAnns[entry.image_id]
        assert [annotations.category_ids[label] for label in entry.labels] == [item["category_id"] for item in truth]
        xywh = np.array([item["bbox"] for item in truth]).reshape(-1, 4)
        xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
        np.testing.assert_allclose(entry.boxes_xyxy_px, xyxy, rtol=0, atol=1e-4)
        assert len(truth) == 0 or (xyxy.min() >= 0 and xyxy.max() <= 128)


def test_all_classes_and_a_range_of_sizes_occur(drawn: Path) -> None:
    """On 40 images: each class at least 10 times, 3 to 6 objects an image, sides from under 15 to over 40 pixels."""
    content = json.loads((drawn / "annotations" / "instances_train2017.json").read_text())
    categories = [item["category_id"] for item in content["annotations"]]
    assert all(categories.count(category["id"]) >= 10 for category in content["categories"])
    assert 3 <= len(categories) / 40 <= 6
    longest = [max(item["bbox"][2:]) for item in content["annotations"]]
    assert min(longest) < 15
    assert max(longest) > 40


def test_a_scale_draws_the_same_shapes_larger() -> None:
    """Scenes of twice the pixels at twice the scale, against the usual ones: the same objects, their boxes twice as
    large, to the third of a pixel that each edge is drawn to at either size."""
    for index in range(8):
        (_, usual), (_, larger) = (synthetic.draw_scene(0, "val2017", index, 96 * scale, scale) for scale in (1, 2))
        assert [drawn.category_id for drawn in larger] == [drawn.category_id for drawn in usual]
        expected, found = (np.array([drawn.box_xyxy_px for drawn in scene]) for scene in (usual, larger))
        np.testing.assert_allclose(found, 2 * expected, rtol=0, atol=1.01)


def test_boxes_are_the_extents_of_the_pixels_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes of one shape with noise and strokes off, against the same scene with its texture replaced by the
    background: the changed pixels span the box, to the pixel that an edge covers in part."""
    monkeypatch.setattr(synthetic, "_draw_strokes", lambda generator, canvas, count: canvas)
    quiet, seen = synthetic._texture, 0
    for index in range(60):
        pictures = []
        for texture in (quiet, lambda generator, axes, behind: quiet(generator, axes, behind) * 0 + 1000):
            monkeypatch.setattr(synthetic, "_texture", texture)
            pixels, objects = synthetic.draw_scene(0, "val2017", index)
            pictures.append(pixels)
        if len(objects) != 1:
            continue
        seen += 1
        rows, columns = np.nonzero((pictures[1] == 255).all(axis=-1) & (pictures[0] != 255).any(axis=-1))
        x0, y0, x1, y1 = objects[0].box_xyxy_px
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, [x0, y0, x1, y1], rtol=0, atol=1.01)
    assert seen >= 3


def test_what_exists_is_left_alone_and_what_cannot_be_drawn_is_refused(drawn: Path, tmp_path: Path) -> None:
    before = fingerprints(drawn)
    with pytest.raises(UserError, match="exists"):
        synthetic.draw_data_set(drawn, train_images=1, val_images=1)
    assert fingerprints(drawn) == before
    with pytest.raises(UserError, match="at least one image"):
        synthetic.draw_data_set(tmp_path / "none", train_images=0)
    assert not (tmp_path / "none").exists()
