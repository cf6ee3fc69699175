"""Exports against what reads them: transformers' own model and processor, onnxruntime, and our loader."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.augment import AugmentPolicy, draw, evaluation_policy, policy_of_sizes
from common.categories import Categories
from common.coco import Annotations, load_annotations
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.evaluate import detect
from common.images import collate, load_image, normalise
from common.records import Augmentation, Batch, ImageEntry, Targets
from common.replay import apply_boxes, apply_image
from common.synthetic import draw_data_set
from student_train.__main__ import export
from student_train.export_onnx import OLDEST_EXPORTER
from tests import detr_oracle

CATEGORIES = Categories((3, 7, 900), ("cat", "dog", "owl"))
SMALL = DetectorConfig(
    "resnet18", 3, width=64, encoder_layers=1, decoder_layers=2, queries=12, feedforward=96, pretrained_backbone=False
)
STUDENTS = {
    "r18": SMALL,
    "r50, plain, one level": dataclasses.replace(SMALL, backbone="resnet50", refine=False, levels=1),
    "two-stage, pretrained": dataclasses.replace(SMALL, two_stage=True, pretrained_backbone=True),
    "two levels, 2 points, 4 heads": dataclasses.replace(SMALL, levels=2, points=2, heads=4),
    "timm": dataclasses.replace(SMALL, backbone="timm:convnext_atto"),
}


def saved(path: Path, config: DetectorConfig, categories: Categories | None = CATEGORIES) -> DeformableDetr:
    """A detector with every weight random, and its checkpoint as training writes it."""
    torch.manual_seed(0)
    detector = DeformableDetr(config).eval()
    detr_oracle.randomise(detector)
    save_detector(path, detector, categories and categories.to_metadata())
    return detector


def run(checkpoint: Path, to: str, out: Path, *more: object) -> None:
    export([str(word) for word in ("--checkpoint", checkpoint, "--to", to, "--out", out, *more)])


@pytest.mark.parametrize("student", STUDENTS)
def test_transformers(student: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`from_pretrained` on the exported folder: no key missing or unexpected, no word of tied weights; its logits
    within 1e-4 and boxes within 1e-5 of ours on a padded batch; class names and category ids arrive. Our loader reads
    the folder back: equal."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    detector = saved(tmp_path / "best.safetensors", STUDENTS[student])
    run(tmp_path / "best.safetensors", "transformers", tmp_path / "theirs")
    oracle, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    written = capfd.readouterr()
    assert "tie" not in written.err + written.out
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert oracle.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert list(oracle.config.category_ids) == [3, 7, 900]

    images, mask = detr_oracle.padded_batch()
    with torch.no_grad():
        found = detector(images, mask)
        expected = oracle.eval()(images, pixel_mask=(~mask).long())
    assert (found.logits[:, -1] - expected.logits).abs().max() <= 1e-4
    assert (found.boxes_cxcywh[:, -1] - expected.pred_boxes).abs().max() <= 1e-5

    again, report = load_detector(tmp_path / "theirs")
    assert report.categories == CATEGORIES
    assert not report.unused
    assert dataclasses.replace(again.config, pretrained_backbone=False) == dataclasses.replace(
        detector.config, pretrained_backbone=False
    )
    ours, theirs = detector.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if not name.endswith("num_batches_tracked"))


def test_transformers_processor(tmp_path: Path) -> None:
    """Their image processor, made from the exported folder, against our evaluation's resize and normalisation of a
    noisy image: same size, pixels within one grey level on average (their resize rounds differently); and the sizes
    are those of --sizes."""
    transformers = pytest.importorskip("transformers")
    saved(tmp_path / "best.safetensors", SMALL)
    run(tmp_path / "best.safetensors", "transformers", tmp_path / "theirs", "--sizes", 96, 128)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    scenes = scenes_of(tmp_path, 1)
    (entry,) = scenes.entries
    policy = evaluation_policy(policy_of_sizes((96, 128)))
    ours, _, _ = seen(scenes, entry, policy)
    image = load_image(scenes.image_path(entry)).permute(1, 2, 0).numpy()
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() <= 1 / 255 / 0.22


def seen(scenes: Annotations, entry: ImageEntry, policy: AugmentPolicy) -> tuple[Tensor, Targets, Augmentation]:
    """An image as a detector is shown it."""
    augmentation = draw(0, entry.image_id, 0, entry.width, entry.height, policy)
    image = normalise(apply_image(load_image(scenes.image_path(entry)), augmentation))
    return image, apply_boxes(entry, augmentation), augmentation


def scenes_of(folder: Path, images: int) -> Annotations:
    draw_data_set(folder / "scenes", train_images=1, val_images=images)
    return load_annotations(folder / "scenes", "val2017")


@pytest.fixture(scope="module")
def onnx_student(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeformableDetr, Path]:
    """A tiny detector of seven classes, and its ONNX file of open sizes. (Made once: torch.export is slow.)"""
    pytest.importorskip("torch", OLDEST_EXPORTER)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    config = PRESETS["tiny"](7, decoder_layers=2, queries=30)
    names = Categories(tuple(range(1, 8)), tuple("abcdefg"))
    detector = saved(folder / "best.safetensors", config, names)
    run(folder / "best.safetensors", "onnx", folder / "student.onnx", "--sizes", 128)
    return detector, folder / "student.onnx"


def test_onnxruntime_gives_the_same_detections(onnx_student: tuple[DeformableDetr, Path], tmp_path: Path) -> None:
    """onnxruntime on raw pixels against `detect` on our model's output, for padded batches of one, two and three images
    of different sizes: scores within 1e-5, the same labels in the same order, boxes within 0.01 pixels."""
    import onnxruntime

    detector, file = onnx_student
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert [category["name"] for category in json.loads(metadata["categories"])] == list("abcdefg")
    policy = evaluation_policy(policy_of_sizes((128,)))
    assert (metadata["short_side"], metadata["max_long_side"]) == ("128", str(policy.max_long_side))
    scenes = scenes_of(tmp_path, 6)
    for sizes, entries in (((64,), scenes.entries[:1]), ((128,), scenes.entries[1:3]), ((96,), scenes.entries[3:6])):
        policy = evaluation_policy(policy_of_sizes(sizes))
        samples = [seen(scenes, entry, policy) for entry in entries]
        batch = collate([sample[:2] for sample in samples])
        with torch.no_grad():
            output = detector(batch.images, batch.padding_mask)
        sizes_px = np.array([(e.height, e.width) for e in entries], dtype=np.float32)
        scores, labels, boxes_xyxy_px = session.run(
            None, {"images": raw(batch), "padding_mask": batch.padding_mask.numpy(), "sizes": sizes_px}
        )
        for row, (_, _, augmentation) in enumerate(samples):
            expected = detect(output.logits[row, -1], output.boxes_cxcywh[row, -1], augmentation)
            assert np.abs(scores[row] - expected.scores.numpy()).max() <= 1e-5
            assert labels[row].tolist() == expected.labels.tolist()
            assert np.abs(boxes_xyxy_px[row] - expected.boxes_xyxy_px.numpy()).max() <= 0.01


def raw(batch: Batch) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes that were normalised; noise where padded, which must not matter."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels: Tensor = ((batch.images * std + mean) * 255).round().to(torch.uint8)
    noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.where(batch.padding_mask[:, None], noise, pixels).numpy()


def test_onnx_has_standard_operators_and_nothing_besides_the_student(
    onnx_student: tuple[DeformableDetr, Path],
) -> None:
    """onnx's own checker; operators of the standard set only; as many weights as the student has, and no more."""
    import onnx

    detector, file = onnx_student
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert "GridSample" in {node.op_type for node in model.graph.node}
    own = sum(parameter.numel() for parameter in detector.parameters())
    held = sum(int(np.prod(weight.dims)) for weight in model.graph.initializer)
    assert held <= own + 5000  # batch norm's statistics and the exporter's constants
    assert file.stat().st_size <= 4 * held + 500_000
    assert b"site-packages" not in file.read_bytes()


def test_onnx_of_a_fixed_size(tmp_path: Path) -> None:
    """--image-size fixes the inputs' shapes; the detections are the same (scores within 1e-5)."""
    pytest.importorskip("torch", OLDEST_EXPORTER)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    detector = saved(tmp_path / "a.safetensors", PRESETS["tiny"](3, decoder_layers=1, levels=2, two_stage=True))
    run(tmp_path / "a.safetensors", "onnx", tmp_path / "a.onnx", "--image-size", 64, 128)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [x.shape for x in session.get_inputs()] == [[1, 3, 64, 128], [1, 64, 128], [1, 2]]
    scenes = scenes_of(tmp_path, 1)
    batch = collate([seen(scenes, scenes.entries[0], evaluation_policy(policy_of_sizes((64,))))[:2]])
    assert batch.images.shape[-2:] == (64, 64)
    images, mask = torch.zeros(1, 3, 64, 128), torch.ones(1, 64, 128, dtype=torch.bool)
    images[..., :64], mask[..., :64] = batch.images, batch.padding_mask
    with torch.no_grad():
        output = detector(images, mask)
    batch = Batch(images, mask, batch.targets)
    inputs = {"images": raw(batch), "padding_mask": mask.numpy(), "sizes": np.ones((1, 2), dtype=np.float32)}
    scores, _, _ = session.run(None, inputs)
    expected = output.logits[0, -1].sigmoid().flatten().sort(descending=True).values[:100]
    assert np.abs(scores[0] - expected.numpy()).max() <= 1e-5


@pytest.mark.parametrize("two_stage", [False, True])
def test_official_outputs_are_category_ids(two_stage: bool, tmp_path: Path) -> None:
    """The official file has an output for each id up to the largest; loading it back with the data's ids gives every
    weight back (exact), and an output of no category a probability of 0."""
    config = dataclasses.replace(SMALL, two_stage=two_stage, queries=300, width=256 if two_stage else 64)
    detector = saved(tmp_path / "best.safetensors", config)
    run(tmp_path / "best.safetensors", "official", tmp_path / "official.pth")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert content["model"]["class_embed.0.weight"].shape == (901, config.width)
    assert content["model"]["class_embed.0.bias"][4].sigmoid() < 1e-12
    again, report = load_detector(tmp_path / "official.pth", data=CATEGORIES)
    assert not report.unused
    ours, theirs = detector.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("to", ["mmdet", "mmdet2"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v2_1280"])
def test_mmdet(backbone: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MMDetection's file names its classes and comes back with every weight (exact). MobileNetV2's names are those of
    MMDetection's modules, written down here from its source, and so are its indices: it numbers conv1 none and layer1
    0, and conv2 7, so that strides 8, 16 and 32 end in 2, 4 and 6, or 7 with conv2's 1280 channels."""
    detector = saved(tmp_path / "best.safetensors", dataclasses.replace(SMALL, backbone=backbone))
    run(tmp_path / "best.safetensors", to, tmp_path / "mmdet.pth")
    said = capsys.readouterr().err
    content = torch.load(tmp_path / "mmdet.pth", weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == CATEGORIES.names
    assert ("bbox_head.transformer.level_embeds" in content["state_dict"]) == (to == "mmdet2")
    assert ("MMDetection 2 drops without a word" in said) == (to == "mmdet2")
    if backbone != "resnet18":
        found = {name: tuple(t.shape) for name, t in content["state_dict"].items() if name.startswith("backbone.")}
        assert found == dict(mmdet_mobilenet())
        assert f"out_indices=(2, 4, {6 if backbone == 'mobilenet_v2' else 7})" in said
    again, report = load_detector(tmp_path / "mmdet.pth")
    assert not report.unused
    assert again.config.backbone == backbone
    ours, theirs = detector.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if not name.endswith("num_batches_tracked"))


def mmdet_mobilenet() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of MMDetection 3's MobileNetV2: conv1, layer1..7 of inverted residuals (expansion, depthwise and
    linear convolution, each with its norm), conv2."""

    def convolution(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"backbone.{name}.conv.weight", shape
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            yield f"backbone.{name}.bn.{leaf}", shape[:1]
        yield f"backbone.{name}.bn.num_batches_tracked", ()

    yield from convolution("conv1", 32, 3, 3, 3)
    channels = 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for stage, (expansion, out, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            hidden, name = channels * expansion, f"layer{stage}.{block}"
            if expansion > 1:
                yield from convolution(f"{name}.expand_conv", hidden, channels, 1, 1)
            yield from convolution(f"{name}.depthwise_conv", hidden, 1, 3, 3)
            yield from convolution(f"{name}.linear_conv", out, hidden, 1, 1)
            channels = out
    yield from convolution("conv2", 1280, 320, 1, 1)


def test_classes_from_a_data_set(tmp_path: Path) -> None:
    """A checkpoint that does not name its classes takes those of --data; of another number: UserError."""
    pytest.importorskip("timm")
    scenes = scenes_of(tmp_path, 1)
    config = dataclasses.replace(SMALL, num_classes=scenes.num_classes)
    saved(tmp_path / "best.safetensors", config, None)
    run(tmp_path / "best.safetensors", "transformers", tmp_path / "theirs", "--data", tmp_path / "scenes")
    labels = json.loads((tmp_path / "theirs" / "config.json").read_text())["id2label"]
    assert tuple(labels.values()) == scenes.class_names
    saved(tmp_path / "best.safetensors", SMALL, None)
    with pytest.raises(UserError, match="trained on the same categories"):
        run(tmp_path / "best.safetensors", "transformers", tmp_path / "theirs", "--data", tmp_path / "scenes")


def test_what_a_program_cannot_express_is_one_line(tmp_path: Path) -> None:
    """Backbones, widths and sizes that the other side does not have: UserError before anything is written."""
    cases = (
        (dataclasses.replace(SMALL, backbone="mobilenet_v2"), "transformers", (), "would drop activations"),
        (PRESETS["tiny"](3), "transformers", (), "expected a ResNet or a timm: backbone"),
        (PRESETS["tiny"](3), "mmdet", (), "use --to onnx"),
        (dataclasses.replace(SMALL, backbone="mobilenet_v2"), "official", (), "use --to onnx"),
        (dataclasses.replace(SMALL, width=48), "official", (), "whose neck has 32 groups, found 48"),
        (
            dataclasses.replace(SMALL, two_stage=True),
            "official",
            (),
            "expected a width of 256 for a two-stage detector",
        ),
        (dataclasses.replace(SMALL, two_stage=True), "mmdet", (), "expected a width of 256 for a two-stage detector"),
        (dataclasses.replace(SMALL, two_stage=True), "mmdet2", (), "expected a width of 256 for a two-stage detector"),
        (SMALL, "onnx", ("--image-size", 100, 128), "two multiples of 64"),
    )
    for config, to, more, message in cases:
        saved(tmp_path / "best.safetensors", config)
        out = tmp_path / to
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / "best.safetensors", to, out, *more)
        assert "\n" not in str(caught.value)
        assert not out.is_file()
        assert not list(out.glob("*")) if out.exists() else True


@pytest.mark.parametrize("to", ["transformers", "mmdet", "official", "onnx"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, to: str) -> None:
    """Below a file, in /proc, and where a folder (or, for transformers, a file) is in the way: the line comes before
    the checkpoint, which is none, is even read."""
    (tmp_path / "file").touch()
    taken = tmp_path / "file" if to == "transformers" else tmp_path
    for out in (tmp_path / "file" / "x", Path("/proc/nope/x"), Path("/proc/x"), taken):
        with pytest.raises(UserError, match="could not be written"):
            run(tmp_path / "file", to, out)
