"""The project's main claim: a student trained from the cache is the one trained beside the teacher itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.cache.reader import CacheReader
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.geometry import level_shapes, token_positions_in_batch
from common.images import batch_to, collate
from common.records import Batch, CachedBatch
from common.runtime import Ranks
from common.synthetic import draw_data_set
from kernels import decode_tokens
from student_train import loop
from student_train.config import (
    DataOptions,
    DistillationOptions,
    Mode,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from student_train.feed import CachedViews, replay
from student_train.live import live_targets
from student_train.model import StudentInTraining
from student_train.prepare import Data, prepare_data, prepare_live, prepare_student
from student_train.teachers import Lesson
from teacher_dump.config import DataOptions as DumpDataOptions
from teacher_dump.config import DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import run_dump
from tests.fgd_oracle import fgd_directly, maps_of
from tests.training_cases import losses_of

STEPS = 20
SIDES = (64, 80, 96)  # so that samples of a batch are padded

# The stated bounds (docs/losses.md) of a store with the default codec, fp16, which moves each value by up to 2^-11.
LOSS_BOUND = 2.0**-9  # relative, of every loss of one student
GRADIENT_BOUND = 2.0**-9  # of the norm of the gradient
PATH_BOUND = 0.005  # relative, of the sum of the losses in each of 20 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/: images of which one has no box. teacher.safetensors. full.zarr: lossless, each sample alone.
    default.zarr: without options, the teacher's batches of 4. half.zarr: fp16, with the neck. int8.zarr, pq4.zarr."""
    folder = tmp_path_factory.mktemp("live")
    draw_data_set(folder / "scenes", train_images=10, val_images=2)
    annotations = folder / "scenes" / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    empty = content["images"][3]["id"]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] != empty]
    annotations.write_text(json.dumps(content))
    torch.manual_seed(0)
    save_detector(folder / "teacher.safetensors", DeformableDetr(PRESETS["tiny"](7, queries=20)))
    data = DumpDataOptions(folder / "scenes", views=2, sizes=SIDES, workers=1)
    teacher = TeacherOptions(str(folder / "teacher.safetensors"), device="cpu")
    alone = replace(teacher, batch_size=1)
    run_dump(DumpConfig(data, alone, StoreOptions(folder / "full.zarr", preset="full")))
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "half.zarr", preset="half", neck=True)))
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "default.zarr")))
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "int8.zarr", tokens="int8", neck=True)))
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "pq4.zarr", tokens="pq4", neck=True)))
    return folder


def configuration(folder: Path, out: Path, distillation: DistillationOptions, store: str = "full.zarr") -> TrainConfig:
    """A student that differs from the teacher (width 64, 20 queries, 3 layers) in all of these."""
    return TrainConfig(
        data=DataOptions(cache=folder / store, data=folder / "scenes", workers=1, prefetch=2),
        model=ModelOptions("tiny", width=32, queries=30, decoder_layers=2),
        distillation=distillation,
        optimisation=OptimisationOptions(epochs=STEPS, max_steps=STEPS, batch_size=4, lr=1e-3),
        output=OutputOptions(out=out, name="run", eval_every=0, device="cpu"),
    )


def run(config: TrainConfig) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of each step, and the weights at the end."""
    loop.train(config)
    folder = config.output.out / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if "losses" in line], load_file(folder / "last.safetensors")


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_cache_and_live_teacher_train_the_same_student(folder: Path, tmp_path: Path, mode: Mode) -> None:
    """20 steps from a lossless cache against 20 steps with the teacher beside the student, FGD on top of the mode's own
    losses: every loss of every step, and every weight at the end, equal bit for bit."""
    options = DistillationOptions(mode, fgd_weight=1.0)
    cached_losses, cached_weights = run(configuration(folder, tmp_path / "cached", options))
    live = replace(options, live_teacher=folder / "teacher.safetensors")
    live_losses, live_weights = run(configuration(folder, tmp_path / "live", live))
    assert len(cached_losses) == STEPS
    kinds = {"features", "logits", "assignment", "fgd", "detection"}
    assert {name.split("/")[0] for name in cached_losses[0]} - {"contrastive"} == kinds
    assert ("contrastive" in cached_losses[0]) == (mode == "released")
    assert live_losses == cached_losses
    assert cached_losses[0] != cached_losses[-1]
    assert live_weights.keys() == cached_weights.keys()
    assert all(torch.equal(live_weights[name], weight) for name, weight in cached_weights.items())


@pytest.mark.parametrize("store", ["default.zarr", "half.zarr"])
def test_what_the_codec_changes_leaves_a_student_on_its_path(folder: Path, tmp_path: Path, store: str) -> None:
    """20 steps of `paper` from the default store and from an fp16 one, both of the teacher's batches of 4, against 20
    live: the sum of the losses of every step within PATH_BOUND; what changes in one, the following ones build upon."""
    options = DistillationOptions()
    cached, _ = run(configuration(folder, tmp_path / "cached", options, store))
    live_options = replace(options, live_teacher=folder / "teacher.safetensors")
    live, _ = run(configuration(folder, tmp_path / "live", live_options, store))
    for one, other in zip(cached, live, strict=True):
        assert sum(one.values()) == pytest.approx(sum(other.values()), rel=PATH_BOUND)


def first_batch(data: Data, images: int = 4) -> tuple[Batch, list[int]]:
    """Samples of view 0, among them the image without boxes, and their rows."""
    assert data.reader is not None
    source = CachedViews(data.train, data.reader)
    samples = [source.sample(0, index) for index in range(len(source))]
    samples.sort(key=lambda sample: len(sample.entry.labels))
    replayed = [replay(sample, data.train) for sample in samples[:images]]
    batch = batch_to(collate([(one.image, one.targets) for one in replayed]), torch.device("cpu"))
    return batch, [sample.row for sample in samples[:images]]


def gradient(
    student: StudentInTraining, batch: Batch, cached: CachedBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and the gradient of their sum by parameter."""
    student.zero_grad()
    output = student(batch.images, batch.padding_mask)
    losses = losses_of(output, batch.targets, [Lesson(cached)], student.options)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, found


def prepared(folder: Path, store: str, mode: Mode) -> tuple[StudentInTraining, Data]:
    config = configuration(folder, folder, DistillationOptions(mode, fgd_weight=1.0), store)
    data = prepare_data(config.data)
    torch.manual_seed(1)
    return prepare_student(config, data).eval(), data


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_live_targets_are_the_lossless_record(folder: Path, mode: Mode) -> None:
    """Each field of the batch that a live teacher gives against the one read from the lossless store: equal bits."""
    _, data = prepared(folder, "full.zarr", mode)
    assert data.reader is not None
    batch, rows = first_batch(data)
    stored = data.reader.read(rows)
    teacher = prepare_live(folder / "teacher.safetensors", data)
    live = live_targets(teacher.look(batch.images, batch.padding_mask), batch.targets, with_neck=True)
    for name, value in vars(stored).items():
        found = getattr(live, name)
        if value is None:
            assert found is None, name
        else:
            assert torch.equal(found, value.to(found.dtype)), name


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_the_default_codec_keeps_to_its_bound(folder: Path, mode: Mode) -> None:
    """One student's losses and gradient from the store with the default codec against the live teacher: every loss
    within LOSS_BOUND relative, the gradient within GRADIENT_BOUND of its norm."""
    student, data = prepared(folder, "half.zarr", mode)
    assert data.reader is not None
    batch, rows = first_batch(data)
    teacher = prepare_live(folder / "teacher.safetensors", data)
    live = live_targets(teacher.look(batch.images, batch.padding_mask), batch.targets, with_neck=True)
    losses, found = gradient(student, batch, data.reader.read(rows))
    expected_losses, expected = gradient(student, batch, live)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=LOSS_BOUND, atol=1e-7, msg=lambda m, n=name: n + m)
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    error = torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm()
    assert 0 < error < GRADIENT_BOUND * norm


def test_a_live_teacher_needs_no_store(folder: Path, tmp_path: Path) -> None:
    """Two steps on views drawn afresh: all losses of `paper`, finite and above zero."""
    config = configuration(folder, tmp_path, DistillationOptions(live_teacher=folder / "teacher.safetensors"))
    config = replace(
        config,
        data=replace(config.data, cache=None, sizes=SIDES),
        optimisation=replace(config.optimisation, max_steps=2),
    )
    losses, _ = run(config)
    assert {name.split("/")[0] for name in losses[0]} == {"detection", "features", "logits", "assignment"}
    assert all(0 < value < float("inf") for step in losses for value in step.values())


def test_only_the_fields_that_the_losses_need_are_read(folder: Path) -> None:
    """What each loss alone reads of the full store: the fields that its equation names, and nothing of the others; and
    its value is that of reading everything, to the bit."""
    fields: dict[str, tuple[DistillationOptions, set[str]]] = {
        "logits": (only(logits_weight=1.0), {"logits", "boxes_cxcywh"}),
        "features": (only(feature_weight=1.0), {"tokens", "token_weights"}),
        "assignment": (only(assignment_weight=1.0), set()),
        "contrastive": (only(contrastive_weight=1.0), {"logits", "boxes_cxcywh", "queries"}),
        "fgd": (only(fgd_weight=1.0), {"neck"}),
        "released features": (replace(only(feature_weight=1.0), mode="released"), {"neck", "neck_weights"}),
    }
    for name, (options, expected) in fields.items():
        config = configuration(folder, folder, options)
        data = prepare_data(config.data)
        assert data.reader is not None
        batch, rows = first_batch(data)
        torch.manual_seed(0)
        student = prepare_student(config, data).eval()
        everything, _ = gradient(student, batch, data.reader.read(rows))
        feed = loop.prepare_feed(config, data, Ranks(), torch.device("cpu"))
        feed.close()
        assert {field.name for field in data.reader.fields} == expected | {"assignment"}, name
        chosen = data.reader.read(rows)
        assert len(chosen.queries) == (4 if "queries" in expected else 0)
        found, _ = gradient(student, batch, chosen)
        assert found == everything, name
        assert any(loss.startswith(name.split()[-1]) and value > 0 for loss, value in found.items()), name
        data.reader.close()


def only(**weights: float) -> DistillationOptions:
    return replace(DistillationOptions().without_losses(), **weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(("store", "bound"), [("half.zarr", 0.001), ("int8.zarr", 0.02), ("pq4.zarr", 0.2)])
def test_necks_decode(folder: Path, store: str, bound: float) -> None:
    """The neck as the reader gives it, decoded, against the lossless store's, teacher batches included: the relative
    error below the bound; so the neck has statistics, scales and codebooks of its own."""
    full, other = CacheReader(folder / "full.zarr"), CacheReader(folder / store)
    by_key = {(int(i), int(v)): r for r, (i, v) in enumerate(zip(other.table.image_id, other.table.view, strict=True))}
    for row in range(0, len(full), 5):
        same = by_key[int(full.table.image_id[row]), int(full.table.view[row])]
        batch, expected = other.read([same]), full.read([row]).neck
        assert batch.neck is not None
        assert expected is not None
        constants = (batch.neck_scales, batch.neck_channel_scale, batch.neck_channel_shift)
        neck = decode_tokens(batch.neck, *constants, torch.float32, batch.neck_codebooks)
        if batch.neck_rotation is not None:
            neck = neck @ batch.neck_rotation.T
        assert (neck - expected).norm() < bound * expected.norm()
    full.close()
    other.close()


def mistakes(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """What the message says, and the call."""
    other = folder / "other.safetensors"
    torch.manual_seed(5)
    save_detector(other, DeformableDetr(PRESETS["tiny"](7, queries=20)))
    scenes = DumpDataOptions(folder / "scenes", sizes=SIDES)
    teacher = TeacherOptions(str(folder / "teacher.safetensors"), device="cpu")

    def start(store: str, options: DistillationOptions) -> object:
        config = configuration(folder, folder, options, store)
        return prepare_student(config, prepare_data(config.data))

    no_queries = StoreOptions(folder / "no_queries.zarr", neck=True, queries=False)
    run_dump(DumpConfig(scenes, teacher, no_queries))
    some_tokens = StoreOptions(folder / "x.zarr", keep_tokens=0.5, neck=True)
    run_dump(DumpConfig(scenes, teacher, StoreOptions(folder / "plain.zarr")))
    return [
        ("is not the teacher teacher.safetensors", lambda: start("full.zarr", DistillationOptions(live_teacher=other))),
        ("--preset full, or use --feature-weight 0", lambda: start("plain.zarr", DistillationOptions("released"))),
        ("--preset full, or use --fgd-weight 0", lambda: start("plain.zarr", DistillationOptions(fgd_weight=1.0))),
        ("or use --contrastive-weight 0", lambda: start("no_queries.zarr", DistillationOptions("released"))),
        ("expected all tokens with the neck", lambda: run_dump(DumpConfig(scenes, teacher, some_tokens))),
    ]


def test_mistakes_are_one_line(folder: Path) -> None:
    """Another teacher than the store's, losses of the neck on a store without it, a neck of some tokens: UserError."""
    for message, call in mistakes(folder):
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_explicit_weights_win_over_the_mode() -> None:
    """`released` brings its weights; those given on the command line stay, 0 among them."""
    assert vars(DistillationOptions().weights) == {
        "logits": 1, "features": 20, "assignment": 1, "contrastive": 0, "fgd": 0
    }  # fmt: skip
    assert vars(DistillationOptions("released").weights) == {
        "logits": 1, "features": 1, "assignment": 1, "contrastive": 0.2, "fgd": 0
    }  # fmt: skip
    given = DistillationOptions("released", feature_weight=3.0, contrastive_weight=0.0).weights
    assert (given.features, given.contrastive, given.logits) == (3, 0, 1)


def test_fgd_from_codes_is_that_of_their_features(folder: Path) -> None:
    """FGD of a student from a store of codes against that from the same features decoded beforehand: 1e-5 relative."""
    config = configuration(folder, folder, only(fgd_weight=1.0), "pq4.zarr")
    data = prepare_data(config.data)
    assert data.reader is not None
    batch, rows = first_batch(data)
    student = prepare_student(config, data).eval()
    cached = data.reader.read(rows)
    assert cached.neck is not None
    assert cached.neck_rotation is not None
    decoded = decode_tokens(cached.neck, None, None, None, torch.float32, cached.neck_codebooks)
    plain = replace(cached, neck=decoded @ cached.neck_rotation.T, neck_codebooks=None, neck_rotation=None)
    (found, _), (expected, _) = (gradient(student, batch, records) for records in (cached, plain))
    assert {name: float(loss) for name, loss in found.items()} == pytest.approx(
        {name: float(loss) for name, loss in expected.items()}, rel=1e-5
    )
    assert any(name.startswith("fgd") and value > 0 for name, value in found.items())


def test_fgd_from_the_cache_equals_a_direct_computation(folder: Path) -> None:
    """FGD of a student from the records of the full store against the article's equations on dense maps of the teacher
    and the student run here, an image without boxes among them, in float64: every term within 1e-4 relative."""
    config = configuration(folder, folder, only(fgd_weight=1.0))
    data = prepare_data(config.data)
    assert data.reader is not None
    batch, rows = first_batch(data)
    student = prepare_student(config, data).eval()
    (bridge,) = student.bridges
    assert bridge.fgd_blocks is not None
    assert bridge.neck_projection is not None
    found, _ = gradient(student, batch, data.reader.read(rows))

    teacher = load_detector(folder / "teacher.safetensors")[0].eval()
    teacher_maps, student_maps = [], []
    with torch.no_grad():
        own = bridge.neck_projection(student.detector(batch.images, batch.padding_mask).neck)
        for index, mask in enumerate(batch.padding_mask):
            height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
            grid = level_shapes(height, width, teacher.strides)
            image = [(batch.images[index, :, :height, :width], batch.targets[index])]
            alone = collate(image)
            output = teacher(alone.images, alone.padding_mask)
            teacher_maps.append(maps_of(output.neck[0, token_positions_in_batch(grid, output.level_shapes)], grid))
            batch_shapes = level_shapes(*batch.images.shape[-2:], teacher.strides)
            student_maps.append(maps_of(own[index, token_positions_in_batch(grid, batch_shapes)], grid))
        expected = fgd_directly(teacher_maps, student_maps, batch.targets, bridge.fgd_blocks)
    for name, term in expected.items():
        torch.testing.assert_close(found[f"fgd/{name}"].double(), term, rtol=1e-4, atol=0, msg=name)
    data.reader.close()
