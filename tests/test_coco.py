"""The annotation index, against pycocotools on real annotations, and each way in which a json can be broken."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from common.categories import output_columns
from common.coco import check_images, load_annotations, missing_images
from common.errors import UserError

Json = dict[str, Any]


def small_json() -> Json:
    """Three images, one of them empty, and two categories with ids that are no indices."""
    return {
        "images": [
            {"id": 9, "file_name": "nine.jpg", "width": 100, "height": 80},
            {"id": 4, "file_name": "four.jpg", "width": 50, "height": 60},
            {"id": 7, "file_name": "seven.jpg", "width": 10, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [10, 20, 30, 40], "iscrowd": 0, "area": 1200},
            {"id": 2, "image_id": 4, "category_id": 13, "bbox": [0, 0, 50, 60], "iscrowd": 0, "area": 3000},
            {"id": 3, "image_id": 9, "category_id": 13, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 13, "name": "stop sign"}],
    }


def write(folder: Path, content: Json | str | bytes) -> Path:
    """A data set of this json for split `train`, with empty files as images; returns its folder."""
    (folder / "annotations").mkdir()
    (folder / "train").mkdir()
    if isinstance(content, dict):
        for image in content.get("images", []):
            (folder / "train" / str(image.get("file_name"))).touch()
        content = json.dumps(content)
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "annotations" / "instances_train.json").write_bytes(data)
    return folder


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_annotations_equal_what_pycocotools_reads(coco_nano: Path, split: str) -> None:
    """Images, names, sizes, boxes (1e-4 px), categories and order of 24 images; crowd regions are left out."""
    annotations = load_annotations(coco_nano, split)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco_nano / "annotations" / f"instances_{split}.json"))
    assert [entry.image_id for entry in annotations.entries] == sorted(coco.getImgIds())
    assert annotations.num_classes == 80
    assert (annotations.category_ids[0], annotations.category_ids[-1], annotations.class_names[-1]) == (
        1,
        90,
        "toothbrush",
    )
    for entry in annotations.entries:
        image = coco.imgs[entry.image_id]
        assert (entry.file_name, entry.width, entry.height) == (image["file_name"], image["width"], image["height"])
        truth = [item for item in coco.imgToAnns[entry.image_id] if not item["iscrowd"]]
        x, y, w, h = np.array([item["bbox"] for item in truth]).reshape(-1, 4).T
        expected = np.stack((x, y, np.minimum(x + w, entry.width), np.minimum(y + h, entry.height)), axis=1)
        np.testing.assert_allclose(entry.boxes_xyxy_px, expected, rtol=0, atol=1e-4)
        assert [annotations.category_ids[label] for label in entry.labels] == [item["category_id"] for item in truth]
    assert sum(item["iscrowd"] for item in coco.anns.values()) > 0
    assert sum(len(entry.labels) for entry in annotations.entries) < len(coco.anns)


def test_the_index_is_sorted_and_keeps_images_without_boxes(tmp_path: Path) -> None:
    """Ids out of order, an empty image, category ids with gaps; dtypes as the records promise."""
    annotations = load_annotations(write(tmp_path, small_json()), "train")
    assert [entry.image_id for entry in annotations.entries] == [4, 7, 9]
    assert [entry.labels.tolist() for entry in annotations.entries] == [[0], [], [1, 0]]
    assert annotations.entries[2].boxes_xyxy_px.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6]]
    assert annotations.entries[1].boxes_xyxy_px.shape == (0, 4)
    assert {(entry.boxes_xyxy_px.dtype, entry.labels.dtype) for entry in annotations.entries} == {
        (np.dtype("float32"), np.dtype("int64"))
    }
    assert (annotations.category_ids, annotations.class_names) == ((13, 90), ("stop sign", "toothbrush"))
    data = annotations.annotation_file.read_bytes()
    assert annotations.sha256 == hashlib.sha256(data).hexdigest()


def test_an_image_list_without_annotations_is_an_index_of_empty_images(tmp_path: Path) -> None:
    annotations = load_annotations(write(tmp_path, small_json() | {"annotations": []}), "train")
    assert [len(entry.labels) for entry in annotations.entries] == [0, 0, 0]


@pytest.mark.parametrize(
    ("bbox", "iscrowd", "expected"),
    [
        ([-5, -5, 20, 20], 0, [0, 0, 15, 15]),  # leaves at the top left
        ([90, 70, 20, 20], 0, [90, 70, 100, 80]),  # leaves at the bottom right
        ([0, 0, 100, 80], 0, [0, 0, 100, 80]),  # the whole image
        ([100, 10, 5, 5], 0, None),  # outside, touching the border
        ([10, 10, 0, 5], 0, None),  # no width
        ([10, 10, 5, -3], 0, None),  # negative height
        ([50.00000001, 10, 1e-9, 5], 0, None),  # no width left in float32
        ([10, 10, 5, 5], 1, None),  # crowd
    ],
)
def test_boxes_are_clipped_and_dropped_when_empty_or_crowd(
    tmp_path: Path, bbox: list[float], iscrowd: int, expected: list[float] | None
) -> None:
    content = small_json()
    content["annotations"] = [{"id": 1, "image_id": 9, "category_id": 13, "bbox": bbox, "iscrowd": iscrowd}]
    entry = load_annotations(write(tmp_path, content), "train").entries[-1]
    assert entry.boxes_xyxy_px.tolist() == ([expected] if expected else [])


def _change(section: str, row: int, **fields: Any) -> Callable[[Json], None]:
    return lambda content: content[section][row].update(fields)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (_change("images", 0, id=4), "every image id once, found 1 repeated, the first is 4"),
        (_change("images", 0, file_name="four.jpg"), "every file name once, found 1 repeated, the first is four.jpg"),
        (_change("images", 1, id="4"), "'id' to be a whole number everywhere, found '4'"),
        (_change("images", 1, width=0), r"above 0 \(and up to 16777216\), found 0 x 60 for four.jpg"),
        (lambda content: content["images"][1].pop("height"), "'height' in every object, not found in"),
        (_change("annotations", 0, image_id=5), "listed image ids only, found 1 of others, the first of 5"),
        (_change("annotations", 2, category_id=14), "listed category ids only, found 1 of others, the first of 14"),
        (_change("annotations", 1, bbox=[1, 2, 3]), "four numbers as every 'bbox'"),
        (_change("annotations", 1, bbox=[1, 2, 3, None]), "four (finite )?numbers as every 'bbox'"),
        (_change("annotations", 1, bbox=[1, 2, float("nan"), 4]), "four finite numbers"),
        (lambda content: content["annotations"][0].pop("bbox"), "'bbox' in every object"),
        (_change("categories", 0, id=13), "every category id once"),
        (_change("categories", 0, id=-1), "category ids of 0 and above, found -1"),
        (lambda content: content["categories"].clear(), "categories, found an empty list"),
        (lambda content: content["images"].clear(), "images, found an empty list"),
        (lambda content: content.pop("annotations"), "a list of objects named 'annotations'"),
    ],
)
def test_broken_references_are_one_line_that_names_the_file(
    tmp_path: Path, breaks: Callable[[Json], None], message: str
) -> None:
    content = small_json()
    breaks(content)
    with pytest.raises(UserError, match=message) as caught:
        load_annotations(write(tmp_path, content), "train")
    assert "\n" not in str(caught.value)
    assert "instances_train.json" in str(caught.value)


@pytest.mark.parametrize("content", ['{"images": [', "[]", b"\xff\xfe\x00", b""])
def test_files_that_are_no_instances_json_are_user_errors(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(UserError, match=r"instances_train.json: expected"):
        load_annotations(write(tmp_path, content), "train")


def test_a_missing_layout_is_described(tmp_path: Path) -> None:
    """No folder at all, then a json without its image folder: the message names what is missing and the way out."""
    with pytest.raises(UserError, match=r"instances_train.json does not exist.*--data.*make demo"):
        load_annotations(tmp_path / "nowhere", "train")
    (write(tmp_path, {}) / "train").rmdir()
    with pytest.raises(UserError, match=r"train does not exist"):
        load_annotations(tmp_path, "train")


def test_missing_image_files_are_counted(tmp_path: Path) -> None:
    content = small_json()
    content["images"][0]["file_name"] = "nested/nine.jpg"
    (tmp_path / "data").mkdir()
    folder = tmp_path / "data"
    for name in ("annotations", "train", "train/nested"):
        (folder / name).mkdir()
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    (folder / "train" / "nested" / "nine.jpg").touch()
    annotations = load_annotations(folder, "train")
    assert missing_images(annotations) == ["four.jpg", "seven.jpg"]
    with pytest.raises(UserError, match=r"but 2 are missing, the first is four\.jpg"):
        check_images(annotations)
    for name in ("four.jpg", "seven.jpg"):
        (folder / "train" / name).touch()
    check_images(annotations)


def test_output_columns_select_the_classes_of_either_convention(coco_nano: Path) -> None:
    """One-hot logits over category ids (91) and over classes (80): after selection both say the same class."""
    ids = load_annotations(coco_nano, "val2017").category_ids
    by_id = torch.eye(91)[list(ids)][:, list(output_columns(ids, 91))]
    by_class = torch.eye(80)[:, list(output_columns(ids, 80))]
    assert torch.equal(by_id, torch.eye(80))
    assert torch.equal(by_class, torch.eye(80))
    with pytest.raises(UserError, match="found 20"):
        output_columns(ids, 20)
