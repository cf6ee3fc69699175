"""No detector with NaN or infinity among its outputs gets an AP, is stored, calibrates, or is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.cache.reader import read_manifest
from common.cache.schema import Manifest
from common.cache.writer import Record, finished_shards
from common.coco import load_annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.finite import check_finite
from common.teacher import Teacher, TeacherOutput
from student_train.evaluate import detect_split, saved_policy
from teacher_dump.score import score_store
from teacher_dump.teachers import load_teacher
from tests.dump_cases import SIDE, command, draw_scenes, dump

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=6)


def tiny() -> DeformableDetr:
    torch.manual_seed(0)
    return DeformableDetr(PRESETS["tiny"](7)).eval()


def first_convolution(model: DeformableDetr, value: float) -> None:
    next(model.backbone.parameters()).data.view(-1)[0] = value


def width_of_the_last_boxes(model: DeformableDetr, value: float) -> None:
    names = [name for name, bias in model.named_parameters() if name.endswith("bias") and bias.shape == (4,)]
    dict(model.named_parameters())[names[-1]].data[2] = value


def classes(model: DeformableDetr, value: float) -> None:
    for name, bias in model.named_parameters():
        if name.endswith("bias") and bias.shape == (7,):
            bias.data[3] = value


BROKEN = [
    (first_convolution, NAN, "logits, boxes_cxcywh"),
    (first_convolution, INFINITY, "logits, boxes_cxcywh"),
    (width_of_the_last_boxes, NAN, "boxes_cxcywh"),
    (classes, INFINITY, "logits"),
    (classes, -INFINITY, "logits"),
]


@pytest.mark.parametrize(("spoil", "value", "fields"), BROKEN)
def test_no_ap(scenes: Path, spoil: Callable[[DeformableDetr, float], None], value: float, fields: str) -> None:
    """A detector with one weight spoilt is refused where it is evaluated, by fields and images; a sound one is not."""
    annotations, model = load_annotations(scenes, "val2017"), tiny()
    policy = saved_policy(scenes / "none", (SIDE,))
    detect_split(model, annotations, policy, batch_size=2, workers=1)
    spoil(model, value)
    with pytest.raises(UserError, match=f"^the student gave NaN or infinite {fields} for image [0-9]+: check"):
        detect_split(model, annotations, policy, batch_size=2, workers=1)


@pytest.mark.parametrize("spoil", [first_convolution, width_of_the_last_boxes])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_weights_that_are_not_finite_are_not_loaded(
    tmp_path: Path, spoil: Callable[[DeformableDetr, float], None], value: float
) -> None:
    """By the tensor's name, which also finds the infinite width of a box that a sigmoid makes 1."""
    model = tiny()
    spoil(model, value)
    (broken,) = {name.split(".")[0] for name, tensor in model.named_parameters() if not tensor.isfinite().all()}
    save_detector(tmp_path / "a.safetensors", model)
    with pytest.raises(UserError, match=rf"a\.safetensors: expected finite weights, .* the first is {broken}\."):
        load_detector(tmp_path / "a.safetensors")


def test_fields_and_images_are_named() -> None:
    """Of 2 fields and 12 images, ten are broken in one of the fields: the first eight are named."""
    sound, spoilt = torch.zeros(12, 3), torch.zeros(12, 3)
    check_finite({"one": sound, "other": list(spoilt)}, range(12), "it")
    spoilt[2:, 1] = -INFINITY
    with pytest.raises(UserError, match=r"^it gave NaN or infinite other for image 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.: "):
        check_finite({"one": sound, "other": list(spoilt)}, range(12), "it")


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TeacherOutput], TeacherOutput]], None]:
    """Has the teachers of a dump say something else than they do."""

    def spoil(change: Callable[[TeacherOutput], TeacherOutput]) -> None:
        def load(*arguments: Any, **options: Any) -> Teacher:
            teacher = load_teacher(*arguments, **options)

            def run(images: Sequence[Tensor]) -> TeacherOutput:
                return change(teacher.run(images))

            return replace(teacher, run=run)

        monkeypatch.setattr("teacher_dump.dump.load_teacher", load)

    return spoil


Spoil = Callable[[Callable[[TeacherOutput], TeacherOutput]], None]


@pytest.mark.parametrize("preset", ["compact", "half"])
@pytest.mark.parametrize("field", ["memory", "queries", "logits", "boxes_cxcywh"])
@pytest.mark.parametrize("value", [NAN, -INFINITY])
def test_nothing_is_stored(
    scenes: Path,
    tmp_path: Path,
    spoilt: Spoil,
    capsys: pytest.CaptureFixture[str],
    preset: str,
    field: str,
    value: float,
) -> None:
    """One value of one field in the second image of a batch: calibration, or else the first shard, stops with one line
    that names field and image; no shard is there."""

    def change(output: TeacherOutput) -> TeacherOutput:
        getattr(output, field)[1].view(-1)[-1] = value
        return output

    spoilt(change)
    out = tmp_path / "s.zarr"
    assert dump(scenes, out, "--preset", preset) == 2
    captured = capsys.readouterr().err
    (line,) = [line for line in captured.splitlines() if line.startswith("error: ")]
    assert f"the teacher random:tiny gave NaN or infinite {field} for image " in line
    assert "Traceback" not in captured
    assert not out.exists() or not finished_shards(out, read_manifest(out)).any()


@pytest.mark.parametrize("field", ["memory", "queries", "logits"])
def test_what_float16_cannot_hold_is_refused(
    scenes: Path, tmp_path: Path, spoilt: Spoil, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    """Values of 70,000, above float16's 65,504: the dump with --preset half names the field, with --preset full it
    succeeds; from that store, `transcode` to float16 is refused with the same line."""

    def change(output: TeacherOutput) -> TeacherOutput:
        for tensor in getattr(output, field):
            tensor.view(-1)[5] = 7e4
        return output

    spoilt(change)
    name = {"memory": "tokens"}.get(field, field)
    assert dump(scenes, tmp_path / "half.zarr", "--preset", "half") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {name} of image ")
    assert "cannot be stored as float16" in line
    assert dump(scenes, tmp_path / "full.zarr", "--preset", "full") == 0
    assert command("transcode", tmp_path / "full.zarr", tmp_path / "new.zarr", "--tokens", "fp16") == 2
    assert f"error: {name} of image " in capsys.readouterr().err


def test_a_store_of_nan_is_not_scored(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions could write one, without today's check: NaN in a single box of the last layer."""
    out, annotations = tmp_path / "s.zarr", load_annotations(scenes, "train2017")

    def unchecked(manifest: Manifest, record: Record, image_id: int, view: int) -> Record:
        boxes_cxcywh = record["boxes_cxcywh"].copy()
        boxes_cxcywh[-1, 2, 3] = NAN if image_id == 4 else boxes_cxcywh[-1, 2, 3]
        return {**record, "boxes_cxcywh": boxes_cxcywh}

    monkeypatch.setattr("teacher_dump.encode.storable", unchecked)
    assert dump(scenes, out) == 2
    with pytest.raises(UserError, match=r"s\.zarr gave NaN or infinite boxes_cxcywh for image 4: check"):
        score_store(out, annotations)
