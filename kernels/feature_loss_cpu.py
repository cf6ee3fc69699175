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
_LAST = 6  # blocks, that the caller does alone
_AHEAD = 3  # tokens whose rows are fetched before they are needed
_AHEAD_OF_ALL = 12  # rows, likewise, of which not all have a token

_OUTSIDE = "positions and offsets point outside the student"

_BYTES = np.dtype(np.uint8)  # codes, or two int4
_BITS = np.dtype(np.uint16)  # of a half or of a bfloat

Array = npt.NDArray[Any]

# The kept tokens as they are stored, and what decodes and weighs them; floats in the dtype that is computed in. A plain
# tuple: what numba has cached for a named one fails to load once the name has changed.
# tokens (S, ·): float32, int8, two int4 or a code in uint8, or the bits of a half in uint16; weights (S,);
# scales (S, G), ones where there are none; channel_scale (C,); channel_shift (C,); codebooks (M, 256, d) or no rows.
Teacher = tuple[Array, Array, Array, Array, Array, Array]


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
def _copy_4(codebooks, m, code, j, unpacked, i):  # type: ignore[no-untyped-def]
    """unpacked[0, i : i + 4] = codebooks[m, code, j : j + 4], all read before any is written: the compiler cannot know
    that the arrays do not overlap, and would else wait for each write. A third faster than a loop."""
    a, b = codebooks[m, code, j], codebooks[m, code, j + 1]
    c, d = codebooks[m, code, j + 2], codebooks[m, code, j + 3]
    unpacked[0, i] = a
    unpacked[0, i + 1] = b
    unpacked[0, i + 2] = c
    unpacked[0, i + 3] = d


@inlined()
def _value(numbers, row, c, halves, real):  # type: ignore[no-untyped-def]
    """numbers[row, c] in real's dtype; uint16 are the bits of `halves`, or else of bfloats."""
    if numbers.dtype == _BITS:
        bits = np.uint16(numbers[row, c])
        return real.dtype.type(_half_to_float(bits) if halves else _bfloat_to_float(bits))
    return real.dtype.type(numbers[row, c])


@inlined(counting=False)
def _unpack(teacher, s, unpacked):  # type: ignore[no-untyped-def]
    """unpacked[0]: token s, that is codes, or two numbers to a byte, or has a scale for each group of channels."""
    tokens, _, scales, _, _, codebooks = teacher
    groups = scales.shape[1]
    if codebooks.shape[0]:
        width = codebooks.shape[2]
        for m in range(codebooks.shape[0]):
            code = np.uint8(tokens[s, m])
            if width == 8:
                _copy_4(codebooks, m, code, 0, unpacked, 8 * m)
                _copy_4(codebooks, m, code, 4, unpacked, 8 * m + 4)
            elif width == 4:
                _copy_4(codebooks, m, code, 0, unpacked, 4 * m)
            else:
                for j in range(width):
                    unpacked[0, m * width + j] = codebooks[m, code, j]
    elif tokens.dtype == _BYTES:
        eight, fifteen = np.int32(8), np.int32(15)
        for i in range(tokens.shape[1]):
            byte = np.int32(tokens[s, i])
            unpacked[0, 2 * i] = ((byte & fifteen) ^ eight) - eight
            unpacked[0, 2 * i + 1] = ((byte >> np.int32(4)) ^ eight) - eight
    else:
        for c in range(tokens.shape[1]):
            unpacked[0, c] = _value(tokens, s, c, True, unpacked)
    if groups > 1:
        width = unpacked.shape[1] // groups
        for g in range(groups):
            for c in range(g * width, (g + 1) * width):
                unpacked[0, c] *= scales[s, g]


@inlined("contract", "reassoc")
def _compare(student, row, numbers, s, scale, teacher, factor, gradient, at):  # type: ignore[no-untyped-def]
    """The squared error of a row of the student against `numbers` of token s, and `factor` times the difference in
    gradient[at]. One loop, for several take half as long again."""
    _, _, _, channel_scale, channel_shift, _ = teacher
    total = channel_scale.dtype.type(0)
    for c in range(channel_scale.size):
        decoded = _value(numbers, s, c, True, channel_scale) * (scale * channel_scale[c]) + channel_shift[c]
        difference = _value(student, row, c, False, channel_scale) - decoded
        total += difference * difference
        if gradient.dtype == _BITS:
            gradient[at, c] = _float_to_bfloat(factor * difference)
        else:
            gradient[at, c] = factor * difference
    return np.float64(total)


@inlined(counting=False)
def _error(student, row, teacher, s, unpacked, factor, gradient, at):  # type: ignore[no-untyped-def]
    """The weighted squared error of token s at a row of the student, and its `gradient`, likewise.

    The student is float32, float64 or the bits of a bfloat in uint16. What does not apply to the dtypes is folded away
    by the compiler.
    """
    tokens, weights, scales, _, _, _ = teacher
    grouped, factor = scales.shape[1] > 1, factor * weights[s]
    if grouped or tokens.dtype == _BYTES:
        _unpack(teacher, s, unpacked)
        scale = unpacked.dtype.type(1) if grouped else scales[s, 0]
        error = _compare(student, row, unpacked, 0, scale, teacher, factor, gradient, at)
    else:
        error = _compare(student, row, tokens, s, scales[s, 0], teacher, factor, gradient, at)
    return np.float64(weights[s]) * error


@jit("contract")
def _forward(progress, student, teacher, rows, errors):  # type: ignore[no-untyped-def]
    """errors[s]: the weighted squared error of token s, a block of tokens at a time."""
    channels, flat, real = student.shape[1], student.reshape(-1), teacher[1].dtype
    unpacked, difference = np.empty((1, channels), real), np.empty((1, channels), real)
    while True:
        block = take(progress)
        if block < 0:
            break
        for s in range(block * _BLOCK, min((block + 1) * _BLOCK, rows.size)):
            if s + _AHEAD < rows.size:
                prefetch(flat, rows[s + _AHEAD] * channels, channels)
            errors[s] = _error(student, rows[s], teacher, s, unpacked, real.type(1), difference, 0)
        finish(progress)


@jit()
def _find_rows(positions, offsets, length, rows):  # type: ignore[no-untyped-def]
    """Whether positions and offsets are in range; if so, `rows` are the tokens' in the flattened student."""
    if offsets[0] != 0 or offsets[-1] != rows.size:
        return False
    for b in range(offsets.size - 1):
        if offsets[b] > offsets[b + 1]:
            return False
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
    progress, grad, student, teacher, token_of_row, errors, grad_student
):
    """The same errors, and the student's gradient, flat, for the loss's gradient `grad`, a block of rows at a time:
    first all that is not zero is computed, then written, so that reading and writing do not wait for one another."""
    channels, flat, real = student.shape[1], student.reshape(-1), teacher[1].dtype
    unpacked = np.empty((1, channels), real)
    results = np.zeros((_BLOCK + 1, channels), grad_student.dtype)  # the last row stays zero
    flat_results, vector = results.reshape(-1), VECTOR_BYTES // grad_student.itemsize
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
            errors[s] = _error(student, row, teacher, s, unpacked, real.type(2) * grad, results, row - first)
        for row in range(first, last):
            target, source = row * channels, (row - first if token_of_row[row] >= 0 else _BLOCK) * channels
            if channels % vector == 0:
                for c in range(0, channels, vector):
                    stream(grad_student, target + c, flat_results, source + c)
            else:
                for c in range(channels):
                    grad_student[target + c] = flat_results[source + c]
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
    teacher = _teacher(student, tokens, weights, scales, channel_scale, channel_shift, codebooks)
    parallel(_forward, -(-len(rows) // _BLOCK), _rows_of(student), teacher, rows_, errors)
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
    teacher = _teacher(student, tokens, weights, scales, channel_scale, channel_shift, codebooks)
    return _forward_and_gradient(grad.item(), student, teacher, _array(rows))[1]


class InOnePass(torch.autograd.Function):
    """Loss and gradient at once, for a float32 or float64 student that has a gradient.

    The gradient waits for the loss's own, by which it is multiplied; who goes back a second time has it computed anew.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, tokens: Tensor, positions: Tensor, offsets: Tensor, *factors: Any) -> Tensor:
        ctx.rows = rows_of(positions, offsets, student.shape[1])
        ctx.save_for_backward(student, tokens, *factors)
        teacher = _teacher(student, tokens, *factors)
        errors, ctx.grad_student = _forward_and_gradient(1.0, student, teacher, ctx.rows)
        return _sum(errors, student)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_student, ctx.grad_student, factor = ctx.grad_student, None, grad.item()
        if grad_student is None:
            student, *stored = ctx.saved_tensors
            _, grad_student = _forward_and_gradient(factor, student, _teacher(student, *stored), ctx.rows)
        elif factor != 1:
            rows, flat = ctx.rows, _rows_of(grad_student).reshape(-1)
            arguments = (_real(grad_student)(factor), rows, grad_student.shape[2], flat)
            parallel(_scale, -(-len(rows) // _BLOCK), *arguments)
        return grad_student, *[None] * 8


def _forward_and_gradient(grad: float, student: Tensor, teacher: Teacher, rows: Array) -> tuple[Array, Tensor]:
    """Each token's error, and the gradient (B, T, C) of student in its dtype for the loss's gradient `grad`."""
    token_of_row, errors = np.empty(student.shape[0] * student.shape[1], np.int32), np.zeros(len(rows))
    if not _find_tokens(rows, token_of_row):
        raise ValueError(_OUTSIDE)
    grad_student = empty(student.shape, torch.float32 if student.dtype == torch.float16 else student.dtype)
    arguments = (_real(student)(grad), _rows_of(student), teacher, token_of_row, errors)
    blocks, flat = -(-len(token_of_row) // _BLOCK), _rows_of(grad_student).reshape(-1)
    parallel(_forward_and_backward, blocks, *arguments, flat, last=_LAST)
    return errors, grad_student.half() if student.dtype == torch.float16 else grad_student


def _sum(errors: Array, student: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(errors.sum(), _real(student)))


def _real(student: Tensor) -> type[np.floating[Any]]:
    return np.float64 if student.dtype == torch.float64 else np.float32


def _rows_of(student: Tensor) -> Array:
    """As (B*T, C); bf16 as its bits; fp16, which CPUs do not train in, as float32."""
    if student.dtype == torch.bfloat16:
        student = student.view(torch.uint16)
    elif student.dtype == torch.float16:
        student = student.float()
    return _array(student).reshape(-1, student.shape[2])


def _teacher(
    student: Tensor,
    tokens: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> Teacher:
    real, channels, numbers = _real(student), student.shape[2], _array(tokens)

    def converted(tensor: Tensor) -> Array:
        return _array(tensor).astype(real, copy=False)

    return (
        numbers.view(np.uint16) if tokens.dtype == torch.float16 else numbers,  # numba has no type for halves
        converted(weights),
        np.ones((len(weights), 1), real) if scales is None else converted(scales),
        np.ones(channels, real) if channel_scale is None else converted(channel_scale),
        np.zeros(channels, real) if channel_shift is None else converted(channel_shift),
        np.empty((0, 256, 0), real) if codebooks is None else converted(codebooks),
    )


def _array(tensor: Tensor) -> Array:
    """Its memory, in C order, with the fewest calls: they are no small part of a millisecond's work."""
    array: Array = tensor.numpy(force=True)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
