"""The feature loss on cached tokens on the CPU: numba, decoding one token at a time into a row that stays in the cache.

Forward reads each kept token and its student row once. Backward reads them again and writes the gradient once, row by
row, zeros included, instead of filling it with zeros first. Nothing of the size of the features is allocated but the
gradient. Sums are in a fixed order: the bits are the same whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.jit import inlined, jit
from kernels.threads import parallel

_BLOCK = 64  # tokens of one partial sum, so that the order of additions does not depend on the threads

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
    compiler. Without codebooks, their shape is (0, 256, 0).
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
    group = channels // scales.shape[1]
    for g in range(scales.shape[1]):
        scale = scales[s, g]
        for c in range(group):
            difference[g * group + c] *= scale
    if student.itemsize == 2:
        for c in range(channels):
            value = _bfloat_to_float(student[row, c])
            difference[c] = value - (difference[c] * channel_scale[c] + channel_shift[c])
    else:
        for c in range(channels):
            difference[c] = student[row, c] - (difference[c] * channel_scale[c] + channel_shift[c])


@jit("contract", "reassoc")
def _forward(  # type: ignore[no-untyped-def]
    start, stop, student, tokens, rows, weights, scales, channel_scale, channel_shift, codebooks, sums
):
    """The weighted squared error of each block of tokens start..stop, in float64."""
    difference = np.empty(channel_scale.size, channel_scale.dtype)
    for block in range(start, stop):
        total = 0.0
        for s in range(block * _BLOCK, min((block + 1) * _BLOCK, rows.size)):
            _difference(student, tokens, rows[s], s, scales, channel_scale, channel_shift, codebooks, difference)
            squares = channel_scale.dtype.type(0)
            for c in range(difference.size):
                squares += difference[c] * difference[c]
            total += np.float64(weights[s]) * np.float64(squares)
        sums[block] = total


@jit("contract")
def _backward(  # type: ignore[no-untyped-def]
    start,
    stop,
    grad,
    student,
    tokens,
    token_of_row,
    weights,
    scales,
    channel_scale,
    channel_shift,
    codebooks,
    grad_student,
):
    """Rows start..stop of the student's gradient, for the loss's gradient `grad`."""
    difference = np.empty(channel_scale.size, channel_scale.dtype)
    for row in range(start, stop):
        s = token_of_row[row]
        if s < 0:
            for c in range(difference.size):
                grad_student[row, c] = 0
            continue
        _difference(student, tokens, row, s, scales, channel_scale, channel_shift, codebooks, difference)
        factor = 2 * grad * weights[s]
        if grad_student.itemsize == 2:
            for c in range(difference.size):
                grad_student[row, c] = _float_to_bfloat(factor * difference[c])
        else:
            for c in range(difference.size):
                grad_student[row, c] = factor * difference[c]


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
    real = _real(student)
    if len(rows):  # here as well, since under torch.compile the facade could not look
        least, most = (int(found) for found in torch.aminmax(rows))
        if least < 0 or most >= student.shape[0] * student.shape[1]:
            raise ValueError("positions and offsets point outside the student")
    arguments = (
        _rows_of(student),
        _numbers(tokens),
        rows.numpy(),
        *_factors(real, student.shape[2], weights, scales, channel_scale, channel_shift, codebooks),
    )
    sums = np.zeros(-(-len(rows) // _BLOCK))
    parallel(lambda start, stop: _forward(start, stop, *arguments, sums), len(sums))
    return torch.tensor(sum(sums.tolist()), dtype=real)


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
    real = _real(student)
    grad_student = torch.empty(student.shape, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)
    token_of_row = np.full(student.shape[0] * student.shape[1], -1, np.int32)
    token_of_row[rows.numpy()] = np.arange(len(rows), dtype=np.int32)
    factors = _factors(real, student.shape[2], weights, scales, channel_scale, channel_shift, codebooks)
    arguments = (
        np.float64(grad.item()) if real == torch.float64 else np.float32(grad.item()),
        _rows_of(student),
        _numbers(tokens),
        token_of_row,
        *factors,
        _rows_of(grad_student),
    )
    parallel(lambda start, stop: _backward(start, stop, *arguments), len(token_of_row))
    return grad_student.to(student.dtype)


def _real(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _rows_of(student: Tensor) -> Array:
    """As (B*T, C); bf16 as its bits; fp16, which CPUs do not train in, as float32."""
    flat = student.detach().contiguous().flatten(0, 1)
    if student.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.float().numpy() if student.dtype == torch.float16 else flat.numpy()


def _numbers(tokens: Tensor) -> Array:
    """As they are stored; a half as its bits, which numba has no type for."""
    array: Array = tokens.contiguous().numpy()
    return array.view(np.uint16) if tokens.dtype == torch.float16 else array


def _factors(
    real: torch.dtype,
    channels: int,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> list[Array]:
    """weights, scales, channel_scale, channel_shift and codebooks in the dtype that is computed in, ones, zeros or no
    codebooks for None."""
    scales = torch.ones(len(weights), 1) if scales is None else scales
    channel_scale = torch.ones(channels) if channel_scale is None else channel_scale
    channel_shift = torch.zeros(channels) if channel_shift is None else channel_shift
    codebooks = torch.empty(0, 256, 0) if codebooks is None else codebooks
    tensors = (weights, scales, channel_scale, channel_shift, codebooks)
    return [tensor.detach().to(real).contiguous().numpy() for tensor in tensors]
