"""Reading a batch of samples in one call that needs no GIL: positioned reads into place, pages checked while hot.

A page is its rows and their crc32c. One `preadv` scatters several pages: rows to where they belong, sums aside. Doing
this for all fields of a batch in one compiled call leaves nothing per page or field to Python, whose threads would
queue for the GIL where records are small.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from common.cache import crc32c
from common.cache.schema import CHECKSUM_BYTES

GROUP_BYTES = 2**18  # a piece: read at once and checked before the next, in a core's second-level cache
GROUP_PAGES = 256  # two buffers a page: below every system's IOV_MAX of 1024
SCATTERED_BYTES = 2048  # pages from this size on are put into place by the kernel

WHOLE, ENDS_EARLY, CHANGED = 0, 1, 2
REASONS = {ENDS_EARLY: "the file ends too early", CHANGED: "the checksum of a page does not match"}

Integers = npt.NDArray[np.int64]

_preadv: Any = types.ExternalFunction("preadv", types.int64(types.int32, types.uint64, types.int32, types.int64))
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))
_memcpy: Any = types.ExternalFunction("memcpy", types.uint64(types.uint64, types.uint64, types.uint64))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


@dataclass(frozen=True)
class Placement:
    """Where the records of a batch are in their shard files and where they go: B samples, F fields, int64.

    row_in_shard, page_in_shard: (B,) its row in sample fields and its first page in token fields, counted in its own
    shard. token_offsets: (B + 1,) of its token rows in the batch. address: (F,) of the first row. per_token: (F,)
    bool. row_bytes: (F,). page_bytes: (F,) of a page without its checksum.
    """

    row_in_shard: Integers
    page_in_shard: Integers
    token_offsets: Integers
    address: Integers
    per_token: npt.NDArray[np.bool_]
    row_bytes: Integers
    page_bytes: Integers

    def range_of(self, sample: int, field: int) -> tuple[int, int, int]:
        """Byte offset of its first page, address and bytes of its rows; the last page may have more."""
        offset, address, size = _range_of(*vars(self).values(), sample, field)  # type: ignore[call-arg]
        return int(offset), int(address), int(size)


@dataclass(frozen=True)
class Pieces:
    """The samples of a batch to be read, cut into pieces that threads take one after another until none is left.

    samples: (N,) which of the batch. files: (N, F) descriptors of their shard files. progress: (2,), how many pieces
    were taken and how many of them are done. found: (N, F), WHOLE, ENDS_EARLY or CHANGED.
    """

    samples: Integers
    files: Integers
    progress: Integers
    found: npt.NDArray[np.int8]

    @classmethod
    def of(cls, samples: Integers, files: Integers) -> Pieces:
        return cls(samples, files, np.zeros(2, np.int64), np.zeros(files.shape, np.int8))


def read_pieces(placement: Placement, pieces: Pieces, leave_bytes: int, verify: bool) -> None:
    """Take pieces and read them, until none is left but those of the last `leave_bytes`. With 0 to leave, return when
    all pieces are done, by whichever thread."""
    _read_pieces(*vars(placement).values(), *vars(pieces).values(), leave_bytes, verify)  # type: ignore[call-arg]


def memory_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of memory that somebody else keeps alive, as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _range_of(
    row_in_shard: Any,
    page_in_shard: Any,
    token_offsets: Any,
    address: Any,
    per_token: Any,
    row_bytes: Any,
    page_bytes: Any,
    sample: Any,
    field: Any,
) -> Any:
    first_page, first_row, rows = row_in_shard[sample], sample, 1
    if per_token[field]:
        first_page, first_row = page_in_shard[sample], token_offsets[sample]
        rows = token_offsets[sample + 1] - first_row
    offset = first_page * (page_bytes[field] + CHECKSUM_BYTES)
    return offset, address[field] + first_row * row_bytes[field], rows * row_bytes[field]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
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


def _add_one(context: Any, counters: Any, index: Any) -> Any:
    """counters[index] += 1, in one step among all threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", place, context.get_constant(types.int64, 1), "seq_cst")

    return types.int64(counters, types.int64), generate


_add: Any = intrinsic(_add_one)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _read_pieces(
    row_in_shard: Any,
    page_in_shard: Any,
    token_offsets: Any,
    address: Any,
    per_token: Any,
    row_bytes: Any,
    page_bytes: Any,
    samples: Any,
    files: Any,
    progress: Any,
    found: Any,
    leave_bytes: int,
    verify: bool,
) -> None:
    aside = np.empty(max(GROUP_BYTES, page_bytes.max()), dtype=np.uint8)
    buffers = np.empty((2 * GROUP_PAGES + 1, 2), dtype=np.int64)  # address and size of each: C's struct iovec
    token_bytes, sample_bytes = row_bytes[per_token].sum(), row_bytes[~per_token].sum()
    remaining = 0
    for sample in samples:
        remaining += sample_bytes + token_bytes * (token_offsets[sample + 1] - token_offsets[sample])
    piece, mine = 0, _add(progress, 0)
    for i in range(len(samples)):
        for field in range(len(row_bytes)):
            at, into, left = _range_of(
                row_in_shard,
                page_in_shard,
                token_offsets,
                address,
                per_token,
                row_bytes,
                page_bytes,
                samples[i],
                field,
            )
            page = page_bytes[field]
            while left > 0:
                pages = min(max(1, GROUP_BYTES // (page + CHECKSUM_BYTES)), GROUP_PAGES, -(-left // page))
                size = min(left, pages * page)
                if piece == mine:
                    if page >= SCATTERED_BYTES:
                        state = _read_scattered(files[i, field], at, page, pages, into, size, aside, buffers, verify)
                    else:
                        state = _read_stripped(files[i, field], at, page, pages, into, size, aside, verify)
                    if state != WHOLE:
                        found[i, field] = state
                    _add(progress, 1)
                    if leave_bytes > 0 and remaining - size <= leave_bytes:
                        return
                    mine = _add(progress, 0)
                at, into, left = at + pages * (page + CHECKSUM_BYTES), into + size, left - size
                remaining -= size
                piece += 1
    while leave_bytes == 0 and progress[1] < piece:  # the others are at their last pieces
        _sched_yield()
