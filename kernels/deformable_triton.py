"""Multi-scale deformable attention on a GPU: Triton, float32 sums for any input dtype.

One program takes one head of one sample and a block of queries. It goes over the levels; at each it has a tile of
(queries * points, head width): the points' locations come in one coalesced load, each of the four corners is one
gather whose rows are the contiguous D numbers of a head. The forward keeps its sum in registers and writes it once,
without atomics. The backward makes one pass: it gathers the same corners again (no sampled values are stored), takes
their dot products with the output's gradient for the gradients of locations and weights, which it writes once, and adds
to the value's gradient with float32 atomics, the only sums without a fixed order.

What one encoder layer must move, two 640x640 images (T = Q = 8500, H = 8, D = 32, L = P = 4), bf16 values, float32
locations and weights:

- forward: values 8.7 MB, locations 17.4 MB, weights 8.7 MB, output 8.7 MB, once each: 43.5 MB, 13 microseconds at the
  3.35 TB/s of an H100 SXM's memory. The gathers read 2.2 M points * 4 corners * 64 B = 557 MB, which fit L2: 0.1 ms if
  L2 gives 5.5 TB/s, so L2 sets the floor. The 0.6 GFLOP of products and sums are next to nothing.
- backward: inputs 34.8 MB and the output's gradient 8.7 MB, gradients of locations and weights 26.1 MB, of the values
  17.4 MB of float32 zeros, as much again read and 8.7 MB cast: 113 MB, 34 microseconds. The same gathers, and 1.1 GB of
  float32 atomic additions in L2, which set the floor: above 0.3 ms.

These are bounds by arithmetic, not measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import on_device_of

_TILE = 2048  # elements of one gather: 16 a thread with the default of 4 warps


@triton.jit  # type: ignore[untyped-decorator]
def _points(  # type: ignore[no-untyped-def]
    table, locations, weights, level, query, point, valid, sample, queries, head,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """One level's points (R,): place in weights, weight, pixel left above, distances from it; and the level's sizes."""
    at = (((sample * queries + query) * HEADS + head) * LEVELS + level) * POINTS + point
    weight = tl.load(weights + at, mask=valid, other=0.0).to(tl.float32)
    pair = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    x, y = tl.split(tl.load(locations + pair, mask=valid[:, None], other=0.0).to(tl.float32))
    height, width = tl.load(table + level * 3), tl.load(table + level * 3 + 1)
    x, y = x * width - 0.5, y * height - 0.5
    x, y = tl.where(x > -2.0, x, -2.0), tl.where(y > -2.0, y, -2.0)  # far outside, or NaN: a place outside
    x, y = tl.where(x < width + 1.0, x, width + 1.0), tl.where(y < height + 1.0, y, height + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return at, weight, left.to(tl.int32), top.to(tl.int32), x - left, y - top, height, width


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    value, table, locations, weights, out, tokens, queries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % HEADS
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    r = tl.arange(0, BLOCK_Q * BLOCK_P)
    query, point = tl.program_id(0) * BLOCK_Q + r // BLOCK_P, r % BLOCK_P
    valid = (query < queries) & (point < POINTS)
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_Q * BLOCK_P, BLOCK_D), tl.float32)
    for level in range(LEVELS):
        _, weight, left, top, right_part, lower_part, height, width = _points(
            table, locations, weights, level, query, point, valid, sample, queries, head, HEADS, LEVELS, POINTS
        )
        first = sample * tokens + tl.load(table + level * 3 + 2)
        for corner in tl.static_range(4):
            column, row = left + corner % 2, top + corner // 2
            on_map = valid & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            factor = right_part if corner % 2 == 1 else 1.0 - right_part
            factor = factor * (lower_part if corner // 2 == 1 else 1.0 - lower_part)
            start = ((first + row * width + column) * HEADS + head) * WIDTH
            mask = on_map[:, None] & (d < WIDTH)[None, :]
            gathered = tl.load(value + start[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += (weight * factor)[:, None] * gathered
    result = tl.sum(tl.reshape(sums, (BLOCK_Q, BLOCK_P, BLOCK_D)), axis=1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = ((sample * queries + rows) * HEADS + head) * WIDTH
    tl.store(out + start[:, None] + d[None, :], result, mask=(rows < queries)[:, None] & (d < WIDTH)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad_out, value, table, locations, weights, grad_value, grad_locations, grad_weights, tokens, queries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % HEADS
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    r = tl.arange(0, BLOCK_Q * BLOCK_P)
    query, point = tl.program_id(0) * BLOCK_Q + r // BLOCK_P, r % BLOCK_P
    valid = (query < queries) & (point < POINTS)
    d = tl.arange(0, BLOCK_D)
    start = ((sample * queries + query) * HEADS + head) * WIDTH
    mask = valid[:, None] & (d < WIDTH)[None, :]
    grad = tl.load(grad_out + start[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        at, weight, left, top, right_part, lower_part, height, width = _points(
            table, locations, weights, level, query, point, valid, sample, queries, head, HEADS, LEVELS, POINTS
        )
        first = sample * tokens + tl.load(table + level * 3 + 2)
        sampled = tl.zeros((BLOCK_Q * BLOCK_P,), tl.float32)
        slope_x = tl.zeros((BLOCK_Q * BLOCK_P,), tl.float32)
        slope_y = tl.zeros((BLOCK_Q * BLOCK_P,), tl.float32)
        for corner in tl.static_range(4):
            column, row = left + corner % 2, top + corner // 2
            on_map = valid & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            factor_x = right_part if corner % 2 == 1 else 1.0 - right_part
            factor_y = lower_part if corner // 2 == 1 else 1.0 - lower_part
            start = ((first + row * width + column) * HEADS + head) * WIDTH
            mask = on_map[:, None] & (d < WIDTH)[None, :]
            gathered = tl.load(value + start[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(gathered * grad, axis=1)
            sampled += factor_x * factor_y * dot
            slope_x += (2 * (corner % 2) - 1) * factor_y * dot
            slope_y += (2 * (corner // 2) - 1) * factor_x * dot
            addend = (weight * factor_x * factor_y)[:, None] * grad
            tl.atomic_add(grad_value + start[:, None] + d[None, :], addend, mask=mask, sem="relaxed")
        tl.store(grad_weights + at, sampled, mask=valid)
        slopes = tl.join(weight * slope_x * width, weight * slope_y * height)
        pair = at[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(grad_locations + pair, slopes, mask=valid[:, None])


def forward(value: Tensor, level_sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """As `kernels.deformable._forward`."""
    batch, queries, heads, _, _, _ = locations.shape
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    out = value.new_empty(batch, queries, heads * value.shape[3])
    if out.numel():
        grid, constants = _launch(value, locations)
        table = _table(tuple(level_sizes), value.device)
        with on_device_of(value):
            _forward[grid](value, table, locations, weights, out, value.shape[1], queries, **constants)
    return out


def backward(
    grad_out: Tensor, value: Tensor, level_sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, in their dtypes."""
    queries = locations.shape[1]
    grad_out, value = grad_out.contiguous(), value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    if grad_out.numel():
        grid, constants = _launch(value, locations)
        tensors = (grad_out, value, _table(tuple(level_sizes), value.device), locations, weights)
        with on_device_of(value):
            _backward[grid](*tensors, grad_value, grad_locations, grad_weights, value.shape[1], queries, **constants)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants that the kernels are compiled for."""
    batch, queries, heads, levels, points, _ = locations.shape
    width = value.shape[3]
    block_p, block_d = triton.next_power_of_2(points), triton.next_power_of_2(width)
    block_q = max(1, _TILE // (block_p * block_d))
    constants = {"HEADS": heads, "WIDTH": width, "LEVELS": levels, "POINTS": points}
    blocks = {"BLOCK_Q": block_q, "BLOCK_P": block_p, "BLOCK_D": block_d}
    return (triton.cdiv(queries, block_q), batch * heads), constants | blocks


@functools.lru_cache(maxsize=1024)
def _table(level_sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 3) int32 with height, width and first token of each level; kept, since copying it to a GPU waits."""
    rows, first = [], 0
    for height, width in zip(level_sizes[::2], level_sizes[1::2], strict=True):
        rows.append((height, width, first))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)
