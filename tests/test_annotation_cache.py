"""Kept arrays of annotations, against reading the json itself, whatever happened to either of them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import annotation_cache
from common.annotation_cache import FOLDER_VARIABLE, load_instances
from common.errors import UserError
from common.instances_json import Instances, read_instances
from common.runtime import log


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Where arrays are kept, of small files, too; log lines can be read."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO)
    return tmp_path / "cache" / "annotations"


def assert_same(found: Instances, expected: Instances) -> None:
    """Every value and type is the same, bit for bit."""
    for ours, theirs in ((found.entries, expected.entries), (found.entries.truth, expected.entries.truth)):
        for name, array in vars(theirs).items():
            if name != "truth":
                assert getattr(ours, name).dtype == array.dtype
                np.testing.assert_array_equal(getattr(ours, name), array)
    assert found[1:] == expected[1:]


def write(folder: Path, boxes: int = 3, width: int = 50, name: str = "{}.jpg") -> Path:
    content: dict[str, Any] = {
        "images": [{"id": 5 * i, "file_name": name.format(i), "width": 100, "height": 90} for i in range(4)],
        "categories": [{"id": 7, "name": "seven"}, {"id": 2}],
        "annotations": [
            {"image_id": 5 * (i % 3), "category_id": 2, "bbox": [i % 40, 2.5, width, 2], "iscrowd": i % 2}
            for i in range(boxes)
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def never(*_: object) -> Instances:
    raise AssertionError("the json was read")


def test_the_second_opening_maps_what_the_first_read(
    coco_nano: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real annotations: first and second opening give what reading the json gives; the second does not read it."""
    path, folder = coco_nano / "annotations" / "instances_train2017.json", coco_nano / "train2017"
    expected = read_instances(path, folder)
    assert_same(load_instances(path, folder), expected)
    assert len(list(kept.glob("*.arrays"))) == 1
    monkeypatch.setattr(annotation_cache, "read_instances", never)
    assert_same(load_instances(path, folder), expected)


@pytest.mark.parametrize("boxes", [0, 3])
def test_no_boxes(tmp_path: Path, boxes: int) -> None:
    path = write(tmp_path, boxes)
    for _ in range(2):
        assert_same(load_instances(path, tmp_path), read_instances(path, tmp_path))


def test_damage_is_noticed_and_mended(tmp_path: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bit flipped in each byte of the head and in some others, and cut short: the json is read again, with a line."""
    path = write(tmp_path)
    expected = read_instances(path, tmp_path)
    load_instances(path, tmp_path)
    (arrays,) = kept.glob("*.arrays")
    sound = arrays.read_bytes()
    damaged = [sound[:i] + bytes([sound[i] ^ 16]) + sound[i + 1 :] for i in [*range(64), *range(64, len(sound), 9)]]
    for content in damaged + [sound[:length] for length in (0, 10, 24, 33, 200, len(sound) - 1)] + [sound + b"\0"]:
        caplog.clear()
        arrays.write_bytes(content)
        assert_same(load_instances(path, tmp_path), expected)
        assert "damaged, or of another version" in caplog.text
        assert arrays.read_bytes() == sound


def test_a_warning_is_said_again(tmp_path: Path) -> None:
    """Boxes of which a quarter leaves the images: the warning is kept with the arrays."""
    path = write(tmp_path, boxes=40, width=71)
    found = [load_instances(path, tmp_path).warning for _ in range(2)]
    assert found == 2 * [read_instances(path, tmp_path).warning]
    assert "are cut at the border" in found[0]


def test_a_note_that_lies_or_is_damaged_does_no_harm(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes of no json, of the wrong shape, or with another json's hash: the right annotations (exact)."""
    monkeypatch.setattr(annotation_cache, "CLOCK_NS", -(10**18))
    path = write(tmp_path)
    expected = read_instances(path, tmp_path)
    load_instances(path, tmp_path)
    (note,) = kept.glob("*.json")
    state, _ = json.loads(note.read_text())
    for content in ("", "[]", "3", "{}", json.dumps([state, "0" * 64]), json.dumps([state, None])):
        note.write_text(content)
        assert_same(load_instances(path, tmp_path), expected)


def test_a_json_replaced_within_a_tick_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another json of the same size, time and inode, right after the first was opened: the new one is read. (On a file
    system with a coarse clock no change of time shows; here `_state` plays it.)"""
    monkeypatch.setattr(annotation_cache, "_state", lambda path: [path.stat().st_size, now, now, 1])
    now = int(os.stat(tmp_path).st_mtime_ns)
    assert load_instances(write(tmp_path, width=50), tmp_path).entries[0].boxes_xyxy_px[0, 2] == 50
    path = write(tmp_path, width=60)
    assert load_instances(path, tmp_path).entries[0].boxes_xyxy_px[0, 2] == 60


def test_a_json_whose_time_is_put_back(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another json of the same size with the time of the old one, which was known by its note: the new one is read, and
    the old one's arrays are gone."""
    monkeypatch.setattr(annotation_cache, "CLOCK_NS", -(10**18))
    path = write(tmp_path, width=50)
    before = path.stat()
    load_instances(path, tmp_path)
    path.unlink()
    write(tmp_path, width=60)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_instances(path, tmp_path).entries[0].boxes_xyxy_px[0, 2] == 60
    assert len(list(kept.glob("*.arrays"))) == 1


def test_a_known_json_is_not_hashed_again(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A json older than the clock's tick: its note is trusted, and the file not opened."""
    monkeypatch.setattr(annotation_cache, "CLOCK_NS", -(10**18))
    path = write(tmp_path)
    expected = load_instances(path, tmp_path)
    monkeypatch.setattr("hashlib.file_digest", never)
    assert_same(load_instances(path, tmp_path), expected)


def test_nowhere_to_keep_arrays(tmp_path: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file in the folder's place: the annotations are read all the same, with one line that names the variable."""
    kept.parent.touch()
    path = write(tmp_path)
    assert_same(load_instances(path, tmp_path), read_instances(path, tmp_path))
    assert [FOLDER_VARIABLE in record.getMessage() for record in caplog.records] == [True]


def test_a_full_disk(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that cannot be written to the end: nothing of them stays, and the json is read once."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    path, read = write(tmp_path), []
    monkeypatch.setattr(annotation_cache, "read_instances", lambda *both: read.append(both) or read_instances(*both))
    assert_same(load_instances(path, tmp_path), read_instances(path, tmp_path))
    assert len(read) == 1
    assert [file.suffix for file in kept.iterdir()] == [".lock"]


def test_names_belong_to_their_folder_of_images(tmp_path: Path) -> None:
    """Absolute file names: read for one folder they are relative; for another they are refused, kept or not."""
    path = write(tmp_path, name=f"{tmp_path}/images/{{}}.jpg")
    for _ in range(2):
        assert load_instances(path, tmp_path / "images").entries[1].file_name == "1.jpg"
        assert load_instances(path, tmp_path).entries[1].file_name == "images/1.jpg"
        with pytest.raises(UserError, match="to stay inside the folder of images"):
            load_instances(path, tmp_path / "others")


def test_a_broken_json_is_not_kept(tmp_path: Path, kept: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("2.5", "NaN"))
    for _ in range(2):
        with pytest.raises(UserError, match="expected four finite numbers"):
            load_instances(path, tmp_path)
    assert not list(kept.glob("*.arrays"))


def test_processes_at_once_read_a_json_once(tmp_path: Path) -> None:
    """Three processes that begin together: one says that it keeps the arrays, and all have the same boxes."""
    path = write(tmp_path, boxes=20_000)
    program = (
        "import sys, logging; from pathlib import Path; from common import annotation_cache as a;"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout); a.SMALLEST_BYTES = 0;"
        f"print(a.load_instances(Path({str(path)!r}), Path({str(tmp_path)!r})).entries.truth.boxes_xywh_px.sum())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert "".join(said).count("kept as arrays") == 1
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert float(said[0].splitlines()[-1]) > 0
