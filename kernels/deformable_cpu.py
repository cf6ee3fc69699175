"""Multi-scale deformable attention on the CPU: numba, with the loops over the head width as vector instructions.

A query's sampling points are first turned into four rows and four factors each, a loop that the compiler vectorises;
then the rows are gathered. The work is split by sample and head, so that what one thread gathers from fits its cache.

Every element of a result is written by one thread, its terms added in the order of the queries: the bits are the same
whatever the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from kernels.jit import inlined, jit
from kernels.threads import finish, parallel, take

# ---- vector instructions -------------------------------------------------------------------------------------------
# LLVM does not vectorise a sum of products without being allowed to reorder every sum, nor loops over arrays that might
# overlap without a test on every entry; these two intrinsics say what is meant.

_instruction: Any = intrinsic(prefer_literal=True)


def _blocks(width: int) -> list[tuple[int, int]]:
    """(start, lanes) that cover range(width) with power-of-two vectors of at most 16 lanes."""
    blocks, start = [], 0
    while start < width:
        lanes = min(16, 1 << ((width - start).bit_length() - 1))
        blocks.append((start, lanes))
        start += lanes
    return blocks


def _vector(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, lanes: int) -> Any:
    """Pointer to `lanes` elements of a flat array from `offset`."""
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_value_type(array_type.dtype)
    return builder.bitcast(builder.gep(data, [offset]), ir.VectorType(element, lanes).as_pointer())


def _contiguous(*arrays: Any) -> bool | None:
    """Whether numba may compile this: flat arrays of one dtype whose elements lie side by side."""
    return all(array.ndim == 1 and array.layout == "C" and array.dtype == arrays[0].dtype for array in arrays) or None


def _declare(builder: Any, function: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, function, name)  # type: ignore[no-untyped-call]


def _fused_multiply_add(builder: Any, vector: Any, a: Any, b: Any, c: Any) -> Any:
    name = f"llvm.fmuladd.v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    function = ir.FunctionType(vector, [vector] * 3)
    return builder.call(_declare(builder, function, name), [a, b, c])


@_instruction
def _row_dot(typing_context, a, i, b, j, width):  # type: ignore[no-untyped-def]
    """sum(a[i + d] * b[j + d] for d in range(width)); flat arrays of one dtype, width a constant."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a_type, _, b_type, _, _ = signature.args
        a_value, i_value, b_value, j_value, _ = arguments
        element = context.get_value_type(a_type.dtype)
        total: Any = ir.Constant(element, -0.0)
        sums: dict[int, Any] = {}  # by number of lanes
        for start, lanes in _blocks(width.literal_value):
            vector = ir.VectorType(element, lanes)
            at = ir.Constant(i_value.type, start)
            x = builder.load(_vector(context, builder, a_type, a_value, builder.add(i_value, at), lanes), align=4)
            y = builder.load(_vector(context, builder, b_type, b_value, builder.add(j_value, at), lanes), align=4)
            previous = sums.get(lanes, ir.Constant(vector, [-0.0] * lanes))
            sums[lanes] = _fused_multiply_add(builder, vector, x, y, previous)
        for lanes, sum_ in sums.items():
            name = f"llvm.vector.reduce.fadd.v{lanes}f{32 if isinstance(element, ir.FloatType) else 64}"
            function = ir.FunctionType(element, [element, sum_.type])
            reduce = _declare(builder, function, name)
            total = builder.call(reduce, [total, sum_], fastmath=("reassoc",))
        return total

    return _contiguous(a, b) and (a.dtype(a, types.int64, b, types.int64, width), generate)


@_instruction
def _row_add(typing_context, y, i, scale, x, j, width):  # type: ignore[no-untyped-def]
    """y[i + d] += scale * x[j + d] for d in range(width); flat arrays and a scale of one dtype, width a constant."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        y_type, _, _, x_type, _, _ = signature.args
        y_value, i_value, scale_value, x_value, j_value, _ = arguments
        element = context.get_value_type(y_type.dtype)
        for start, lanes in _blocks(width.literal_value):
            vector = ir.VectorType(element, lanes)
            undefined, zero = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            one = builder.insert_element(undefined, scale_value, zero)
            splat = builder.shuffle_vector(
                one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            )
            at = ir.Constant(i_value.type, start)
            target = _vector(context, builder, y_type, y_value, builder.add(i_value, at), lanes)
            addend = builder.load(_vector(context, builder, x_type, x_value, builder.add(j_value, at), lanes), align=4)
            sum_ = _fused_multiply_add(builder, vector, splat, addend, builder.load(target, align=4))
            builder.store(sum_, target, align=4)
        return context.get_dummy_value()

    return _contiguous(y, x) and (types.void(y, types.int64, y.dtype, x, types.int64, width), generate)


# ---- kernels -------------------------------------------------------------------------------------------------------
# All arrays are flat.


@inlined("contract")
def _corners(xy, table, stride, count, row, side):  # type: ignore[no-untyped-def]
    """Where the sampling points of one query, head and group of levels lie.

    row (4, count): offset of the values (top left, top right, bottom left, bottom right) of each point, of some place
    on the map where that corner is outside. side (8, count): bilinear factors of (left, right, top, bottom), 0
    outside the map; then for the same sides 1 on the map, 0 outside.
    """
    real = side.dtype.type
    zero, half, one, two = real(0), real(0.5), real(1), real(2)
    nought, unit = np.int32(0), np.int32(1)
    for s in range(count):
        height, width = table[s], table[count + s]
        x = xy[2 * s] * real(width) - half
        y = xy[2 * s + 1] * real(height) - half
        x = x if x > -two else -two  # far outside, or NaN: some place outside that fits an integer
        y = y if y > -two else -two
        x = x if x < real(width) + one else real(width) + one
        y = y if y < real(height) + one else real(height) + one
        x_floor, y_floor = np.floor(x), np.floor(y)
        x0, y0 = np.int32(x_floor), np.int32(y_floor)
        x1, y1 = np.int32(x0 + unit), np.int32(y0 + unit)
        left = one if (x0 >= nought) & (x0 < width) else zero
        right = one if (x1 >= nought) & (x1 < width) else zero
        top = one if (y0 >= nought) & (y0 < height) else zero
        bottom = one if (y1 >= nought) & (y1 < height) else zero
        side[s] = (one - (x - x_floor)) * left
        side[count + s] = (x - x_floor) * right
        side[2 * count + s] = (one - (y - y_floor)) * top
        side[3 * count + s] = (y - y_floor) * bottom
        side[4 * count + s] = left
        side[5 * count + s] = right
        side[6 * count + s] = top
        side[7 * count + s] = bottom
        x0 = min(max(x0, nought), np.int32(width - unit))
        x1 = min(max(x1, nought), np.int32(width - unit))
        y0 = np.int32(table[2 * count + s] + min(max(y0, nought), np.int32(height - unit)) * width)
        y1 = np.int32(table[2 * count + s] + min(max(y1, nought), np.int32(height - unit)) * width)
        row[s] = np.int32(y0 + x0) * stride
        row[count + s] = np.int32(y0 + x1) * stride
        row[2 * count + s] = np.int32(y1 + x0) * stride
        row[3 * count + s] = np.int32(y1 + x1) * stride


@inlined("contract")
def _slopes(weights, dots, side, table, count, grad_weights, grad_xy):  # type: ignore[no-untyped-def]
    """Gradients of weights and locations from each corner's `dots` (4, count) with the output's gradient."""
    real = side.dtype.type
    for s in range(count):
        left, right, top, bottom = side[s], side[count + s], side[2 * count + s], side[3 * count + s]
        at_left = top * dots[s] + bottom * dots[2 * count + s]
        at_right = top * dots[count + s] + bottom * dots[3 * count + s]
        at_top = left * dots[s] + right * dots[count + s]
        at_bottom = left * dots[2 * count + s] + right * dots[3 * count + s]
        slope_x = side[5 * count + s] * at_right - side[4 * count + s] * at_left
        slope_y = side[7 * count + s] * at_bottom - side[6 * count + s] * at_top
        grad_weights[s] = left * at_left + right * at_right
        grad_xy[2 * s] = weights[s] * real(table[count + s]) * slope_x
        grad_xy[2 * s + 1] = weights[s] * real(table[s]) * slope_y


@functools.cache
def _compiled(width: int, count: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(forward, backward) for one head width and number of sampling points, float32 or float64.

    The sizes are constants of the machine code: without them the compiler would test at every query whether its dozen
    little arrays overlap, which takes longer than the work. All arrays are flat. `table` holds height, width and first
    token of each point's level, `count` of each, for one group of levels after another.
    """

    @jit("contract")
    def forward(progress, blocks, tokens, heads, queries, value, table, locations, weights, out):  # type: ignore[no-untyped-def]
        """A unit is one (sample, head, block of queries)."""
        row, side = np.empty(4 * count, np.int32), np.empty(8 * count, value.dtype)
        stride = heads * width
        while True:
            unit = take(progress)
            if unit < 0:
                break
            sample, head, block = unit // (heads * blocks), unit // blocks % heads, unit % blocks
            origin = (sample * tokens * heads + head) * width
            for q in range(queries * block // blocks, queries * (block + 1) // blocks):
                at = (sample * queries + q) * heads + head
                _corners(locations[at * count * 2 : (at + 1) * count * 2], table, np.int32(stride), count, row, side)
                for d in range(width):
                    out[at * width + d] = 0.0
                for s in range(count):
                    weight = weights[at * count + s]
                    top, bottom = weight * side[2 * count + s], weight * side[3 * count + s]
                    left, right = side[s], side[count + s]
                    _row_add(out, at * width, top * left, value, origin + row[s], width)
                    _row_add(out, at * width, top * right, value, origin + row[count + s], width)
                    _row_add(out, at * width, bottom * left, value, origin + row[2 * count + s], width)
                    _row_add(out, at * width, bottom * right, value, origin + row[3 * count + s], width)
            finish(progress)

    @jit("contract")
    def backward(  # type: ignore[no-untyped-def]
        progress,
        groups,
        tokens,
        heads,
        queries,
        grad_out,
        value,
        table,
        locations,
        weights,
        grad_value,
        grad_xy,
        grad_weights,
    ):
        """A unit is one (sample, head, group of levels)."""
        row, side, dots = (
            np.empty(4 * count, np.int32),
            np.empty(8 * count, value.dtype),
            np.empty(4 * count, value.dtype),
        )
        while True:
            unit = take(progress)
            if unit < 0:
                break
            sample, head, group = unit // (heads * groups), unit // groups % heads, unit % groups
            levels = table[group * 3 * count : (group + 1) * 3 * count]
            first, last = levels[2 * count], levels[3 * count - 1] + levels[count - 1] * levels[2 * count - 1]
            origin, stride = (sample * tokens * heads + head) * width, heads * width
            for t in range(first, last):
                for d in range(width):
                    grad_value[origin + t * stride + d] = 0.0
            for q in range(queries):
                at = (sample * queries + q) * heads + head
                point = (at * groups + group) * count
                _corners(locations[point * 2 : (point + count) * 2], levels, np.int32(stride), count, row, side)
                for s in range(count):
                    weight = weights[point + s]
                    top, bottom = weight * side[2 * count + s], weight * side[3 * count + s]
                    left, right = side[s], side[count + s]
                    a, b = origin + row[s], origin + row[count + s]
                    c, d = origin + row[2 * count + s], origin + row[3 * count + s]
                    dots[s] = _row_dot(grad_out, at * width, value, a, width)
                    dots[count + s] = _row_dot(grad_out, at * width, value, b, width)
                    dots[2 * count + s] = _row_dot(grad_out, at * width, value, c, width)
                    dots[3 * count + s] = _row_dot(grad_out, at * width, value, d, width)
                    _row_add(grad_value, a, top * left, grad_out, at * width, width)
                    _row_add(grad_value, b, top * right, grad_out, at * width, width)
                    _row_add(grad_value, c, bottom * left, grad_out, at * width, width)
                    _row_add(grad_value, d, bottom * right, grad_out, at * width, width)
                _slopes(
                    weights[point : point + count],
                    dots,
                    side,
                    levels,
                    count,
                    grad_weights[point : point + count],
                    grad_xy[point * 2 : (point + count) * 2],
                )
            finish(progress)

    return forward, backward


# ---- tensors in, tensors out ---------------------------------------------------------------------------------------


def forward(value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """As `kernels.deformable._forward`; float64 in float64, everything else in float32."""
    batch, queries, heads, levels, points, _ = locations.shape
    tokens, width = value.shape[1], value.shape[3]
    value_, locations_, weights_ = _flat(_real(value), value, locations, weights)
    out = torch.empty(batch, queries, heads * width, dtype=_real(value))
    compiled, _ = _compiled(width, levels * points)
    table = _table(tuple(level_sizes), points, 1)
    blocks = max(1, min(queries, 64 // max(1, batch * heads)))

    units, out_ = batch * heads * blocks, out.view(-1).numpy()
    parallel(compiled, units, blocks, tokens, heads, queries, value_, table, locations_, weights_, out_)
    return out.to(value.dtype)


def backward(
    grad_out: Tensor, value: Tensor, level_sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, in their dtypes."""
    batch, queries, heads, levels, points, _ = locations.shape
    tokens, width = value.shape[1], value.shape[3]
    # Where samples and heads are few, levels are split too. By shape, not by threads: bits must not depend on those.
    groups = levels if batch * heads < 8 else 1
    _, compiled = _compiled(width, levels // groups * points)
    table = _table(tuple(level_sizes), points, groups)
    grad_out_, value_, locations_, weights_ = _flat(_real(value), grad_out, value, locations, weights)
    grads = [torch.empty(tensor.shape, dtype=_real(value)) for tensor in (value, locations, weights)]
    arrays = (grad_out_, value_, table, locations_, weights_, *(grad.view(-1).numpy() for grad in grads))
    parallel(compiled, batch * heads * groups, groups, tokens, heads, queries, *arrays)
    return grads[0].to(value.dtype), grads[1].to(locations.dtype), grads[2].to(weights.dtype)


def _real(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _flat(dtype: torch.dtype, *tensors: Tensor) -> list[npt.NDArray[np.floating[Any]]]:
    return [tensor.detach().to(dtype).contiguous().view(-1).numpy() for tensor in tensors]


@functools.lru_cache(maxsize=256)
def _table(level_sizes: tuple[int, ...], points: int, groups: int) -> npt.NDArray[np.int32]:
    """The kernels' table of heights, widths and first tokens. level_sizes: (height, width, height, width, ...)."""
    sizes = np.array(level_sizes, dtype=np.int32).reshape(-1, 2)
    first = np.cumsum(sizes.prod(1)) - sizes.prod(1)
    levels = np.concatenate((sizes, first[:, None]), axis=1).astype(np.int32)  # (L, 3)
    return levels.reshape(groups, -1, 3).transpose(0, 2, 1).repeat(points, axis=2).reshape(-1).copy()
