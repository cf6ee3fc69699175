"""Files that are no images, too large, or out of reach: which are broken, and which stop every command."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import images
from common.cache.reader import read_manifest
from common.cache.writer import finished_shards
from common.coco import load_annotations
from common.errors import UserError
from common.images import LARGEST_PIXELS, BrokenImage, decode_image, load_image, read_image
from student_train.config import DataOptions
from student_train.feed import Feed, FeedOptions, FreshViews
from student_train.prepare import prepare_data
from tests.dump_cases import TEACHER, command, draw_scenes, dump

SIZE = (64, 64)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=6)


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "an empty file"), (b"<html>not found</html>", "which begins with b'<html>")]
)
def test_what_is_no_image_is_broken(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BrokenImage, match=rf"image at .*a\.jpg, found .*{found}"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "link to nothing"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    """None of them is a broken image; a named pipe without a writer would block for ever, /dev/zero never end."""
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"expected an image at .*a\.jpg") as caught:
        load_image(path)
    assert not isinstance(caught.value, BrokenImage)


def test_too_many_open_files(scenes: Path) -> None:
    """With no descriptor left for the process, by the system's own limit: its words, and no broken image."""
    path = sorted((scenes / "train2017").iterdir())[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(UserError, match="which cannot be read: Too many open files") as caught:
            load_image(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(caught.value, BrokenImage)


def large(path: Path, width: int, height: int) -> Path:
    """A PNG with such a header, whose pixels are black; a MB or less on disk."""
    Image.new("1", (width, height)).save(path)
    return path


def test_sizes_are_compared_before_anything_is_decoded(tmp_path: Path) -> None:
    """13000 x 13000, for 64 x 64 and where the annotations say so, too: refused with less than 10 MB of numpy's memory;
    one that the limit allows is decoded; above twice the limit Pillow itself refuses, in our words."""
    path = large(tmp_path / "a.png", 13000, 13000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.png to have 64 x 64 pixels, .*found 13000 x 13000") as caught:
        load_image(path, SIZE)
    assert not isinstance(caught.value, BrokenImage)
    with pytest.raises(BrokenImage, match=f"at most {LARGEST_PIXELS} pixels in .*a.png, found 13000 x 13000"):
        load_image(path, (13000, 13000))
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert load_image(large(tmp_path / "b.png", 40_000, 5), (40_000, 5)).shape == (3, 5, 40_000)
    with pytest.raises(BrokenImage, match=f"at most {LARGEST_PIXELS} pixels in .*c.png, found over"):
        load_image(large(tmp_path / "c.png", 20_000, 10_000))


def test_what_the_system_says_while_decoding_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images.Image, "open", refuse)
    with pytest.raises(UserError, match="a could not be decoded: Too many open files") as caught:
        decode_image(b"", "a", None)
    assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOENT])
def test_errors_of_the_system_stop_a_dump_that_skips_broken_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    """One image out of reach: one line with the system's reason, and no shard with a blank of it; when the system is
    well again, the store is completed without one skipped."""
    out, opened = tmp_path / "s.zarr", os.open
    broken = sorted((data / "train2017").iterdir())[4]

    def refuse(path: object, *arguments: int, **more: int) -> int:
        if str(path) == str(broken):
            raise OSError(fault, os.strerror(fault))
        return opened(path, *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(images.os, "open", refuse)
        assert dump(data, out, "--skip-broken", "--preset", "half") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(broken) in line
    assert os.strerror(fault) in line
    assert dump(data, out, "--skip-broken", "--preset", "half") == 0
    assert "left out" not in capsys.readouterr().err
    assert finished_shards(out, read_manifest(out)).all()


def test_another_size_is_said_by_a_calibrated_dump(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default preset decodes images first to calibrate: the first real reason, with both sizes."""
    for path in (data / "train2017").iterdir():
        Image.new("RGB", (50, 40)).save(path)
    assert dump(data, tmp_path / "s.zarr", "--skip-broken") == 2
    assert "to have 64 x 64 pixels, as in the annotations, found 50 x 40" in capsys.readouterr().err


def test_calibration_without_a_single_image_gives_the_first_reason(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (data / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert dump(data, tmp_path / "s.zarr", "--skip-broken") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "none of 6 images could be decoded, the first: expected a whole JPEG or PNG image at" in line
    assert command("plan", "--data", data, "--teacher", TEACHER, "--sizes", 64, "--measure", 1) == 2


def test_training_skips_broken_images_only(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut file gives way to another sample; a missing one stops training before it begins, one that cannot be read
    during it, both also with --skip-broken."""
    options = DataOptions(data=data, sizes=(64,), skip_broken=True)
    paths = sorted((data / "train2017").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    found = prepare_data(options)

    def steps() -> list[int]:
        views = FreshViews(found.train, found.policy, seed=0)
        feed = Feed(views, found.train, None, FeedOptions(2, 0, skip_broken=True))
        try:
            return [len(step.image_ids) for step in feed.epoch(0)]
        finally:
            feed.close()

    assert steps() == [2, 2, 2]
    with monkeypatch.context() as patch:
        patch.setattr(
            "student_train.feed.read_image",
            lambda path: _out_of_reach(path) if path == paths[1] else read_image(path),
        )
        with pytest.raises(UserError, match="Input/output error"):
            steps()
    paths[2].unlink()
    with pytest.raises(UserError, match=f"1 are missing, the first is {paths[2].name}"):
        prepare_data(options)


def _out_of_reach(path: Path) -> bytes:
    raise UserError(f"expected an image at {path}, which cannot be read: {os.strerror(errno.EIO)}")


def test_every_image_of_a_data_set_is_read_as_before(scenes: Path) -> None:
    """`read_image` and `load_image` against pathlib's bytes and Pillow's pixels, exactly."""
    annotations = load_annotations(scenes, "train2017")
    for entry in annotations.entries:
        path = annotations.image_path(entry)
        assert read_image(path) == path.read_bytes()
        with Image.open(path) as file:
            np.testing.assert_array_equal(load_image(path).permute(1, 2, 0).numpy(), np.asarray(file))
