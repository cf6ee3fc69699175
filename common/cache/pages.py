"""Reading many page ranges in one call that needs no GIL: positioned reads into place, each page checked while hot.

A page is its rows and their crc32c. One `preadv` scatters several pages: rows to where they belong, sums aside. Doing
this for all fields of a batch in one compiled call leaves nothing per page to Python, whose threads would queue for
the GIL where records are small.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from common.cache import crc32c
from common.cache.schema import CHECKSUM_BYTES

GROUP_BYTES = 2**19  # read at once and checked before the next: stays in a core's second-level cache
GROUP_PAGES = 256  # two buffers a page: below every system's IOV_MAX of 1024

WHOLE, ENDS_EARLY, CHANGED = 0, 1, 2
REASONS = {ENDS_EARLY: "the file ends too early", CHANGED: "the checksum of a page does not match"}

_preadv: Any = types.ExternalFunction("preadv", types.int64(types.int32, types.uint64, types.int32, types.int64))


@dataclass(frozen=True)
class Ranges:
    """Page ranges to read, a row each; all arrays (N,) int64.

    file: descriptor of an open file. offset: of the first page's first byte. page_bytes: of a page without its sum.
    address: where the rows go. size: bytes of rows; what the last page has beyond them is checked and dropped.
    """

    file: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    page_bytes: npt.NDArray[np.int64]
    address: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]


def read_pages(ranges: Ranges, first: int, last: int, verify: bool) -> npt.NDArray[np.int64]:
    """Read ranges first..last-1. (last - first,) of WHOLE, ENDS_EARLY or CHANGED; never raises for bad files."""
    columns = (ranges.file, ranges.offset, ranges.page_bytes, ranges.address, ranges.size)
    return _read_pages(*columns, first, last, verify)  # type: ignore[no-any-return]


def memory_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of memory that somebody else keeps alive, as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _read_pages(
    file: Any, offset: Any, page_bytes: Any, address: Any, size: Any, first: int, last: int, verify: bool
) -> Any:
    found = np.zeros(last - first, dtype=np.int64)
    spare = np.empty(page_bytes[first:last].max() if last > first else 0, dtype=np.uint8)
    sums = np.empty(GROUP_PAGES, dtype=np.uint32)
    parts = np.empty((2 * GROUP_PAGES + 1, 2), dtype=np.int64)  # address and size of each buffer: C's struct iovec
    for index in range(first, last):
        page, at, into, left = page_bytes[index], offset[index], address[index], size[index]
        while left > 0 and found[index - first] == WHOLE:
            # A group of pages: all but possibly the last are whole.
            pages = min(max(1, GROUP_BYTES // page), GROUP_PAGES, -(-left // page))
            rows = min(left, pages * page)
            count = 0
            for k in range(pages):
                wanted = min(page, rows - k * page)
                parts[count, 0], parts[count, 1] = into + k * page, wanted
                count += 1
                if wanted < page:
                    parts[count, 0], parts[count, 1] = spare.ctypes.data, page - wanted
                    count += 1
                parts[count, 0], parts[count, 1] = sums.ctypes.data + CHECKSUM_BYTES * k, CHECKSUM_BYTES
                count += 1
            stored = pages * (page + CHECKSUM_BYTES)
            if _preadv(np.int32(file[index]), np.uint64(parts.ctypes.data), np.int32(count), at) != stored:
                found[index - first] = ENDS_EARLY
            elif verify:
                for k in range(pages):
                    wanted = min(page, rows - k * page)
                    crc = crc32c.extend(0, into + k * page, wanted)
                    if wanted < page:
                        crc = crc32c.extend(crc, spare.ctypes.data, page - wanted)
                    if crc != sums[k]:
                        found[index - first] = CHANGED
            at, into, left = at + stored, into + rows, left - rows
    return found
