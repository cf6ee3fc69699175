"""Training on part of a store or of a split: what is finished of a store, and --subset of both phases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.cache.reader import CacheReader
from common.coco import Annotations, load_annotations
from common.errors import UserError
from common.subset import take_subset
from student_train import loop, selection
from student_train.config import TrainConfig
from student_train.feed import CachedViews
from student_train.prepare import prepare_data
from tests.dump_cases import TEACHER, command, draw_scenes, dump
from tests.training_cases import PLAIN, configuration, make_store, run_ranks, steps_of

SHARD_SAMPLES, SHARDS = 4, 5  # of ten images in two views
LEFT = (0, 1, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The same with a store of which shards 2 and 4 are not finished: a file of each is not there yet."""
    shutil.copytree(whole / "store.zarr", tmp_path / "store.zarr")
    (tmp_path / "scenes").symlink_to(whole / "scenes")
    take_away(tmp_path, set(range(SHARDS)) - set(LEFT))
    return tmp_path


def take_away(folder: Path, shards: Iterable[int]) -> None:
    for shard in shards:
        (folder / "store.zarr" / "token_weights" / f"c.{shard}").unlink()


def complete(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "store.zarr", folder / "store.zarr", dirs_exist_ok=True)


def five_steps(folder: Path, name: str) -> TrainConfig:
    """One epoch and two thirds of the next."""
    config = configuration(folder, folder)
    optimisation = replace(config.optimisation, epochs=4, max_steps=5)
    return replace(config, optimisation=optimisation, output=replace(config.output, name=name, log_every=0))


def stopped_after(config: TrainConfig, steps: int) -> TrainConfig:
    return replace(config, optimisation=replace(config.optimisation, max_steps=steps))


def resumed(config: TrainConfig) -> TrainConfig:
    return replace(config, output=replace(config.output, resume=True))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(selection.log, "warning", lines.append)
    return lines


def test_epochs_of_an_unfinished_store(folder: Path) -> None:
    """Every epoch has each image that is in a finished shard once, and no row of another shard; over two epochs an
    image shows all of its finished views; a complete store shows view e mod 2. By hand from the table's rows."""
    reader = CacheReader(folder / "store.zarr")
    table, annotations = reader.table, load_annotations(folder / "scenes", "train2017")
    there = [row for row in range(len(table)) if row // SHARD_SAMPLES in LEFT]
    views = {image: [row for row in there if table.image_id[row] == image] for image in table.image_id[there].tolist()}
    assert {len(rows) for rows in views.values()} == {1, 2}
    source = CachedViews(annotations, reader)
    assert len(source) == len(views)
    for epoch in range(4):
        samples = [source.sample(epoch, index) for index in range(len(source))]
        assert sorted(sample.entry.image_id for sample in samples) == sorted(views)
        for sample in samples:
            rows = views[sample.entry.image_id]
            assert sample.row == rows[epoch % len(rows)]
        assert source.sizes(epoch).tolist() == [[s.augmentation.height, s.augmentation.width] for s in samples]
    reader.close()


def test_training_on_an_unfinished_store(folder: Path, whole: Path, warnings: list[str]) -> None:
    """It trains, and one line says on how much and how to complete the store, with numbers counted here; nothing is
    said of a complete store; a store without a finished shard is one line."""
    loop.train(five_steps(folder, "run"))
    reader = CacheReader(folder / "store.zarr")
    images = len({int(reader.table.image_id[row]) for row in range(20) if row // SHARD_SAMPLES in LEFT})
    said = [line for line in warnings if "UNFINISHED" in line]
    assert len(said) == 1
    assert f"the 12 of 20 samples, of {images} of 10 images, in 3 of 5 shards; the same `python -m teacher_d" in said[0]
    assert len(steps_of(folder / "run")) == 5

    warnings.clear()
    prepare_data(configuration(whole, folder).data)
    assert not [line for line in warnings if "UNFINISHED" in line]

    take_away(folder, LEFT)
    with pytest.raises(UserError, match=r"expected a store with finished shards, found none of its 5: .* teacher_dump"):
        loop.train(five_steps(folder, "none"))
    assert not (folder / "none").exists()


def test_a_run_goes_on_with_the_samples_it_began_with(folder: Path, whole: Path, warnings: list[str]) -> None:
    """Four steps on an unfinished store, then the store is completed, then --resume: all five steps' losses and the
    student are those of a run that was never interrupted, bit for bit, and a line says what is left out. With a shard
    gone, or with a store of another kind, it is refused."""
    loop.train(five_steps(folder, "whole"))
    config = five_steps(folder, "parted")
    loop.train(stopped_after(config, 4))
    complete(folder, whole)
    warnings.clear()
    loop.train(resumed(config))
    assert [line for line in warnings if "has 2 shards more than when this run began" in line]
    one, other = (steps_of(folder / name) for name in ("whole", "parted"))
    assert [line["losses"] for line in one] == [line["losses"] for line in other]
    one, other = (load_file(folder / name / "last.safetensors") for name in ("whole", "parted"))
    assert all(np.array_equal(one[name], other[name]) for name in one)

    loop.train(stopped_after(five_steps(folder, "later"), 1))  # on the whole store
    take_away(folder, [4])
    with pytest.raises(UserError, match=r"expected the 5 shards that the run began with, found 1 .* is shard 4: "):
        loop.train(resumed(five_steps(folder, "later")))
    other_store = configuration(folder, folder).data.data / "other.zarr"
    assert dump(folder / "scenes", other_store) == 0
    config = replace(config, data=replace(config.data, cache=str(other_store)))
    with pytest.raises(UserError, match=r"was started with another store: .*views\.views: 1 against 2"):
        loop.train(resumed(config))
    shutil.rmtree(other_store)


def _train_while_it_grows(config: TrainConfig, whole: Path) -> None:
    """As one of two ranks; for the second the store is complete already."""
    if os.environ["RANK"] == "1":
        config = replace(config, data=replace(config.data, cache=str(whole / "store.zarr")))
    loop.train(config)


def test_ranks_agree_on_the_samples(folder: Path, whole: Path) -> None:
    """Two ranks of which the second finds a store that has grown: they make the same steps as two ranks of which both
    find the store as it was, bit for bit."""
    run_ranks(_train_while_it_grows, stopped_after(five_steps(folder, "growing"), 2), whole)
    run_ranks(_train_while_it_grows, stopped_after(five_steps(folder, "as it was"), 2), folder)
    growing, as_it_was = ([line["losses"] for line in steps_of(folder / name)] for name in ("growing", "as it was"))
    assert len(growing) == 2
    assert growing == as_it_was


def image_ids_of(annotations: Annotations) -> list[int]:
    return [entry.image_id for entry in annotations.entries]


def test_subsets(whole: Path) -> None:
    """A subset has the wanted number of images in the annotations' order, is part of any larger one, and has odd ids as
    often as chance (1000 of 2000, within 5 standard deviations); a number of no image, or of too many, is refused."""
    annotations = load_annotations(whole / "scenes", "train2017")
    assert take_subset(annotations, None) is annotations
    for wanted, count in ((3, 3), (0.3, 3), (1.0, 10), (10, 10), (1, 1)):
        image_ids = image_ids_of(take_subset(annotations, wanted))
        assert len(image_ids) == count
        assert [image_id for image_id in image_ids_of(annotations) if image_id in image_ids] == image_ids
    smaller, larger = (take_subset(annotations, wanted) for wanted in (3, 7))
    assert set(image_ids_of(smaller)) <= set(image_ids_of(larger))
    assert image_ids_of(take_subset(larger, 3)) == image_ids_of(smaller)
    many = annotations.entries[np.zeros(2000, dtype=np.intp)]
    many = replace(annotations, entries=replace(many, image_ids=np.arange(2000)))
    odd = int((take_subset(many, 0.5).entries.image_ids % 2).sum())
    assert abs(odd - 500) < 5 * np.sqrt(1000 / 4 / 2)
    for wanted in (0, 11, -1, 0.0, 0.01, 2.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="expected --subset of 1 to 10 images, or of a fraction"):
            take_subset(annotations, wanted)


def test_training_on_a_subset(whole: Path, tmp_path: Path) -> None:
    """--subset 4 with a store and plainly: the same four images, in one step an epoch."""
    seen = []
    for cached in (True, False):
        config = configuration(whole, tmp_path, cached)
        config = replace(config, data=replace(config.data, subset=4), distillation=PLAIN)
        data = prepare_data(config.data)
        seen.append([entry.image_id for entry in data.train.entries])
        config = replace(config, output=replace(config.output, name=f"cached {cached}"))
        loop.train(config)
        assert len(steps_of(tmp_path / f"cached {cached}")) == 2
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


def test_dumping_a_subset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store of 8 of 12 images: plan and dump agree on them, images outside of it need not be there, repair and verify
    --against-teacher find the same images, another subset is another store, and a student trains on it."""
    scenes, out = draw_scenes(tmp_path / "scenes", images=12), tmp_path / "store.zarr"
    chosen = take_subset(load_annotations(scenes, "train2017"), 8)
    for entry in load_annotations(scenes, "train2017").entries:
        if entry.image_id not in {kept.image_id for kept in chosen.entries}:
            (scenes / "train2017" / entry.file_name).unlink()
    assert command("plan", "--data", scenes, "--teacher", TEACHER, "--sizes", 64, "--subset", "8") == 0
    assert "8 images x 1 view = 8" in capsys.readouterr().out
    assert dump(scenes, out, "--subset", "8") == 0
    reader = CacheReader(out)
    assert sorted(reader.table.image_id.tolist()) == [entry.image_id for entry in chosen.entries]
    assert dump(scenes, out, "--subset", "7") == 2
    assert "data.images: 7 against 8" in capsys.readouterr().err
    file = out / "logits" / "c.0.0.0.0"
    before = file.read_bytes()
    file.unlink()
    assert command("repair", out, "--data", scenes, "--teacher", TEACHER, "--device", "cpu") == 0
    assert file.read_bytes() == before
    source = ("--data", scenes, "--teacher", TEACHER, "--device", "cpu")
    assert command("verify", out, "--against-teacher", "2", *source) == 0

    config = configuration(tmp_path, tmp_path)
    loop.train(replace(config, optimisation=replace(config.optimisation, epochs=1)))
    assert len(steps_of(tmp_path / "run")) == 2
