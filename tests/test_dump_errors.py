"""What a user can do wrong in phase one: exit status 2, one line that says what to do, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from tests.dump_cases import TEACHER, command, contents, draw_scenes, dump, same_bytes

Mend = Callable[[Path], None]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=12)


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


class Refusal:
    """Asserts that what is on stderr is one line `error: ...` (warnings and progress apart) and holds some words."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, status: int, *words: str) -> str:
        assert status == 2
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, captured.err
        for word in words:
            assert word in errors[0], f"{word!r} is not in {errors[0]!r}"
        return errors[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(capsys)


def annotations_of(data: Path) -> Path:
    return data / "annotations" / "instances_train2017.json"


def test_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The very first thing a new user sees, with no options but the teacher: the layout, and that the demo needs none.
    Here nothing but the error is on stderr."""
    monkeypatch.chdir(tmp_path)
    assert command("--teacher", TEACHER) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in ("data/coco/train2017/*.jpg", "annotations/instances_train2017.json", "--data", "make demo"):
        assert word in error
    assert not list(tmp_path.iterdir())


def test_no_teacher(data: Path, tmp_path: Path, refused: Refusal) -> None:
    missing = tmp_path / "teacher.pth"
    refused(command("--data", data, "--teacher", missing, "--out", tmp_path / "s.zarr"), str(missing), "random:r101")
    assert not (tmp_path / "s.zarr").exists()


def test_no_such_preset(data: Path, tmp_path: Path, refused: Refusal) -> None:
    refused(command("--data", data, "--teacher", "random:r102", "--out", tmp_path / "s.zarr"), "random:r102", "r101")


def test_checkpoint_of_another_class_count(data: Path, tmp_path: Path, refused: Refusal) -> None:
    """A detector of 5 classes for data of 7 categories with ids up to 34."""
    from common.detr.detector import DeformableDetr

    checkpoint = tmp_path / "five.safetensors"
    save_detector(checkpoint, DeformableDetr(PRESETS["tiny"](5)))
    status = command("--data", data, "--teacher", checkpoint, "--sizes", "64", "--out", tmp_path / "s.zarr")
    refused(status, "5", "7")
    assert not (tmp_path / "s.zarr").exists()


def test_checkpoint_of_another_architecture(data: Path, tmp_path: Path, refused: Refusal) -> None:
    checkpoint = tmp_path / "other.pth"
    torch.save({"model": {"layer.weight": torch.zeros(3, 3)}}, checkpoint)
    refused(command("--data", data, "--teacher", checkpoint, "--out", tmp_path / "s.zarr"), str(checkpoint))
    assert not (tmp_path / "s.zarr").exists()


def test_checkpoint_that_is_no_checkpoint(data: Path, tmp_path: Path, refused: Refusal) -> None:
    checkpoint = tmp_path / "text.pth"
    checkpoint.write_text("not a checkpoint")
    refused(command("--data", data, "--teacher", checkpoint, "--out", tmp_path / "s.zarr"), str(checkpoint))


def test_broken_image(data: Path, tmp_path: Path, refused: Refusal, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, with the way on; nothing of its shard is left. With --skip-broken the store is completed, the image is
    listed, and its row is marked in the store and blank."""
    broken = data / "train2017" / "000000000007.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    out = tmp_path / "s.zarr"
    refused(dump(data, out, "--preset", "half"), str(broken), "--skip-broken")
    assert not [name for name in contents(out) if ".partial" in name]

    assert dump(data, out, "--preset", "half", "--skip-broken") == 0
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: left out:")]
    assert len(listed) == 1
    assert str(broken) in listed[0]
    group = zarr.open_group(out, mode="r")
    image_id, skipped = (np.asarray(group[name][:]) for name in ("samples/image_id", "skipped"))  # type: ignore[index]
    assert image_id[skipped == 1].tolist() == [7]
    assert not np.asarray(group["queries"][:])[skipped == 1].any()  # type: ignore[index]
    assert np.asarray(group["queries"][:])[skipped == 0].any(axis=(1, 2, 3)).all()  # type: ignore[index]
    assert command("verify", out) == 0


def test_annotations_without_images(data: Path, tmp_path: Path, refused: Refusal) -> None:
    (data / "train2017" / "000000000003.jpg").unlink()
    refused(dump(data, tmp_path / "s.zarr"), "000000000003.jpg", "missing")
    shutil.rmtree(data / "train2017")
    refused(dump(data, tmp_path / "s.zarr"), str(data / "train2017"))
    assert not (tmp_path / "s.zarr").exists()


def test_store_of_another_configuration(data: Path, tmp_path: Path, refused: Refusal) -> None:
    """Every field that differs is listed, and the store stays as it was."""
    out = tmp_path / "s.zarr"
    assert dump(data, out) == 0
    before = contents(out)
    line = refused(
        dump(data, out, "--views", "2", "--tokens", "int8", "--seed", "5"), str(out), "another configuration"
    )
    for word in ("views.views: 2 against 1", "codec.tokens: 'int8' against 'pq8'", "views.seed: 5 against 0"):
        assert word in line
    content = json.loads(annotations_of(data).read_text())
    content["annotations"].pop()
    annotations_of(data).write_text(json.dumps(content))
    refused(dump(data, out), "data.annotations_sha256")
    assert contents(out) == before


def test_store_of_another_format_version(data: Path, tmp_path: Path, refused: Refusal) -> None:
    out = tmp_path / "s.zarr"
    assert dump(data, out) == 0
    text = (out / "zarr.json").read_text()
    (out / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    refused(dump(data, out), "format version 99")
    refused(command("inspect", out), "format version 99")


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_something_else_at_the_place(data: Path, tmp_path: Path, refused: Refusal, there: str) -> None:
    out = tmp_path / "s.zarr"
    if there == "file":
        out.write_text("mine")
    elif there == "folder":
        (out / "mine").mkdir(parents=True)
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused(dump(data, out), str(out), "--out")
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]


def test_no_permission(data: Path, tmp_path: Path, refused: Refusal) -> None:
    """Below a file, where even root cannot write; and in a folder without the right to, unless this is root."""
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    for folder in ("file", "closed") if os.geteuid() else ("file",):
        out = tmp_path / folder / "s.zarr"
        refused(dump(data, out), str(out), "could not be written")
    assert not list((tmp_path / "closed").iterdir())


def test_permission_lost_on_the_way(
    data: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to open the files of a shard: as above, and the store can be completed later."""
    out = tmp_path / "s.zarr"
    opened = Path.open

    def refuse(path: Path, *arguments: object, **more: object) -> object:
        if ".zarr/logits/" in str(path) and "2.0.0.0" in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *arguments, **more)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        refused(dump(data, out), str(out), "Permission denied")
    assert not [name for name in contents(out) if ".partial" in name]
    assert dump(data, out) == 0


def test_not_enough_disk(data: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before the teacher runs."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("teacher_dump.dump.run_teacher", lambda *_: pytest.fail("the teacher ran"))
    refused(dump(data, tmp_path / "s.zarr"), "GB are free", "--keep-tokens")
    assert not list(tmp_path.glob("s.zarr*"))


def test_disk_full_on_the_way(data: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has no space left at some write (ENOSPC), or takes less than it was given: one line, no leftovers;
    run again, the store is completed with the bytes of one that had room."""
    reference, out = tmp_path / "reference.zarr", tmp_path / "s.zarr"
    assert dump(data, reference) == 0
    write, left = os.writev, [40]

    def full(descriptor: int, buffers: list[bytes]) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        refused(dump(data, out), str(out), "No space left on device", "run the same command again")
    assert not [name for name in contents(out) if ".partial" in name]
    assert dump(data, out) == 0
    assert same_bytes(out, reference)


def test_disk_full_at_creation(data: Path, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zarr.Group, "create_array", full)
    refused(dump(data, tmp_path / "s.zarr"), "No space left on device")
    assert not list(tmp_path.glob("s.zarr*"))


@pytest.mark.parametrize(
    ("option", "value"), [("--keep-tokens", "0"), ("--keep-tokens", "1.5"), ("--views", "0"), ("--batch-size", "0")]
)
def test_values_out_of_range(data: Path, tmp_path: Path, refused: Refusal, option: str, value: str) -> None:
    refused(dump(data, tmp_path / "s.zarr", option, value), option, value)
    assert not (tmp_path / "s.zarr").exists()


def test_commands_on_no_store(tmp_path: Path, refused: Refusal) -> None:
    missing = tmp_path / "none.zarr"
    for arguments in (("verify", missing), ("inspect", missing), ("repair", missing), ("transcode", missing, "x.zarr")):
        refused(command(*arguments), str(missing), "found nothing")
