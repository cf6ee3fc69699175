"""The feature loss on cached tokens on the CPU: numba, decoding one token at a time into a row that stays in the cache.

Each kept token and its student row are read once, for the loss and the gradient alike, and the gradient is written
once, zeros included. Nothing of the size of the features is allocated but the gradient. Sums are in a fixed order: the
bits are the same whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.jit import inlined, jit
from kernels.memory import VECTOR_BYTES, empty, prefetch, stream
from kernels.threads import finish, parallel, take

_BLOCK = 64  # tokens, or rows of the student, that a thread takes at a time
_AHEAD = 3  # tokens whose rows are fetched before they are needed
_AHEAD_OF_ALL = 12  # rows, likewise, of which not all have a token

_OUTSIDE = "positions and offsets point outside the student"

Array = npt.NDArray[Any]


@inlined()
def _half_to_float(bits):  # type: ignore[no-untyped-def]
    """IEEE half precision: its exponent and mantissa moved into a float's, and the exponent's bias corrected."""
    magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    scaled = magnitude.view(np.float32) * np.float32(2.0**112)
    special = np.uint32(magnitude | np.uint32(0x7F800000)).view(np.float32)  # infinity and NaN
    value = special if magnitude >= np.uint32(0x0F800000) else scaled
    return -value if bits & np.uint16(0x8000) else value


@inlined()
def _bfloat_to_float(bits):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined()
def _float_to_bfloat(value):  # type: ignore[no-untyped-def]
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((rounded if value == value else bits | np.uint32(0x400000)) >> np.uint32(16))


@inlined()
def _copy_4(codebooks, m, code, j, target, i):  # type: ignore[no-untyped-def]
    """target[i : i + 4] = codebooks[m, code, j : j + 4], all read before any is written: the compiler cannot know that
    the arrays do not overlap, and would else wait for each write. A third faster than a loop."""
    a, b = codebooks[m, code, j], codebooks[m, code, j + 1]
    c, d = codebooks[m, code, j + 2], codebooks[m, code, j + 3]
    target[i] = a
    target[i + 1] = b
    target[i + 2] = c
    target[i + 3] = d


@inlined("contract")
def _difference(  # type: ignore[no-untyped-def]
    student, tokens, row, s, scales, channel_scale, channel_shift, codebooks, difference
):
    """difference[c] = student[row, c] - decode(tokens)[s, c].

    The dtypes say what is stored: tokens are float32, int8, two int4 or a code in uint8, or the bits of a half in
    uint16; the student is float32, float64 or the bits of a bfloat in uint16. What does not apply is folded away by the
    compiler. Without scales or codebooks, these have no rows.
    """
    channels = difference.size
    if tokens.itemsize == 2:
        for c in range(channels):
            difference[c] = _half_to_float(np.uint16(tokens[s, c]))
    elif tokens.itemsize == 4:
        for c in range(channels):
            difference[c] = tokens[s, c]
    elif codebooks.shape[0]:
        width = codebooks.shape[2]
        for m in range(codebooks.shape[0]):
            code = np.uint8(tokens[s, m])
            if width == 8:
                _copy_4(codebooks, m, code, 0, difference, 8 * m)
                _copy_4(codebooks, m, code, 4, difference, 8 * m + 4)
            elif width == 4:
                _copy_4(codebooks, m, code, 0, difference, 4 * m)
            else:
                for j in range(width):
                    difference[m * width + j] = codebooks[m, code, j]
    elif 2 * tokens.shape[1] == channels:
        for i in range(tokens.shape[1]):
            byte = np.int32(tokens[s, i])
            difference[2 * i] = ((byte & 15) ^ 8) - 8
            difference[2 * i + 1] = ((byte >> 4) ^ 8) - 8
    else:
        for c in range(channels):
            difference[c] = np.int32(tokens[s, c])
    scale, groups = channel_scale.dtype.type(1), scales.shape[1]
    if scales.shape[0] and groups == 1:
        scale = scales[s, 0]
    elif scales.shape[0]:
        for g in range(groups):
            for c in range(g * (channels // groups), (g + 1) * (channels // groups)):
                difference[c] *= scales[s, g]
    if student.itemsize == 2:
        for c in range(channels):
            value = _bfloat_to_float(student[row, c])
            difference[c] = value - (difference[c] * (scale * channel_scale[c]) + channel_shift[c])
    else:
        for c in range(channels):
            difference[c] = student[row, c] - (difference[c] * (scale * channel_scale[c]) + channel_shift[c])


@inlined("contract", "reassoc")
def _squared(difference):  # type: ignore[no-untyped-def]
    total = difference.dtype.type(0)
    for c in range(difference.size):
        total += difference[c] * difference[c]
    return np.float64(total)


@jit("contract")
def _forward(  # type: ignore[no-untyped-def]
    progress, student, tokens, rows, weights, scales, channel_scale, channel_shift, codebooks, errors
):
    """errors[s]: the weighted squared error of token s, a block of tokens at a time."""
    channels, flat = channel_scale.size, student.reshape(-1)
    difference = np.empty(channels, channel_scale.dtype)
    while True:
        block = take(progress)
        if block < 0:
            break
        for s in range(block * _BLOCK, min((block + 1) * _BLOCK, rows.size)):
            if s + _AHEAD < rows.size:
                prefetch(flat, rows[s + _AHEAD] * channels, channels)
            _difference(student, tokens, rows[s], s, scales, channel_scale, channel_shift, codebooks, difference)
            errors[s] = np.float64(weights[s]) * _squared(difference)
        finish(progress)


@jit()
def _total(errors):  # type: ignore[no-untyped-def]
    """In the order of the tokens."""
    total = 0.0
    for error in errors:
        total += error
    return total


@jit()
def _find_rows(positions, offsets, length, rows):  # type: ignore[no-untyped-def]
    """Whether positions and offsets are in range; if so, `rows` are the tokens' in the flattened student."""
    if offsets[0] != 0 or offsets[-1] != rows.size or (offsets[1:] < offsets[:-1]).any():
        return False
    for b in range(offsets.size - 1):
        for s in range(offsets[b], offsets[b + 1]):
            if positions[s] < 0 or positions[s] >= length:
                return False
            rows[s] = b * length + positions[s]
    return True


@jit()
def _find_tokens(rows, token_of_row):  # type: ignore[no-untyped-def]
    """The inverse of `rows`, -1 where there is no token. Whether they are in range."""
    token_of_row[:] = -1
    for s in range(rows.size):
        if rows[s] < 0 or rows[s] >= token_of_row.size:
            return False
        token_of_row[rows[s]] = s
    return True


@jit()
def _in_range(rows, count):  # type: ignore[no-untyped-def]
    for row in rows:  # noqa: SIM110 - compiled
        if row < 0 or row >= count:
            return False
    return True


@jit("contract")
def _forward_and_backward(  # type: ignore[no-untyped-def]
    progress,
    grad,
    student,
    tokens,
    token_of_row,
    weights,
    scales,
    channel_scale,
    channel_shift,
    codebooks,
    errors,
    grad_student,
):
    """The same errors, and the student's gradient, flat, for the loss's gradient `grad`, a block of rows at a time:
    first all that is not zero is computed, then written, so that reading and writing do not wait for one another."""
    channels, flat = channel_scale.size, student.reshape(-1)
    difference, results = np.empty(channels, channel_scale.dtype), np.empty((_BLOCK, channels), grad_student.dtype)
    zeros, vector = np.zeros(channels, grad_student.dtype), VECTOR_BYTES // grad_student.itemsize
    while True:
        block = take(progress)
        if block < 0:
            break
        first = block * _BLOCK
        last = min(first + _BLOCK, token_of_row.size)
        for row in range(first, last):
            s, later = token_of_row[row], min(row + _AHEAD_OF_ALL, token_of_row.size - 1)
            if token_of_row[later] >= 0:
                prefetch(flat, later * channels, channels)
            if s < 0:
                continue
            _difference(student, tokens, row, s, scales, channel_scale, channel_shift, codebooks, difference)
            errors[s] = np.float64(weights[s]) * _squared(difference)
            factor = 2 * grad * weights[s]
            if grad_student.itemsize == 2:
                for c in range(channels):
                    results[row - first, c] = _float_to_bfloat(factor * difference[c])
            else:
                for c in range(channels):
                    results[row - first, c] = factor * difference[c]
        for row in range(first, last):
            source = results[row - first] if token_of_row[row] >= 0 else zeros
            if channels % vector == 0:
                for c in range(0, channels, vector):
                    stream(grad_student, row * channels + c, source[c:])
            else:
                for c in range(channels):
                    grad_student[row * channels + c] = source[c]
        finish(progress)


@jit()
def _scale(progress, factor, rows, channels, grad_student):  # type: ignore[no-untyped-def]
    while True:
        block = take(progress)
        if block < 0:
            break
        for s in range(block * _BLOCK, min((block + 1) * _BLOCK, rows.size)):
            for c in range(rows[s] * channels, (rows[s] + 1) * channels):
                grad_student[c] *= factor
        finish(progress)


def rows_of(positions: Tensor, offsets: Tensor, length: int) -> Array:
    """Each token's row (S,) in the flattened (B * length, C) student. ValueError for what is out of range."""
    rows = np.empty(len(positions), np.int64)
    if not _find_rows(_array(positions), _array(offsets), length, rows):
        if offsets[0] != 0 or offsets[-1] != len(rows) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to {len(rows)}, the number of tokens, got {offsets.tolist()}")
        found = f"{int(positions.min())}..{int(positions.max())}"
        raise ValueError(f"positions must lie in 0..{length - 1}, found {found}")
    return rows


def forward(
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> Tensor:
    """As `kernels.feature_loss._forward`."""
    rows_, errors = _array(rows), np.empty(len(rows))
    if not _in_range(rows_, student.shape[0] * student.shape[1]):
        raise ValueError(_OUTSIDE)
    factors = _factors(student, weights, scales, channel_scale, channel_shift, codebooks)
    parallel(_forward, -(-len(rows) // _BLOCK), _rows_of(student), _numbers(tokens), rows_, *factors, errors)
    return _sum(errors, student)


def backward(
    grad: Tensor,
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> Tensor:
    """The gradient (B, T, C) of student, in its dtype."""
    factors = _factors(student, weights, scales, channel_scale, channel_shift, codebooks)
    return _forward_and_gradient(grad.item(), student, tokens, _array(rows), factors)[1]


class InOnePass(torch.autograd.Function):
    """Loss and gradient at once, for a float32 or float64 student that has a gradient.

    The gradient waits for the loss's own, by which it is multiplied; who goes back a second time has it computed anew.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, tokens: Tensor, positions: Tensor, offsets: Tensor, *factors: Any) -> Tensor:
        ctx.rows = rows_of(positions, offsets, student.shape[1])
        ctx.save_for_backward(student, tokens, *factors)
        errors, ctx.grad_student = _forward_and_gradient(1.0, student, tokens, ctx.rows, _factors(student, *factors))
        return _sum(errors, student)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, tokens, *factors = ctx.saved_tensors
        grad_student, ctx.grad_student, factor = ctx.grad_student, None, grad.item()
        if grad_student is None:
            _, grad_student = _forward_and_gradient(factor, student, tokens, ctx.rows, _factors(student, *factors))
        elif factor != 1:
            arguments = (_real(student)(factor), ctx.rows, student.shape[2], _rows_of(grad_student).reshape(-1))
            parallel(_scale, -(-len(ctx.rows) // _BLOCK), *arguments)
        return grad_student, *[None] * 8


def _forward_and_gradient(
    grad: float, student: Tensor, tokens: Tensor, rows: Array, factors: list[Array]
) -> tuple[Array, Tensor]:
    """Each token's error, and the gradient (B, T, C) of student in its dtype for the loss's gradient `grad`."""
    token_of_row, errors = np.empty(student.shape[0] * student.shape[1], np.int32), np.zeros(len(rows))
    if not _find_tokens(rows, token_of_row):
        raise ValueError(_OUTSIDE)
    grad_student = empty(student.shape, torch.float32 if student.dtype == torch.float16 else student.dtype)
    arguments = (_real(student)(grad), _rows_of(student), _numbers(tokens), token_of_row, *factors, errors)
    blocks, flat = -(-len(token_of_row) // _BLOCK), _rows_of(grad_student).reshape(-1)
    parallel(_forward_and_backward, blocks, *arguments, flat)
    return errors, grad_student.half() if student.dtype == torch.float16 else grad_student


def _sum(errors: Array, student: Tensor) -> Tensor:
    return torch.from_numpy(np.array(_total(errors), _real(student)))


def _real(student: Tensor) -> type[np.floating[Any]]:
    return np.float64 if student.dtype == torch.float64 else np.float32


def _rows_of(student: Tensor) -> Array:
    """As (B*T, C); bf16 as its bits; fp16, which CPUs do not train in, as float32."""
    if student.dtype == torch.bfloat16:
        student = student.view(torch.uint16)
    elif student.dtype == torch.float16:
        student = student.float()
    return _array(student).reshape(-1, student.shape[2])


def _numbers(tokens: Tensor) -> Array:
    """As they are stored; a half as its bits, which numba has no type for."""
    array = _array(tokens)
    return array.view(np.uint16) if tokens.dtype == torch.float16 else array


def _factors(
    student: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> list[Array]:
    """weights, scales, channel_scale, channel_shift and codebooks in the dtype that is computed in; for None ones,
    zeros, or no rows."""
    real, channels = _real(student), student.shape[2]
    return [
        _array(weights).astype(real, copy=False),
        np.empty((0, 1), real) if scales is None else _array(scales).astype(real, copy=False),
        np.ones(channels, real) if channel_scale is None else _array(channel_scale).astype(real, copy=False),
        np.zeros(channels, real) if channel_shift is None else _array(channel_shift).astype(real, copy=False),
        np.empty((0, 256, 0), real) if codebooks is None else _array(codebooks).astype(real, copy=False),
    ]


def _array(tensor: Tensor) -> Array:
    """Its memory, in C order, with the fewest calls: they are no small part of a millisecond's work."""
    array: Array = tensor.numpy(force=True)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
