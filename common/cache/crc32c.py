"""crc32c over memory addresses, without the GIL: what the reader checks pages with.

Three lanes of a block run side by side, because the processor's crc32 instruction takes three cycles but can start
one in each; their sums are joined by what a lane's length of zeros does to a sum, which is linear over GF(2) and thus
four table look-ups. (Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", Intel, 2011.)
Processors without that instruction look up tables for each word instead.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from kernels.jit import inlined, jit

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
LANE_WORDS = 128
LANE_BYTES = 8 * LANE_WORDS


def _after_zero_bytes(count: int) -> npt.NDArray[np.uint64]:
    """(4, 256): tables[k, b] is what byte k of a sum, of value b, becomes after `count` zero bytes."""
    tables = np.arange(256, dtype=np.uint64) << (8 * np.arange(4, dtype=np.uint64)[:, None])
    for _ in range(count):
        tables = _BYTE_TABLE[tables & np.uint64(255)] ^ (tables >> np.uint64(8))
    return tables


def _byte_table() -> npt.NDArray[np.uint64]:
    table = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        table = np.where(table & np.uint64(1), (table >> np.uint64(1)) ^ np.uint64(POLYNOMIAL), table >> np.uint64(1))
    return table


_BYTE_TABLE = _byte_table()
_ONE_LANE = _after_zero_bytes(LANE_BYTES)
_TWO_LANES = _after_zero_bytes(2 * LANE_BYTES)
_WORD_TABLES = np.concatenate([_after_zero_bytes(8), _after_zero_bytes(4)])  # of bytes 0..3 and 4..7 of a word


def _load(bits: int) -> Any:
    """A function that loads an unsigned integer from an address of any alignment."""
    number: Any = {8: types.uint8, 32: types.uint32, 64: types.uint64}[bits]

    @intrinsic  # type: ignore[untyped-decorator]
    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.load(pointer, align=1)

        return number(types.uint64), generate

    return load


load_word, load_sum, load_byte = _load(64), _load(32), _load(8)


@intrinsic  # type: ignore[untyped-decorator]
def _instruction(typing_context: Any, crc: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word_type = ir.IntType(64)
        function = builder.module.declare_intrinsic(
            "llvm.x86.sse42.crc32.64.64", (), ir.FunctionType(word_type, [word_type, word_type])
        )
        return builder.call(function, arguments)

    return types.uint64(types.uint64, types.uint64), generate


@inlined()
def step_by_instruction(crc: Any, word: Any) -> Any:
    return _instruction(crc, word)  # type: ignore[call-arg]


@inlined()
def step_by_tables(crc: Any, word: Any) -> Any:
    word ^= crc
    crc = np.uint64(0)
    for byte in range(8):
        crc ^= _WORD_TABLES[byte, (word >> np.uint64(8 * byte)) & np.uint64(255)]
    return crc


HAS_INSTRUCTION = platform.machine() in ("x86_64", "AMD64") and binding.get_host_cpu_features().get("sse4.2", False)
_step = step_by_instruction if HAS_INSTRUCTION else step_by_tables


@inlined()
def _shift(tables: npt.NDArray[np.uint64], crc: Any) -> Any:
    low, high = np.uint64(255), np.uint64(8)
    return (
        tables[0, crc & low]
        ^ tables[1, (crc >> high) & low]
        ^ tables[2, (crc >> np.uint64(16)) & low]
        ^ tables[3, crc >> np.uint64(24)]
    )


@jit()
def extend(crc: Any, address: Any, size: Any) -> Any:
    """The crc32c of some bytes whose own is `crc`, followed by the `size` bytes at `address`."""
    crc, here, left = np.uint64(crc) ^ np.uint64(0xFFFFFFFF), np.uint64(address), np.int64(size)
    while left >= 3 * LANE_BYTES:
        second, third = np.uint64(0), np.uint64(0)
        for word in range(LANE_WORDS):
            at = here + np.uint64(8 * word)
            crc = _step(crc, load_word(at))
            second = _step(second, load_word(at + np.uint64(LANE_BYTES)))
            third = _step(third, load_word(at + np.uint64(2 * LANE_BYTES)))
        crc = _shift(_TWO_LANES, crc) ^ _shift(_ONE_LANE, second) ^ third
        here += np.uint64(3 * LANE_BYTES)
        left -= 3 * LANE_BYTES
    while left >= 8:
        crc = _step(crc, load_word(here))
        here += np.uint64(8)
        left -= 8
    for byte in range(left):
        crc = _BYTE_TABLE[(crc ^ load_byte(here + np.uint64(byte))) & np.uint64(255)] ^ (crc >> np.uint64(8))
    return crc ^ np.uint64(0xFFFFFFFF)


def value(data: npt.NDArray[Any]) -> int:
    """crc32c of a contiguous array's bytes."""
    return int(extend(0, data.ctypes.data, data.nbytes))


def of_rows(data: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint32]:
    """(N,) the crc32c of the first `size` bytes of each row of `data` (N, bytes)."""
    sums = np.empty(len(data), dtype=np.uint32)
    _of_rows(data.ctypes.data, data.strides[0], size, sums)
    return sums


@jit()
def _of_rows(address: Any, stride: Any, size: Any, sums: Any) -> None:
    for row in range(len(sums)):
        sums[row] = extend(0, np.uint64(address) + np.uint64(row) * np.uint64(stride), size)
