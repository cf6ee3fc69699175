"""The kernels against what they replace, at the sizes of training on two images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels import cached_feature_loss, deformable_attention, hungarian, nearest_codes
from kernels.nearest_codes import nearest_codes_reference
from tests.benchmarks import Case

LEVELS_640 = [(80, 80), (40, 40), (20, 20), (10, 10)]
STEPS = 16  # of the feature loss in one go: a step alone, after a rest, is mostly waking up
LEVELS_320 = [(40, 40), (20, 20), (10, 10), (5, 5)]


def cases() -> Iterator[Case]:
    """Two images throughout; deformable attention with 8 heads of width 32, 4 levels, 4 points, float32."""
    tokens = sum(height * width for height, width in LEVELS_640)
    yield _deformable("deformable attention, encoder 640x640", LEVELS_640, tokens, spread=None)
    yield _deformable("deformable attention, encoder 640x640, near", LEVELS_640, tokens, spread=0.05)
    yield _deformable("deformable attention, encoder 320x320", LEVELS_320, tokens // 4, spread=None)
    yield _deformable("deformable attention, decoder 640x640", LEVELS_640, 300, spread=None)
    yield _deformable_forward("deformable attention, encoder 640x640, forward", LEVELS_640, tokens)
    for kind in ("int8", "int4", "pq", "float16"):
        yield _feature_loss(f"cached feature loss, {kind}", kind, tokens, tokens // 4)
    yield _feature_loss("cached feature loss, pq, all tokens", "pq", tokens, tokens)
    for targets in (300, 100):
        yield _hungarian(f"hungarian, 6 layers x 2 images, 300x{targets}", targets)
    for width in (8, 4):
        yield _nearest_codes(f"nearest codes, groups of {width}", width)


def _deformable_inputs(
    levels: list[tuple[int, int]], queries: int, spread: float | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Locations anywhere on the map, or within `spread` of the query's own place, as in a trained encoder."""
    torch.manual_seed(0)
    tokens = sum(height * width for height, width in levels)
    value = torch.randn(2, tokens, 8, 32, requires_grad=True)
    locations = torch.rand(2, queries, 8, 4, 4, 2)
    if spread is not None:
        places = torch.cat([torch.cartesian_prod(torch.arange(h) / h, torch.arange(w) / w).flip(1) for h, w in levels])
        locations = places[None, :, None, None, None] + spread * (2 * locations - 1)
    weights = torch.rand(2, queries, 8, 4, 4).flatten(3).softmax(-1).view(2, queries, 8, 4, 4).requires_grad_()
    return (value, locations.requires_grad_(), weights), torch.randn(2, queries, 256)


def _deformable(name: str, levels: list[tuple[int, int]], queries: int, spread: float | None) -> Case:
    (value, locations, weights), grad = _deformable_inputs(levels, queries, spread)

    def step(backend: str) -> Callable[[], object]:
        def run() -> object:
            output = deformable_attention(value, levels, locations, weights, backend)
            return torch.autograd.grad(output, (value, locations, weights), grad)

        return run

    return Case(name, step("auto"), step("reference"), "forward + backward of one layer")


def _deformable_forward(name: str, levels: list[tuple[int, int]], queries: int) -> Case:
    (value, locations, weights), _ = _deformable_inputs(levels, queries, None)

    def step(backend: str) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return deformable_attention(value, levels, locations, weights, backend)

        return run

    return Case(name, step("auto"), step("reference"), "forward of one layer")


def _feature_loss(name: str, kind: str, tokens: int, kept: int) -> Case:
    """`kept` of the tokens of each image, 256 channels, in the cache's usual formats."""
    torch.manual_seed(0)
    batch, channels = 2, 256
    student = torch.randn(batch, tokens, channels, requires_grad=True)
    positions = torch.cat([torch.randperm(tokens)[:kept].sort().values for _ in range(batch)])
    stored = {
        "int8": (torch.randint(-127, 128, (batch * kept, channels), dtype=torch.int8), torch.rand(batch * kept, 1)),
        "int4": (torch.randint(256, (batch * kept, channels // 2), dtype=torch.uint8), torch.rand(batch * kept, 8)),
        "pq": (torch.randint(256, (batch * kept, channels // 8), dtype=torch.uint8), None),
        "float16": (torch.randn(batch * kept, channels).half(), None),
    }
    teacher, scales = stored[kind]
    channel = None if scales is None else torch.rand(channels)
    codebooks = torch.randn(channels // 8, 256, 8) if kind == "pq" else None
    weights, offsets = torch.rand(batch * kept), torch.tensor([0, kept, 2 * kept])

    def step(backend: str) -> Callable[[], object]:
        def run() -> object:
            for _ in range(STEPS):
                loss = cached_feature_loss(
                    student, teacher, positions, weights, offsets, scales, channel, channel, codebooks, backend
                )
                torch.autograd.grad(loss, student)
            return None

        return run

    return Case(
        name,
        step("auto"),
        step("reference"),
        f"{STEPS} x forward + backward, {kept} of {tokens} tokens, twice",
        runs=25,
    )


def _nearest_codes(name: str, width: int) -> Case:
    """All tokens of a COCO sample."""
    torch.manual_seed(0)
    features, codebooks = torch.randn(12_100, 256), torch.randn(256 // width, 256, width)
    return Case(
        name,
        lambda: nearest_codes(features, codebooks),
        lambda: nearest_codes_reference(features, codebooks),
        "12,100 tokens of 256 channels",
    )


def _hungarian(name: str, targets: int) -> Case:
    torch.manual_seed(0)
    costs = torch.rand(6, 2, 300, targets)

    def one_by_one() -> object:
        return [[linear_sum_assignment(cost.numpy()) for cost in layer] for layer in costs]

    return Case(name, lambda: hungarian(costs), one_by_one, "all matrices of a step", runs=25)
