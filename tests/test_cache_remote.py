"""Stores in a bucket, on a real S3 server: the same bytes, and what happens when the network breaks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import zarr
from zarr.storage import ObjectStore

from common.cache import storage
from common.cache.plan import Plan
from common.cache.reader import CacheReader, CorruptRecord, read_manifest
from common.cache.schema import CodecInfo, Manifest
from common.cache.storage import Bucket, Folder, locate
from common.cache.writer import ShardWriter, create_store, finished_shards, shard_key
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.errors import UserError
from student_train import loop
from student_train.feed import Feed, TrainingStep
from student_train.teachers import open_teachers
from teacher_dump import dump as dump_module
from teacher_dump import store as store_module
from teacher_dump.config import DataOptions, DumpConfig, StoreOptions, TeacherOptions
from teacher_dump.dump import run_dump
from tests.benchmarks.cache_stores import plain_constants
from tests.dump_cases import SIDE, TEACHER, command, contents, draw_scenes, dump
from tests.s3_server import Server, Wire, environment
from tests.test_cache import make_record, make_store_inputs, write_all
from tests.training_cases import configuration, steps_of

pytest.importorskip("obstore", reason="obstore is not installed: pip install detrcache[s3]")


@pytest.fixture
def wire(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The way to the server, in the environment; commands give up after 2 s without it."""
    wire = Wire(server.port)
    for name, value in environment(wire.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "RETRY_S", 2.0)
    storage._open_bucket.cache_clear()
    yield wire
    wire.cut()
    storage._open_bucket.cache_clear()


@pytest.fixture
def url(wire: Wire) -> str:
    return f"s3://bucket/{uuid4().hex}/store.zarr"


@pytest.fixture
def inputs() -> tuple[Manifest, Plan]:
    return make_store_inputs(CodecInfo("int8", 0.5), images=12, views=2)


def bucket_contents(url: str) -> dict[str, bytes]:
    """Every object of a store, with a client of its own."""
    import obstore

    client = obstore.store.from_url(url, client_options={"allow_http": True})
    listed = [entry["path"] for chunk in obstore.list(client) for entry in chunk]
    return {key: bytes(obstore.get(client, key).bytes()) for key in listed}


def write_both(tmp_path: Path, url: str, inputs: tuple[Manifest, Plan]) -> Path:
    write_all(tmp_path / "store.zarr", *inputs)
    write_all(url, *inputs)
    return tmp_path / "store.zarr"


def assert_same_records(ours: CacheReader, theirs: CacheReader) -> None:
    rows = np.random.default_rng(0).permutation(len(ours))
    for some in np.array_split(rows, 3):
        one, other = ours.read(some), theirs.read(some)
        for name, tensor in vars(one).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, getattr(other, name)), name


def test_a_bucket_holds_what_a_folder_holds(tmp_path: Path, url: str, inputs: tuple[Manifest, Plan]) -> None:
    """A store written to S3 against one written to a folder: the same keys and bytes; our reader and zarr-python
    read the same from both."""
    local = write_both(tmp_path, url, inputs)
    ours, theirs = contents(local), bucket_contents(url)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    assert finished_shards(url, inputs[0]).all()
    assert_same_records(CacheReader(url), CacheReader(local))
    bucket = locate(url)
    assert isinstance(bucket, Bucket)
    remote_tokens, local_tokens = (
        zarr.open_array(place, path="tokens", mode="r") for place in (ObjectStore(bucket.client, read_only=True), local)
    )
    np.testing.assert_array_equal(np.asarray(remote_tokens[:200]), np.asarray(local_tokens[:200]))


def test_urls_survive_pathlib(url: str) -> None:
    """A bucket's URL that went through pathlib, which folds slashes, names the same bucket."""
    assert locate(Path(url)) == locate(url)
    assert isinstance(locate("s3.zarr"), Folder)


def test_wrong_secrets_are_refused_in_one_line(
    url: str, wire: Wire, inputs: tuple[Manifest, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage._open_bucket.cache_clear()
    create = partial(create_store, url, *inputs, plain_constants(inputs[0]))
    for attempt in (create, lambda: read_manifest(url), lambda: CacheReader(url)):
        with pytest.raises(UserError, match=r"refused the request.*AWS_SECRET_ACCESS_KEY") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_missing_store_and_a_second_creator(url: str, inputs: tuple[Manifest, Plan]) -> None:
    """Nothing at the URL: one line. Two processes create at once: the second learns of it, the first one's stays."""
    with pytest.raises(UserError, match="found nothing"):
        read_manifest(url)
    create_store(url, *inputs, plain_constants(inputs[0]))
    with pytest.raises(FileExistsError):
        create_store(url, *make_store_inputs(CodecInfo("fp16", 1.0)), {})
    assert read_manifest(url) == inputs[0]


def test_creating_replaces_nothing(url: str, inputs: tuple[Manifest, Plan]) -> None:
    """What is there of a store stays, to the byte, when another one is created over it: refused, whether the first is
    whole or was stopped in the middle. The same store is completed."""
    create_store(url, *inputs, plain_constants(inputs[0]))
    before = bucket_contents(url)
    other = make_store_inputs(CodecInfo("fp16", 1.0))
    with pytest.raises(FileExistsError):
        create_store(url, *other, plain_constants(other[0]))
    assert bucket_contents(url) == before
    create_store(url, *inputs, plain_constants(inputs[0]))
    locate(url).remove("zarr.json")
    locate(url).remove("samples/view/c/0")
    with pytest.raises(UserError, match="another process is creating a store of another configuration"):
        create_store(url, *other, plain_constants(other[0]))
    create_store(url, *inputs, plain_constants(inputs[0]))
    assert bucket_contents(url) == before


def test_two_dumps_at_once(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dumps into one bucket, made to create the store at the same time and both to write all of its shards, one
    behind the other: both end well, and every object is that of a single dump into a folder."""
    data, folder = draw_scenes(tmp_path / "scenes", 8), tmp_path / "store.zarr"
    torch.manual_seed(0)
    save_detector(tmp_path / "teacher.safetensors", DeformableDetr(PRESETS["tiny"](7)))
    options = DumpConfig(
        DataOptions(data, sizes=(SIDE,), workers=1),
        TeacherOptions(str(tmp_path / "teacher.safetensors"), device="cpu"),
        StoreOptions(url, tokens="int8", keep_tokens=0.5),
    )
    run_dump(replace(options, store=replace(options.store, out=folder)))
    together, create, missing = threading.Barrier(2, timeout=60), store_module.create_store, dump_module.missing_shards

    def create_together(*arguments: Any, **more: Any) -> None:
        together.wait()
        create(*arguments, **more)

    def missing_for_both(*arguments: Any) -> list[int]:
        shards = missing(*arguments)
        together.wait()
        return shards

    monkeypatch.setattr(store_module, "create_store", create_together)
    monkeypatch.setattr(dump_module, "missing_shards", missing_for_both)
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(run_dump, [options, options]))
    assert [summary.samples for summary in summaries] == [8, 8]
    assert bucket_contents(url) == contents(folder)


def test_lines_name_the_bucket(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """plan, dump, verify and inspect print the URL as it was given."""
    data = draw_scenes(tmp_path / "scenes", 4)
    assert dump(data, url) == 0
    assert command("plan", "--data", data, "--teacher", TEACHER, "--sizes", SIDE, "--out", url) == 0
    assert command("verify", url) == 0
    assert command("inspect", url) == 0
    printed = capsys.readouterr()
    assert printed.out.count(url) >= 3
    assert f"{url}: 4 images x 1 views" in printed.err
    assert f"{url}: wrote 4 samples" in printed.err
    assert "s3:/b" not in printed.out + printed.err


def test_a_short_cut_is_waited_out(
    tmp_path: Path, url: str, wire: Wire, inputs: tuple[Manifest, Plan], caplog: pytest.LogCaptureFixture
) -> None:
    """The network is gone for half a second while records are read: they come, equal, with a warning."""
    local = write_both(tmp_path, url, inputs)
    reader = CacheReader(url)
    wire.cut()
    healing = threading.Timer(0.5, wire.mend)
    healing.start()
    logging.getLogger("detrcache").propagate = True
    assert_same_records(reader, CacheReader(local))
    healing.join()
    assert "trying again" in caplog.text


def test_a_shard_is_there_whole_or_not_at_all(url: str, wire: Wire, inputs: tuple[Manifest, Plan]) -> None:
    """The network breaks in the middle of a put: one line says so, and the shard is not finished."""
    manifest, plan = inputs
    create_store(url, manifest, plan, plain_constants(manifest))
    writer = ShardWriter(url, manifest, plan.table, 0)
    writer.add([make_record(manifest, plan, row) for row in range(manifest.layout.shard_samples)])
    wire.cut_after = 2000
    with pytest.raises(UserError, match=r"out of reach for 2 s.*run the same command again") as caught:
        writer.commit()
    assert "\n" not in str(caught.value)
    wire.mend()
    assert not finished_shards(url, manifest).any()


def test_several_teachers_in_a_bucket(tmp_path: Path, url: str, wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    """Two teachers dumped into a bucket, the second by a later command, against the same in a folder: equal files; the
    commands and the reader find both, and the records read for a step are equal."""
    data = draw_scenes(tmp_path / "scenes", 4)
    folder = tmp_path / "store.zarr"
    for out in (folder, url):
        assert dump(data, out, "--teacher", "a=random:tiny") == 0
        assert dump(data, out, "--teacher", "a=random:tiny", "b=random:tiny_teacher") == 0
    assert contents(folder) == bucket_contents(url)
    capsys.readouterr()
    assert command("verify", url) == 0
    assert f"{url}/b: sound" in capsys.readouterr().out
    assert command("repair", url) == 2
    assert f"such as {url}/a" in capsys.readouterr().err
    local, remote = open_teachers(str(folder), "average"), open_teachers(url, "average")
    assert remote.names == ("a", "b")
    (ours, _), (theirs, _) = (teachers.read([3, 1], 0, teachers.buffers()) for teachers in (local, remote))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cached.tokens, other.cached.tokens)
        assert torch.equal(one.cached.boxes_cxcywh, other.cached.boxes_cxcywh)
    local.close()
    remote.close()


def test_a_dump_goes_on_after_the_network_was_cut(
    tmp_path: Path, url: str, wire: Wire, capfd: pytest.CaptureFixture[str]
) -> None:
    """`teacher_dump --out s3://...` whose network is cut in the middle ends with one line; run again it completes the
    store. Its bytes equal those of a local dump, and a student trains from it."""
    data = draw_scenes(tmp_path / "scenes", 12)
    half = ("--preset", "half")  # of some megabytes
    assert dump(data, tmp_path / "store.zarr", *half) == 0
    wire.cut_after = 400_000
    assert dump(data, url, *half) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: s3://bucket/")
    assert "it goes on where it stopped" in error
    wire.mend()
    finished = finished_shards(url, read_manifest(url))
    assert 0 < finished.sum() < len(finished)
    assert dump(data, url, *half) == 0
    ours, theirs = contents(tmp_path / "store.zarr"), bucket_contents(url)
    assert ours == theirs
    arguments = [
        "--cache", url, "--data", data, "--student", "tiny", "--epochs", "1", "--batch-size", "4",
        "--out", tmp_path, "--name", "run", "--workers", "1", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "student_train", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_second_epoch_needs_no_network(tmp_path: Path, url: str, wire: Wire, inputs: tuple[Manifest, Plan]) -> None:
    """With a local cache, what was read once is read again with the network cut, by this process and by another; the
    copies are the objects' bytes."""
    local = write_both(tmp_path, url, inputs)
    reader = CacheReader(url, local_cache=tmp_path / "copies")
    other = CacheReader(url, local_cache=tmp_path / "copies")
    assert_same_records(reader, CacheReader(local))
    assert reader.copies is not None
    reader.copies.wait()
    later = CacheReader(url, local_cache=tmp_path / "copies")
    wire.cut()
    assert_same_records(reader, CacheReader(local))
    assert_same_records(later, CacheReader(local))
    with pytest.raises(UserError, match="out of reach"):
        other.read([0])  # opened when there was no copy yet
    field = inputs[0].fields()[0]
    copy = reader.copies.folder.root / shard_key(field, 1)
    assert copy.read_bytes() == (local / shard_key(field, 1)).read_bytes()


def test_training_fetches_the_store_once(tmp_path: Path, url: str, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of training from the bucket with --local-cache, the network cut before the second: every step's losses
    are those of training from the same store in a folder, bit for bit."""
    data = draw_scenes(tmp_path / "scenes", 8)
    for out in (tmp_path / "store.zarr", url):
        assert dump(data, out) == 0
    config = configuration(tmp_path, tmp_path)
    loop.train(replace(config, output=replace(config.output, name="local")))
    prepare, epoch, opened = loop.prepare_data, Feed.epoch, []

    def prepare_and_keep(*arguments: Any) -> Any:
        opened.append(prepare(*arguments))
        return opened[-1]

    def cut_before_the_second(feed: Feed, number: int, first_step: int = 0) -> Iterator[TrainingStep]:
        if number == 1:
            opened[0].reader.copies.wait()
            wire.cut()
        return epoch(feed, number, first_step)

    monkeypatch.setattr(loop, "prepare_data", prepare_and_keep)
    monkeypatch.setattr(Feed, "epoch", cut_before_the_second)
    remote = replace(config.data, cache=url, local_cache=tmp_path / "copies")
    loop.train(replace(config, data=remote, output=replace(config.output, name="remote")))
    ours, theirs = ([line["losses"] for line in steps_of(tmp_path / name)] for name in ("remote", "local"))
    assert len(ours) == 4
    assert ours == theirs


def test_the_local_cache_keeps_within_its_size(tmp_path: Path, url: str, inputs: tuple[Manifest, Plan]) -> None:
    """A bound below the store's size: the folder stays below it and holds something; records are right."""
    local = write_both(tmp_path, url, inputs)
    whole = sum(len(data) for key, data in contents(local).items() if "/c." in key)
    reader = CacheReader(url, local_cache=tmp_path / "copies", local_cache_bytes=whole // 2)
    assert_same_records(reader, CacheReader(local))
    assert reader.copies is not None
    reader.copies.wait()
    assert_same_records(reader, CacheReader(local))
    used = sum(len(data) for data in contents(tmp_path / "copies").values())
    assert 0 < used <= whole // 2


@pytest.mark.parametrize("damage", ["page", "index", "end"])
def test_damaged_objects_are_noticed_and_left_out(url: str, inputs: tuple[Manifest, Plan], damage: str) -> None:
    """A flipped byte of a page, of the index, or an object cut short: reading names image, view and shard; read_sound
    gives the other records, equal to those read before."""
    manifest, plan = inputs
    write_all(url, manifest, plan)
    before = CacheReader(url).read(range(len(plan.table)))
    bucket, key = locate(url), shard_key(manifest.fields()[0], 1)
    assert isinstance(bucket, Bucket)
    content = bytearray(bucket.read(key))
    if damage == "end":
        content = content[: len(content) // 2]
    else:
        content[10 if damage == "page" else len(content) - 10] ^= 1
    bucket.put(key, bytes(content))
    with pytest.raises(CorruptRecord, match=r"tokens/c\.1\.0.* image \d+, view \d") as caught:
        CacheReader(url).read(range(len(plan.table)))
    assert caught.value.shard == 1
    batch, dropped = CacheReader(url).read_sound(range(len(plan.table)))
    in_shard = manifest.layout.shard_samples
    expected = [in_shard] if damage == "page" else list(range(in_shard, 2 * in_shard))
    assert [error.row for error in dropped] == expected
    kept = np.setdiff1d(np.arange(len(plan.table)), expected)
    assert torch.equal(batch.logits, before.logits[kept])
    sizes = np.diff(batch.token_offsets)
    np.testing.assert_array_equal(sizes, plan.table.token_count[kept])
