"""`python -m student_train evaluate`: checkpoints of every layout, and results noted for `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.synthetic import draw_data_set
from student_train.__main__ import evaluate
from student_train.compare import read_run, table


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
        run(folder, tmp_path / "nothing.pth", "--record", tmp_path / "teacher")
