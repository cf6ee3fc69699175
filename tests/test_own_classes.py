"""A data set with classes of its own, ids 7, 3 and 900, from the dump to the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.cache.reader import CacheReader
from common.categories import Categories
from common.coco import load_annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.synthetic import draw_data_set
from student_train import loop
from student_train.__main__ import evaluate, export
from student_train.config import DataOptions, ModelOptions, OptimisationOptions, OutputOptions, TrainConfig
from student_train.export_onnx import OLDEST_EXPORTER
from teacher_dump.config import DataOptions as DumpDataOptions
from teacher_dump.config import DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import run_dump

IDS = {7: "cat", 3: "dog", 900: "owl"}  # in the order of the json, which is not the order of the ids
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """owls/: drawn scenes whose categories are renamed to three. store.zarr: by a teacher of three classes. run/: a
    student on a timm backbone after two steps."""
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("own")
    draw_data_set(folder / "owls", train_images=6, val_images=4)
    for split in ("train2017", "val2017"):
        path = folder / "owls" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = list(IDS)[annotation["category_id"] % 3]
        content["categories"] = [{"id": category_id, "name": name} for category_id, name in IDS.items()]
        path.write_text(json.dumps(content))
    torch.manual_seed(0)
    save_detector(folder / "teacher.safetensors", DeformableDetr(PRESETS["tiny"](3, queries=20)))
    data = DumpDataOptions(folder / "owls", views=1, sizes=(SIDE,), workers=1)
    teacher = TeacherOptions(str(folder / "teacher.safetensors"), device="cpu")
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "store.zarr")))
    config = TrainConfig(
        DataOptions(cache=folder / "store.zarr", data=folder / "owls", workers=1),  # type: ignore[arg-type]
        ModelOptions("timm:resnet10t", width=64, queries=10, encoder_layers=1, decoder_layers=2),
        optimisation=OptimisationOptions(batch_size=3, max_steps=2),
        output=OutputOptions(folder, "run", device="cpu"),
    )
    loop.train(config)
    return folder


def test_store_and_student_know_the_classes(folder: Path) -> None:
    """The store's logits have three classes; the student learnt from distillation losses; its file names the data's ids
    in ascending order, its tensors are the detector's alone: none of the teacher, none of the projections."""
    reader = CacheReader(folder / "store.zarr")
    assert reader.read([0]).logits.shape[-1] == 3
    reader.close()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "losses" in line]
    assert len(steps) == 2
    for line in steps:
        assert {"features", "assignment/class", "logits/class"} <= line["losses"].keys()
    detector, report = load_detector(folder / "run" / "last.safetensors")
    assert report.categories == Categories((3, 7, 900), ("dog", "cat", "owl"))
    assert load_file(folder / "run" / "last.safetensors").keys() == detector.state_dict().keys()


def test_detections_have_the_ids(folder: Path, tmp_path: Path) -> None:
    """A detector made to see one class everywhere: `evaluate` writes only the category id of that class's index."""
    detector, report = load_detector(folder / "run" / "last.safetensors")
    assert report.categories is not None
    with torch.no_grad():
        for head in detector.decoder.class_heads:
            assert isinstance(head, nn.Linear)
            head.bias.copy_(torch.tensor([-50.0, -50.0, 5.0]))
            head.weight.zero_()
    save_detector(tmp_path / "owls.safetensors", detector, report.categories.to_metadata())
    arguments = ["--checkpoint", tmp_path / "owls.safetensors", "--data", folder / "owls", "--sizes", SIDE]
    arguments += ["--workers", 1, "--device", "cpu", "--detections", tmp_path / "found.json"]
    evaluate([str(argument) for argument in arguments])
    found = json.loads((tmp_path / "found.json").read_text())
    confident = [detection for detection in found if detection["score"] > 0.9]
    assert {detection["category_id"] for detection in confident} == {900}
    assert {detection["image_id"] for detection in confident} == {
        entry.image_id for entry in load_annotations(folder / "owls", "val2017").entries
    }


@pytest.mark.parametrize("to", ["transformers", "onnx"])
def test_exports_know_the_classes_and_nothing_of_the_teacher(folder: Path, tmp_path: Path, to: str) -> None:
    """The trained student's export: class names and ids; no more numbers than the student has, and no name of what
    training added."""
    if to == "onnx":
        pytest.importorskip("torch", OLDEST_EXPORTER)
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    checkpoint, out = folder / "run" / "best.safetensors", tmp_path / "out"
    size = ["--image-size", "64", "128"] if to == "onnx" else []
    export(["--checkpoint", str(checkpoint), "--to", to, "--out", str(out), *size])
    detector, _ = load_detector(checkpoint)
    own = sum(tensor.numel() for tensor in detector.state_dict().values())
    if to == "transformers":
        config = json.loads((out / "config.json").read_text())
        assert (config["id2label"], config["category_ids"]) == ({"0": "dog", "1": "cat", "2": "owl"}, [3, 7, 900])
        weights = load_file(out / "model.safetensors")
        names = set(weights)
        heads = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("model.decoder.bbox_embed"))
        assert sum(tensor.numel() for tensor in weights.values()) - heads <= own  # the heads are there twice
    else:
        model = onnx.load(out)
        categories = json.loads({entry.key: entry.value for entry in model.metadata_props}["categories"])
        assert categories == [{"id": i, "name": name} for i, name in sorted(IDS.items())]
        names = {weight.name for weight in model.graph.initializer}
        assert sum(torch.Size(weight.dims).numel() for weight in model.graph.initializer) <= own + 5000
    assert not [name for name in names if "projection" in name or "teacher" in name]
