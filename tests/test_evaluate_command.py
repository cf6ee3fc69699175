"""`python -m student_train evaluate`: checkpoints of every layout, and results noted for `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.categories import Categories
from common.coco import load_annotations
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.synthetic import draw_data_set
from student_train.__main__ import evaluate, export
from student_train.compare import read_run, table
from tests import detr_oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/: three validation images of seven classes. detector.safetensors: a tiny one with random weights."""
    folder = tmp_path_factory.mktemp("evaluate")
    draw_data_set(folder / "scenes", train_images=1, val_images=3)
    torch.manual_seed(0)
    save_detector(folder / "detector.safetensors", DeformableDetr(PRESETS["tiny"](7, queries=20)))
    return folder


def run(folder: Path, checkpoint: Path, *more: str | Path) -> None:
    arguments = ["--checkpoint", checkpoint, "--data", folder / "scenes", "--sizes", 64, "--workers", 1, *more]
    evaluate([str(argument) for argument in [*arguments, "--device", "cpu"]])


def test_the_result_is_noted_as_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--record makes a folder that `compare` reads: the twelve numbers printed, the parameters counted here, no steps.
    A second evaluation replaces it; a training run's folder is refused before anything is evaluated."""
    detector, _ = load_detector(folder / "detector.safetensors")
    for _ in range(2):
        run(folder, folder / "detector.safetensors", "--record", tmp_path / "teacher")
    recorded = read_run(tmp_path / "teacher")
    ((step, metrics),) = recorded.evaluations
    assert (step, recorded.steps) == (0, ())
    assert recorded.parameters == sum(parameter.numel() for parameter in detector.parameters())
    assert recorded.what == "evaluation of detector.safetensors"
    assert len(metrics) == 13
    assert f"AP {100 * metrics['ap']:.1f}" in capsys.readouterr().out
    assert "teacher  evaluation of detector.safetensors" in table([recorded])
    assert {"command", "versions", "git_revision"} < json.loads((tmp_path / "teacher" / "run.json").read_text()).keys()

    (tmp_path / "teacher" / "run.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="holds a training run"):
        run(folder, folder / "scenes", "--record", tmp_path / "teacher")


def test_every_layout_is_evaluated_alike(folder: Path, tmp_path: Path) -> None:
    """One detector on a ResNet-18 as our file, transformers' folder, MMDetection's and the official file, the last with
    an output for each category id: `evaluate` finds the same detections in all (scores within 1e-5)."""
    config = DetectorConfig("resnet18", 7, width=32, encoder_layers=1, decoder_layers=2, queries=12, feedforward=32)
    annotations = load_annotations(folder / "scenes", "val2017")
    detector = DeformableDetr(config)
    detr_oracle.randomise(detector)
    categories = Categories(annotations.category_ids, annotations.class_names)
    save_detector(tmp_path / "own.safetensors", detector, categories.to_metadata())
    found = {}
    for layout in ("own", "transformers", "mmdet", "official"):
        path = tmp_path / (layout if layout == "transformers" else f"{layout}.pth")
        if layout == "own":
            path = tmp_path / "own.safetensors"
        else:
            export(["--checkpoint", str(tmp_path / "own.safetensors"), "--to", layout, "--out", str(path)])
        run(folder, path, "--detections", tmp_path / f"{layout}.json")
        found[layout] = json.loads((tmp_path / f"{layout}.json").read_text())
    for layout, detections in found.items():
        assert len(detections) == len(found["own"]) > 0
        for ours, theirs in zip(found["own"], detections, strict=True):
            assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5), layout
            assert (theirs["image_id"], theirs["category_id"]) == (ours["image_id"], ours["category_id"]), layout
            assert theirs["bbox"] == pytest.approx(ours["bbox"], abs=1e-3)


@pytest.mark.parametrize("flag", ["--record", "--detections"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(folder: Path, flag: str) -> None:
    """The line comes before the checkpoint, which is none, is even read."""
    with pytest.raises(UserError, match="could not be written"):
        run(folder, folder / "scenes", flag, folder / "detector.safetensors" / "x")
