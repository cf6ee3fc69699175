"""`student_train picture`: a row for each checkpoint, and something in each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from common.coco import load_annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.errors import UserError
from common.evaluate import Result
from common.synthetic import draw_data_set
from student_train.__main__ import picture
from student_train.compare import distinct
from student_train.picture import draw_detections, row_names

CELL_PX = 240  # 2.4 inches of 100 pixels


def test_checkpoints_of_one_folder_have_a_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """best and last of one run: as high as three rows with that of the ground truth, in which the untrained detector,
    which is sure of nothing, has its surest detections drawn, and says so, for both."""
    draw_data_set(tmp_path / "scenes", train_images=1, val_images=2)
    torch.manual_seed(0)
    detector = DeformableDetr(PRESETS["tiny"](7, queries=20))
    checkpoints = [tmp_path / "run" / f"{name}.safetensors" for name in ("best", "last")]
    checkpoints[0].parent.mkdir()
    for checkpoint in checkpoints:
        save_detector(checkpoint, detector)
    options = ["--data", tmp_path / "scenes", "--sizes", 64, "--out", tmp_path / "new" / "x.png", "--device", "cpu"]
    picture([str(word) for word in [*checkpoints, *options]])
    assert Image.open(tmp_path / "new" / "x.png").size == (2 * CELL_PX, 3 * CELL_PX)
    told = capsys.readouterr().out
    for name in ("run/best", "run/last"):
        assert f"{name}: in 2 images nothing reaches --min-score 0.3: their three surest are drawn" in told


def test_the_three_surest_where_none_is_sure(tmp_path: Path) -> None:
    """Of five detections of .05 to .25 in the second image, the picture at .3 is that of the three best alone at .1,
    pixel by pixel; the first image's sure one is drawn alone in both."""
    draw_data_set(tmp_path / "scenes", train_images=1, val_images=2)
    annotations = load_annotations(tmp_path / "scenes", "val2017")
    sure, unsure = (entry.image_id for entry in annotations.entries)

    def found(image_id: int, score: float) -> Result:
        box = [100 * score, 5.0, 20.0, 30.0]
        return {"image_id": image_id, "category_id": annotations.category_ids[0], "bbox": box, "score": score}

    others = [found(unsure, score) for score in (0.1, 0.25, 0.05, 0.2, 0.15)]
    first = [found(sure, 0.9)]
    everything = [("x", [*first, found(sure, 0.09), *others])]
    told = draw_detections(annotations, everything, tmp_path / "all.png", 0.3)
    best = [("x", [*first, *(result for result in others if result["score"] > 0.12)])]
    assert (told, draw_detections(annotations, best, tmp_path / "best.png", 0.1)) == ({"x": 1}, {})
    drawn, expected = (Image.open(tmp_path / name).convert("RGB").tobytes() for name in ("all.png", "best.png"))
    assert drawn == expected


def test_rows_are_told_apart_by_the_shortest_name() -> None:
    def names(*checkpoints: str) -> list[str]:
        return distinct([row_names(Path(checkpoint)) for checkpoint in checkpoints])

    assert names("runs/a/best.safetensors", "runs/b/best.safetensors") == ["a", "b"]
    assert names("runs/a/best.safetensors", "demo/teacher.pth") == ["a", "teacher"]
    assert names("runs/a/best.safetensors", "runs/a/last.safetensors") == ["a/best", "a/last"]
    assert names("runs/a/best.pth", "other/a/best.pth") == ["runs/a/best.pth", "other/a/best.pth"]


def test_without_checkpoints_there_is_no_picture() -> None:
    with pytest.raises(UserError, match="expected some checkpoints"):
        picture([])
