"""Several teachers in one store: written one after the other, and a student that averages or picks among them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file
from torch import Tensor

from common.cache.members import member_names
from common.cache.reader import CacheReader
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import load_detector, save_detector
from common.devices import start_processes
from common.errors import UserError
from common.runtime import Ranks, read_ranks
from common.synthetic import draw_data_set
from student_train import loop
from student_train.config import DistillationOptions, SpeedOptions, TrainConfig
from student_train.prepare import prepare_data, prepare_feed, prepare_student
from student_train.run_folder import RunFolder
from student_train.step import agree, train_step
from student_train.teachers import CHOICES, CachedTeachers, open_teachers, random_teachers
from tests.dump_cases import command, contents, same_bytes
from tests.training_cases import IMAGES, SIDE, configuration, run_ranks, steps_of

CPU = torch.device("cpu")


def options(folder: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", folder / "scenes", "--views", 2, "--sizes", SIDE, "--workers", 1, "--device", "cpu")
    return (*data, "--preset", "half", "--neck", *more)


def teacher_file(path: Path, preset: str, queries: int, width: int, layers: int, seed: int) -> Path:
    torch.manual_seed(seed)
    save_detector(path, DeformableDetr(PRESETS[preset](7, queries=queries, width=width, decoder_layers=layers)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/. small.safetensors and large.pth, teachers that differ in width, queries and layers. two.zarr: both, the
    second added by a later command with other batches. small.zarr: the first alone. twins.zarr: the second twice."""
    folder = tmp_path_factory.mktemp("several")
    draw_data_set(folder / "scenes", train_images=IMAGES, val_images=2)
    small = teacher_file(folder / "small.safetensors", "tiny", 20, 32, 2, seed=1)
    large = teacher_file(folder / "large.safetensors", "tiny_teacher", 25, 64, 3, seed=2)
    assert command(*options(folder, "--teacher", f"small={small}", "--out", folder / "two.zarr")) == 0
    assert (
        command(*options(folder, "--teacher", f"large={large}", "--batch-size", 3, "--out", folder / "two.zarr")) == 0
    )
    assert command(*options(folder, "--teacher", small, "--out", folder / "small.zarr")) == 0
    assert command(*options(folder, "--teacher", f"a={large}", f"b={large}", "--out", folder / "twins.zarr")) == 0
    return folder


def config_of(folder: Path, out: Path, store: str, teachers: str | None = None, **distillation: object) -> TrainConfig:
    config = configuration(folder, out)
    data = replace(config.data, cache=str(folder / store), teachers=teachers, prefetch=1)
    chosen = DistillationOptions(**distillation)  # type: ignore[arg-type]
    return replace(config, data=data, distillation=chosen, output=replace(config.output, name=teachers or "run"))


# Phase one -----------------------------------------------------------------------------------------------------------


def test_members_are_the_stores_of_their_teachers(folder: Path) -> None:
    """A member of a store of two against the store that a dump of its teacher alone writes: equal files, byte for byte.
    zarr-python finds both members in one group, and their arrays are those of the reader."""
    assert member_names(folder / "two.zarr") == ("large", "small")
    assert member_names(folder / "small.zarr") == ()
    assert same_bytes(folder / "two.zarr" / "small", folder / "small.zarr")
    group = zarr.open_group(folder / "two.zarr", mode="r")
    for name in ("large", "small"):
        reader = CacheReader(folder / "two.zarr" / name)
        stored = reader.read(reader.rows())
        assert np.array_equal(np.asarray(group[f"{name}/boxes_cxcywh"]), stored.boxes_cxcywh.numpy())  # type: ignore[arg-type]
        reader.close()


def test_a_teacher_is_added_and_an_interrupted_one_goes_on(folder: Path, tmp_path: Path) -> None:
    """The command with one teacher more, where one shard of the first is missing: that shard is written again and the
    second teacher's store made, with the bytes of stores that were never interrupted; all else keeps its inode."""
    store = tmp_path / "store.zarr"
    store.mkdir()
    shutil.copy(folder / "two.zarr" / "zarr.json", store)
    shutil.copytree(folder / "two.zarr" / "small", store / "small")
    lost = next((store / "small" / "tokens").glob("c.*"))
    lost.unlink()
    before = {path: path.stat().st_ino for path in (store / "small" / "tokens").iterdir()}
    both = (folder / "small.safetensors", folder / "large.safetensors")
    assert command(*options(folder, "--teacher", *both, "--out", store)) == 0
    assert same_bytes(store / "small", folder / "small.zarr")
    assert same_bytes(store / "large", folder / "twins.zarr" / "a")
    assert all(path.stat().st_ino == inode for path, inode in before.items())


def test_two_ranks_write_two_teachers(folder: Path, tmp_path: Path) -> None:
    """Two processes as torchrun starts them: each teacher's store has the bytes that one process writes."""
    both = (folder / "small.safetensors", folder / "large.safetensors")
    run_ranks(dump_on_a_rank, options(folder, "--teacher", *both, "--out", tmp_path / "store.zarr"))
    assert same_bytes(tmp_path / "store.zarr" / "small", folder / "small.zarr")
    assert same_bytes(tmp_path / "store.zarr" / "large", folder / "twins.zarr" / "a")


def dump_on_a_rank(arguments: tuple[object, ...]) -> None:
    assert command(*arguments) == 0


def test_commands_on_the_whole_and_on_a_member(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect, plan and verify speak of every member; verify fails for damage in any of them, and repair mends it by
    the member's path; what works on one store says so, given the whole."""
    store = tmp_path / "two.zarr"
    shutil.copytree(folder / "two.zarr", store)
    assert command("inspect", store) == 0
    printed = capsys.readouterr().out
    assert f"{store}/large," in printed
    assert f"{store}/small," in printed
    both = (folder / "small.safetensors", folder / "large.safetensors")
    assert command("plan", *options(folder, "--teacher", *both, "--out", store)) == 0
    printed = capsys.readouterr().out
    assert printed.count("exactly") == 2
    assert "all teachers: " in printed
    assert command("verify", store) == 0
    damaged = next((store / "large" / "tokens").glob("c.*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert command("verify", store) == 1
    printed = capsys.readouterr().out
    assert f"{store}/large: NOT sound" in printed
    assert f"{store}/small: sound" in printed
    source = ("--data", folder / "scenes", "--device", "cpu", "--workers", 1)
    assert command("repair", store / "large", "--teacher", folder / "large.safetensors", *source) == 0
    assert same_bytes(store, folder / "two.zarr")
    capsys.readouterr()
    for mistaken in (
        ("repair", store),
        ("transcode", store, tmp_path / "new.zarr"),
        ("prune", store, tmp_path / "new"),
    ):
        assert command(*mistaken) == 2
        assert f"has several (large, small): name one of them, such as {store}/large" in capsys.readouterr().err
    assert command("verify", store, "--against-teacher", 2) == 2
    assert command("verify", store / "small", "--against-teacher", 2, "--teacher", both[0], *source) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--teacher", "random:tiny", "x/tiny.pth", "--out", "new.zarr"), "several called tiny: name them"),
        (("--teacher", "a.pth", "x/best.pth", "--out", "new.zarr"), r"none of average, random, best, found 'best'"),
        (("--teacher", "random:tiny", "--out", "two.zarr"), r"\(large, small\): to add one, give it a name"),
        (("--teacher", "a=random:tiny", "--out", "small.zarr"), "found a store of one: name another --out, or move"),
    ],
)
def test_mistakes_in_phase_one(
    folder: Path, arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each ends with exit status 2 and one line that says what to do; nothing is written."""
    import re

    before = {name: contents(folder / name).keys() for name in ("two.zarr", "small.zarr")}
    assert command(*options(folder, *arguments[:-1], folder / arguments[-1])) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(error) == 1
    assert re.search(line, error[0])
    assert not (folder / "new.zarr").exists()
    assert before == {name: contents(folder / name).keys() for name in ("two.zarr", "small.zarr")}


# Phase two -----------------------------------------------------------------------------------------------------------


def one_step(config: TrainConfig, out: Path, *, alike: bool = False) -> None:
    """Save the gradients of the detector in the first step, and the losses of this rank. alike: give all bridges the
    weights of the first."""
    ranks = read_ranks()
    start_processes(ranks, CPU)
    torch.manual_seed(0)
    data = prepare_data(config.data)
    training = loop.start(config, data, CPU, ranks)
    if alike:
        first, *others = training.student.bridges
        for other in others:
            other.load_state_dict(first.state_dict())
    training.model.eval()  # batch norm by its running statistics: those of a batch differ with its size
    feed = prepare_feed(config, data, ranks, CPU)
    step = next(iter(feed.epoch(0)))
    counts, _ = agree(training, step, stop=False)
    losses, _ = train_step(training, step, counts, clip=0)
    feed.close()
    gradients = {n: p.grad for n, p in training.student.detector.named_parameters() if p.grad is not None}
    torch.save({"gradients": gradients, "losses": losses}, out.with_name(f"{out.name}.{ranks.rank}"))


def results_of(out: Path, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    content = torch.load(out.with_name(f"{out.name}.{rank}"), weights_only=True)
    return content["gradients"], content["losses"]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to the norm of all of `one`."""
    assert one.keys() == other.keys()
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    return max(float((one[name] - other[name]).norm() / norm) for name in one)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_equal_teachers_teach_what_one_does(folder: Path, tmp_path: Path, mode: str) -> None:
    """Two teachers with the same records and the same projections, averaged, drawn at random and chosen as best,
    against one of them alone, with FGD on top of the mode's losses (without the contrastive one): every loss of a step
    within 1e-5 relative, every parameter's gradient within 1e-5 of the whole gradient's norm; in three parts of a step,
    and by two processes, within 1e-4."""
    losses = {"mode": mode, "contrastive_weight": 0.0, "fgd_weight": 1.0}

    def config(teachers: str, accumulate: int = 1) -> TrainConfig:
        plain = config_of(folder, tmp_path, "twins.zarr", teachers, **losses)
        wider = replace(plain.model, width=32)  # so that projections are trained
        return replace(plain, model=wider, speed=SpeedOptions(accumulate=accumulate))

    one_step(config("a"), tmp_path / "one")
    alone, expected = results_of(tmp_path / "one")
    assert {name.split("/")[0] for name in expected} == {"features", "logits", "assignment", "fgd", "detection"}
    for choice in CHOICES:
        one_step(config(choice), tmp_path / "both", alike=True)
        gradients, found = results_of(tmp_path / "both")
        assert found == pytest.approx(expected, rel=1e-5), choice
        assert distance(alone, gradients) < 1e-5, choice
    one_step(config("random", accumulate=3), tmp_path / "parts", alike=True)
    gradients, found = results_of(tmp_path / "parts")
    assert found == pytest.approx(expected, rel=1e-4)
    assert distance(alone, gradients) < 1e-4
    if mode == "paper":
        run_ranks(twins_on_two_ranks, config("random"), tmp_path / "ranks")
        assert distance(alone, results_of(tmp_path / "ranks")[0]) < 1e-4


def twins_on_two_ranks(config: TrainConfig, out: Path) -> None:
    one_step(config, out, alike=True)


def test_the_average_is_the_mean_of_its_teachers(folder: Path, tmp_path: Path) -> None:
    """Two teachers of different width, queries and layers: each distillation loss of the average against the mean of
    what the same student has from each teacher alone, within 1e-5; and random draws, those of 60 epochs for one step's
    samples, come to the same mean within 5 standard errors."""
    both = config_of(folder, tmp_path, "two.zarr", "average")
    torch.manual_seed(0)
    data = prepare_data(both.data)
    student = prepare_student(both, data).eval()
    losses = {choice: losses_in_epochs(both, student, choice, 1)[0] for choice in ("average", "large", "small")}
    for name, value in losses["average"].items():
        mean = (losses["large"][name] + losses["small"][name]) / 2
        assert value == pytest.approx(mean, rel=1e-5), name
    assert losses["large"]["features"] != pytest.approx(losses["small"]["features"], rel=0.01)
    drawn = losses_in_epochs(both, student, "random", 60)
    for name in ("features", "logits/class", "logits/place", "assignment/class"):
        values = np.array([one[name] for one in drawn])
        assert values.std() > 0, name
        assert abs(values.mean() - losses["average"][name]) < 5 * values.std() / np.sqrt(len(values)), name


def losses_in_epochs(config: TrainConfig, student: torch.nn.Module, choice: str, epochs: int) -> list[dict[str, float]]:
    """The losses of one batch, four samples of view 0, as its teachers are chosen in each of some epochs. choice: as
    --teachers, for the student with both teachers' bridges."""
    from common.images import batch_to, collate
    from student_train.feed import CachedViews, replay
    from student_train.objective import needed_fields
    from tests.training_cases import losses_of

    data = prepare_data(config.data)
    assert data.teachers is not None
    assert data.reader is not None
    teachers = CachedTeachers(data.teachers.names, data.teachers.readers, "random" if choice == "random" else "average")
    teachers.prepare(needed_fields(config.distillation), seed=3)
    source = CachedViews(data.train, data.reader)
    samples = [source.sample(0, index) for index in range(4)]
    replayed = [replay(sample, data.train) for sample in samples]
    batch = batch_to(collate([(one.image, one.targets) for one in replayed]), torch.device("cpu"))
    found = []
    with torch.no_grad():
        for epoch in range(epochs):
            lessons, _ = teachers.read([sample.row for sample in samples], epoch, teachers.buffers())
            if choice in teachers.names:
                lessons = (replace(lessons[teachers.names.index(choice)], weight=1.0),)
            output = student(batch.images, batch.padding_mask, [(one.teacher, one.samples) for one in lessons])
            losses = losses_of(output, batch.targets, lessons, config.distillation)
            found.append({name: float(loss) for name, loss in losses.items()})
    teachers.close()
    return found


def test_one_of_several_is_that_teacher_alone(folder: Path, tmp_path: Path) -> None:
    """A run of two steps with --teachers small against one from the store of that teacher alone, contrastive loss
    included: every loss and every weight equal bit for bit; and nothing in run.json or in the student tells of the
    other teacher."""
    member = config_of(folder, tmp_path / "member", "two.zarr", "small", mode="released")
    alone = config_of(folder, tmp_path / "alone", "small.zarr", mode="released")
    for config in (member, alone):
        loop.train(replace(config, optimisation=replace(config.optimisation, max_steps=2)))
    one, other = tmp_path / "member" / "small", tmp_path / "alone" / "run"
    assert [step["losses"] for step in steps_of(one)] == [step["losses"] for step in steps_of(other)]
    weights, expected = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    record = json.loads((one / "run.json").read_text())
    assert record["store"]["teacher"]["name"] == "small.safetensors"
    assert record["teachers"] is None


@pytest.mark.parametrize("choice", CHOICES)
def test_every_way_trains_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path, choice: str) -> None:
    """Three steps in one go against two and a continuation: equal losses and weights, bit for bit. The student's file
    has its own weights only and loads as a detector of its own."""
    whole, parted = (config_of(folder, tmp_path / name, "two.zarr", choice) for name in ("whole", "parted"))
    steps = {count: replace(whole.optimisation, max_steps=count) for count in (2, 3)}
    loop.train(replace(whole, optimisation=steps[3]))
    loop.train(replace(parted, optimisation=steps[2]))
    loop.train(replace(parted, optimisation=steps[3], output=replace(parted.output, resume=True)))
    one, other = tmp_path / "whole" / choice, tmp_path / "parted" / choice
    assert [step["losses"] for step in steps_of(one)] == [step["losses"] for step in steps_of(other)]
    weights, others = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert all(torch.equal(others[name], value) for name, value in weights.items())
    record = json.loads((one / "run.json").read_text())
    assert list(record["teachers"]) == ["large", "small"]
    detector, _ = load_detector(one / "last.safetensors")
    assert set(weights) == set(detector.state_dict())
    with pytest.raises(UserError, match="with the teachers large, small, found  in the store"):
        RunFolder(one, writes=True).go_on(replace(whole, optimisation=steps[3]), None)


def test_random_teachers_are_drawn_by_seed_image_and_epoch(folder: Path) -> None:
    """Draws for 20000 images: each of three teachers within 5 standard errors of a third; another seed and another
    epoch draw independently (agreement of a third, within 5 standard errors); an image's draw does not depend on which
    others are asked for. What a teacher does not teach is not read: a lesson has the records of its samples."""
    ids = np.arange(20000)
    drawn = random_teachers(3, 7, ids, 2)
    error = np.sqrt(1 / 3 * 2 / 3 / len(ids))
    for teacher in range(3):
        assert abs((drawn == teacher).mean() - 1 / 3) < 5 * error
    for other in (random_teachers(3, 7, ids, 3), random_teachers(3, 8, ids, 2)):
        assert abs((drawn == other).mean() - 1 / 3) < 5 * error
    assert np.array_equal(random_teachers(3, 7, ids[::-7], 2), drawn[::-7])

    teachers = open_teachers(str(folder / "two.zarr"), "random")
    teachers.prepare({"assignment", "boxes_cxcywh"}, seed=0)
    rows = list(range(2 * IMAGES))
    chosen = random_teachers(2, 0, teachers.readers[0].table.image_id[rows], 5)
    lessons, _ = teachers.read(rows, 5, teachers.buffers())
    assert [lesson.teacher for lesson in lessons] == [0, 1]
    for lesson in lessons:
        assert lesson.samples is not None
        assert lesson.samples.tolist() == np.flatnonzero(chosen == lesson.teacher).tolist()
        assert len(lesson.cached.boxes_cxcywh) == len(lesson.samples)
        assert not lesson.cached.tokens.numel()
    teachers.close()


def test_the_best_teacher_and_the_same_sample_in_both_stores(folder: Path) -> None:
    """The teacher of each sample under `best` against the sum of the last layer's quality read by zarr-python and
    looked up by (image, view); the members have their samples in different orders. A lesson's records are those of the
    sample, in the teacher's own store."""
    teachers = open_teachers(str(folder / "two.zarr"), "best")
    teachers.prepare({"assignment", "logits"}, seed=0)
    fit, logits = [], []
    for name in teachers.names:
        group = zarr.open_group(folder / "two.zarr" / name, mode="r")
        keys = list(zip(group["samples/image_id"][:], group["samples/view"][:], strict=True))  # type: ignore[index]
        fit.append(dict(zip(keys, group["quality"][:][:, -1].sum(axis=1), strict=True)))  # type: ignore[index]
        logits.append(dict(zip(keys, group["logits"][:], strict=True)))  # type: ignore[index]
    table = teachers.readers[0].table
    assert not np.array_equal(table.image_id, teachers.readers[1].table.image_id)
    keys = list(zip(table.image_id, table.view, strict=True))
    expected = [int(fit[1][key] > fit[0][key]) for key in keys]
    assert len(set(expected)) == 2, "one teacher is best everywhere: the test has lost its subject"
    lessons, _ = teachers.read(range(len(keys)), 0, teachers.buffers())
    taught = [None if lesson.samples is None else lesson.samples.tolist() for lesson in lessons]
    assert taught == [[place for place, best in enumerate(expected) if best == teacher] for teacher in (0, 1)]
    everything, _ = CachedTeachers(teachers.names, teachers.readers).read(range(len(keys)), 0, teachers.buffers())
    assert not np.array_equal(logits[0][keys[0]], logits[0][keys[1]])
    for lesson in (*lessons, *everything):
        places = range(len(keys)) if lesson.samples is None else lesson.samples.tolist()
        for record, place in zip(lesson.cached.logits.numpy(), places, strict=True):
            assert np.array_equal(record, logits[lesson.teacher][keys[place]])
    teachers.close()


def test_mistakes_in_phase_two(folder: Path, tmp_path: Path) -> None:
    """An unknown teacher, with the nearest name; a name for a store of one; members of other samples; an unfinished
    member: one line each, before anything is trained."""
    with pytest.raises(UserError, match=r"average\|random\|best\|large\|small, found larg: is it large\?"):
        open_teachers(str(folder / "two.zarr"), "larg")
    with pytest.raises(UserError, match="--teachers large is for a store of several teachers"):
        open_teachers(str(folder / "small.zarr"), "large")
    store = tmp_path / "store.zarr"
    shutil.copytree(folder / "two.zarr", store)
    next((store / "large" / "tokens").glob("c.*")).unlink()
    with pytest.raises(UserError, match=r"found \d+ of \d+ shards of large: run its"):
        open_teachers(str(store), None)
    shutil.rmtree(store / "large")
    more = options(folder, "--teacher", f"large={folder / 'large.safetensors'}", "--seed", 1, "--out", store)
    assert command(*more) == 0
    with pytest.raises(UserError, match=r"small against large with views\.seed: 0 against 1"):
        open_teachers(str(store), "average")
    open_teachers(str(store), "small").close()


def test_broken_images_and_damaged_records(folder: Path, tmp_path: Path) -> None:
    """A damaged record of one teacher: with skip_corrupt, the steps of its view train on other samples in its place, by
    all teachers; without, the error names the image."""
    store = tmp_path / "two.zarr"
    shutil.copytree(folder / "two.zarr", store)
    file = max((store / "small" / "tokens").glob("c.*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    config = config_of(tmp_path, tmp_path, "two.zarr", "average")
    config = replace(config, data=replace(config.data, data=folder / "scenes"))
    reader = CacheReader(store / "small")
    (damage,) = reader.read_sound(reader.rows())[1]
    reader.close()
    feed = prepare_feed(config, prepare_data(config.data), Ranks(), CPU)
    with pytest.raises(UserError, match=rf"image {damage.image_id}, .*--on-corrupt skip"):
        list(feed.epoch(damage.view))
    feed.close()
    config = replace(config, data=replace(config.data, on_corrupt="skip"))
    feed = prepare_feed(config, prepare_data(config.data), Ranks(), CPU)
    for step in feed.epoch(damage.view):
        (part,) = step.parts
        assert damage.image_id not in part.image_ids
        assert [len(lesson.cached.boxes_cxcywh) for lesson in part.lessons] == [len(part.image_ids)] * 2
    feed.close()
    assert feed.corrupt == {(damage.image_id, damage.view)}
