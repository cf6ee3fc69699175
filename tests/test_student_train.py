"""Phase two end to end on drawn scenes: training from a store, the baseline, resuming, evaluation, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.augment import apply_boxes, apply_image, draw, flip_policy
from common.cache.reader import CacheReader
from common.coco import load_annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.images import load_image, normalise
from common.runtime import Ranks
from common.synthetic import draw_data_set
from student_train import loop, students
from student_train.config import (
    DataOptions,
    DistillationOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)
from student_train.feed import CachedViews, Feed, FreshViews, epoch_order, rank_share, steps_per_epoch
from student_train.prepare import prepare_data
from teacher_dump.config import DataOptions as DumpDataOptions
from teacher_dump.config import DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import run_dump

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES, SIDE = 10, 64
PLAIN = DistillationOptions(logits_weight=0, feature_weight=0, assignment_weight=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/: ten training and four validation images. store.zarr: two views by a teacher whose file is gone."""
    folder = tmp_path_factory.mktemp("phase_two")
    draw_data_set(folder / "scenes", train_images=IMAGES, val_images=4)
    torch.manual_seed(0)
    save_detector(folder / "teacher.safetensors", DeformableDetr(PRESETS["tiny"](7, queries=20)))
    data = DumpDataOptions(folder / "scenes", views=2, sizes=(SIDE,), workers=1)
    teacher = TeacherOptions(str(folder / "teacher.safetensors"), device="cpu")
    run_dump(DumpConfig(data, teacher, StoreOptions(folder / "store.zarr")))
    (folder / "teacher.safetensors").unlink()
    return folder


def configuration(folder: Path, out: Path, cached: bool = True) -> TrainConfig:
    """The tiny student for two epochs of three steps, the last of two images."""
    return TrainConfig(
        DataOptions(folder / "store.zarr", folder / "scenes", workers=2, prefetch=2)
        if cached
        else DataOptions(None, folder / "scenes", sizes=(SIDE,), workers=2, prefetch=2),
        ModelOptions("tiny"),
        DistillationOptions(),
        OptimisationOptions(epochs=2, batch_size=4, lr=1e-3),
        OutputOptions(out, "run", eval_every=0, device="cpu"),
    )


def steps_of(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "losses" in line]


def test_the_command_trains_from_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    """The command line in a process of its own, the teacher's file deleted: it ends with an AP line and leaves a whole
    run, whose losses are all there; `teacher_dump` is never imported."""
    code = (
        "import sys; from student_train.__main__ import main; main();"
        "assert not [name for name in sys.modules if name.startswith('teacher_dump')], 'phase one was imported'"
    )
    arguments = [
        "--cache", folder / "store.zarr", "--data", folder / "scenes", "--student", "tiny", "--epochs", "1",
        "--batch-size", "4", "--out", tmp_path, "--name", "run", "--workers", "1", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("AP ")
    run = tmp_path / "run"
    names = {"best.safetensors", "last.safetensors", "last.pt", "metrics.jsonl", "run.json"}
    assert {path.name for path in run.iterdir()} == names
    detection = {f"detection/{name}" for name in ("class", "l1", "giou")}
    assignment = {f"assignment/{name}" for name in ("class", "l1", "giou")}
    logits = {f"logits/{name}" for name in ("class", "box", "place")}
    for line in steps_of(run):
        assert line["losses"].keys() == detection | assignment | logits | {"features"}  # type: ignore[attr-defined]
        assert {"step_s", "waiting_for_cache_s", "waiting_for_images_s", "samples_per_s"} <= line.keys()
    record = json.loads((run / "run.json").read_text())
    assert record["store"]["teacher"]["name"] == "teacher.safetensors"
    assert torch.__version__.startswith(record["versions"]["torch"])


@pytest.mark.parametrize(
    ("student", "mode"),
    [
        (ModelOptions("tiny", width=32, queries=30, decoder_layers=2), "paper"),
        (ModelOptions("tiny", queries=10, refine=False), "released"),
    ],
)
def test_students_of_other_sizes_learn_and_are_saved_alone(
    folder: Path, tmp_path: Path, student: ModelOptions, mode: str
) -> None:
    """Other widths, query and layer counts than the teacher's (64, 20, 3): every loss is finite and above zero, and the
    file saved has exactly the detector's tensors: no projection, nothing of the teacher."""
    config = configuration(folder, tmp_path)
    config = replace(
        config,
        model=student,
        distillation=DistillationOptions(mode),  # type: ignore[arg-type]
        optimisation=replace(config.optimisation, max_steps=2),
    )
    loop.train(config)
    for line in steps_of(tmp_path / "run"):
        assert all(0 < value < float("inf") for value in line["losses"].values())  # type: ignore[attr-defined]
    detector, report = load_detector(tmp_path / "run" / "last.safetensors")
    assert not report.unused
    assert load_file(tmp_path / "run" / "last.safetensors").keys() == detector.state_dict().keys()


def test_two_stage_students_train(folder: Path, tmp_path: Path) -> None:
    """The two-stage variant with its proposals' losses; assignment distillation is refused in one line."""
    config = replace(configuration(folder, tmp_path), model=ModelOptions("tiny", queries=20, two_stage=True))
    with pytest.raises(UserError, match="use --assignment-weight 0"):
        loop.train(config)
    config = replace(
        config,
        distillation=DistillationOptions(assignment_weight=0),
        optimisation=replace(config.optimisation, max_steps=1),
    )
    loop.train(config)
    (line,) = steps_of(tmp_path / "run")
    assert {"proposals/class", "proposals/l1", "proposals/giou"} < line["losses"].keys()  # type: ignore[attr-defined]


def test_with_all_weights_zero_the_cache_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain baseline on a store trains while reading any record fails, and sees the same pixels as distillation."""
    config = configuration(folder, tmp_path)
    data = prepare_data(config.data)
    distilled, plain = (
        loop.prepare_feed(replace(config, distillation=chosen), data, Ranks(), torch.device("cpu"))
        for chosen in (DistillationOptions(), PLAIN)
    )
    for one, other in zip(distilled.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(one.batch.images, other.batch.images)
        assert one.cached is not None
        assert other.cached is None
    distilled.close()
    plain.close()

    def fail(*_: object) -> None:
        raise AssertionError("a record was read")

    monkeypatch.setattr(CacheReader, "read", fail)
    loop.train(replace(config, distillation=PLAIN, optimisation=replace(config.optimisation, max_steps=1)))
    (line,) = steps_of(tmp_path / "run")
    assert {name.split("/")[0] for name in line["losses"]} == {"detection"}  # type: ignore[attr-defined]


def test_plain_training_learns_two_images_by_heart(folder: Path, tmp_path: Path) -> None:
    """60 steps on two scenes: the detection loss falls to less than half of where it started."""
    config = configuration(folder, tmp_path, cached=False)
    data = prepare_data(config.data)
    two = replace(data.train, entries=data.train.entries[:2])
    config = replace(
        config, distillation=PLAIN, optimisation=OptimisationOptions(epochs=60, batch_size=2, lr=2e-3, clip=1)
    )
    torch.manual_seed(0)
    training = loop.start(config, replace(data, train=two), torch.device("cpu"), Ranks())
    feed = loop.prepare_feed(config, replace(data, train=two), Ranks(), torch.device("cpu"))
    (batch,) = feed.epoch(0)
    totals = [sum(loop.train_step(training, batch, config.optimisation)[0].values()) for _ in range(60)]
    feed.close()
    assert sum(totals[-5:]) / 5 < 0.5 * totals[0]


def test_a_resumed_run_ends_as_one_never_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps against six interrupted in the second epoch and continued: weights equal bit for bit, losses too.

    Dropout is on, so that the generator's state counts.
    """
    monkeypatch.setitem(students.STUDENTS, "tiny", _tiny_with_dropout)
    whole = configuration(folder, tmp_path / "whole")
    loop.train(whole)

    halved = configuration(folder, tmp_path / "halved")
    step = loop.train_step

    def interrupt_at_five(training: loop.Training, *rest: object) -> object:
        if training.step == 4:
            raise KeyboardInterrupt
        return step(training, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", interrupt_at_five)
    with pytest.raises(KeyboardInterrupt):
        loop.train(halved)
    monkeypatch.setattr(loop, "train_step", step)
    torch.manual_seed(12345)  # what the generator did meanwhile must not matter
    loop.train(replace(halved, output=replace(halved.output, resume=True)))

    one, other = (load_file(tmp_path / name / "run" / "last.safetensors") for name in ("whole", "halved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    expected = {line["step"]: line["losses"] for line in steps_of(tmp_path / "whole" / "run")}
    found = {line["step"]: line["losses"] for line in steps_of(tmp_path / "halved" / "run")}
    assert found == expected

    changed = replace(halved, optimisation=replace(halved.optimisation, lr=5e-4))
    with pytest.raises(UserError, match=r"another optimisation\.lr"):
        loop.train(replace(changed, output=replace(halved.output, resume=True)))


def _tiny_with_dropout(classes: int, **overrides: object) -> object:
    return PRESETS["tiny"](classes, **(overrides | {"dropout": 0.1, "tiny_blocks": 1}))


def test_evaluate_gives_the_ap_that_training_reported(folder: Path, tmp_path: Path) -> None:
    """`evaluate` on the last weights in a process of its own against the last evaluation in metrics.jsonl: equal to the
    digits printed; the detections written are of the split's images and categories."""
    config = configuration(folder, tmp_path)
    metrics = loop.train(replace(config, optimisation=replace(config.optimisation, epochs=1)))
    arguments = [
        "evaluate", "--checkpoint", tmp_path / "run" / "last.safetensors", "--data", folder / "scenes", "--sizes", SIDE,
        "--batch-size", "4", "--workers", "1", "--device", "cpu", "--detections", tmp_path / "found.json",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "student_train", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(metrics)
    found = json.loads((tmp_path / "found.json").read_text())
    val = load_annotations(folder / "scenes", "val2017")
    assert {detection["category_id"] for detection in found} <= set(val.category_ids)
    assert {detection["image_id"] for detection in found} == {entry.image_id for entry in val.entries}


def test_a_checkpoint_holds_no_code(folder: Path, tmp_path: Path) -> None:
    """torch.load(weights_only=True) reads last.pt: tensors, numbers and strings only. A student can start from the
    other file by --init and take over all of it."""
    config = configuration(folder, tmp_path)
    config = replace(config, optimisation=replace(config.optimisation, max_steps=1))
    loop.train(config)
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert content["step"] == 1
    trained = load_file(tmp_path / "run" / "last.safetensors")
    model = replace(config.model, init=tmp_path / "run" / "last.safetensors")
    inherited = loop.start(replace(config, model=model), prepare_data(config.data), torch.device("cpu"), Ranks())
    state = inherited.student.detector.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())


def test_divergence_names_loss_step_and_images(folder: Path, tmp_path: Path) -> None:
    """A NaN weight: the error names the losses, the step and the images, and no optimiser step is made."""
    config = configuration(folder, tmp_path)
    data = prepare_data(config.data)
    training = loop.start(config, data, torch.device("cpu"), Ranks())
    with torch.no_grad():
        training.student.detector.decoder.class_heads[0].weight[0, 0] = float("nan")
    before = [parameter.clone() for parameter in training.student.parameters()]
    feed = loop.prepare_feed(config, data, Ranks(), torch.device("cpu"))
    batch = next(iter(feed.epoch(0)))
    with pytest.raises(loop.Diverged, match=r"detection/class is nan at step 0 \(images \d+, \d+, \d+, \d+\)"):
        loop.train_step(training, batch, config.optimisation)
    feed.close()
    for parameter, old in zip(training.student.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), old.nan_to_num())


@pytest.fixture
def views(folder: Path) -> FreshViews:
    return FreshViews(load_annotations(folder / "scenes", "train2017"), flip_policy(SIDE), seed=3)


def make_feed(source: FreshViews, **options: object) -> Feed:
    arguments: dict[str, object] = {
        "batch_size": 4, "seed": 3, "ranks": Ranks(), "workers": 3, "prefetch": 2, **options
    }  # fmt: skip
    return Feed(source, source.annotations, None, **arguments)  # type: ignore[arg-type]


def test_the_feed_replays_in_order_from_any_step(views: FreshViews) -> None:
    """Its images against decoding and augmenting them one by one here: equal bit for bit, in the order of epoch_order;
    an epoch begun at step 1 is the same epoch without its first batch."""
    feed = make_feed(views)
    batches = list(feed.epoch(5))
    order = epoch_order(IMAGES, 3, 5)
    assert sorted(order) == list(range(IMAGES))
    assert order != epoch_order(IMAGES, 3, 6)
    assert [image_id for batch in batches for image_id in batch.image_ids] == [
        views.annotations.entries[index].image_id for index in order
    ]
    for batch in batches:
        for row, image_id in enumerate(batch.image_ids):
            entry = next(entry for entry in views.annotations.entries if entry.image_id == image_id)
            augmentation = draw(3, image_id, 5, entry.width, entry.height, flip_policy(SIDE))
            image = normalise(apply_image(load_image(views.annotations.image_path(entry)), augmentation))
            assert torch.equal(batch.batch.images[row, :, :SIDE, :SIDE], image)
            assert torch.equal(batch.batch.targets[row].boxes_cxcywh, apply_boxes(entry, augmentation).boxes_cxcywh)
    later = list(feed.epoch(5, first_step=1))
    assert [(batch.step, batch.image_ids) for batch in later] == [(b.step, b.image_ids) for b in batches[1:]]
    feed.close()


def test_epochs_of_a_store_see_its_views_in_turn(folder: Path) -> None:
    """Epoch e takes view e mod 2, each of its rows once; the augmentation is the store's."""
    reader = CacheReader(folder / "store.zarr")
    source = CachedViews(load_annotations(folder / "scenes", "train2017"), reader)
    for epoch in range(3):
        samples = [source.sample(epoch, index) for index in range(len(source))]
        assert sorted(sample.row for sample in samples) == reader.rows(epoch % 2).tolist()
        for sample in samples:
            assert int(reader.table.image_id[sample.row]) == sample.entry.image_id
            assert tuple(reader.table.augmentation[sample.row]) == tuple(vars(sample.augmentation).values())
    reader.close()


def test_ranks_share_every_step(views: FreshViews) -> None:
    """Three ranks' shares of each step are disjoint and together the step of one; no rank is ever without a sample."""
    order = epoch_order(IMAGES, 0, 0)
    for batch_size in (3, 4, 7):
        ranks = [Ranks(rank, rank, 3) for rank in range(3)]
        for step in range(steps_per_epoch(IMAGES, batch_size, ranks[0])):
            shares = [rank_share(order, step, batch_size, rank) for rank in ranks]
            assert all(shares)
            assert sorted(index for share in shares for index in share) == sorted(
                rank_share(order, step, batch_size, Ranks())
            )


ONE_STEP = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from common.runtime import read_ranks, start_processes
from student_train import loop
from student_train.prepare import prepare_data
from tests.test_student_train import configuration

folder, out = map(Path, sys.argv[1:])
config, ranks, device = configuration(folder, out), read_ranks(), torch.device("cpu")
start_processes(ranks, device)
torch.manual_seed(0)
data = prepare_data(config.data)
training = loop.start(config, data, device, ranks)
training.model.eval()  # batch norm by its running statistics: those of a batch differ with its size
feed = loop.prepare_feed(config, data, ranks, device)
loop.train_step(training, next(iter(feed.epoch(0))), replace(config.optimisation, clip=0))
feed.close()
if ranks.is_first:
    torch.save({name: p.grad for name, p in training.student.named_parameters() if p.grad is not None}, out)
if ranks.world_size > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_one(folder: Path, tmp_path: Path) -> None:
    """The gradient of a step on four samples, all losses on, by one process and by two with two samples each, whose
    numbers of boxes differ: every parameter's differs by less than 1e-4 of the whole gradient's norm."""
    (tmp_path / "step.py").write_text(ONE_STEP)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    gradients = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
        command = [sys.executable, *launcher, str(tmp_path / "step.py"), str(folder), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        gradients.append(torch.load(out, weights_only=True))
    one, two = gradients
    assert one.keys() == two.keys()
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    for name in one:
        assert (one[name] - two[name]).norm() < 1e-4 * norm, name


def test_broken_images(folder: Path, tmp_path: Path) -> None:
    """A truncated JPEG stops the feed with its name; with skip_broken the batch comes without it, and it is listed."""
    annotations = load_annotations(folder / "scenes", "train2017")
    images = tmp_path / "images"
    images.mkdir()
    for entry in annotations.entries:
        data = annotations.image_path(entry).read_bytes()
        broken = entry is annotations.entries[2]
        (images / entry.file_name).write_bytes(data[: len(data) // 3] if broken else data)
    views = FreshViews(replace(annotations, image_folder=images), flip_policy(SIDE), seed=3)
    name = annotations.entries[2].file_name
    feed = make_feed(views)
    with pytest.raises(UserError, match=f"{name}.*--skip-broken"):
        list(feed.epoch(0))
    feed.close()
    feed = make_feed(views, skip_broken=True)
    seen = [image_id for batch in feed.epoch(0) for image_id in batch.image_ids]
    feed.close()
    assert sorted(seen) == [entry.image_id for entry in annotations.entries if entry.file_name != name]
    assert feed.broken == {name}


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    """A store of other annotations or none, --sizes beside a store, no run to resume, a run in the way: UserError, one
    line that says what to do, and no folder made."""
    config = configuration(folder, tmp_path)
    draw_data_set(tmp_path / "other", train_images=2, val_images=1, seed=9)
    with pytest.raises(UserError, match="other annotations"):
        loop.train(replace(config, data=replace(config.data, data=tmp_path / "other")))
    with pytest.raises(UserError, match="expected a store"):
        loop.train(replace(config, data=replace(config.data, cache=tmp_path / "nothing.zarr")))
    with pytest.raises(UserError, match="--sizes was given together with --cache"):
        loop.train(replace(config, data=replace(config.data, sizes=(64,))))
    with pytest.raises(UserError, match="found none: leave --resume out"):
        loop.train(replace(config, output=replace(config.output, resume=True)))
    assert not (tmp_path / "run").exists()
    loop.train(replace(config, optimisation=replace(config.optimisation, max_steps=1)))
    with pytest.raises(UserError, match="choose another --name"):
        loop.train(config)


def test_schedules() -> None:
    """The step schedule drops to a tenth at --lr-drop, the cosine ends near 0, and both rise over the warm-up."""
    options = OptimisationOptions(lr_drop=2, warmup_steps=3)
    factors = [loop.learning_rate_factor(step, 10, 30, options) for step in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:20]) == {1.0}
    assert set(factors[20:]) == {0.1}
    cosine = [loop.learning_rate_factor(step, 10, 30, replace(options, schedule="cosine")) for step in range(30)]
    assert cosine[15] == pytest.approx(0.5)
    assert 0 < cosine[29] < 0.01
