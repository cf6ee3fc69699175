"""Class names decide which output is which class, wherever a file has them: in every command, and between splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import detr_oracle
import numpy as np
import pytest
import torch

from common.categories import Categories, match_outputs
from common.coco import Annotations, in_order_of, load_annotations
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.weights import load_detector, save_detector, select_classes
from common.errors import UserError
from common.images import load_image
from common.runtime import start_logging
from common.synthetic import draw_data_set
from student_train import loop
from student_train.__main__ import evaluate, export, picture
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from student_train.evaluate import average_precision, class_table, detect_split, saved_policy
from student_train.prepare import prepare_data, prepare_live, prepare_student
from teacher_dump.teachers import load_teacher

CONFIG = DetectorConfig("resnet18", 7, width=32, encoder_layers=1, decoder_layers=2, queries=12, feedforward=32)
ORDER = (3, 0, 6, 1, 2, 5, 4)  # of the data's classes in the other detector
OTHERS = ("other.safetensors", "other.pth", "other")  # this project's, MMDetection's, transformers'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/: drawn images. right.safetensors: a detector of their classes. other...: the same detector with its
    outputs and names in another order, in three layouts. strange.safetensors: the same with names of other things."""
    folder = tmp_path_factory.mktemp("names")
    draw_data_set(folder / "scenes", train_images=2, val_images=3)
    names = annotations_of(folder).class_names
    detector = DeformableDetr(CONFIG)
    detr_oracle.randomise(detector)
    ids = tuple(range(7))
    save_detector(folder / "right.safetensors", detector, Categories(ids, names).to_metadata())
    strange = tuple(f"planet {index}" for index in ids)
    save_detector(folder / "strange.safetensors", detector, Categories(ids, strange).to_metadata())
    detector.load_state_dict(select_classes(detector.state_dict(), 7, ORDER))
    other = Categories(ids, tuple(names[index] for index in ORDER))
    save_detector(folder / "other.safetensors", detector, other.to_metadata())
    for layout, out in (("mmdet", "other.pth"), ("transformers", "other")):
        export(["--checkpoint", str(folder / "other.safetensors"), "--to", layout, "--out", str(folder / out)])
    return folder


def annotations_of(folder: Path, split: str = "val2017") -> Annotations:
    return load_annotations(folder / "scenes", split)


def detections(folder: Path, checkpoint: str, out: Path) -> list[dict[str, float]]:
    arguments = ["--checkpoint", folder / checkpoint, "--data", folder / "scenes", "--sizes", 64, "--workers", 1]
    evaluate([str(argument) for argument in [*arguments, "--device", "cpu", "--detections", out]])
    found: list[dict[str, float]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_evaluate_finds_the_same(folder: Path, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every detection of the permuted detector is the right one's, of the same category id (scores within 1e-5), and
    one line says that classes were mapped."""
    right = detections(folder, "right.safetensors", tmp_path / "right.json")
    capsys.readouterr()
    found = detections(folder, other, tmp_path / "found.json")
    assert capsys.readouterr().err.count("classes go by name") == 1
    for ours, theirs in zip(right, found, strict=True):
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5)
        assert (theirs["image_id"], theirs["category_id"]) == (ours["image_id"], ours["category_id"])
    assert len({item["category_id"] for item in found}) > 3


@pytest.mark.parametrize("other", [*OTHERS, "hf:"])
def test_teachers_say_the_same(folder: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits of an image, whichever way the permuted teacher is named, against the right one's: 1e-4."""
    pytest.importorskip("transformers")
    annotations = annotations_of(folder)
    image = load_image(annotations.image_path(annotations.entries[0]))
    right = load_teacher(str(folder / "right.safetensors"), annotations, torch.device("cpu")).run([image])
    name = f"hf:{folder / 'other'}" if other == "hf:" else str(folder / other)
    start_logging()
    found = load_teacher(name, annotations, torch.device("cpu")).run([image])
    assert capsys.readouterr().err.count("classes go by name") == 1
    torch.testing.assert_close(found.logits, right.logits, rtol=0, atol=1e-4)


def training(folder: Path, **model: object) -> TrainConfig:
    return TrainConfig(
        DataOptions(None, data=folder / "scenes", sizes=(64,), workers=1),
        ModelOptions("r18", width=32, queries=12, encoder_layers=1, decoder_layers=2, **model),  # type: ignore[arg-type]
        DistillationOptions(logits_weight=0, feature_weight=0, assignment_weight=0),
        OptimisationOptions(batch_size=2, epochs=2),
        OutputOptions(folder, "run", device="cpu"),
    )


def test_a_live_teacher_and_a_students_first_weights_go_by_name(folder: Path) -> None:
    """The live teacher's columns undo the permutation; --init of the permuted detector gives the class heads of the
    right one (exact), and of one with other names everything but the class heads."""
    config = training(folder)
    data = prepare_data(config.data)
    columns = prepare_live(folder / "other.safetensors", data).columns
    assert [ORDER[column] for column in columns] == list(range(7))
    right = load_detector(folder / "right.safetensors")[0].state_dict()
    heads = [name for name in right if "class_heads" in name]
    assert heads
    for name, kept in (("other.safetensors", True), ("strange.safetensors", False)):
        student = prepare_student(training(folder, init=folder / name), data).detector.state_dict()
        fitting = [key for key in right if key in student and student[key].shape == right[key].shape]
        differing = [key for key in fitting if not torch.equal(student[key], right[key])]
        assert [key for key in differing if key in heads] == ([] if kept else heads)
        assert not [key for key in differing if key not in heads]


def test_an_export_keeps_the_names(folder: Path, tmp_path: Path) -> None:
    """With --data, whose names are written in capitals: outputs and ids are the data's, names the checkpoint's. Data of
    other classes is an error."""
    shout(folder / "scenes", tmp_path / "loud")
    arguments = ["--to", "transformers", "--data", str(tmp_path / "loud")]
    export(["--checkpoint", str(folder / "other.safetensors"), "--out", str(tmp_path / "out"), *arguments])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    annotations = annotations_of(folder)
    assert tuple(config["id2label"].values()) == annotations.class_names
    assert tuple(config["category_ids"]) == annotations.category_ids
    exported, right = (load_detector(path)[0] for path in (tmp_path / "out", folder / "right.safetensors"))
    for ours, theirs in zip(exported.decoder.class_heads, right.decoder.class_heads, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    with pytest.raises(UserError, match="classes go by name; give both the same names"):
        export(["--checkpoint", str(folder / "strange.safetensors"), "--out", str(tmp_path / "no"), *arguments])


def shout(data: Path, out: Path) -> None:
    """A copy of a data set's annotations with names in capitals."""
    (out / "annotations").mkdir(parents=True)
    (out / "val2017").mkdir()
    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    for category in content["categories"]:
        category["name"] = category["name"].upper()
    (out / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "command",
    [
        lambda checkpoint, data, out: evaluate(["--checkpoint", checkpoint, "--data", data, "--device", "cpu"]),
        lambda checkpoint, data, out: picture([checkpoint, "--data", data, "--device", "cpu", "--out", out]),
        lambda checkpoint, data, out: load_teacher(
            checkpoint, load_annotations(Path(data), "val2017"), torch.device("cpu")
        ),
    ],
)
def test_contradictory_names_are_an_error_that_shows_both(
    folder: Path, tmp_path: Path, command: Callable[[str, str, str], object]
) -> None:
    """As many classes, none of the same name: one line, with the file and the first names of both."""
    checkpoint = str(folder / "strange.safetensors")
    with pytest.raises(UserError) as caught:
        command(checkpoint, str(folder / "scenes"), str(tmp_path / "picture.png"))
    message = str(caught.value)
    first = ", ".join(annotations_of(folder).class_names[:3])
    assert message.startswith(checkpoint)
    assert f"of the data's classes, {first} ... (7), found one of planet 0, planet 1, planet 2 ... (7)" in message
    assert "\n" not in message


DATA = Categories((1, 2, 3), ("cat", "traffic light", "dog"))


@pytest.mark.parametrize(
    ("known", "columns", "note"),
    [
        (("cat", "traffic light", "dog"), (0, 1, 2), None),
        (
            ("dog", "cat", "bird", "traffic light"),
            (1, 3, 0),
            "3 of its 4 outputs are kept, 'cat' of the data is",
        ),
        (("cat", "traffic light", "dog", "bird"), (0, 1, 2), "the first 3 of its 4 outputs are kept"),
        (("Cat", "traffic_light", "DOG"), (0, 1, 2), "spelled otherwise: 'cat' is its 'Cat'"),
        (("DOG", "dog", "Traffic-Light", "CAT"), (3, 2, 1), "'cat' of the data is output 3"),  # the exact dog
        (("cat", "semaphore", "dog"), (0, 1, 2), "taken by their place: 'traffic light' is its 'semaphore'"),
        (("0", "1", "2"), (0, 1, 2), "in their order"),  # no names
    ],
)
def test_names_that_fit(known: tuple[str, ...], columns: tuple[int, ...], note: str | None) -> None:
    found = match_outputs(Categories(tuple(range(len(known))), known), len(known), DATA)
    assert found.columns == columns
    assert (note is None and not found.notes) or (len(found.notes) == 1 and note is not None and note in found.notes[0])


def test_classes_that_share_a_name_go_by_their_order() -> None:
    data = Categories((1, 2, 3), ("cat", "dog", "cat"))
    assert match_outputs(Categories((0, 1, 2), ("dog", "cat", "cat")), 3, data).columns == (1, 0, 2)
    assert match_outputs(Categories((0, 1, 2), data.names), 3, data).notes == ()


def renumber(folder: Path, out: Path, names: dict[str, str] | None = None) -> Annotations:
    """val2017 with other ids: those of the classes in reverse, plus 20; or with some classes of other names."""
    content = json.loads((folder / "scenes" / "annotations" / "instances_val2017.json").read_text())
    ids = {category["id"]: category["id"] for category in content["categories"]}
    if names is None:
        ids = {old: new + 20 for old, new in zip(ids, reversed(list(ids)), strict=True)}
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
        category["name"] = (names or {}).get(category["name"], category["name"])
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    (out / "annotations").mkdir(parents=True)
    (out / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (out / "val2017").symlink_to(folder / "scenes" / "val2017")
    return load_annotations(out, "val2017")


def test_a_splits_own_ids_are_mapped_by_name(folder: Path, tmp_path: Path) -> None:
    """Validation annotations with other ids of the same names: the boxes have the classes of the original file, the
    metrics are its (exact), and the detections have the new file's ids."""
    train, val = annotations_of(folder, "train2017"), annotations_of(folder)
    other = in_order_of(renumber(folder, tmp_path / "other"), train)
    assert other.class_names == train.class_names
    assert other.category_ids == tuple(category_id + 20 for category_id in val.category_ids[::-1])
    for ours, theirs in zip(other.entries, val.entries, strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    detector = load_detector(folder / "right.safetensors")[0]
    policy = saved_policy(folder / "right.safetensors", (64,))
    found = {}
    for name, split in (("val", val), ("other", other)):
        results = detect_split(detector, split, policy, batch_size=3, workers=1)
        found[name] = average_precision(split, results)
        assert {result["category_id"] for result in results} <= set(split.category_ids)
    assert found["other"] == found["val"]


def test_splits_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    """A renamed class: the line says which is missing and which is too many. Written in capitals it is the same."""
    train = annotations_of(folder, "train2017")
    first = train.class_names[0]
    with pytest.raises(UserError, match=f"without {first}, and with planet more: list the same categories in both"):
        in_order_of(renumber(folder, tmp_path / "planet", {first: "planet"}), train)
    assert in_order_of(renumber(folder, tmp_path / "loud", {first: first.upper()}), train).category_ids


def test_the_table_shows_every_class_with_its_boxes(folder: Path) -> None:
    """A dash and 0 boxes for a class without any; elsewhere as many as the entries have."""
    annotations = annotations_of(folder)
    metrics = average_precision(annotations, [])
    lines = class_table(annotations, metrics)
    counts = np.bincount(np.concatenate([entry.labels for entry in annotations.entries]), minlength=7)
    assert (counts == 0).any()
    assert (counts > 0).any()
    for line, name, count in zip(lines, annotations.class_names, counts.tolist(), strict=True):
        ap, boxes, _, shown = line.split()
        assert (ap, int(boxes), shown) == ("0.0" if count else "-", count, name)


def test_without_boxes_to_find_the_best_is_the_last(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs with a validation split of no boxes: AP and best AP are dashes, best.safetensors is the last."""
    scenes = tmp_path / "scenes"
    (scenes / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        content = json.loads((folder / "scenes" / "annotations" / f"instances_{split}.json").read_text())
        content["annotations"] = content["annotations"] if split == "train2017" else []
        (scenes / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (scenes / split).symlink_to(folder / "scenes" / split)
    config = training(folder)
    config = replace(config, data=replace(config.data, data=scenes), model=ModelOptions("tiny"))
    metrics = loop.train(replace(config, output=OutputOptions(tmp_path, "run", eval_every=1, device="cpu")))
    assert str(metrics).startswith("AP -")
    assert "best AP -:" in capsys.readouterr().err
    best, last = (load_detector(tmp_path / "run" / f"{name}.safetensors")[0].state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)
