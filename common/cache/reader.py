"""Reading records for training: byte ranges from the shard index straight into batch buffers.

zarr-python reads any store too (the tests compare every byte) but re-reads the shard index on each call and fetches
page by page. Here a sample's pages, which stand side by side, arrive with one `preadv` per field, which releases the
GIL, in a few threads of the training process: DataLoader workers would send megabytes through a pipe.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from common.cache.plan import SampleTable
from common.cache.schema import ATTRIBUTE, CHECKSUM_BYTES, INDEX_ENTRY_BYTES, MISSING, Field, Manifest
from common.cache.writer import CONSTANTS_GROUP, finished_shards, read_skipped, read_table, shard_path
from common.errors import UserError
from common.records import CachedBatch

Integers = npt.NDArray[np.int64]

OPEN_FILES = 256
READ_THREADS = 2
BUFFERS_PER_CALL = 1000  # below every system's IOV_MAX of 1024


class CorruptRecord(UserError):
    """A page whose checksum does not match, or a file that ends too early."""


@dataclass
class BatchBuffers:
    """Memory that one batch is read into, reused by later batches: it grows to the largest batch and stays.

    The tensors of a CachedBatch are views of it; they are valid until it is passed to `read` again.
    """

    pin: bool = False
    _flat: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64))
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = torch.empty(size + size // 4, dtype=getattr(torch, dtype), pin_memory=self.pin)
            self._flat[name] = flat
        return flat[:size].view(*shape)


class CacheReader:
    """A store, opened for reading. `complete` says whether every shard is there; `rows` lists what can be read."""

    def __init__(self, path: Path | str, *, verify: bool = True, threads: int = READ_THREADS) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.table: SampleTable = read_table(self.path)
        self.fields = self.manifest.fields()
        self.constants = read_constants(self.path)
        finished = finished_shards(self.path, self.manifest)
        self.finished_shards = finished
        self._readable = finished[np.arange(len(self.table)) // self.manifest.layout.shard_samples]
        self._readable[read_skipped(self.path)] = False
        self._verify = verify
        self._shards = _OpenShards(self.path, self.manifest)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cache-reader")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def complete(self) -> bool:
        return bool(self.finished_shards.all())

    def rows(self, view: int | None = None) -> npt.NDArray[np.intp]:
        """The rows of all samples that are in finished shards, of one view or of all."""
        chosen = self._readable if view is None else self._readable & (self.table.view == view)
        return np.flatnonzero(chosen)

    def read(self, rows: Sequence[int] | npt.NDArray[np.intp], buffers: BatchBuffers | None = None) -> CachedBatch:
        """The records of these samples, in this order. CorruptRecord names the sample and the shard."""
        rows = np.asarray(rows, dtype=np.int64)
        counts = self.table.token_count[rows].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        buffers = buffers or BatchBuffers()
        tensors = {
            f.name: buffers.tensor(f.name, (offsets[-1] if f.per == "token" else len(rows), *f.row_shape), f.dtype)
            for f in self.fields
        }
        flat = {name: _bytes_of(tensor) for name, tensor in tensors.items()}

        def read_sample(index: int) -> None:
            for f in self.fields:
                first, last = (offsets[index], offsets[index + 1]) if f.per == "token" else (index, index + 1)
                self._read_field(f, int(rows[index]), flat[f.name][first * f.row_bytes : last * f.row_bytes])

        list(self._pool.map(read_sample, range(len(rows))))
        return self._batch(rows, offsets, tensors)

    def close(self) -> None:
        self._pool.shutdown()
        self._shards.close()

    def _read_field(self, field: Field, row: int, into: npt.NDArray[np.uint8]) -> None:
        layout = self.manifest.layout
        shard, row_in_shard = divmod(row, layout.shard_samples)
        if field.per == "token":
            row_in_shard = int(self.table.token_offset[row]) - shard * layout.shard_tokens
        page_bytes = layout.page_bytes(field) - CHECKSUM_BYTES
        first_page, pages = row_in_shard // layout.page_rows(field), -(-len(into) // page_bytes)
        try:
            opened = self._shards.get(field, shard)
            opened.read(first_page, pages, page_bytes, into, self._verify)
        except (OSError, EOFError, ValueError) as error:
            image_id, view = self.table.image_id[row], self.table.view[row]
            raise CorruptRecord(
                f"{shard_path(self.path, field, shard)}: the record of image {image_id}, view {view} is damaged:"
                f" {error};"
                f" `python -m teacher_dump verify {self.path}` lists all damage, dumping again mends it"
            ) from None

    def _batch(
        self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], read: dict[str, Tensor]
    ) -> CachedBatch:
        positions = read.get("token_positions")
        if positions is None:
            positions = torch.cat([torch.arange(int(n)) for n in np.diff(offsets)]) if len(rows) else torch.zeros(0)
        return CachedBatch(
            tokens=read["tokens"],
            token_scales=read.get("token_scales"),
            channel_scale=self.constants.get("channel_scale"),
            channel_shift=self.constants.get("channel_shift"),
            token_positions=positions.long(),
            token_weights=read["token_weights"],
            token_offsets=torch.from_numpy(offsets),
            level_shapes=torch.from_numpy(self.table.level_shapes[rows].astype(np.int64)),
            queries=read["queries"],
            logits=read["logits"],
            boxes_cxcywh=read["boxes_cxcywh"],
            quality=read["quality"],
            assignment=read["assignment"].long(),
        )


class _OpenShard:
    """An open shard file of one field and its index, (pages, 2) of offset and length."""

    def __init__(self, path: Path, pages: int) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        size = pages * INDEX_ENTRY_BYTES
        end = os.fstat(self._fd).st_size
        tail = np.empty(size + CHECKSUM_BYTES, dtype=np.uint8)
        if end < len(tail) or os.preadv(self._fd, [tail], end - len(tail)) != len(tail):
            raise EOFError("the file ends before its index")
        if google_crc32c.value(tail[:size]) != int(tail[size:].view("<u4")[0]):
            raise ValueError("the checksum of the shard index does not match")
        self._index = tail[:size].view("<u8").reshape(pages, 2)

    def read(self, first: int, pages: int, page_bytes: int, into: npt.NDArray[np.uint8], verify: bool) -> None:
        """Read whole pages into `into`; what the last page has beyond its end is read aside."""
        offset = int(self._index[first, 0])
        if offset == MISSING:
            raise ValueError("its pages were never written")
        expected = np.uint64(offset) + np.arange(pages, dtype=np.uint64) * np.uint64(page_bytes + CHECKSUM_BYTES)
        if not np.array_equal(self._index[first : first + pages, 0], expected):
            raise ValueError("its pages do not stand side by side")
        spare = np.empty(pages * page_bytes - len(into), dtype=np.uint8)
        sums = np.empty((pages, CHECKSUM_BYTES), dtype=np.uint8)
        parts: list[npt.NDArray[np.uint8]] = []
        for page in range(pages):
            parts.append(into[page * page_bytes : (page + 1) * page_bytes])
            if page == pages - 1 and len(spare):
                parts.append(spare)
            parts.append(sums[page])
        for start in range(0, len(parts), BUFFERS_PER_CALL):
            chunk = parts[start : start + BUFFERS_PER_CALL]
            size = sum(len(part) for part in chunk)
            if os.preadv(self._fd, chunk, offset) != size:
                raise EOFError("the file ends too early")
            offset += size
        if verify:
            stored = sums.view("<u4")[:, 0]
            for page in range(pages):
                value = google_crc32c.value(into[page * page_bytes : (page + 1) * page_bytes])
                if page == pages - 1 and len(spare):
                    value = google_crc32c.extend(value, spare)
                if value != stored[page]:
                    raise ValueError(f"the checksum of page {first + page} does not match")


class _OpenShards:
    """The most recently used shard files, kept open.

    A file that falls out of use is closed when the last reader lets go of it, so that no thread reads a closed one.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._store, self._layout = store, manifest.layout
        self._open: OrderedDict[tuple[str, int], _OpenShard] = OrderedDict()
        self._lock = Lock()

    def get(self, field: Field, shard: int) -> _OpenShard:
        key = (field.name, shard)
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                opened = _OpenShard(shard_path(self._store, field, shard), self._layout.shard_pages(field))
                self._open[key] = opened
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return opened

    def close(self) -> None:
        with self._lock:
            self._open.clear()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`. UserError if there is none."""
    if not (path / "zarr.json").is_file():
        raise UserError(
            f"{path}: expected a store written by `python -m teacher_dump`, found"
            f" {'a folder without zarr.json' if path.exists() else 'nothing'}; name the store with --cache"
        )
    try:
        attributes = zarr.open_group(path, mode="r").attrs
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}/zarr.json is not a Zarr v3 group ({error}); dump the store again") from None
    return Manifest.from_json(attributes.get(ATTRIBUTE), str(path))


def read_constants(path: Path) -> dict[str, Tensor]:
    group = zarr.open_group(path, path=CONSTANTS_GROUP, mode="r")
    return {name: torch.from_numpy(np.asarray(array[:])) for name, array in group.arrays()}


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    return tensor.view(-1).view(torch.uint8).numpy()
