"""In what order a shard reaches the disk: what a power cut can take, and what it cannot."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cache.schema import CodecInfo
from common.cache.storage import Folder, publish_all
from common.cache.writer import ShardWriter, create_store, finished_shards
from tests.benchmarks.cache_stores import plain_constants
from tests.test_cache import make_record, make_store_inputs


def test_a_shard_reaches_the_disk_before_its_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that matters, recorded: each file is brought to the disk in its full size before any file of the shard
    is renamed; when `commit` returns, each folder has been brought to the disk after the rename in it. So the shard is
    whole wherever all its names are, and its names are there to stay. One fsync for each file and each folder."""
    manifest, plan = make_store_inputs(CodecInfo("int8", 0.5), images=12, views=2)
    store = tmp_path / "store.zarr"
    create_store(store, manifest, plan, plain_constants(manifest))
    events: list[tuple[str, str, int]] = []  # what, to which path, of how many bytes
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        events.append(("fsync", path, os.fstat(descriptor).st_size))

    def recorded_rename(path: Path, target: Any) -> Path:
        events.append(("rename", str(path), path.stat().st_size))
        result = rename(path, target)
        events.append(("renamed", str(result.parent), 0))
        return result

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    writer = ShardWriter(store, manifest, plan.table, 0)
    writer.add(make_record(manifest, plan, row) for row in range(manifest.layout.shard_samples))
    assert events == []
    writer.commit()

    fields = len(manifest.fields())
    kinds = [kind for kind, _, _ in events]
    assert kinds.count("fsync") == 2 * fields
    assert kinds.count("rename") == fields
    first_rename, last_renamed = kinds.index("rename"), len(kinds) - 1 - kinds[::-1].index("renamed")
    synced = {(path, size) for kind, path, size in events[:first_rename] if kind == "fsync"}
    assert {(path, size) for kind, path, size in events if kind == "rename"} == synced
    settled = {path for kind, path, _ in events[last_renamed:] if kind == "fsync"}
    assert settled == {str(store / field.name) for field in manifest.fields()}
    assert finished_shards(store, manifest).tolist()[:2] == [True, False]


def test_files_wait_for_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files: no fsync returns before all three have begun (a barrier that otherwise breaks after 10 s)."""
    barrier = threading.Barrier(3, timeout=10)
    monkeypatch.setattr(os, "fsync", lambda descriptor: barrier.wait())
    files = [Folder(tmp_path).new_file(f"{name}/c.0") for name in "abc"]
    for file in files:
        file.write([np.arange(5, dtype=np.uint8)])
    publish_all(files)
    assert [(tmp_path / name / "c.0").read_bytes() for name in "abc"] == [bytes(range(5))] * 3


def test_nothing_is_shown_when_one_file_cannot_be_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails for the second of three files: no file gets its name, and after discarding nothing is left."""
    fsync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    files = [Folder(tmp_path).new_file(f"{name}/c.0") for name in "abc"]
    with pytest.raises(OSError, match="Input/output error"):
        publish_all(files)
    assert not list(tmp_path.rglob("c.0"))
    for file in files:
        file.discard()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
