"""Memory of large results that every step makes anew: used again once nobody holds them, and written past the caches.

Fresh memory costs a page fault for every 4 kB, which can take longer than computing what is written there; whether the
C library has old memory at hand depends on what else the process allocates. And an ordinary write first reads what it
overwrites into a cache, from which the write drives out what is still needed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

LINE_BYTES = 64  # of a cache
VECTOR_BYTES = 32  # what `stream` writes at once
_LEAST_BYTES = 2**20  # smaller results the C library keeps memory for

_Memory = npt.NDArray[np.uint8]

_free: list[_Memory] = []  # at most one: the largest that was let go of


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, beginning with a cache line.

    It may lie where an earlier one lay that is gone, with all its views.
    """
    size = shape.numel() * dtype.itemsize
    if size < _LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)  # torch begins with a cache line too
    memory = _take(size)
    lent = memory[:size]
    weakref.finalize(lent, _let_go, memory).atexit = False
    return torch.frombuffer(lent, dtype=dtype).view(shape)


def _take(size: int) -> _Memory:
    try:
        memory = _free.pop()
    except IndexError:
        return _aligned(size)
    if memory.nbytes >= size:
        return memory
    del memory  # before its successor is there
    return _aligned(size)


def _aligned(size: int) -> _Memory:
    memory = np.empty(size + LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + size]


def _let_go(memory: _Memory) -> None:
    try:
        other = _free.pop()
    except IndexError:
        other = memory
    _free.append(max(memory, other, key=len))


def _stream(context: Any, target: Any, at: Any, source: Any, start: Any) -> Any:
    """target[at : at + n] = source[start : start + n], past the caches, for the n elements of VECTOR_BYTES.

    Flat arrays of one dtype; the target's part begins at a multiple of VECTOR_BYTES in memory.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_value_type(target.dtype)
        vector = ir.VectorType(element, VECTOR_BYTES * 8 // target.dtype.bitwidth).as_pointer()
        written, read = (
            builder.bitcast(builder.gep(context.make_array(type_)(context, builder, array).data, [index]), vector)
            for type_, array, index in ((target, *arguments[:2]), (source, *arguments[2:]))
        )
        store = builder.store(builder.load(read, align=4), written, align=VECTOR_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


def _prefetch(context: Any, array: Any, at: Any, count: Any) -> Any:
    """Begin to fetch elements at..at+count of a flat array into the caches."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch: Any = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer]), "llvm.prefetch.p0i8"
        )
        to_read, in_all_levels, data_cache = (ir.Constant(integer, number) for number in (0, 3, 1))
        start, stop = arguments[1], builder.add(arguments[1], arguments[2])
        line = ir.Constant(start.type, LINE_BYTES * 8 // array.dtype.bitwidth)
        with cgutils.for_range_slice(builder, start, stop, line, start.type) as (index, _):
            place = builder.bitcast(builder.gep(data, [index]), byte)
            builder.call(fetch, [place, to_read, in_all_levels, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


stream: Any = intrinsic(_stream)
prefetch: Any = intrinsic(_prefetch)
