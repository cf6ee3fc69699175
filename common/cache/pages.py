"""Reading a batch of samples in one call that needs no GIL: positioned reads into place, pages checked while hot, and
the rest of the batch asked for at once where a read turns out to come from a disk.

A page is its rows and their crc32c. One `preadv` scatters several pages: rows to where they belong, sums aside. Doing
this for all fields of a batch in one compiled call leaves nothing per page or field to Python, whose threads would
queue for the GIL where records are small.

Nothing here checks an index: a table that `common.cache.validate` let pass says where rows are and how many there are.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from common.cache import crc32c
from common.cache.schema import CHECKSUM_BYTES
from kernels.jit import inlined, jit
from kernels.threads import add

GROUP_BYTES = 2**17  # a piece: read at once and checked before the next, in a core's second-level cache
GROUP_PAGES = 256  # two buffers a page: below every system's IOV_MAX of 1024
SCATTERED_BYTES = 2048  # pages from this size on are put into place by the kernel

MONOTONIC, WILL_NEED = time.CLOCK_MONOTONIC, getattr(os, "POSIX_FADV_WILLNEED", 0)
SLOW_NS = 400_000  # a piece that takes longer, and 1 ns a byte, comes from a disk: from memory it takes a tenth

WHOLE, ENDS_EARLY, CHANGED = 0, 1, 2
REASONS = {ENDS_EARLY: "the file ends too early", CHANGED: "the checksum of a page does not match"}

Integers = npt.NDArray[np.int64]

_preadv: Any = types.ExternalFunction("preadv", types.int64(types.int32, types.uint64, types.int32, types.int64))
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))
_memcpy: Any = types.ExternalFunction("memcpy", types.uint64(types.uint64, types.uint64, types.uint64))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))
_advised = types.int32(types.int32, types.int64, types.int64, types.int32)
_posix_fadvise: Any = (
    types.ExternalFunction("posix_fadvise", _advised)
    if hasattr(os, "posix_fadvise")
    else inlined()(lambda file, at, size, advice: 0)  # macOS reads without it
)
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())

# Rows of Placement.samples and of Placement.fields.
SHARD, ROW, PAGE, TOKENS = 0, 1, 2, 3
PER_TOKEN, ROW_BYTES, PAGE_BYTES, FILE = 0, 1, 2, 3


class Placement(NamedTuple):
    """Where the records of a batch are in their shard files and where they go: B samples, F fields, all int64.

    samples: (4, B + 1). SHARD: which it is in. ROW, PAGE: its row in sample fields and its first page in token fields,
    counted in its own shard. TOKENS: where its token rows begin in the batch; the last entry is their number.
    fields: (4, F). PER_TOKEN: 1 for token fields. ROW_BYTES. PAGE_BYTES: of a page without its checksum. FILE: which of
    a shard's files it is. address: (F,) of the first row.
    """

    samples: Integers
    fields: Integers
    address: Integers

    def range_of(self, sample: int, field: int) -> tuple[int, int, int]:
        """Byte offset of its first page, address and bytes of its rows; the last page may have more."""
        offset, address, size = _range_of(*self, sample, field)
        return int(offset), int(address), int(size)


class Pieces(NamedTuple):
    """The samples of a batch to be read, cut into pieces that threads take one after another until none is left.

    samples: (N,) which of the batch. files: (N, files of a shard) int32 descriptors. progress: (4,), how many pieces
    were taken, how many of them are done, how many threads found one slow, and whether one met an error. found: (N, F),
    WHOLE, ENDS_EARLY or CHANGED.
    """

    samples: Integers
    files: npt.NDArray[np.int32]
    progress: Integers
    found: npt.NDArray[np.int8]


@jit()
def place_samples(
    rows: Any, token_count: Any, token_offset: Any, shard_samples: int, shard_tokens: int, page_tokens: int
) -> Any:
    """Placement.samples of these rows (B,) of the sample table, whose columns token_count and token_offset are."""
    samples = np.empty((4, len(rows) + 1), np.int64)
    samples[TOKENS, 0] = 0
    for i in range(len(rows)):
        shard = rows[i] // shard_samples
        samples[SHARD, i] = shard
        samples[ROW, i] = rows[i] - shard * shard_samples
        samples[PAGE, i] = (token_offset[rows[i]] - shard * shard_tokens) // page_tokens
        samples[TOKENS, i + 1] = samples[TOKENS, i] + token_count[rows[i]]
    return samples


@jit()
def count_up(offsets: Any, into: Any) -> None:
    """into[offsets[i] : offsets[i + 1]] = 0, 1, 2, ... for all i."""
    for i in range(len(offsets) - 1):
        part = into[offsets[i] : offsets[i + 1]]
        for position in range(part.size):
            part[position] = np.int32(position)


@jit()
def find_misplaced(offsets: Any, positions: Any, tokens: Any, misplaced: Any) -> None:
    """misplaced[i] = True where positions[offsets[i] : offsets[i + 1]] do not ascend within 0 .. tokens[i] - 1."""
    for i in range(len(offsets) - 1):
        before = -1
        for s in range(offsets[i], offsets[i + 1]):
            if positions[s] <= before or positions[s] >= tokens[i]:
                misplaced[i] = True
            before = positions[s]


def read_pieces(placement: Placement, pieces: Pieces, leave_bytes: int, verify: bool) -> bool:
    """Take pieces and read them, until none is left but those of the last `leave_bytes`. With 0 to leave, return when
    all pieces are done, by whichever thread: whether all are whole."""
    return bool(_read_pieces(*placement, *pieces, leave_bytes, verify))


def memory_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of memory that somebody else keeps alive, as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@jit()
def _range_of(samples: Any, fields: Any, address: Any, sample: Any, field: Any) -> Any:
    first_page, first_row, rows = samples[ROW, sample], sample, 1
    if fields[PER_TOKEN, field]:
        first_page, first_row = samples[PAGE, sample], samples[TOKENS, sample]
        rows = samples[TOKENS, sample + 1] - first_row
    offset, row_bytes = first_page * (fields[PAGE_BYTES, field] + CHECKSUM_BYTES), fields[ROW_BYTES, field]
    return offset, address[field] + first_row * row_bytes, rows * row_bytes


@jit()
def _read_scattered(
    file: Any, at: Any, page: Any, pages: Any, into: Any, size: Any, aside: Any, buffers: Any, verify: bool
) -> Any:
    """Read pages, of which `size` bytes go to `into`; the sums and what the last page has more go aside."""
    count, sums = 0, np.empty(GROUP_PAGES, dtype=np.uint32)
    for k in range(pages):
        wanted = min(page, size - k * page)
        buffers[count, 0], buffers[count, 1] = into + k * page, wanted
        count += 1
        if wanted < page:
            buffers[count, 0], buffers[count, 1] = aside.ctypes.data, page - wanted
            count += 1
        buffers[count, 0], buffers[count, 1] = sums.ctypes.data + CHECKSUM_BYTES * k, CHECKSUM_BYTES
        count += 1
    got = _preadv(np.int32(file), np.uint64(buffers.ctypes.data), np.int32(count), np.int64(at))
    if got != pages * (page + CHECKSUM_BYTES):
        return ENDS_EARLY
    if verify:
        for k in range(pages):
            wanted = min(page, size - k * page)
            crc = crc32c.extend(0, into + k * page, wanted)
            if wanted < page:
                crc = crc32c.extend(crc, aside.ctypes.data, page - wanted)
            if crc != sums[k]:
                return CHANGED
    return WHOLE


@jit()
def _read_stripped(file: Any, at: Any, page: Any, pages: Any, into: Any, size: Any, aside: Any, verify: bool) -> Any:
    """The same for small pages, of which the kernel would handle each buffer for longer than a copy takes."""
    stride, source = page + CHECKSUM_BYTES, np.int64(aside.ctypes.data)
    got = _pread(np.int32(file), np.uint64(source), np.uint64(pages * stride), np.int64(at))
    if got != pages * stride:
        return ENDS_EARLY
    for k in range(pages):
        here = source + k * stride
        if verify and crc32c.extend(0, here, page) != crc32c.load_sum(np.uint64(here + page)):
            return CHANGED
        _memcpy(np.uint64(into + k * page), np.uint64(here), np.uint64(min(page, size - k * page)))
    return WHOLE


@jit()
def _now_ns(clock: Any) -> Any:
    """clock: (2,) int64, memory for C's struct timespec."""
    _clock_gettime(np.int32(MONOTONIC), np.uint64(clock.ctypes.data))
    return clock[0] * 1_000_000_000 + clock[1]


@jit()
def _ask_for(samples: Any, fields: Any, address: Any, chosen: Any, files: Any, first: int) -> None:
    """Have the kernel fetch the samples from `first` on, all at once: a disk is faster with many requests to choose
    from than with one of each thread."""
    for i in range(first, len(chosen)):
        for field in range(len(address)):
            at, _, size = _range_of(samples, fields, address, chosen[i], field)
            page = fields[PAGE_BYTES, field]
            stored = -(-size // page) * (page + CHECKSUM_BYTES)
            _posix_fadvise(files[i, fields[FILE, field]], at, stored, np.int32(WILL_NEED))


@jit()
def _read_pieces(
    samples: Any,
    fields: Any,
    address: Any,
    chosen: Any,
    files: Any,
    progress: Any,
    found: Any,
    leave_bytes: int,
    verify: bool,
) -> Any:
    aside = np.empty(max(GROUP_BYTES, fields[PAGE_BYTES].max()), dtype=np.uint8)
    buffers = np.empty((2 * GROUP_PAGES + 1, 2), dtype=np.int64)  # address and size of each: C's struct iovec
    remaining = 0
    for i in range(len(chosen)):
        for field in range(len(address)):
            remaining += _range_of(samples, fields, address, chosen[i], field)[2]
    clock = np.empty(2, np.int64)
    piece, mine = 0, add(progress, 0, 1)
    for i in range(len(chosen)):
        for field in range(len(address)):
            at, into, left = _range_of(samples, fields, address, chosen[i], field)
            page, file = fields[PAGE_BYTES, field], files[i, fields[FILE, field]]
            while left > 0:
                pages = min(max(1, GROUP_BYTES // (page + CHECKSUM_BYTES)), GROUP_PAGES, -(-left // page))
                size = min(left, pages * page)
                if piece == mine:
                    began_ns = _now_ns(clock)
                    if page >= SCATTERED_BYTES:
                        state = _read_scattered(file, at, page, pages, into, size, aside, buffers, verify)
                    else:
                        state = _read_stripped(file, at, page, pages, into, size, aside, verify)
                    if state != WHOLE:
                        found[i, field] = state
                    if progress[2] == 0 and _now_ns(clock) - began_ns > SLOW_NS + size and add(progress, 2, 1) == 0:
                        _ask_for(samples, fields, address, chosen, files, i)
                    add(progress, 1, 1)
                    if leave_bytes > 0 and remaining - size <= leave_bytes:
                        return False
                    mine = add(progress, 0, 1)
                at, into, left = at + pages * (page + CHECKSUM_BYTES), into + size, left - size
                remaining -= size
                piece += 1
    while leave_bytes == 0 and progress[1] < piece and progress[3] == 0:  # the others are at their last pieces
        _sched_yield()
    return not found.any()
