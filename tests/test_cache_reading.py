"""How the reader goes about reading: with any number of threads, from memory or from a disk."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cache import pages
from common.cache.buffers import BatchBuffers
from common.cache.reader import CacheReader
from common.cache.schema import CHECKSUM_BYTES, CodecInfo, Field
from common.cache.writer import shard_key
from tests.benchmarks.cache_stores import make_inputs, make_record, write_store

SAMPLES = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of a megabyte a sample: several pieces each."""
    path = tmp_path_factory.mktemp("reading") / "store.zarr"
    write_store(path, *_inputs())
    return path


def _inputs():  # type: ignore[no-untyped-def]
    return make_inputs(SAMPLES, CodecInfo("int8", 1.0), layers=2, queries=20, mean_side_px=280)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_reads_the_same(store: Path, threads: int) -> None:
    """Twenty batches into the same buffers, checksums compared, against the bytes given to the writer: equal."""
    manifest, plan = _inputs()
    reader, buffers = CacheReader(store, threads=threads, verify="always"), BatchBuffers()
    generator = np.random.default_rng(threads)
    for size in (1, 8, 8, 3, *[5] * 16):
        rows = generator.permutation(SAMPLES)[:size]
        batch = reader.read(rows, buffers)
        records = [make_record(manifest, plan, row) for row in rows]
        for name in ("tokens", "token_weights"):
            expected = np.concatenate([record[name] for record in records])
            assert getattr(batch, name).numpy().tobytes() == expected.tobytes()
        for name in ("logits", "quality", "assignment"):
            expected = np.stack([record[name] for record in records]).astype(getattr(batch, name).numpy().dtype)
            assert getattr(batch, name).numpy().tobytes() == expected.tobytes()
    reader.close()


@pytest.mark.parametrize("closed", [True, False])
def test_threads_end_with_the_reader(store: Path, closed: bool) -> None:
    """The threads of a reader are gone when it is closed, or when nobody holds it any more."""
    before = set(threading.enumerate())
    reader = CacheReader(store, threads=4)
    reader.read([0, 1])
    started = set(threading.enumerate()) - before
    assert sorted(thread.name for thread in started) == ["cache-reader"] * 3
    if closed:
        reader.close()
    del reader
    gc.collect()
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()


def _in_memory(file: int, offset: int, size: int) -> bool:
    """Whether all of these bytes of a file are in the page cache, by mincore(2), which reads none of them."""
    begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
    with mmap.mmap(file, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        resident = (ctypes.c_ubyte * (-(-(offset + size - begin) // mmap.PAGESIZE)))()
        address = ctypes.c_void_p(ctypes.addressof(view) + begin)
        done = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(offset + size - begin), resident)
        del view
    assert done == 0
    return all(page & 1 for page in resident)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux is asked what is in memory, and to fetch it")
def test_a_slow_read_asks_for_the_rest_of_the_batch(store: Path) -> None:
    """Of three samples that are dropped from the page cache, the last two are asked for: these and not the first come
    to memory, though nobody reads them."""
    manifest, plan = _inputs()
    field = next(field for field in manifest.fields() if field.name == "tokens")
    rows, layout = np.array([3, 9, 20]), manifest.layout
    columns = plan.table.token_count, plan.table.token_offset
    samples = pages.place_samples(rows, *columns, layout.shard_samples, layout.shard_tokens, layout.page_tokens)
    page_bytes = layout.page_bytes(field) - CHECKSUM_BYTES
    fields = np.array([[1], [field.row_bytes], [page_bytes], [0]])
    placement = pages.Placement(samples, fields, np.zeros(1, np.int64))
    files = [os.open(store / shard_key(field, row // layout.shard_samples), os.O_RDONLY) for row in rows]

    def in_memory(index: int) -> bool:
        offset, _, size = placement.range_of(index, 0)
        return _in_memory(files[index], offset, -(-size // page_bytes) * (page_bytes + CHECKSUM_BYTES))

    try:
        for file in files:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if any(in_memory(index) for index in range(len(rows))):
            pytest.skip("this file system keeps its files in memory")
        pages._ask_for(*placement, np.arange(len(rows)), np.array(files, np.int32)[:, None], 1)
        deadline = time.monotonic() + 20
        while not (in_memory(1) and in_memory(2)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [in_memory(index) for index in range(3)] == [False, True, True]
    finally:
        for file in files:
            os.close(file)


def test_buffers_grow_and_are_given_again() -> None:
    """Rows of one length are the same tensor, of another a view of the same memory; more rows than ever before, or
    other fields, take new memory, which has room for a quarter more."""
    buffers = BatchBuffers()
    fields = (Field("a", "token", (3,), "float16"), Field("b", "sample", (), "int64"))
    address = buffers.fit(fields, 2, 100).copy()
    rows = buffers.rows("a", 100)
    assert rows.shape == (100, 3)
    assert rows.dtype == torch.float16
    assert buffers.rows("a", 100) is rows
    assert buffers.rows("a", 90).data_ptr() == rows.data_ptr() == address[0]
    assert (buffers.fit(fields, 2, 125) == address).all()
    assert buffers.rows("a", 125).data_ptr() == address[0]
    assert buffers.fit(fields, 2, 126)[0] == buffers.rows("a", 126).data_ptr()
    for samples, tokens in ((400, 10), (2, 2000)):  # neither shrinks when the other grows
        buffers.fit(fields, samples, tokens)
    address = buffers.fit(fields, 400, 2000).copy()
    assert (buffers.fit(fields, 500, 2500) == address).all()
    others = (Field("a", "sample", (), "uint8"),)
    assert buffers.fit(others, 4, 0)[0] == buffers.rows("a", 4).data_ptr()
    assert buffers.rows("a", 4).dtype == torch.uint8
