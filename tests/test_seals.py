"""Seals: a shard file in another's place is noticed, by the reader and by verify, and mended by repair."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch

from common.cache import reader as reader_module
from common.cache.reader import CacheReader, CorruptRecord
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.errors import UserError
from student_train import loop
from tests.dump_cases import SIDE, command, contents, draw_scenes, same_bytes, swap, unseal
from tests.training_cases import configuration

OPTIONS = ("--tokens", "int8", "--neck", "--views", "2", "--skip-broken")
BROKEN_ID = 4


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores of one layout: `store`, and others that differ in one thing. One image is broken."""
    folder = tmp_path_factory.mktemp("stores")
    torch.manual_seed(0)
    for name in ("teacher", "other_teacher"):
        save_detector(folder / f"{name}.safetensors", DeformableDetr(PRESETS["tiny"](7)))
    for name, images in (("scenes", 12), ("other_scenes", 12)):
        draw_scenes(folder / name, images)
        (folder / name / "train2017" / f"{BROKEN_ID:012}.jpg").write_bytes(b"broken")
    annotations = folder / "other_scenes" / "annotations" / "instances_train2017.json"
    annotations.write_text(annotations.read_text() + "\n")
    for name, data, teacher, more in (
        ("store", "scenes", "teacher", ()),
        ("other_seed", "scenes", "teacher", ("--seed", "1")),
        ("other_teacher", "scenes", "other_teacher", ()),
        ("other_data", "other_scenes", "teacher", ()),
    ):
        assert write(folder, folder / f"{name}.zarr", data, teacher, *more) == 0
    return folder


def write(folder: Path, out: Path, data: str = "scenes", teacher: str = "teacher", *more: str) -> int:
    source = ("--data", folder / data, "--teacher", folder / f"{teacher}.safetensors", "--device", "cpu")
    return command(*source, "--sizes", SIDE, "--workers", "1", "--out", out, *OPTIONS, *more)


@pytest.fixture
def store(stores: Path, tmp_path: Path) -> Path:
    """A copy of `store` that a test may spoil."""
    return Path(shutil.copytree(stores / "store.zarr", tmp_path / "store.zarr"))


def files_of(store: Path, shard: int, field: str = "*") -> list[Path]:
    return sorted([*store.glob(f"{field}/c.{shard}"), *store.glob(f"{field}/c.{shard}.*")])


def swap_shards(store: Path, field: str = "*") -> None:
    """Shards 1 and 5, of views 0 and 1. The broken image is in shards 0 and 4."""
    for one, other in zip(files_of(store, 1, field), files_of(store, 5, field), strict=True):
        swap(one, other)


def take_shard(name: str) -> Callable[[Path, Path], None]:
    """Shard 0 of another store."""

    def take(store: Path, stores: Path) -> None:
        for mine, other in zip(files_of(store, 0), files_of(stores / f"{name}.zarr", 0), strict=True):
            shutil.copyfile(other, mine)

    return take


def take_table(store: Path, stores: Path) -> None:
    shutil.copytree(stores / "other_seed.zarr" / "samples", store / "samples", dirs_exist_ok=True)


def copy_skipped(store: Path, stores: Path) -> None:
    shutil.copyfile(store / "skipped" / "c" / "0", store / "skipped" / "c" / "1")


def mark_all(store: Path, stores: Path) -> None:
    """A shard all of whose samples are marked as blank: none of them is ever read."""
    samples = CacheReader(store).manifest.layout.shard_samples
    marks = b"\1" * samples
    (store / "skipped" / "c" / "1").write_bytes(marks + google_crc32c.value(marks).to_bytes(4, "little"))


SPOILT: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "two shards": (lambda store, _: swap_shards(store), "tokens/c.1.0: it was written as shard 5"),
    "one field": (lambda store, _: swap_shards(store, "assignment"), "assignment/c.5.0.0: it was written as shard 1"),
    "two fields": (
        lambda store, _: swap(store / "token_weights" / "c.0", store / "neck_weights" / "c.0"),
        "token_weights/c.0: it was written as a file of neck_weights",
    ),
    "seed": (take_shard("other_seed"), "quality/c.0.0.0: it was written for another store"),
    "teacher": (take_shard("other_teacher"), "quality/c.0.0.0: it was written for another store"),
    "data": (take_shard("other_data"), "quality/c.0.0.0: it was written for another store"),
    "table": (take_table, "samples: it lists other samples than shard 0 was written for"),
    "skipped deleted": (
        lambda store, _: (store / "skipped" / "c" / "0").unlink(),
        "skipped/c/0: it does not mark the samples that shard 0 was written without",
    ),
    "skipped added": (copy_skipped, "skipped/c/1: it does not mark the samples that shard 1 was written without"),
    "all skipped": (mark_all, "skipped/c/1: it does not mark the samples that shard 1 was written without"),
}


def read_all(store: Path) -> None:
    reader = CacheReader(store)
    try:
        reader.read(reader.rows())
    finally:
        reader.close()


@pytest.mark.parametrize("case", SPOILT)
def test_files_in_the_wrong_place(stores: Path, store: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every checksum of these files is right. Reading all records fails and verify names what is wrong, once; without
    seals, which is how older stores are, both find nothing. Repair brings every byte back."""
    spoil, line = SPOILT[case]
    read_all(store)
    spoil(store, stores)
    with pytest.raises(CorruptRecord, match=r"it was written|it lists other|it does not mark"):
        read_all(store)
    capsys.readouterr()
    assert command("verify", store) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([found for found in lines if line in found]) == 1, lines
    assert len(lines) == len(set(lines))

    old = Path(shutil.copytree(store, store.with_name("old.zarr")))
    unseal(old)
    assert command("verify", old) == 0
    read_all(old)

    if case == "table":
        return
    source = ("--data", stores / "scenes", "--teacher", stores / "teacher.safetensors", "--device", "cpu")
    assert command("repair", store, *source, "--skip-broken") == 0
    assert same_bytes(store, stores / "store.zarr")


def test_pages_of_another_sample(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pages of a file exchanged, each with its checksum: the reader does not look for that, verify does."""
    layout, path = CacheReader(store).manifest.layout, store / "logits" / "c.0.0.0.0"
    field = next(field for field in CacheReader(store).manifest.fields() if field.name == "logits")
    page, content = layout.page_bytes(field), path.read_bytes()
    path.write_bytes(content[page : 2 * page] + content[:page] + content[2 * page :])
    assert command("verify", store) == 1
    assert "logits/c.0.0.0.0: its pages are not those that it was written with" in capsys.readouterr().out


def test_flipped_bits_of_seals(store: Path) -> None:
    """Every fifth of the 256 bits of a file's seal, flipped: the reader notices all of them, and verify the last."""
    layout, path = CacheReader(store).manifest.layout, store / "quality" / "c.1.0.0"
    content = path.read_bytes()
    begin = len(content) - (layout.shard_samples * 16 + 4) - 32
    reader_rows = range(layout.shard_samples, 2 * layout.shard_samples)
    for bit in range(0, 256, 5):
        spoilt = bytearray(content)
        spoilt[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(spoilt))
        reader = CacheReader(store)
        with pytest.raises(CorruptRecord, match="seal"):
            reader.read(reader_rows)
        reader.close()
    assert command("verify", store) == 1


def test_training_notices(stores: Path, tmp_path: Path) -> None:
    """Training on a store with two shards exchanged ends with one line."""
    (tmp_path / "scenes").symlink_to(stores / "scenes")
    shutil.copytree(stores / "store.zarr", tmp_path / "store.zarr")
    swap_shards(tmp_path / "store.zarr")
    with pytest.raises(UserError, match=r"it was written as shard \d") as caught:
        loop.train(configuration(tmp_path, tmp_path))
    assert "\n" not in str(caught.value)


def test_older_stores(stores: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without seals: its records are those of the sealed one, one line says what cannot be checked, and so does
    verify. An unfinished one goes on: new shards are sealed, and from then on known when they are exchanged. Transcode
    makes a sealed one of it; prune shares its files as they are."""
    reader = CacheReader(store)
    rows = reader.rows()
    before = {name: value for name, value in vars(reader.read(rows)).items() if isinstance(value, torch.Tensor)}
    unseal(store)
    said: list[str] = []
    monkeypatch.setattr(reader_module.log, "info", said.append)
    after = CacheReader(store).read(rows)
    assert all(torch.equal(value, getattr(after, name)) for name, value in before.items())
    assert len(said) == 1
    assert f"{store} was written before shard files were sealed" in said[0]

    old = contents(store)
    for shard in (1, 5):
        for path in files_of(store, shard):
            path.unlink()
    assert write(stores, store) == 0
    sealed = contents(stores / "store.zarr")
    for name, content in contents(store).items():
        is_new = name.split("/")[-1].split(".")[:2] in (["c", "1"], ["c", "5"])
        assert content == (sealed if is_new else old)[name], name
    assert command("verify", store) == 0
    swap_shards(store, "logits")
    with pytest.raises(CorruptRecord, match="it was written as shard"):
        read_all(store)
    assert command("verify", store) == 1
    swap_shards(store, "logits")

    assert command("transcode", store, tmp_path / "again.zarr") == 0
    assert same_bytes(tmp_path / "again.zarr", stores / "store.zarr")
    assert command("prune", store, tmp_path / "pruned.zarr", "--views", "1") == 0
    assert (tmp_path / "pruned.zarr" / "tokens" / "c.0.0").samefile(store / "tokens" / "c.0.0")
    assert command("verify", tmp_path / "pruned.zarr") == 0
    read_all(tmp_path / "pruned.zarr")
