"""Multi-scale deformable attention: the facade."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backends import choose
from kernels.deformable_reference import deformable_attention_reference


def deformable_attention(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Sample every head's values at a few points of every level and sum them with the attention weights.

    Deformable DETR (arXiv 2010.04159), equation 3, between the projections: for query q and head h
    `output[q, h] = sum over levels l, points p of attention_weights[q, h, l, p] * bilinear(value_l[h], location)`.

    value: (B, T, H, D), the levels one after another, rows before columns. level_shapes: (height, width) of each.
    sampling_locations: (B, Q, H, L, P, 2) as (x, y) relative to each level's width and height; 0..1 is the map,
    (0, 0) the outer corner of its first pixel; what lies outside contributes zero, as in `grid_sample` with
    `padding_mode="zeros", align_corners=False`. attention_weights: (B, Q, H, L, P). Returns (B, Q, H*D) in the dtype of
    value. Dtypes may differ (autocast); sums are in float32, or float64 for a float64 value.

    backend: "auto", "reference" (plain PyTorch, any device), "cpu" (numba; same bits for any number of threads) or
    "triton" (head widths up to 128; its value gradient is summed in no fixed order).

    Raises ValueError for shapes that do not fit, and for a backend that cannot run here.
    """
    _check(value, level_shapes, sampling_locations, attention_weights)
    chosen = choose("deformable attention", backend, value)
    if chosen == "reference":
        return deformable_attention_reference(value, level_shapes, sampling_locations, attention_weights)
    # A version that brings its own autograd (deformops, say) is one more branch here; one that does not is one more
    # module with `forward` and `backward` in `_module`.
    level_sizes = [side for shape in level_shapes for side in shape]
    output: Tensor = _forward(value, level_sizes, sampling_locations, attention_weights, chosen)
    return output


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"kernels.deformable_{backend}")  # at first use: numba and triton load slowly


@torch.library.custom_op("detrcache::deformable_attention", mutates_args=())
def _forward(
    value: Tensor, level_sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor, backend: str
) -> Tensor:
    output: Tensor = _module(backend).forward(value, level_sizes, sampling_locations, attention_weights)
    return output


@_forward.register_fake
def _(
    value: Tensor, level_sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor, backend: str
) -> Tensor:
    batch, queries = sampling_locations.shape[:2]
    return value.new_empty(batch, queries, value.shape[2] * value.shape[3])


@torch.library.custom_op("detrcache::deformable_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    value: Tensor,
    level_sizes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _module(backend).backward(
        grad, value, level_sizes, sampling_locations, attention_weights
    )
    return grads


@_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    level_sizes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    grad_value, grad_locations, grad_weights = (tensor.new_empty(tensor.shape) for tensor in inputs)
    return grad_value, grad_locations, grad_weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.level_sizes, sampling_locations, attention_weights, ctx.backend = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward(
        grad, value, ctx.level_sizes, sampling_locations, attention_weights, ctx.backend
    )
    return grad_value, None, grad_locations, grad_weights, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if value.dim() != 4 or 0 in value.shape[1:]:
        raise ValueError(f"value must be (B, T, H, D) with T, H and D at least 1, got {tuple(value.shape)}")
    if any(height < 1 or width < 1 for height, width in level_shapes):
        raise ValueError(f"level_shapes must be (height, width) of at least 1, got {list(level_shapes)}")
    tokens = sum(height * width for height, width in level_shapes)
    if value.shape[1] != tokens:
        raise ValueError(f"level_shapes {list(level_shapes)} hold {tokens} tokens, but value has {value.shape[1]}")
    batch, _, heads, _ = value.shape
    shape = sampling_locations.shape
    if len(shape) != 6 or (shape[0], shape[2], shape[3], shape[5]) != (batch, heads, len(level_shapes), 2):
        expected = f"({batch}, Q, {heads}, {len(level_shapes)}, P, 2)"
        raise ValueError(f"sampling_locations must be {expected}, got {tuple(shape)}")
    if shape[4] < 1:
        raise ValueError("sampling_locations must hold at least one point for each level, got P = 0")
    if attention_weights.shape != shape[:-1]:
        raise ValueError(f"attention_weights must be {tuple(shape[:-1])}, got {tuple(attention_weights.shape)}")
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.device != value.device:
            raise ValueError(f"{name} must be on {value.device} like value, got {tensor.device}")
