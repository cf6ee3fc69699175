"""Which way up an image is, by EXIF and by its annotated size, and which values of 16 bits and more become pixels."""

from __future__ import annotations

import io
import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.augment import draw
from common.coco import load_annotations
from common.errors import UserError
from common.images import BrokenImage, load_entry, load_image
from common.pixel_rule import PixelRule, rule_of_store
from common.runtime import log
from student_train.evaluate import saved_policy
from student_train.feed import Sample, replay
from tests.dump_cases import command, contents, draw_scenes, dump

ORIENTATION = 0x0112
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)  # 30 wide, 20 high
STORED, SHOWN_SIDEWAYS = (30, 20), (20, 30)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the project logs."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep()
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


def saved(path: Path, orientation: int, pixels: np.ndarray[Any, Any] = RGB) -> Path:
    """These pixels as a file that notes an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, exif=exif, **lossless)
    return path


def pixels_of(path: Path, expected: tuple[int, int] | None, rule: PixelRule) -> np.ndarray[Any, Any]:
    return np.asarray(load_image(path, expected, rule).permute(1, 2, 0))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_pillow_applies_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    """auto with the shown size, apply, and auto without annotations: `PIL.ImageOps.exif_transpose`, exactly. ignore:
    what the same rows are in a file without EXIF."""
    path = saved(tmp_path / f"a.{suffix}", orientation)
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    shown = expected.shape[1::-1]
    for size, rule in ((shown, PixelRule()), (shown, PixelRule("apply")), (None, PixelRule())):
        np.testing.assert_array_equal(pixels_of(path, size, rule), expected)
    np.testing.assert_array_equal(
        pixels_of(path, STORED, PixelRule("ignore")), pixels_of(saved(tmp_path / f"b.{suffix}", 1), STORED, PixelRule())
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_grey_of_16_bits_is_turned_as_well(tmp_path: Path, orientation: int) -> None:
    """In a PNG, and in a TIFF, which Pillow turns by itself: `exif_transpose` of the same in 8 bits, exactly."""
    grey = RGB[..., 0]
    for suffix in ("png", "tiff"):
        wide = saved(tmp_path / f"a.{suffix}", orientation, grey.astype(np.uint16) * 257)
        data = saved(tmp_path / f"b.{suffix}", orientation, grey).read_bytes()
        with Image.open(io.BytesIO(data)) as file:  # by its name Pillow 13 maps it into memory and does not turn it
            expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        np.testing.assert_array_equal(pixels_of(wide, None, PixelRule()), expected)
        ignored = pixels_of(wide, STORED, PixelRule("ignore"))
        np.testing.assert_array_equal(ignored, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_what_auto_does_by_the_annotated_size(tmp_path: Path, orientation: int, lines: list[str]) -> None:
    """A sideways image: the shown size turns it without a word, the stored one leaves it with one line in all, that
    names EXIF and the option, and a third size is refused with both."""
    rule = PixelRule()
    paths = [saved(tmp_path / f"{name}.png", orientation) for name in "abc"]
    assert pixels_of(paths[0], SHOWN_SIDEWAYS, rule).shape == (30, 20, 3)
    assert not lines
    for path in paths:
        np.testing.assert_array_equal(pixels_of(path, STORED, rule), RGB)
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("a.png", "EXIF", "--exif"))
    assert [line.split(" ", 1)[0] for line in rule.report()] == ["3"]
    with pytest.raises(UserError, match=r"40 x 40 pixels.*found 30 x 20, or 20 x 30 as its EXIF") as caught:
        pixels_of(paths[0], (40, 40), rule)
    assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize(
    ("orientation", "square"), [(2, False), (3, False), (4, False), *((number, True) for number in range(2, 9))]
)
def test_where_the_size_cannot_tell_it_is_applied_with_one_line(
    tmp_path: Path, orientation: int, square: bool, lines: list[str]
) -> None:
    """Half turns, mirrored images, and all turns of a square: as `exif_transpose`; one line for two, and a count."""
    picture, rule = (RGB[:, :20] if square else RGB), PixelRule()
    for name in "ab":
        path = saved(tmp_path / f"{name}.png", orientation, picture)
        with Image.open(path) as file:
            expected = np.asarray(ImageOps.exif_transpose(file))
        for _ in range(2):
            np.testing.assert_array_equal(pixels_of(path, picture.shape[1::-1], rule), expected)
    assert len(lines) == 1
    assert "--exif ignore" in lines[0]
    assert rule.report() == ["2 images were turned or mirrored by their EXIF orientation though their size cannot tell"]


@pytest.mark.parametrize(("exif", "size", "fits"), [("ignore", SHOWN_SIDEWAYS, "apply"), ("apply", STORED, "ignore")])
def test_a_rule_that_contradicts_the_size_is_named(tmp_path: Path, exif: Any, size: Any, fits: str) -> None:
    path = saved(tmp_path / "a.png", 6)
    with pytest.raises(UserError, match=f"--exif auto or {fits} fits"):
        load_image(path, size, PixelRule(exif))


def test_exif_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """A JPEG whose EXIF block is cut, or notes orientation 77, decodes as it always did."""
    for number, block in enumerate((b"Exif\0\0II*\0\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\xff")):
        Image.fromarray(RGB).save(tmp_path / f"{number}.jpg", exif=block)
        assert load_image(tmp_path / f"{number}.jpg", STORED).shape == (3, 20, 30)
    assert load_image(saved(tmp_path / "77.jpg", 77), STORED).shape == (3, 20, 30)


def test_real_coco_images_are_as_before(coco_nano: Path, lines: list[str]) -> None:
    """48 real images of COCO by the rule auto and by that of stores of before (None): exactly equal, without a word."""
    for split in ("train2017", "val2017"):
        annotations = load_annotations(coco_nano, split)
        before = annotations.decoded_by(PixelRule(None))
        for entry in annotations.entries:
            assert torch.equal(load_entry(annotations, entry), load_entry(before, entry))
    assert not lines


def tiff(order: str, bits: int, values: np.ndarray[Any, Any], kind: int = 1) -> bytes:
    """A TIFF of one strip of grey (h, w), written by hand: TIFF 6.0, section 2. kind: 1 unsigned, 2 signed, 3 float."""
    data, mark = values.tobytes(), "<" if order == "II" else ">"
    height, width = values.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (277, 1), (278, height), (339, kind)]
    long = [(273, 8 + 2 + 12 * 10 + 4), (279, len(data))]
    packed = [(tag, struct.pack(f"{mark}HHIHH", tag, 3, 1, value, 0)) for tag, value in entries]
    packed += [(tag, struct.pack(f"{mark}HHII", tag, 4, 1, value)) for tag, value in long]
    header = order.encode() + struct.pack(f"{mark}HIH", 42, 8, len(packed))
    return header + b"".join(entry for _, entry in sorted(packed)) + struct.pack(f"{mark}I", 0) + data


ALL_VALUES = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "jp2", "tiff II", "tiff MM"])
def test_grey_of_16_bits_becomes_8(tmp_path: Path, kind: str) -> None:
    """Every value of 16 bits in each format that Pillow writes with them, and in TIFFs of both byte orders written by
    hand: round(value / 257), exactly."""
    path = tmp_path / f"a.{kind[:4].strip()}"
    if kind.startswith("tiff "):
        order = kind[-2:]
        path.write_bytes(tiff(order, 16, ALL_VALUES.astype("<u2" if order == "II" else ">u2")))
    else:
        Image.fromarray(ALL_VALUES).save(path, **({"irreversible": False} if kind == "jp2" else {}))
    expected = np.array([round(value / 257) for value in range(2**16)]).reshape(256, 256)
    image = np.asarray(load_image(path, (256, 256)))
    for channel in image:
        np.testing.assert_array_equal(channel, expected)


def test_grey_of_12_bits_becomes_8(tmp_path: Path) -> None:
    """Two values of 12 bits in three bytes, 0, 2047, 2048, 4095 ...: round(value * 255 / 4095), exactly."""
    values = np.array([[0, 2047, 2048, 4095], [16, 17, 4000, 1]])
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    file = bytearray(tiff("II", 12, packed.astype(np.uint8).reshape(2, 6)))
    width = file.index(struct.pack("<HHI", 256, 3, 1)) + 8
    file[width : width + 2] = struct.pack("<H", 4)
    (tmp_path / "a.tiff").write_bytes(file)
    assert load_image(tmp_path / "a.tiff", (4, 2))[0].tolist() == np.rint(values * 255 / 4095).astype(int).tolist()


@pytest.mark.parametrize(
    ("kind", "dtype", "mode"), [(1, "<u4", "I"), (2, "<i2", "I"), (3, "<f4", "F")], ids=["uint32", "int16", "float32"]
)
def test_values_without_a_fixed_range_are_refused(tmp_path: Path, kind: int, dtype: str, mode: str) -> None:
    """TIFFs of 32 bits, signed, and of floats: one line that names the file; stores of before go on as before."""
    path = tmp_path / "a.tiff"
    path.write_bytes(tiff("II", np.dtype(dtype).itemsize * 8, ALL_VALUES.astype(dtype), kind))
    with pytest.raises(BrokenImage, match=rf"a\.tiff, found Pillow's mode {mode}, whose values have no fixed range"):
        load_image(path)
    assert load_image(path, (256, 256), PixelRule(None)).shape == (3, 256, 256)


def test_colour_of_16_bits(tmp_path: Path) -> None:
    """A PNG of 16 bits a channel, written chunk by chunk, of values v * 257: v, exactly."""
    import zlib

    rows = RGB.astype(">u2") * 257
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png", STORED, PixelRule()), RGB)


def test_the_rule_of_before_is_as_it_was(tmp_path: Path) -> None:
    """Stores without a rule: what Pillow's convert("RGB") gives, grey cut off at 255, JPEG and PNG not turned."""
    Image.fromarray(ALL_VALUES).save(tmp_path / "grey.png")
    for path in (tmp_path / "grey.png", saved(tmp_path / "a.jpg", 6), saved(tmp_path / "b.png", 3)):
        with Image.open(path) as file:
            expected, size = np.asarray(file.convert("RGB")), file.size
        np.testing.assert_array_equal(pixels_of(path, size, PixelRule(None)), expected)


def with_orientation(data: Path, orientation: int, undo: Callable[[Image.Image], Image.Image], split: str) -> None:
    """The images of a split turned, with the note how to turn them back."""
    for path in sorted((data / split).iterdir()):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        with Image.open(path) as file:
            turned = undo(file.convert("RGB"))
        path.unlink()
        turned.save(path.with_suffix(".png"), exif=exif)
    annotations = data / "annotations" / f"instances_{split}.json"
    annotations.write_text(annotations.read_text().replace(".jpg", ".png"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes as PNG files, upright."""
    data = draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=4)
    with_orientation(data, 1, lambda image: image, "train2017")
    return data


@pytest.fixture
def turned(scenes: Path, tmp_path: Path) -> Path:
    """The same, square, stored sideways: their size cannot tell."""
    data = Path(shutil.copytree(scenes, tmp_path / "turned"))
    with_orientation(data, 6, lambda image: image.transpose(Image.Transpose.ROTATE_90), "train2017")
    return data


def records(store: Path) -> dict[str, bytes]:
    """The files of a store but for its manifest."""
    return {name: data for name, data in contents(store).items() if name != "zarr.json"}


def manifest_of(store: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((store / "zarr.json").read_text())
    return metadata["attributes"]["detrcache"]  # type: ignore[no-any-return]


def test_a_store_notes_the_rule_it_was_written_with(
    scenes: Path, turned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dump of turned photos equals that of upright ones, byte for byte, and says once that it turned them. With
    --exif ignore it does not. Run again without the option, a store goes on by its own rule; another one is refused."""
    upright, applied, ignored = (tmp_path / f"{name}.zarr" for name in ("upright", "applied", "ignored"))
    assert dump(scenes, upright) == 0
    capsys.readouterr()
    assert dump(turned, applied) == 0
    said = capsys.readouterr().err
    assert said.count("its size cannot tell") == 1
    assert "4 images were turned" in said
    assert records(applied) == records(upright)
    assert manifest_of(applied)["views"]["exif"] == "auto"

    assert dump(turned, ignored, "--exif", "ignore") == 0
    assert records(ignored) != records(upright)
    assert manifest_of(ignored)["views"]["exif"] == "ignore"
    before = contents(ignored)
    shutil.rmtree(ignored / "logits")
    (ignored / "logits").mkdir()
    (ignored / "logits" / "zarr.json").write_bytes(before["logits/zarr.json"])
    assert dump(turned, ignored) == 0
    assert contents(ignored) == before
    capsys.readouterr()
    assert dump(turned, ignored, "--exif", "apply") == 2
    assert "--exif apply was given, but" in capsys.readouterr().err


def test_a_store_of_before_goes_on_as_it_was(
    turned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose manifest has no rule, as all of before, half of it there: it is completed with the pixels as stored
    and no word of a rule in its manifest; `verify --against-teacher` agrees."""
    out = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("teacher_dump.dump.rule_of_dump", lambda *_: PixelRule(None))
        assert dump(turned, out) == 0
    before = contents(out)
    assert "exif" not in manifest_of(out)["views"]
    (out / next(name for name in before if name.startswith("quality/c."))).unlink()
    capsys.readouterr()
    assert dump(turned, out) == 0
    assert "EXIF orientations are ignored" in capsys.readouterr().err
    assert contents(out) == before
    assert command("verify", out, "--against-teacher", "2", "--teacher", "random:tiny", "--data", turned) == 0


def test_what_a_store_was_written_with_is_followed(lines: list[str]) -> None:
    assert rule_of_store("s.zarr", "apply", None) == rule_of_store("s.zarr", "apply", "apply") == PixelRule("apply")
    assert not lines
    assert rule_of_store("s.zarr", None, None) == PixelRule(None)
    assert "was written before stores noted how images are decoded" in lines[0]
    with pytest.raises(UserError, match=r"--exif auto was given, but s\.zarr was written with ignored EXIF"):
        rule_of_store("s.zarr", None, "auto")


def test_evaluation_and_replay_see_the_same(scenes: Path, turned: Path) -> None:
    """What a student and its evaluation get of turned photos, against the upright ones: equal; not by ignore."""
    upright, sideways = (load_annotations(data, "train2017") for data in (scenes, turned))
    policy = saved_policy(scenes / "none.safetensors", (64,))
    for one, other in zip(upright.entries, sideways.entries, strict=True):
        view = draw(0, one.image_id, 0, one.width, one.height, policy)
        expected = replay(Sample(one, view), upright).image
        assert torch.equal(replay(Sample(other, view), sideways).image, expected)
        ignored = replay(Sample(other, view), sideways.decoded_by(PixelRule("ignore"))).image
        assert not torch.equal(ignored, expected)
