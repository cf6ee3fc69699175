"""Stores in a bucket behind a wire that spoils answers: right data, or one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch

from common.cache import storage
from common.cache.plan import Plan
from common.cache.reader import CacheReader, CorruptRecord
from common.cache.schema import CodecInfo, Manifest
from common.cache.storage import Bucket, locate
from common.cache.writer import shard_key
from teacher_dump import dump as dump_module
from tests.bad_wire import FAULTS, BadWire, Fault, bad_wire
from tests.dump_cases import command, contents, draw_scenes, dump
from tests.s3_server import Server, environment
from tests.test_cache import make_store_inputs, write_all

pytest.importorskip("obstore", reason="obstore is not installed: pip install detrcache[s3]")


@pytest.fixture
def wire(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadWire]:
    """The way to the server, in the environment; commands give up after 2 s without answers."""
    with bad_wire(server.port) as wire:
        for name, value in environment(wire.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "RETRY_S", 2.0)
        monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.002)
        storage._open_bucket.cache_clear()
        yield wire
    storage._open_bucket.cache_clear()


@pytest.fixture
def url(wire: BadWire) -> str:
    return f"s3://bucket/{uuid4().hex}/store.zarr"


@pytest.fixture
def inputs() -> tuple[Manifest, Plan]:
    return make_store_inputs(CodecInfo("int8", 0.5), images=12, views=2)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("detrcache"), "propagate", True)
    return caplog


def first_time(fault: Fault, chosen: Callable[[str], bool] = lambda request: True) -> Callable[[str], Fault | None]:
    """This fault for each request that is chosen, when it is made for the first time."""
    seen: set[str] = set()

    def spoil(request: str) -> Fault | None:
        if request in seen or not chosen(request):
            return None
        seen.add(request)
        return fault

    return spoil


def is_listing(request: str) -> bool:
    return "list-type" in request


def assert_equal(batch: Any, expected: Any) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(batch, name), value), name


@pytest.mark.parametrize("fault", FAULTS)
def test_reading(tmp_path: Path, wire: BadWire, url: str, inputs: tuple[Manifest, Plan], fault: Fault) -> None:
    """The first answer to each request is spoilt: all records are those of the same store in a folder. (A listing with
    a flipped bit can be a right listing of other names, so that is left out.)"""
    for place in (tmp_path / "store.zarr", url):
        write_all(place, *inputs)
    rows = range(len(inputs[1].table))
    expected = CacheReader(tmp_path / "store.zarr").read(rows)
    spoilt: list[str] = []
    spoil = first_time(fault, lambda request: not (fault == "flipped" and is_listing(request)))
    wire.spoil = lambda request: found if (found := spoil(request)) is None else spoilt.append(request) or found
    reader = CacheReader(url)
    assert_equal(reader.read(rows), expected)
    assert len(spoilt) > 50
    reader.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_dumping(tmp_path: Path, wire: BadWire, url: str, fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    """The same while a store is written, scored and verified: its objects are the files of a dump into a folder."""
    data = draw_scenes(tmp_path / "scenes", 8)
    assert dump(data, tmp_path / "store.zarr") == 0
    score = next(line for line in capsys.readouterr().err.splitlines() if "by its cached predictions" in line)
    wire.spoil = first_time(fault, lambda request: not (fault == "flipped" and is_listing(request)))
    assert dump(data, url) == 0
    assert command("verify", url) == 0
    captured = capsys.readouterr()
    assert score in captured.err.splitlines()
    assert "sound" in captured.out
    bucket = locate(url)
    for key, content in contents(tmp_path / "store.zarr").items():
        assert bucket.read(key) == content, key


def test_a_bucket_that_stays_away_while_it_is_scored(
    tmp_path: Path, wire: BadWire, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No answer comes from the moment the shards are written: one line says that they are, and the dump ends well."""
    score = dump_module.score_store

    def score_without_network(*arguments: Any) -> Any:
        wire.spoil = lambda request: "silent"
        return score(*arguments)

    monkeypatch.setattr(dump_module, "score_store", score_without_network)
    assert dump(draw_scenes(tmp_path / "scenes", 4), url) == 0
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if "is written, but the teacher could not be scored" in line)
    assert line.startswith(f"warning: {url}")
    assert "out of reach for 2 s" in line
    assert "Traceback" not in error
    wire.spoil = lambda request: None
    assert command("verify", url) == 0


@pytest.mark.parametrize("fault", ["cut", "short", "flipped"])
def test_copies_are_checked_when_they_arrive(
    tmp_path: Path, wire: BadWire, url: str, inputs: tuple[Manifest, Plan], fault: Fault, said: pytest.LogCaptureFixture
) -> None:
    """With --local-cache. Whole objects arrive spoilt once: every copy has the object's bytes. One object arrives
    spoilt always: a line names it, no file of it is shown, and the records, read from the bucket, are right."""
    write_all(tmp_path / "store.zarr", *inputs)
    write_all(url, *inputs)
    manifest, rows = inputs[0], range(len(inputs[1].table))
    expected = CacheReader(tmp_path / "store.zarr").read(rows)
    bad = shard_key(manifest.fields()[0], 2)

    def is_shard(request: str) -> bool:
        return "/c." in request and request.endswith(" ")  # without a range of bytes

    once = first_time(fault, is_shard)
    wire.spoil = lambda request: fault if bad in request and is_shard(request) else once(request)
    reader = CacheReader(url, local_cache=tmp_path / "copies")
    assert_equal(reader.read(rows), expected)
    assert reader.copies is not None
    reader.copies.wait()
    copies, sound = contents(reader.copies.folder.root), contents(tmp_path / "store.zarr")
    assert len(copies) > 5 * len(manifest.fields())
    assert bad not in copies
    assert all(content == sound[key] for key, content in copies.items())
    lines = [record.message for record in said.records if "was not copied" in record.message]
    assert len(lines) == 1
    if fault != "cut":
        assert f"{url}/{bad}: it arrives damaged" in lines[0]
    assert_equal(reader.read(rows), expected)
    reader.close()


@pytest.mark.parametrize("damage", ["page", "index", "end", "gone", "another shard"])
def test_damaged_copies_are_fetched_again(
    tmp_path: Path, url: str, inputs: tuple[Manifest, Plan], damage: str, said: pytest.LogCaptureFixture
) -> None:
    """A copy that a disk or a user spoilt: the records are right, one line names the copy and not the bucket, and it
    is replaced by the object's bytes."""
    write_all(url, *inputs)
    rows = range(len(inputs[1].table))
    reader = CacheReader(url, local_cache=tmp_path / "copies")
    expected = reader.read(rows)
    assert reader.copies is not None
    reader.copies.wait()
    reader.close()
    path = reader.copies.folder.root / shard_key(inputs[0].fields()[0], 2)
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        spoilt = {"end": content[: len(content) // 2], "another shard": path.with_name("c.1.0").read_bytes()}
        content[10 if damage == "page" else len(content) - 10] ^= 1
        path.write_bytes(spoilt.get(damage, content))
    said.clear()
    later = CacheReader(url, local_cache=tmp_path / "copies")
    if damage != "gone":  # a shard that is not whole is no copy
        assert later.copies is not None
        assert later.copies.has(2)
    assert_equal(later.read(rows), expected)
    if damage != "gone":
        lines = [record.message for record in said.records if "fetched again" in record.message]
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: ")
        assert url not in lines[0]
    assert_equal(later.read(rows), expected)  # asks for the copy
    assert later.copies is not None
    later.copies.wait()
    bucket = locate(url)
    assert path.read_bytes() == bucket.read(shard_key(inputs[0].fields()[0], 2))
    later.close()


def test_objects_in_the_wrong_place(
    url: str, inputs: tuple[Manifest, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two objects exchanged: the reader, with and without copies, and verify say so."""
    write_all(url, *inputs)
    bucket = locate(url)
    assert isinstance(bucket, Bucket)
    one, other = (shard_key(inputs[0].fields()[-1], shard) for shard in (0, 1))
    first, second = bucket.read(one), bucket.read(other)
    bucket.put(one, second)
    bucket.put(other, first)
    for more in ({}, {"local_cache": tmp_path / "copies"}):
        reader = CacheReader(url, **more)  # type: ignore[arg-type]
        with pytest.raises(CorruptRecord, match="it was written as shard 1"):
            reader.read(np.arange(2))
        reader.close()
    assert not [key for key in contents(tmp_path / "copies") if key.endswith(one)]
    capsys.readouterr()
    assert command("verify", url) == 1
    assert "it was written as shard 1" in capsys.readouterr().out
