"""Deformable attention and the feature loss at COCO's sizes: time, bytes a second against a copy's, peak memory.

The bytes are the least that must move: each input read once, each output written once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels import cached_feature_loss, deformable_attention
from tests.deformable_cases import SHAPES, Shape, inputs
from tests.feature_loss_cases import inputs as loss_inputs
from tests.gpu.measuring import Place, Row, bytes_of
from tests.gpu.test_kernels import COCO, COCO_TOKENS

Version = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(place: Place) -> Iterator[Row]:
    """Two images: ours, the plain version on grid_sample, and where they are installed transformers' and deformops'."""
    copy = place.copy_bytes_per_s()
    yield Row("copy on the device", {"GB/s": copy / 1e9})
    shapes = {"usual": SHAPES["usual"]} if place.small else COCO
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            value, locations, weights = (tensor.detach().to(place.device) for tensor in inputs(shape))
            leaves = tuple(tensor.requires_grad_() for tensor in (value.to(dtype), locations, weights))
            for version, call in versions(shape, place.device).items():
                row = f"{name}, {str(dtype).removeprefix('torch.')}, {version}"
                try:
                    yield _attention_row(row, place, call, leaves, copy)
                except (RuntimeError, ValueError) as error:  # a dtype or size that somebody else's version refuses
                    yield Row(row, {"refused": str(error).splitlines()[0][:60]})


def versions(shape: Shape, device: torch.device) -> dict[str, Version]:
    """By name; all take value, locations and weights as ours does."""

    def ours(backend: str) -> Version:
        return lambda value, locations, weights: deformable_attention(value, shape.levels, locations, weights, backend)

    found = {"ours": ours("auto"), "grid_sample": ours("reference")}
    try:
        module = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    except ImportError:
        pass
    else:
        theirs = module.MultiScaleDeformableAttention()
        found["transformers"] = lambda value, locations, weights: theirs(
            value, None, [*shape.levels], None, locations.to(value.dtype), weights.to(value.dtype), im2col_step=64
        )
    try:
        msda = importlib.import_module("deformops.registry").msda
    except ImportError:
        return found
    sizes = torch.tensor(shape.levels, device=device)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    found["deformops"] = lambda value, locations, weights: msda(
        value, sizes, starts, locations.to(value.dtype), weights.flatten(3).to(value.dtype)
    )
    return found


def _attention_row(name: str, place: Place, call: Version, leaves: tuple[Tensor, ...], copy: float) -> Row:
    output = call(*leaves)
    grad = torch.randn_like(output)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    def backward() -> object:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    forward_s, backward_s = place.seconds(forward), place.seconds(backward)
    read = bytes_of(leaves)
    forward_bytes, backward_bytes = read + output.nbytes, 2 * read + output.nbytes
    peak = place.peak_mib(lambda: torch.autograd.grad(call(*leaves), leaves, grad))
    return Row(
        name,
        {
            "forward ms": forward_s * 1e3,
            "backward ms": backward_s * 1e3,
            "forward GB/s": forward_bytes / forward_s / 1e9,
            "backward GB/s": backward_bytes / backward_s / 1e9,
            "forward of copy": forward_bytes / forward_s / copy,
            "backward of copy": backward_bytes / backward_s / copy,
            "peak MiB": peak,
        },
    )


def feature_loss(place: Place) -> Iterator[Row]:
    """Forward and backward on all tokens of two images, as they are stored: ours and the plain version."""
    copy = place.copy_bytes_per_s()
    for kind in ("int8, groups", "int4", "codes for 4", "float16"):
        sizes = (12, 9, (5, 9)) if place.small else (256, COCO_TOKENS, (COCO_TOKENS, COCO_TOKENS))
        case = loss_inputs(kind, *sizes)
        student, *others = (None if tensor is None else tensor.detach().to(place.device) for tensor in case.arguments())
        assert student is not None
        student.requires_grad_()
        moved = bytes_of(others) + 3 * student.nbytes  # read in both directions, and its gradient written
        for version, backend in (("ours", "auto"), ("plain", "reference")):
            step = partial(_loss_and_gradient, student, others, backend)
            step_s = place.seconds(step)
            figures = {"both ways ms": step_s * 1e3, "GB/s": moved / step_s / 1e9, "of copy": moved / step_s / copy}
            yield Row(f"{kind}, {version}", {**figures, "peak MiB": place.peak_mib(step)})


def _loss_and_gradient(student: Tensor, others: Sequence[Tensor | None], backend: str) -> object:
    return torch.autograd.grad(cached_feature_loss(student, *others, backend=backend), student)
