"""Annotations as tools write them: understood as they are meant, with the same AP, or refused with the right line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.box_conventions import check_convention
from common.coco import Annotations, load_annotations
from common.errors import UserError
from common.evaluate import CocoMetrics, Result, coco_ap, ground_truth
from common.runtime import start_logging

Json = dict[str, Any]
Change = Callable[[Json], Any]
SIDE_PX = 128
CLASSES = {1: "ring", 2: "disk", 7: "star"}


def drawn() -> Json:
    """The json of 12 images of 128 x 128 pixels with 36 boxes of three classes, four of them crowd regions."""
    generator = np.random.default_rng(0)
    annotations = []
    for number in range(36):
        left, top, width, height = (int(value) for value in generator.integers([0, 0, 8, 8], [80, 80, 48, 48]))
        annotations.append(
            {
                "id": number,
                "image_id": 10 + number % 12,
                "category_id": list(CLASSES)[number % 3],
                "bbox": [left + 0.5, top, width, height],
                "area": 0.7 * width * height,
                "iscrowd": int(number % 9 == 5),
            }
        )
    images = [{"id": 10 + n, "file_name": f"{n}.jpg", "width": SIDE_PX, "height": SIDE_PX} for n in range(12)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in CLASSES.items()],
    }


def load(folder: Path, content: Json | str | bytes) -> Annotations:
    text = json.dumps(content) if isinstance(content, dict) else content
    for name in ("annotations", "val"):
        (folder / name).mkdir(exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    (folder / "annotations" / "instances_val.json").write_bytes(data)
    return load_annotations(folder, "val")


def metrics_of(annotations: Annotations) -> CocoMetrics:
    """The metrics of the drawn boxes as detections, shaken, with scores at random."""
    generator = np.random.default_rng(1)
    results: list[Result] = []
    for item in drawn()["annotations"]:
        box = (np.array(item["bbox"]) * generator.uniform(0.9, 1.1, size=4)).tolist()
        label = list(CLASSES).index(item["category_id"])
        found = {"image_id": item["image_id"], "category_id": annotations.category_ids[label], "bbox": box}
        results.append({**found, "score": float(generator.random())})
    return coco_ap(ground_truth(annotations), results)


def numbers(metrics: CocoMetrics) -> list[float]:
    return [value for value in vars(metrics).values() if isinstance(value, float)]


def each(**fields: Any) -> Change:
    """A change of these fields of every annotation, to a value or to what a function makes of it."""

    def change(content: Json) -> None:
        for item in content["annotations"]:
            item.update({name: value(item) if callable(value) else value for name, value in fields.items()})

    return change


def nameless(content: Json) -> None:
    for category in content["categories"]:
        del category["name"]


@pytest.mark.parametrize(
    "change",
    [
        each(bbox=lambda item: [str(value) for value in item["bbox"]]),
        each(area=lambda item: str(item["area"])),
        each(iscrowd=lambda item: str(item["iscrowd"])),
        each(iscrowd=lambda item: bool(item["iscrowd"])),
        each(iscrowd=lambda item: None if item["iscrowd"] == 0 else 1),
        nameless,
        lambda content: [category.update(name=None) for category in content["categories"]],
        lambda content: "\ufeff" + json.dumps(content),
        lambda content: json.dumps(content, indent=2),
    ],
)
def test_what_is_plainly_meant_is_understood(tmp_path: Path, change: Change) -> None:
    """Strings of numbers, nulls, missing names, a byte order mark: boxes to learn from and all numbers of the
    evaluation are those of the well-formed file (exact)."""
    base = load(tmp_path, drawn())
    content = drawn()
    text = change(content)
    other = load(tmp_path, text if isinstance(text, str) else content)
    assert numbers(metrics_of(other)) == numbers(metrics_of(base))
    assert 0.1 < metrics_of(base).ap < 1
    for ours, theirs in zip(other.entries, base.entries, strict=True):
        np.testing.assert_array_equal(ours.boxes_xyxy_px, theirs.boxes_xyxy_px)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("area", [None, float("nan"), "missing"])
def test_a_missing_area_is_the_boxs(tmp_path: Path, area: float | str | None) -> None:
    """Against a file in which width x height is written out (exact)."""
    content = drawn()
    each(area=lambda item: item["bbox"][2] * item["bbox"][3])(content)
    expected = metrics_of(load(tmp_path, content))
    each(area=area)(content)
    if area == "missing":
        for item in content["annotations"]:
            del item["area"]
    assert numbers(metrics_of(load(tmp_path, content))) == numbers(expected)
    assert numbers(expected) != numbers(metrics_of(load(tmp_path, drawn())))  # whose areas are smaller


def test_classes_without_names_are_called_by_their_id_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    """No class vanishes from the metrics: three names for three classes, whose AP is that of the classes' own names."""
    base = list(metrics_of(load(tmp_path, drawn())).class_ap.values())
    content = drawn()
    nameless(content)
    assert list(metrics_of(load(tmp_path, content)).class_ap.items()) == list(zip("127", base, strict=True))
    content = drawn()
    content["categories"][1]["name"] = "ring"
    found = metrics_of(load(tmp_path, content)).class_ap
    assert found == dict(zip(["ring (category 1)", "ring (category 2)", "star"], base, strict=True))


def corners(item: Json) -> list[float]:
    left, top, width, height = item["bbox"]
    return [left, top, left + width, top + height]


def centres(item: Json) -> list[float]:
    left, top, width, height = item["bbox"]
    return [left + width / 2, top + height / 2, width, height]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each(bbox=lambda item: [item["bbox"]]), r"four numbers as every 'bbox', found \[\["),
        (each(bbox=["a", 1, 2, 3]), "four numbers as every 'bbox'"),
        (each(bbox={"x": 1}), "four numbers as every 'bbox'"),
        (each(bbox=None), "four numbers as every 'bbox'"),
        (each(bbox=corners), "leaving their images, .* look like corners"),
        (each(bbox=centres), r"leaving their images, .* look like \[centre x, centre y, width, height\]"),
        (each(bbox=lambda item: [v / SIDE_PX for v in item["bbox"]]), "100% of them at most one pixel .* fractions"),
        (each(bbox=lambda item: [4 * v for v in item["bbox"]]), "images of another size than the listed one"),
        (each(area="large"), "a number as every 'area'"),
        (each(area=[1]), "a number as every 'area'"),
        (each(area=-1), "every 'area' to be 0 or above"),
        (each(area=float("inf")), "every 'area' to be 0 or above"),
        (each(iscrowd="maybe"), "0 or 1 as every 'iscrowd', found 'maybe'"),
        (each(iscrowd=[0]), "0 or 1 as every 'iscrowd'"),
        (each(iscrowd=2), "0 or 1 as every 'iscrowd', found '2'"),
        (each(image_id=2**63 + 5), "'image_id' to be a whole number of at most 63 bits"),
        (each(image_id=10.5), "'image_id' to be a whole number everywhere"),
        (lambda content: content["images"][0].update(id=2**70), "'id' to be a whole number of at most 63 bits"),
        (lambda content: content["images"][0].update(width=2**40), "up to 16777216"),
        (lambda content: '{"info": ' + "[" * 200_000, "nested too deeply at character"),
        (lambda content: '{"images": [{"id": ' + '{"a":' * 200_000, "nested too deeply at character"),
        (lambda content: '{"info": ' + "9" * 5000 + "}", "expected json, found: Exceeds the limit"),
        (lambda content: json.dumps(content).encode("utf-16"), "json in UTF-8, found other bytes"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, change: Change, message: str) -> None:
    content = drawn()
    text = change(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text if isinstance(text, (str, bytes)) else content)
    assert "\n" not in str(caught.value)
    assert "instances_val.json" in str(caught.value)


def test_few_boxes_over_the_border_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One box in ten may leave its image without a word, a third with a warning; all are cut at the border."""
    start_logging()
    for every, warnings in ((10, 0), (3, 1)):
        content = drawn()
        for item in content["annotations"][::every]:
            item["bbox"][0], item["iscrowd"] = 120, 0
        annotations = load(tmp_path, content)
        assert capsys.readouterr().err.count("leaving their images") == warnings
        assert sum((entry.boxes_xyxy_px[:, 2] == SIDE_PX).sum() for entry in annotations.entries) >= 36 // every


@pytest.mark.parametrize(("data", "split"), [("coco_nano", "train2017"), ("coco_nano", "val2017"), ("bccd", "train")])
def test_conventions_of_real_boxes(data: str, split: str, request: pytest.FixtureRequest) -> None:
    """Boxes of real data sets pass as they are, and are recognised as corners, centres, fractions, or boxes of images
    twice the size."""
    annotations = load_annotations(request.getfixturevalue(data), split)
    entries = annotations.entries
    sizes = np.repeat(entries.sizes, entries.box_bounds[:, 1] - entries.box_bounds[:, 0], axis=0)
    boxes = annotations.truth.boxes_xywh_px
    first, second = boxes[:, :2], boxes[:, 2:]
    check_convention(boxes, sizes)
    for other, message in (
        ((first, first + second), "corners"),
        ((first + second / 2, second), "centre"),
        ((first / sizes, second / sizes), "fractions"),
        ((first * 2, second * 2), "another size"),
    ):
        with pytest.raises(UserError, match=message):
            check_convention(np.concatenate(other, axis=1), sizes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../elsewhere.jpg", "stay inside the folder of images"),
        ("a/../../elsewhere.jpg", "stay inside the folder of images"),
        ("/etc/passwd", "stay inside the folder of images"),
        ("..", "stay inside the folder of images"),
        ("a/..", "stay inside the folder of images"),
        ("a\\b.jpg", "without backslashes"),
        ("a\0.jpg", "without backslashes and control characters"),
        ("a\nb.jpg", "without backslashes and control characters"),
        ("\ud800.jpg", "without backslashes and control characters"),
        ("x" * 300, "up to 255 bytes"),
        ("\u4e2d" * 100, "up to 255 bytes"),
        ("", "a name as every 'file_name'"),
        (7, "a name as every 'file_name', found 7"),
        (None, "a name as every 'file_name', found None"),
        (["a.jpg"], "a name as every 'file_name'"),
    ],
)
def test_file_names_that_leave_the_folder_or_are_none_are_one_line(tmp_path: Path, name: Any, message: str) -> None:
    content = drawn()
    content["images"][3]["file_name"] = name
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_file_names_are_relative_to_the_folder_however_they_are_written(tmp_path: Path) -> None:
    content = drawn()
    names = ["./a.jpg", "b/c.jpg", "../val/d.jpg", f"{tmp_path}/val/e.jpg", "f\u202fg é.jpg", "..h.jpg"]
    for image, name in zip(content["images"], names, strict=False):
        image["file_name"] = name
    entries = load(tmp_path, content).entries
    found = [entry.file_name for entry in entries[: len(names)]]
    assert found == ["a.jpg", "b/c.jpg", "d.jpg", "e.jpg", "f\u202fg é.jpg", "..h.jpg"]


def test_images_elsewhere_need_the_flag(tmp_path: Path) -> None:
    """Absolute names and names that leave DATA/SPLIT are accepted inside the folder that --image-folder names, and only
    there; the paths are those of the files."""
    pictures = tmp_path / "pictures"
    (pictures / "a").mkdir(parents=True)
    content = drawn()
    names = [str(pictures / "a" / "1.jpg"), "../pictures/2.jpg", "a/3.jpg"]
    for image, name in zip(content["images"], names, strict=False):
        image["file_name"] = name
    with pytest.raises(UserError, match=r"stay inside the folder of images, .*/val/, .* with --image-folder"):
        load(tmp_path, content)
    annotations = load_annotations(tmp_path, "val", pictures)
    paths = [annotations.image_path(entry) for entry in annotations.entries[:3]]
    assert paths == [pictures / "a" / "1.jpg", pictures / "2.jpg", pictures / "a" / "3.jpg"]
    content["images"][0]["file_name"] = str(tmp_path / "other" / "1.jpg")
    with pytest.raises(UserError, match="stay inside the folder of images"):
        load(tmp_path, content)
