"""Phase two end to end on drawn scenes: training from a store, the baseline, evaluation, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cache.reader import CacheReader
from common.coco import load_annotations
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.errors import UserError
from common.runtime import Ranks, start_logging
from common.synthetic import draw_data_set
from student_train import loop
from student_train.config import DistillationOptions, ModelOptions, OptimisationOptions
from student_train.prepare import prepare_data, prepare_feed, prepare_student
from student_train.step import agree, train_step
from tests.training_cases import (
    PLAIN,
    REPOSITORY,
    SIDE,
    configuration,
    make_store,
    run_command_line,
    start_process,
    steps_of,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("phase_two"))


def run(arguments: list[object], output: Path) -> str:
    """What `python -m student_train` prints in a process of its own."""
    process = start_process(run_command_line, [str(argument) for argument in arguments], output)
    process.join()
    printed = output.read_text()
    assert process.exitcode == 0, printed
    return printed


ALONE = """
import sys
from student_train.__main__ import main
main()
assert not [name for name in sys.modules if name.startswith("teacher_dump")]
"""


def test_the_command_trains_from_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    """The command line in a new interpreter, the teacher's file deleted: it ends with an AP line and leaves a whole
    run, whose losses are all there, and says where the time went; `teacher_dump` is never imported."""
    arguments: list[object] = [
        "--cache", folder / "store.zarr", "--data", folder / "scenes", "--student", "tiny", "--epochs", "1",
        "--batch-size", "4", "--out", tmp_path, "--name", "run", "--workers", "1", "--device", "cpu",
        "--log-every", "2",
    ]  # fmt: skip
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    ended = subprocess.run(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = ended.stdout
    assert ended.returncode == 0, printed
    assert printed.splitlines()[-1].startswith("AP ")
    assert "3 steps in " in printed
    assert "first steps " in printed
    assert "the bottleneck is" not in printed  # three steps say nothing
    assert "step 2/3  loss" in printed
    names = {"best.safetensors", "last.safetensors", "checkpoints", "metrics.jsonl", "run.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} >= names
    detection = {f"detection/{name}" for name in ("class", "l1", "giou")}
    assignment = {f"assignment/{name}" for name in ("class", "l1", "giou")}
    logits = {f"logits/{name}" for name in ("class", "box", "place")}
    for line in steps_of(tmp_path / "run"):
        assert line["losses"].keys() == detection | assignment | logits | {"features"}
        assert {"step_s", "waiting_for_cache_s", "waiting_for_images_s", "samples_per_s"} <= line.keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
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
        assert all(0 < value < float("inf") for value in line["losses"].values())
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
    assert {"proposals/class", "proposals/l1", "proposals/giou"} < line["losses"].keys()


def test_with_all_weights_zero_the_cache_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain baseline on a store trains while reading any record fails, and sees the same pixels as distillation."""
    config = configuration(folder, tmp_path)
    data = prepare_data(config.data)
    distilled, plain = (
        prepare_feed(replace(config, distillation=chosen), data, Ranks(), CPU)
        for chosen in (DistillationOptions(), PLAIN)
    )
    for one, other in zip(distilled.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(one.parts[0].batch.images, other.parts[0].batch.images)
        assert len(one.parts[0].lessons) == 1
        assert not other.parts[0].lessons
    distilled.close()
    plain.close()

    def fail(*_: object) -> None:
        raise AssertionError("a record was read")

    monkeypatch.setattr(CacheReader, "read", fail)
    loop.train(replace(config, distillation=PLAIN, optimisation=replace(config.optimisation, max_steps=1)))
    (line,) = steps_of(tmp_path / "run")
    assert {name.split("/")[0] for name in line["losses"]} == {"detection"}


def test_plain_training_learns_two_images_by_heart(folder: Path, tmp_path: Path) -> None:
    """40 steps on two scenes: the detection loss falls to less than half of where it started."""
    config = configuration(folder, tmp_path, cached=False)
    data = prepare_data(config.data)
    data = replace(data, train=replace(data.train, entries=data.train.entries[:2]))
    config = replace(config, distillation=PLAIN, optimisation=OptimisationOptions(batch_size=2, lr=2e-3))
    torch.manual_seed(0)
    training = loop.start(config, data, CPU, Ranks())
    feed = prepare_feed(config, data, Ranks(), CPU)
    (step,) = feed.epoch(0)
    feed.close()
    counts, _ = agree(training, step, stop=False)
    totals = [sum(train_step(training, step, counts, clip=1)[0].values()) for _ in range(40)]
    assert sum(totals[-5:]) / 5 < 0.5 * totals[0]


def test_evaluate_gives_the_ap_that_training_reported(folder: Path, tmp_path: Path) -> None:
    """`evaluate` on the last weights in a process of its own against the last evaluation of the training: equal to the
    digits printed, at the size that the file says; the detections written are of the split's images and categories."""
    config = configuration(folder, tmp_path)
    metrics = loop.train(replace(config, optimisation=replace(config.optimisation, epochs=1)))
    arguments: list[object] = [
        "evaluate", "--checkpoint", tmp_path / "run" / "last.safetensors", "--data", folder / "scenes",
        "--batch-size", "4", "--workers", "1", "--device", "cpu", "--detections", tmp_path / "found.json",
    ]  # fmt: skip
    assert run(arguments, tmp_path / "printed.txt").splitlines()[-1] == str(metrics)
    found = json.loads((tmp_path / "found.json").read_text())
    val = load_annotations(folder / "scenes", "val2017")
    assert {detection["category_id"] for detection in found} <= set(val.category_ids)
    assert {detection["image_id"] for detection in found} == {entry.image_id for entry in val.entries}
    larger = run([*arguments, "--sizes", str(2 * SIDE)], tmp_path / "larger.txt")
    assert json.loads((tmp_path / "found.json").read_text()) != found
    assert larger.splitlines()[-1].startswith("AP ")


def test_a_checkpoint_holds_no_code(folder: Path, tmp_path: Path) -> None:
    """torch.load(weights_only=True) reads a checkpoint: tensors, numbers and strings only. A student can start from the
    other file by --init and take over all of it."""
    config = configuration(folder, tmp_path)
    config = replace(config, optimisation=replace(config.optimisation, max_steps=1))
    loop.train(config)
    (file,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert torch.load(file, weights_only=True)["step"] == 1
    trained = load_file(tmp_path / "run" / "last.safetensors")
    model = replace(config.model, init=tmp_path / "run" / "last.safetensors")
    inherited = loop.start(replace(config, model=model), prepare_data(config.data), CPU, Ranks())
    state = inherited.student.detector.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    """A store of other annotations or none, --sizes beside a store, no run to resume, a run in the way, fewer images
    than parts of a step: UserError, one line that says what to do, and no folder made."""
    config = configuration(folder, tmp_path)
    draw_data_set(tmp_path / "other", train_images=2, val_images=1, seed=9)
    with pytest.raises(UserError, match="other annotations"):
        loop.train(replace(config, data=replace(config.data, data=tmp_path / "other")))
    with pytest.raises(UserError, match="expected a store"):
        loop.train(replace(config, data=replace(config.data, cache=str(tmp_path / "nothing.zarr"))))
    with pytest.raises(UserError, match="--sizes was given together with --cache"):
        loop.train(replace(config, data=replace(config.data, sizes=(64,))))
    with pytest.raises(UserError, match="found none: leave --resume out"):
        loop.train(replace(config, output=replace(config.output, resume=True)))
    assert not (tmp_path / "run").exists()
    loop.train(replace(config, optimisation=replace(config.optimisation, max_steps=1)))
    with pytest.raises(UserError, match="choose another --name"):
        loop.train(config)
    subset = replace(config, data=replace(config.data, subset=0.1), output=replace(config.output, name="other"))
    with pytest.raises(UserError, match="at least 2 training images, one for each process, found 1: look at"):
        prepare_feed(subset, prepare_data(subset.data), Ranks(1, 1, 2), CPU)
    config = replace(config, speed=replace(config.speed, accumulate=5), output=replace(config.output, name="other"))
    with pytest.raises(UserError, match="expected --batch-size of 5 or more"):
        loop.train(config)
    assert not (tmp_path / "other" / "run.json").exists()


def test_first_weights_that_hardly_fit_are_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--init of a detector half as wide: the backbone and what has no width fit, 97 of 200, so a warning that names
    every other part, as counted by shapes. Of one with half the queries all but their embedding fit: no warning."""
    config = configuration(folder, tmp_path)
    data = prepare_data(config.data)
    model = ModelOptions("tiny", init=tmp_path / "init.safetensors")
    own = DeformableDetr(PRESETS["tiny"](7)).state_dict()
    start_logging()
    for sizes, told in (({"width": 32}, "warning: "), ({"queries": 20}, "")):
        other = DeformableDetr(PRESETS["tiny"](7, **sizes))
        save_detector(tmp_path / "init.safetensors", other)
        prepare_student(replace(config, model=model), data)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "taken over" in line)
        left = [name for name, tensor in own.items() if other.state_dict()[name].shape != tensor.shape]
        assert line.startswith(
            f"{told}{model.init}: {len(own) - len(left)} of the student's {len(own)} weights taken over"
        )
        if told:
            parts = line.partition("from scratch in ")[2].partition(": does --init")[0].split(", ")
            assert parts == list(dict.fromkeys(".".join(name.split(".")[:2]) for name in left))
