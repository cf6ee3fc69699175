"""docs/cache-format.md is enough: a reader written from that page alone, without zarr or this project's code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.cache.codec import decode_logits, decode_tokens
from common.cache.reader import CacheReader
from teacher_dump.encode import read_statistics
from tests.dump_cases import command, draw_scenes, dump

Array = npt.NDArray[Any]


def shifted(value: int) -> int:
    """Eight steps of the reflected polynomial of Castagnoli, 0x82F63B78."""
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


TABLE = [shifted(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def check(data: bytes, *, fully: bool) -> bytes:
    """What stands before the checksum. The sum is compared where `fully`: byte by byte it is slow."""
    content, stored = data[:-4], struct.unpack("<I", data[-4:])[0]
    assert not fully or crc32c(content) == stored
    return content


def metadata(store: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    about = json.loads((store / name / "zarr.json").read_bytes())
    return tuple(about["shape"]), np.dtype(about["data_type"]).newbyteorder("<")


def small_array(store: Path, name: str) -> Array:
    shape, dtype = metadata(store, name)
    data = (store / name).joinpath("c", *("0" for _ in shape)).read_bytes()
    return np.frombuffer(check(data, fully=True), dtype).reshape(shape)


def rows_of_sample(store: Path, name: str, i: int) -> Array:
    """A sample's rows of a token field, or its one row of a sample field."""
    layout = json.loads((store / "zarr.json").read_bytes())["attributes"]["detrcache"]["layout"]
    n, t, p = layout["shard_samples"], layout["shard_tokens"], layout["page_tokens"]
    k = i // n
    shape, dtype = metadata(store, name)
    row_shape = shape[1:]
    is_token_field = name.startswith(("token", "neck"))
    page_rows = p if is_token_field else 1
    b = page_rows * int(np.prod(row_shape)) * dtype.itemsize + 4
    if is_token_field:
        count = int(small_array(store, "samples/token_count")[i])
        first, pages = (int(small_array(store, "samples/token_offset")[i]) - k * t) // p, -(-count // p)
    else:
        count, first, pages = 1, i - k * n, 1
    file = (store / name / ".".join(["c", str(k), *("0" for _ in row_shape)])).read_bytes()
    possible = (t if is_token_field else n) // page_rows
    index = check(file[-(possible * 16 + 4) :], fully=True)
    for page in range(first, first + pages):
        assert struct.unpack_from("<QQ", index, page * 16) == (page * b, b)
    check_seal(store, name, k, file[-(possible * 16 + 4) - 32 : -(possible * 16 + 4)], b, file)
    content = b"".join(
        check(file[page * b : (page + 1) * b], fully=page == first) for page in range(first, first + pages)
    )
    return np.frombuffer(content, dtype).reshape(-1, *row_shape)[:count]


def check_seal(store: Path, name: str, k: int, seal: bytes, b: int, file: bytes) -> None:
    """Every number of a file's seal."""
    attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
    assert attributes["sealed"] is True
    manifest = attributes["detrcache"]
    n, here = manifest["layout"]["shard_samples"], slice(k * manifest["layout"]["shard_samples"], None)
    del (
        manifest["views"]["views"],
        manifest["layout"]["samples"],
        manifest["codec"]["neck"],
        manifest["codec"]["queries"],
    )
    columns = ("image_id", "view", "augmentation", "level_shapes", "token_count", "token_offset")
    marks = store / "skipped" / "c" / str(k)
    pages = file.index(seal) // b
    numbers = (
        crc32c(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()),
        k,
        crc32c(b"".join(small_array(store, f"samples/{column}")[here][:n].tobytes() for column in columns)),
        crc32c(check(marks.read_bytes(), fully=True) if marks.exists() else bytes(n)),
        crc32c(name.encode()),
        crc32c(b"".join(file[(page + 1) * b - 4 : (page + 1) * b] for page in range(pages))),
    )
    assert check(seal, fully=True) == b"SEAL" + struct.pack("<6I", *numbers)


@pytest.mark.parametrize(
    "options",
    [
        ("--tokens", "int8", "--keep-tokens", "0.4"),
        ("--tokens", "int4", "--neck"),
        ("--tokens", "fp32"),
        ("--tokens", "pq8", "--neck", "--logits", "uint8"),
        ("--tokens", "pq4", "--keep-tokens", "0.4"),
    ],
    ids=" ".join,
)
def test_reader_from_the_specification(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Every field of some samples, and the decoded tokens, against our reader: equal."""
    data = draw_scenes(tmp_path / "scenes", images=10)
    (data / "train2017" / "000000000004.jpg").write_bytes(b"broken")
    store = tmp_path / "s.zarr"
    assert dump(data, store, "--skip-broken", *options) == 0
    reader = CacheReader(store)
    image_ids = small_array(store, "samples/image_id")
    skipped_rows = set(range(10)) - set(reader.rows().tolist())
    assert {int(image_ids[row]) for row in skipped_rows} == {4}
    for file in (store / "skipped" / "c").iterdir():
        marks = np.frombuffer(check(file.read_bytes(), fully=True), np.uint8)
        assert {int(file.name) * len(marks) + int(row) for row in np.flatnonzero(marks)} == skipped_rows
    reader.choose_fields({field.name for field in reader.manifest.fields()})
    for row in reader.rows()[[0, 4, 8]].tolist():
        batch = reader.read([row])
        for field in reader.manifest.fields():
            ours, theirs = rows_of_sample(store, field.name, row), getattr(batch, field.name).numpy()
            np.testing.assert_array_equal(
                ours if field.per == "token" else ours[0], theirs if field.per == "token" else theirs[0]
            )
        codec = reader.manifest.codec
        if codec.calibrated:
            stored = {
                name: rows_of_sample(store, name, row)
                for name in ("tokens", "token_scales")
                if name == "tokens" or codec.quantised
            }
            expected = decode_tokens(stored, read_statistics(store).tokens)
            np.testing.assert_allclose(decoded(store, row), expected, rtol=1e-5, atol=1e-5)
        if reader.manifest.codec.logits == "uint8":
            codes = rows_of_sample(store, "logits", row).astype(np.float64).clip(0.25, 254.75)
            np.testing.assert_allclose(2 * np.log(np.tan(codes * np.pi / 510)), decode_logits(batch.logits), rtol=1e-5)


def decoded(store: Path, i: int) -> Array:
    """Tokens of a sample, value by value: int8, int4, or codes of product quantisation."""
    q = rows_of_sample(store, "tokens", i)
    if (store / "teacher" / "codebooks").exists():
        codebooks, rotation = (
            small_array(store, f"teacher/{name}").astype(np.float64) for name in ("codebooks", "rotation")
        )
        groups, _, d = codebooks.shape
        values = np.zeros((len(q), groups * d))
        for token in range(len(q)):
            for m in range(groups):
                for j in range(d):
                    values[token] += codebooks[m, q[token, m], j] * rotation[:, m * d + j]
        return values
    scales = rows_of_sample(store, "token_scales", i)
    channel_scale, channel_shift = (small_array(store, f"teacher/channel_{name}") for name in ("scale", "shift"))
    channels = len(channel_scale)
    values = np.zeros((len(q), channels))
    for token in range(len(q)):
        for c in range(channels):
            if q.shape[1] * 2 == channels:
                number = int(q[token, c // 2]) >> (4 * (c % 2)) & 15
                number -= 16 if number > 7 else 0
            else:
                number = int(q[token, c])
            scale = float(scales[token, c // (channels // scales.shape[1])])
            values[token, c] = number * scale * float(channel_scale[c]) + float(channel_shift[c])
    return values


def test_manifest_checksum(tmp_path: Path) -> None:
    """The checksums in the group's zarr.json, by the specification's words."""
    store = tmp_path / "s.zarr"
    assert dump(draw_scenes(tmp_path / "scenes", images=4), store) == 0
    assert command("verify", store) == 0
    attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
    sums = attributes["crc32c"]
    manifest = json.dumps(attributes["detrcache"], sort_keys=True, separators=(",", ":")).encode()
    assert sums.pop("detrcache") == crc32c(manifest)
    assert set(sums) == {str(path.relative_to(store)) for path in store.rglob("zarr.json")} - {"zarr.json"}
    for name, value in sums.items():
        assert crc32c((store / name).read_bytes()) == value
