"""The cache's reader against a bare pread of the same bytes and against other formats with the same records.

Every way reads batches of 8 random records with two threads into memory that is used again for the next batch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from common.cache.buffers import BatchBuffers
from common.cache.plan import Plan
from common.cache.reader import CacheReader
from common.cache.schema import CodecInfo, Manifest
from common.cache.writer import create_store, shard_key
from tests.benchmarks import Case
from tests.benchmarks.cache_stores import make_inputs, make_record, plain_constants, write_store

BATCH = 8
BATCHES = 16  # of a call: the first after a rest is mostly waking up
THREADS = 2
RUNS = 25
SLOW_RUNS = 5
MILLION = 1_000_000

Row = dict[str, npt.NDArray[Any]]
ReadRow = Callable[[int, Row], object]  # reads one record into arrays of the right shapes


@dataclass(frozen=True)
class Kind:
    """What a record is like. codec, layers, queries, mean_side_px: as for `make_inputs`."""

    name: str
    samples: int
    codec: CodecInfo
    layers: int
    queries: int
    mean_side_px: int

    def inputs(self, samples: int | None = None) -> tuple[Manifest, Plan]:
        shape = {"layers": self.layers, "queries": self.queries, "mean_side_px": self.mean_side_px}
        return make_inputs(samples or self.samples, self.codec, **shape)


KINDS = (
    Kind("4.5 MB", 128, CodecInfo("fp16", 1.0), layers=6, queries=300, mean_side_px=530),
    Kind(
        "0.64 MB", 1024, CodecInfo("pq8", 1.0, queries=False, logits="uint8"), layers=6, queries=300, mean_side_px=780
    ),
)


def cases() -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        for kind in KINDS:
            records = Records(kind, Path(folder) / kind.name.replace(" ", ""))
            yield _warm(records, "pread")
            yield _warm(records, "pread", verify="always")
            for name in (*WAYS, "np.memmap, new batches"):
                yield _warm(records, name)
            yield _cold(records)
            shutil.rmtree(records.folder, ignore_errors=True)
        yield _opening(Path(folder) / "million.zarr")


class Records:
    """The same records in every format, written when first asked for."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.batches = np.random.default_rng(1).permutation(kind.samples).reshape(-1, BATCH)

    @cached_property
    def inputs(self) -> tuple[Manifest, Plan]:
        return self.kind.inputs()

    @cached_property
    def store(self) -> Path:
        self.folder.mkdir(parents=True)
        write_store(self.folder / "store.zarr", *self.inputs)
        return self.folder / "store.zarr"

    def record(self, row: int) -> Row:
        return dict(make_record(*self.inputs, row))

    def reading(self, name: str) -> Callable[[], object]:
        """A call that reads the next batches by the way of this name."""
        if name in ("first", "always"):
            reader, buffers = CacheReader(self.store, threads=THREADS, verify=name), BatchBuffers()
            for rows in self.batches:
                reader.read(rows, buffers)
            batches = cycle(self.batches)
            return lambda: [reader.read(rows, buffers) for rows in islice(batches, BATCHES)]
        if name == "pread":
            return self._pread()
        if name == "np.memmap, new batches":
            return self._collate()
        read = WAYS[name](self)
        destinations = cycle([self._destinations(rows) for rows in self.batches])
        pool = ThreadPoolExecutor(THREADS)
        return lambda: [list(pool.map(lambda pair: read(*pair), batch)) for batch in islice(destinations, BATCHES)]

    def _collate(self) -> Callable[[], object]:
        """What a data loader does with mapped arrays: slices concatenated into a new batch."""
        maps, starts, counts = _maps(self)
        batches, pool = cycle(self.batches), ThreadPoolExecutor(THREADS)

        def collate(name: str, rows: npt.NDArray[np.int64]) -> object:
            if len(maps[name]) == len(counts):
                return np.stack([maps[name][row] for row in rows])
            return np.concatenate([maps[name][starts[row] : starts[row] + counts[row]] for row in rows])

        return lambda: [
            list(pool.map(lambda name, rows=rows: collate(name, rows), maps)) for rows in islice(batches, BATCHES)
        ]

    @cached_property
    def _flat(self) -> Row:
        largest = int(self.inputs[1].table.token_count.max())
        return {
            field.name: np.empty((BATCH * (largest if field.per == "token" else 1), *field.row_shape), field.dtype)
            for field in self.inputs[0].fields()
        }

    def _destinations(self, rows: npt.NDArray[np.int64]) -> list[tuple[int, Row]]:
        """Where each record of a batch goes: views of one memory, the records of a field one after another."""
        manifest, plan = self.inputs
        ends = np.cumsum(plan.table.token_count[rows])
        spans = list(zip(ends - plan.table.token_count[rows], ends, strict=True))
        return [
            (
                int(row),
                {
                    field.name: self._flat[field.name][slice(*spans[index]) if field.per == "token" else index]
                    for field in manifest.fields()
                },
            )
            for index, row in enumerate(rows)
        ]

    def _pread(self) -> Callable[[], object]:
        """One os.preadv per field and record: the reader's byte ranges, checksums and all, known beforehand."""
        manifest, plan = self.inputs
        layout, table = manifest.layout, plan.table
        files: dict[tuple[str, int], int] = {}
        ranges: list[list[tuple[int, int, int]]] = []
        for row in range(len(table)):
            shard, row_in_shard = divmod(row, layout.shard_samples)
            ranges.append([])
            for field in manifest.fields():
                file = files.setdefault((field.name, shard), -1)
                if file < 0:
                    file = files[field.name, shard] = os.open(self.store / shard_key(field, shard), os.O_RDONLY)
                first, pages = row_in_shard, 1
                if field.per == "token":
                    first = (int(table.token_offset[row]) - shard * layout.shard_tokens) // layout.page_tokens
                    pages = -(-int(table.token_count[row]) // layout.page_tokens)
                page_bytes = layout.page_bytes(field)
                ranges[-1].append((file, first * page_bytes, pages * page_bytes))
        largest = max(sum(size for _, _, size in parts) for parts in ranges)
        memory = [memoryview(np.zeros(largest, dtype=np.uint8)) for _ in range(BATCH)]
        pool, batches = ThreadPoolExecutor(THREADS - 1), cycle(self.batches.tolist())

        def read(rows: Sequence[int], into: Sequence[memoryview]) -> None:
            for row, buffer in zip(rows, into, strict=True):
                at = 0
                for file, offset, size in ranges[row]:
                    os.preadv(file, [buffer[at : at + size]], offset)
                    at += size

        def read_batches() -> None:
            half = BATCH // THREADS
            for rows in islice(batches, BATCHES):
                others = [
                    pool.submit(read, rows[at : at + half], memory[at : at + half]) for at in range(half, BATCH, half)
                ]
                read(rows[:half], memory[:half])
                for other in others:
                    other.result()

        return read_batches


def _zarr_python(records: Records) -> ReadRow:
    manifest, plan = records.inputs
    group = zarr.open_group(records.store, mode="r")
    arrays: dict[str, Any] = {field.name: group[field.name] for field in manifest.fields()}

    def read(row: int, into: Row) -> None:
        start = int(plan.table.token_offset[row])
        for field in manifest.fields():
            rows = slice(start, start + int(plan.table.token_count[row])) if field.per == "token" else row
            into[field.name][...] = arrays[field.name][rows]

    return read


def _litdata(records: Records) -> ReadRow:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = records.folder / "litdata"
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for row in range(records.kind.samples):
        writer[row] = records.record(row)
    writer.done()
    writer.merge(1)
    own = threading.local()  # a data set is not for several threads

    def read(row: int, into: Row) -> None:
        if not hasattr(own, "data"):
            own.data = StreamingDataset(str(folder))
        for name, value in own.data[row].items():
            into[name][...] = value

    return read


def _safetensors(records: Records) -> ReadRow:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    folder = records.folder / "safetensors"
    folder.mkdir()
    for row in range(records.kind.samples):
        save_file({name: np.ascontiguousarray(value) for name, value in records.record(row).items()}, folder / str(row))

    def read(row: int, into: Row) -> None:
        with safe_open(folder / str(row), framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                into[name][...] = file.get_tensor(name)

    return read


def _h5py(records: Records) -> ReadRow:
    import h5py

    path = records.folder / "records.h5"
    with h5py.File(path, "w") as file:
        for row in range(records.kind.samples):
            group = file.create_group(str(row))
            for name, value in records.record(row).items():
                group.create_dataset(name, data=value)
    opened = h5py.File(path, "r")

    def read(row: int, into: Row) -> None:
        group = opened[str(row)]
        for name, values in into.items():
            group[name].read_direct(values)

    return read


def _maps(records: Records) -> tuple[Row, npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """A mapped file for each field, all records one after another; first row and number of rows of token fields."""
    manifest, plan = records.inputs
    counts = plan.table.token_count
    starts = np.cumsum(counts, dtype=np.int64) - counts
    maps: Row = {}
    for field in manifest.fields():
        path = records.folder / f"{field.name}.bin"
        if not path.exists():
            with path.open("wb") as file:
                for row in range(len(counts)):
                    file.write(records.record(row)[field.name].tobytes())
        shape = (int(counts.sum()) if field.per == "token" else len(counts), *field.row_shape)
        maps[field.name] = np.memmap(path, mode="r", dtype=field.dtype, shape=shape)
    return maps, starts, counts


def _memmap(records: Records) -> ReadRow:
    maps, starts, counts = _maps(records)

    def read(row: int, into: Row) -> None:
        for field in records.inputs[0].fields():
            span = slice(starts[row], starts[row] + counts[row]) if field.per == "token" else row
            into[field.name][...] = maps[field.name][span]

    return read


WAYS: dict[str, Callable[[Records], ReadRow]] = {
    "zarr-python": _zarr_python,
    "LitData": _litdata,
    "safetensors": _safetensors,
    "h5py": _h5py,
    "np.memmap": _memmap,
}


def _warm(records: Records, name: str, verify: str = "first") -> Case:
    """Records that were read before; verify="always" does what a first reading does."""
    return Case(
        f"cache, {records.kind.name} records: {name}{', verifying' if verify == 'always' else ''}",
        _later(lambda: records.reading(verify)),
        _later(lambda: records.reading(name)),
        f"{BATCHES} batches of {BATCH}",
        runs=SLOW_RUNS if name == "zarr-python" else RUNS,
    )


def _cold(records: Records) -> Case:
    def forget() -> None:
        for path in records.store.glob("*/c.*"):
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    return Case(
        f"cache, {records.kind.name} records: pread, cold",
        _later(lambda: records.reading("first")),
        _later(lambda: records.reading("pread")),
        f"{BATCHES} batches of {BATCH}",
        runs=RUNS,
        before=forget,
    )


def make_empty_store(store: Path, manifest: Manifest, plan: Plan) -> None:
    """A store whose shard files are all there and hold nothing, which is all that opening one sees of them."""
    create_store(store, manifest, plan, plain_constants(manifest))
    for field in manifest.fields():
        for shard in range(manifest.layout.shards):
            (store / shard_key(field, shard)).touch()


def _opening(store: Path) -> Case:
    """Opening a store of a million small records against zarr-python loading its sample table."""

    def prepare() -> None:
        if not store.exists():
            make_empty_store(store, *KINDS[1].inputs(MILLION))

    def ours() -> Callable[[], object]:
        prepare()
        return lambda: CacheReader(store).close()

    def reference() -> Callable[[], object]:
        prepare()
        return lambda: {name: array[:] for name, array in zarr.open_group(store, path="samples", mode="r").arrays()}

    return Case("cache, 1,000,000 records: open", _later(ours), _later(reference), "a store opened", runs=RUNS)


def _later(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that is made when it is first needed: cases that are not run cost nothing."""
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call
