"""Detectors of `transformers` as teachers: what they say, what is dumped of it, and a student that learns from it."""

from __future__ import annotations

import copy
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="needs the extra: pip install 'detrcache[transformers]'")

from common.cache.reader import CacheReader
from common.categories import Categories, from_transformers, match_outputs
from common.coco import Annotations, load_annotations
from common.errors import UserError
from common.images import load_image
from student_train import loop
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from teacher_dump.compare import compare_with_teacher
from teacher_dump.config import DataOptions as DumpDataOptions
from teacher_dump.config import DumpConfig, SourceOptions, StoreOptions, TeacherOptions
from teacher_dump.dump import run_dump
from teacher_dump.transformers_families import FAMILIES, decode_fine, prepare_fine
from teacher_dump.transformers_teacher import (
    as_teacher,
    load_model,
    load_transformers_teacher,
    read_preprocessing,
    sigmoid_logits,
)
from tests.tiny_transformers import BUILDERS, LAYERS, QUERIES, build, deformable_detr, detr, stir

CLASSES = 80
SIDE = 128  # of the samples
FIXED_SIZES = {"rf_detr": (112, 112)}  # whole windows of 14-pixel patches; the others need a multiple of 32
SIZES = ((128, 64), (192, 256))  # height and width of two samples; the second needs no padding
FREE = [name for name, family in FAMILIES.items() if family.own_size]


@pytest.fixture(scope="module")
def annotations(two_images: Path) -> Annotations:
    return load_annotations(two_images, "val2017")


def save(model: Any, folder: Path, family: str) -> Path:
    """The model as its users have it, with a small input size where its family has one size."""
    model.save_pretrained(folder)
    if family not in FREE:
        height, width = FIXED_SIZES.get(family, (96, 96))
        settings = {"size": {"height": height, "width": width}, "do_normalize": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def first_layers(model: Any, layers: int) -> Any:
    """The same model with its decoder cut off after some layers."""
    short = copy.deepcopy(model)
    decoder = short.model.decoder
    decoder.layers = decoder.layers[:layers]
    if hasattr(decoder, "num_layers"):  # DAB-DETR's own count
        decoder.num_layers = layers
    if hasattr(decoder, "eval_idx"):  # D-FINE and DEIMv2 answer from this layer
        decoder.eval_idx = layers - 1
    return short


@pytest.mark.parametrize("family", BUILDERS)
def test_every_layer_is_what_a_model_cut_there_answers(family: str) -> None:
    """All layers' logits and boxes against transformers' own forward of the model cut off after that layer: 1e-5. The
    layers differ from each other, so that none can stand for another."""
    model = build(family, CLASSES)
    side = FIXED_SIZES.get(family, (128, 128))[0]
    pixels, mask = torch.randn(2, 3, side, side), torch.ones(2, side, side)
    with torch.inference_mode():
        expected = [first_layers(model, layers)(pixels, pixel_mask=mask) for layers in range(1, LAYERS + 1)]
        if family in ("d_fine", "deimv2"):
            prepare_fine(model, missing=[])
        decoded = FAMILIES[family].decode(model, pixels, mask)
    assert decoded.queries.shape[:3] == (2, LAYERS, QUERIES)
    assert decoded.memory.shape[:2] == (2, sum(height * width for height, width in decoded.level_shapes))
    for layer, answer in enumerate(expected):
        torch.testing.assert_close(decoded.logits[:, layer], answer.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(decoded.boxes_cxcywh[:, layer], answer.pred_boxes, rtol=0, atol=1e-5)
    assert (decoded.logits[:, 1:] - decoded.logits[:, :-1]).abs().amax(dim=(0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_models_trained_with_auxiliary_losses_in_transformers(name: str) -> None:
    """There transformers norms between layers: the last layer against the model itself, 1e-5, the earlier ones against
    the auxiliary outputs that it trains with, 1e-5."""
    torch.manual_seed(0)
    model = stir(detr(name, CLASSES, d_model=16, auxiliary_loss=True))
    pixels, mask = torch.randn(1, 3, 128, 128), torch.ones(1, 128, 128)
    nothing = {"class_labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.full((1, 4), 0.5)}
    with torch.no_grad():
        answer = model(pixels, pixel_mask=mask, labels=[nothing])
        family = {"Detr": "detr", "ConditionalDetr": "conditional_detr"}[name]
        decoded = FAMILIES[family].decode(model, pixels, mask)
    torch.testing.assert_close(decoded.logits[:, -1], answer.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.boxes_cxcywh[:, -1], answer.pred_boxes, rtol=0, atol=1e-5)
    assert len(answer.auxiliary_outputs) == LAYERS - 1
    for layer, auxiliary in enumerate(answer.auxiliary_outputs):
        torch.testing.assert_close(decoded.logits[:, layer], auxiliary["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(decoded.boxes_cxcywh[:, layer], auxiliary["pred_boxes"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"with_box_refine": False}, {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 9}]
)
def test_variants_of_deformable_detr(options: dict[str, Any]) -> None:
    """Without refinement and with two stages: the last layer against the model's own answer, 1e-5. Only queries that
    all images share become constants of the store."""
    torch.manual_seed(0)
    model = stir(deformable_detr(CLASSES, **options))
    pixels, mask = torch.randn(1, 3, 128, 192), torch.ones(1, 128, 192)
    mask[:, 100:] = 0
    with torch.inference_mode():
        answer, decoded = model(pixels, pixel_mask=mask), FAMILIES["deformable_detr"].decode(model, pixels, mask)
    torch.testing.assert_close(decoded.logits[:, -1], answer.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.boxes_cxcywh[:, -1], answer.pred_boxes, rtol=0, atol=1e-5)
    queries = FAMILIES["deformable_detr"].static_queries(model)
    assert (queries is None) == ("two_stage" in options)


def test_fine_without_the_first_layers_heads_gives_the_last_layer() -> None:
    """A published checkpoint without them: one layer, equal to the model's own answer."""
    model = build("d_fine", CLASSES)
    prepare_fine(model, missing=["model.decoder.class_embed.0.weight"])
    pixels = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        answer, decoded = model(pixels), decode_fine(model, pixels, torch.ones(1, 96, 96))
    assert decoded.logits.shape[1] == decoded.queries.shape[1] == 1
    assert torch.equal(decoded.logits[:, 0], answer.logits)


@pytest.mark.parametrize("family", BUILDERS)
def test_dump_verify_and_train(family: str, two_images: Path, annotations: Annotations, tmp_path: Path) -> None:
    """Two real images dumped, read back, verified, and learned from.

    Read back, against the teacher run on each replayed sample alone: logits and boxes to 1e-4 (other batches, other
    padding), the tokens to fp16's rounding of that. `verify --against-teacher` agrees. A small Deformable DETR then
    trains two steps, with every distillation loss that this teacher allows, all finite, features included.
    """
    folder = save(build(family, CLASSES), tmp_path / "teacher", family)
    store, name = tmp_path / "store.zarr", f"hf:{folder}"
    data = DumpDataOptions(data=two_images, split="train2017", sizes=(SIDE,), workers=1)
    run_dump(
        DumpConfig(data, TeacherOptions(teacher=name, batch_size=2, device="cpu"), StoreOptions(store, preset="half"))
    )

    reader = CacheReader(store)
    teacher = load_transformers_teacher(name, annotations, torch.device("cpu"))
    info = reader.manifest.teacher
    assert info == teacher.info
    assert (info.layers, info.queries) == (LAYERS, QUERIES)
    assert (info.input_size is None) == (family in FREE)
    batch = reader.read(range(2))
    for row in range(2):
        output = teacher.run([replayed(reader, annotations, row)])
        torch.testing.assert_close(batch.logits[row].float(), output.logits[0], rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(batch.boxes_cxcywh[row], output.boxes_cxcywh[0], rtol=0, atol=1e-4)
        tokens = batch.tokens[batch.token_offsets[row] : batch.token_offsets[row + 1]].float()
        torch.testing.assert_close(tokens, output.memory[0], rtol=2e-3, atol=1e-3)
        assert teacher.grid(*reader.table.augmentation[row, 5:7].tolist()) == [
            tuple(shape) for shape in batch.level_shapes[row].tolist()
        ]
    assert compare_with_teacher(store, SourceOptions(teacher=name, data=two_images, device="cpu", workers=1), samples=2)

    static = "query_embeddings" in reader.constants
    losses = train_two_steps(store, two_images, tmp_path, DistillationOptions(assignment_weight=float(static)))
    assert len(losses) == 2
    names = {"features", "logits/class", "detection/l1"} | ({"assignment/l1"} if static else set())
    assert all(names <= step.keys() and np.isfinite(list(step.values())).all() for step in losses)
    assert all(step["features"] > 0 for step in losses)


def replayed(reader: CacheReader, annotations: Annotations, row: int) -> torch.Tensor:
    """The sample's pixels, replayed here with Pillow from the store's integers."""
    flip, top, left, crop_height, crop_width, height, width = reader.table.augmentation[row].tolist()
    entry = next(entry for entry in annotations.entries if entry.image_id == reader.table.image_id[row])
    image = Image.fromarray(load_image(annotations.image_path(entry)).permute(1, 2, 0).contiguous().numpy())
    image = image.crop((left, top, left + crop_width, top + crop_height)).resize((width, height), 2)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(-1) if flip else pixels


def train_two_steps(store: Path, data: Path, out: Path, distillation: DistillationOptions) -> list[dict[str, float]]:
    loop.train(
        TrainConfig(
            DataOptions(cache=store, data=data, workers=1, prefetch=1),
            ModelOptions(student="tiny"),
            distillation,
            OptimisationOptions(epochs=2, batch_size=2, lr=1e-3),
            OutputOptions(out=out, name="run", eval_every=0, device="cpu"),
        )
    )
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if "losses" in line]


@pytest.mark.parametrize("family", FREE)
def test_padded_batches_against_the_image_processor(family: str, tmp_path: Path) -> None:
    """Two samples through our normalisation, padding and mask, against transformers' own processor and
    model: the last layer's logits and boxes to 1e-4, which are relative to each sample's own pixels in both."""
    from transformers import DetrImageProcessor

    model = build(family, CLASSES)
    teacher = as_teacher(
        model, FAMILIES[family], read_preprocessing(tmp_path, FAMILIES[family]), range(CLASSES), family, ""
    )
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]
    output = teacher.run(samples)
    inputs = DetrImageProcessor(do_resize=False)(images=samples, return_tensors="pt")
    assert not inputs["pixel_mask"].all()
    with torch.inference_mode():
        answer = model(**inputs)
    expected = answer.logits if teacher.info.scores == "sigmoid" else sigmoid_logits(answer.logits)
    torch.testing.assert_close(output.logits[:, -1], expected[..., :CLASSES], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.boxes_cxcywh[:, -1], answer.pred_boxes, rtol=0, atol=1e-4)
    assert [len(memory) for memory in output.memory] == [
        sum(height * width for height, width in teacher.grid(*size)) for size in SIZES
    ]


def test_softmax_scores_become_sigmoid_logits() -> None:
    """sigmoid of the converted logits against the softmax in float64, from impossible to certain: 1e-6; all finite."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(1000, 6, generator=generator)
    logits[0] = torch.tensor([100.0, 0, 0, 0, 0, -100])
    expected = logits.double().softmax(-1)[:, :-1]
    found = sigmoid_logits(logits)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double().sigmoid(), expected, rtol=0, atol=1e-6)


NAMES, IDS = ("cat", "traffic light", "dog"), (3, 5, 9)


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        ({0: "Dog", 1: "bird", 2: "cat", 3: "traffic_light"}, (2, 3, 0)),  # by name, whatever the order
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, (0, 1, 2)),  # as many as classes, unnamed
        ({index: f"LABEL_{index}" for index in range(10)}, IDS),  # category ids as indices
        ({0: "cat", 1: "semaphore", 2: "dog"}, (0, 1, 2)),  # one word differs, the others say which order
    ],
)
def test_classes_are_mapped(labels: dict[int, str], columns: tuple[int, ...]) -> None:
    known = from_transformers({"id2label": labels})
    assert match_outputs(known, len(labels), Categories(IDS, NAMES)).columns == columns


@pytest.mark.parametrize(
    "labels",
    [
        {0: "dog", 1: "semaphore", 2: "cat"},  # the order contradicts
        {0: "Katze", 1: "Ampel", 2: "Hund"},  # nothing is recognised
        {0: "LABEL_0", 1: "LABEL_1"},  # neither count
    ],
)
def test_classes_that_cannot_be_mapped_are_refused(labels: dict[int, str]) -> None:
    with pytest.raises(UserError) as caught:
        match_outputs(from_transformers({"id2label": labels}), len(labels), Categories(IDS, NAMES))
    assert "\n" not in str(caught.value)


def test_preprocessing_against_the_image_processor(tmp_path: Path) -> None:
    """Our reading of preprocessor_config.json against transformers' own processor of RT-DETR with the same settings, on
    a real-sized random image: within a grey level's half (Pillow and torchvision round resized pixels differently)."""
    from transformers import RTDetrImageProcessor

    processor = RTDetrImageProcessor(
        size={"height": 96, "width": 160}, do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    preprocessing = read_preprocessing(tmp_path, FAMILIES["rt_detr"])
    assert preprocessing.size == (96, 160)
    image = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    error = (preprocessing(image) - expected).abs() * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) * 255
    assert float(error.max()) <= 1.001
    assert float(error.mean()) < 0.5


def test_defaults_without_a_preprocessor(tmp_path: Path) -> None:
    """DETR keeps the sample's pixels and normalises; RT-DETR resizes to 640 x 640 and does not; a size given rules."""
    image = torch.full((3, 50, 70), 255, dtype=torch.uint8)
    free, fixed = (read_preprocessing(tmp_path, FAMILIES[name]) for name in ("detr", "rt_detr"))
    assert free(image).shape == (3, 50, 70)
    assert free(image)[:, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    )
    assert fixed(image).shape == (3, 640, 640)
    assert fixed(image).unique().tolist() == [1.0]
    assert read_preprocessing(tmp_path, FAMILIES["rt_detr"], (64, 96))(image).shape == (3, 64, 96)


def test_what_cannot_be_a_teacher_is_refused_in_one_line(annotations: Annotations, tmp_path: Path) -> None:
    """No folder, no config, another architecture, broken json, missing weights: each its own line."""
    device = torch.device("cpu")
    (tmp_path / "empty").mkdir()
    for name, settings in (("yolos", '{"model_type": "yolos"}'), ("torn", '{"model_type": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(settings)
    build("detr", CLASSES).model.save_pretrained(tmp_path / "headless")
    cases = {
        "nobody/has-this": "nothing is downloaded",
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "yolos"): "one of the families",
        str(tmp_path / "torn"): "expected json",
        str(tmp_path / "headless"): "weights",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_transformers_teacher(f"hf:{name}", annotations, device)
        assert "\n" not in str(caught.value)


def test_folders_made_to_do_harm(annotations: Annotations, tmp_path: Path) -> None:
    """Configurations of far larger models than their weights, and weights and settings that are none: one line each,
    and the process grows by less than 1 GB over the lot."""
    whole = tmp_path / "whole"
    save(build("detr", CLASSES), whole, "detr")
    config = json.loads((whole / "config.json").read_text())
    backbone = config["backbone_config"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_queries": 10**9}, "expected a model of the"),
        ({"decoder_layers": 10**6}, "found decoder_layers of 1000000"),
        ({"d_model": 2**20}, "expected a model of the"),
        ({"encoder_ffn_dim": 10**10}, "expected a model of the"),
        ({"d_model": "many"}, "cannot be loaded as a detr model"),
        ({"backbone_config": {**backbone, "depths": [1, 10**7, 1, 1]}}, "found depths of 10000000"),
        ({"backbone_config": {**backbone, "hidden_sizes": [2**20] * 4}}, "expected a model of the"),
        ({"model_type": ["detr"]}, "one of the families"),
    ]
    preprocessors = [
        ({"size": {"height": 10**9, "width": 10**9}}, "sides of 32 to 4096"),
        ({"size": {"height": "x", "width": 3}}, "expected an image processor's settings"),
        ({"image_mean": "abc"}, "expected an image processor's settings"),
        ({"image_std": [1.0]}, "three positive deviations"),
        ({"image_std": [0.0, 1.0, 1.0]}, "three positive deviations"),
        ({"rescale_factor": 0}, "expected an image processor's settings"),
    ]
    contents = {
        "model.safetensors": (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        "pytorch_model.bin": (b"PK\x03\x04broken", "was the copy cut short?"),
        "model.safetensors.index.json": (
            b'{"weight_map": {"a": "../whole/model.safetensors"}}',
            "files of this folder",
        ),
        "pytorch_model.bin.index.json": (b'{"weight_map": {"a": "part-1.bin"}}', "found 1 of 1 missing"),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_transformers_teacher(f"hf:{folder}", annotations, torch.device("cpu"))
        assert str(caught.value).isprintable()

    for number, (change, message) in enumerate(cases):
        folder = Path(shutil.copytree(whole, tmp_path / f"config_{number}"))
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(folder, message)
    for number, (settings, message) in enumerate(preprocessors):
        folder = Path(shutil.copytree(whole, tmp_path / f"pixels_{number}"))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        refused(folder, message)
    for name, (content, message) in contents.items():
        (tmp_path / f"with_{name}").mkdir()
        shutil.copy(whole / "config.json", tmp_path / f"with_{name}")
        (tmp_path / f"with_{name}" / name).write_bytes(content)
        refused(tmp_path / f"with_{name}", message)
    (whole / "config.json").write_text('{"a":' + "[" * 100_000)
    refused(whole, "expected json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


def test_the_fingerprint_follows_weights_and_preprocessing(annotations: Annotations, tmp_path: Path) -> None:
    """Equal for equal files; another for another seed of the weights, and for another normalisation."""

    def fingerprint(folder: Path) -> str:
        return load_transformers_teacher(f"hf:{folder}", annotations, torch.device("cpu")).info.weights_sha256

    first, same = (save(build("rt_detr", CLASSES), tmp_path / name, "rt_detr") for name in ("a", "b"))
    other = save(build("rt_detr", CLASSES, seed=1), tmp_path / "c", "rt_detr")
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    before = fingerprint(first)
    settings = json.loads((first / "preprocessor_config.json").read_text())
    (first / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": True}))
    assert fingerprint(first) != before


def test_a_model_of_the_hubs_cache(annotations: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the hub's client caches downloads: found by OWNER/MODEL, and equal to the same model in a folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small-detr"
    snapshot = save(build("detr", CLASSES), repository / "snapshots" / commit, "detr")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    cached, direct = (
        load_transformers_teacher(f"hf:{name}", annotations, torch.device("cpu")).info
        for name in ("someone/small-detr", snapshot)
    )
    assert cached.name == "small-detr"
    assert replace(cached, name=commit) == direct


def test_missing_heads_are_told_from_missing_weights(tmp_path: Path) -> None:
    """`load_model` names what a checkpoint lacks: heads of the first layers may be, a layer's weights not."""
    from safetensors.torch import load_file, save_file

    folder = save(build("d_fine", CLASSES), tmp_path / "teacher", "d_fine")
    weights = load_file(folder / "model.safetensors")

    def without(part: str) -> None:
        kept = {name: value for name, value in weights.items() if part not in name}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    without("class_embed.0.")
    _, missing = load_model(folder)
    assert any("class_embed.0." in name for name in missing)
    without("decoder.layers.1.")
    with pytest.raises(UserError, match=r"decoder\.layers\.1\."):
        load_model(folder)
