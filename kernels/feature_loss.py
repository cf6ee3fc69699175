"""Feature distillation on cached tokens: the facade."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backends import choose
from kernels.feature_loss_reference import cached_feature_loss_reference


def cached_feature_loss(
    student: Tensor,
    tokens: Tensor,
    positions: Tensor,
    weights: Tensor,
    offsets: Tensor,
    scales: Tensor | None = None,
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    codebooks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted squared error between the student's features and the teacher's cached, quantised ones.

    `sum_s weights[s] * sum_c (decode(tokens)[s, c] - student[b(s), positions[s], c])^2`, with
    `decode(q)[s, c] = q * scales[s, group(c)] * channel_scale[c] + channel_shift[c]`: the target-aware feature
    distillation of DETRDistill (arXiv 2211.10156) with its masks folded into one weight per token, on the tokens that
    were kept. The caller folds every normalisation into the weights.

    student: (B, T, C) float32, bf16 or fp16, the only input with a gradient. tokens: (S, C) float32, float16 or
    int8; (S, C/2) uint8 holding two int4 in -8..7 each, in two's complement: the even channel in the low nibble, the
    odd one in the high nibble; or, with codebooks, (S, M) uint8 codes. positions: (S,) int64 into the T of the (padded)
    student; those of one sample are all different. weights: (S,) float32. offsets: (B+1,) int64: tokens
    offsets[b]:offsets[b+1] belong to sample b. scales: (S, G) float16 or float32, one for each group of C/G
    neighbouring channels. channel_scale, channel_shift: (C,). codebooks: (M, 256, d) float32 with d = C/M, of product
    quantisation (Jegou et al., TPAMI 2011): q's channels m*d to (m+1)*d are the centroid codebooks[m, tokens[s, m]].
    Where these were made of rotated features, the student comes rotated likewise: that is the caller's part. What is
    None is left out. Returns a float32 scalar (float64 for a float64 student).

    The gradient of student is the only tensor of its size that is allocated, unless backend is "reference". The "cpu"
    and "triton" versions add in a fixed order.

    Raises ValueError for shapes and dtypes that do not fit, and on the CPU for positions and offsets out of range (on a
    GPU that would wait for the device).
    """
    _check(student, tokens, positions, weights, offsets, scales, channel_scale, channel_shift, codebooks)
    chosen = choose("cached feature loss", backend, student)
    factors = (weights, scales, channel_scale, channel_shift, codebooks)
    loss: Tensor
    if chosen == "cpu" and _wants_gradient(student) and not torch.compiler.is_compiling():
        loss = _module("cpu").InOnePass.apply(student, tokens, positions, offsets, *factors)
        return loss
    inputs = (student, tokens, _rows(positions, offsets, student.shape[1]), *factors)
    loss = cached_feature_loss_reference(*inputs) if chosen == "reference" else _forward(*inputs, chosen)
    return loss


def _wants_gradient(student: Tensor) -> bool:
    """Whether it is asked for, and may be multiplied by the loss's own after it was rounded to the student's dtype."""
    return student.requires_grad and torch.is_grad_enabled() and student.dtype in (torch.float32, torch.float64)


def _rows(positions: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Each token's row (S,) in the flattened (B * length, C) student."""
    if positions.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(_module("cpu").rows_of(positions, offsets, length))
    every = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(every, offsets.diff(), output_size=len(positions)) * length + positions


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"kernels.feature_loss_{backend}")  # at first use: numba and triton load slowly


@torch.library.custom_op("detrcache::cached_feature_loss", mutates_args=())
def _forward(
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
    backend: str,
) -> Tensor:
    loss: Tensor = _module(backend).forward(
        student, tokens, rows, weights, scales, channel_scale, channel_shift, codebooks
    )
    return loss


@_forward.register_fake
def _(
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
    backend: str,
) -> Tensor:
    return student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))


@torch.library.custom_op("detrcache::cached_feature_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
    backend: str,
) -> Tensor:
    grad_student: Tensor = _module(backend).backward(
        grad, student, tokens, rows, weights, scales, channel_scale, channel_shift, codebooks
    )
    return grad_student


@_backward.register_fake
def _(
    grad: Tensor,
    student: Tensor,
    tokens: Tensor,
    rows: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
    backend: str,
) -> Tensor:
    return student.new_empty(student.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.backend), *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(
    student: Tensor,
    tokens: Tensor,
    positions: Tensor,
    weights: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    codebooks: Tensor | None,
) -> None:
    if student.dim() != 3 or not student.is_floating_point():
        raise ValueError(f"student must be floating and (B, T, C), got {student.dtype} {tuple(student.shape)}")
    batch, _, channels = student.shape
    if tokens.dtype not in (torch.float32, torch.float16, torch.int8, torch.uint8):
        raise ValueError(f"tokens must be float32, float16, int8 or uint8 (int4 or codes), got {tokens.dtype}")
    kept, elements = positions.shape[0], channels
    if codebooks is not None:
        _check_codebooks(codebooks, tokens, channels)
        elements = codebooks.shape[0]
    elif tokens.dtype == torch.uint8:
        if channels % 2:
            raise ValueError(f"int4 tokens need an even number of channels, got {channels}")
        elements = channels // 2
    shapes = {
        "tokens": (tokens, (kept, elements)),
        "positions": (positions, (kept,)),
        "weights": (weights, (kept,)),
        "offsets": (offsets, (batch + 1,)),
        "channel_scale": (channel_scale, (channels,)),
        "channel_shift": (channel_shift, (channels,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for {kept} tokens of {channels} channels, got {tuple(tensor.shape)}"
            )
    for name, tensor in (("positions", positions), ("offsets", offsets)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    if scales is not None and (scales.dim() != 2 or scales.shape[0] != kept or channels % max(1, scales.shape[1])):
        raise ValueError(f"scales must be ({kept}, G) with G a divisor of {channels}, got {tuple(scales.shape)}")


def _check_codebooks(codebooks: Tensor, tokens: Tensor, channels: int) -> None:
    if codebooks.dtype != torch.float32 or tokens.dtype != torch.uint8:
        raise ValueError(f"codebooks must be float32 and their tokens uint8, got {codebooks.dtype} and {tokens.dtype}")
    shape = codebooks.shape
    if len(shape) != 3 or shape[1] != 256 or shape[0] * shape[2] != channels:
        raise ValueError(f"codebooks must be (M, 256, d) with M * d = {channels} channels, got {tuple(shape)}")
