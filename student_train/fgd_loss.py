"""FGD, focal and global distillation (Yang et al., CVPR 2022, arXiv 2111.11837), from cached neck features.

Focal: the squared error weighs foreground and background, each token, and each channel, by the teacher's attention.
Global: what a context block makes of the whole map is to agree too. The numbers are those of the seed configuration.

Tokens of all samples and levels stand one after another; a segment is one level of one sample, which is what the
article calls a feature map. Nothing is padded, so that no attention is spent on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.boxes import cxcywh_to_xyxy
from common.matching import PaddedTargets
from common.records import CachedBatch
from kernels import decode_tokens, to_device
from student_train.feature_loss import Aligned


@dataclass(frozen=True)
class FgdWeights:
    """alpha, beta, gamma, lambda and T of the article's equations 9 to 12."""

    foreground: float = 1e-3
    background: float = 5e-4
    attention: float = 5e-4
    relation: float = 5e-6
    temperature: float = 0.5


@dataclass(frozen=True)
class Segments:
    """Which feature map each of S tokens belongs to.

    index: (S,) int64 = sample * levels + level. sizes: (N,) float, tokens of each of the N maps; 0 where the student
    has none like it. cells: (S, 2) row and column. grids: (N, 2) rows and columns of each map.
    """

    index: Tensor
    sizes: Tensor
    cells: Tensor
    grids: Tensor
    samples: int

    def sum(self, values: Tensor) -> Tensor:
        """(N, ...) sums of values (S, ...) over each map."""
        return values.new_zeros(len(self.sizes), *values.shape[1:]).index_add(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes.clamp(min=1).view(-1, *[1] * (values.dim() - 1))

    def softmax(self, values: Tensor) -> Tensor:
        """Softmax of values (S,) over the tokens of each map."""
        lowest = values.new_full((len(self.sizes),), -torch.inf)
        largest = lowest.scatter_reduce(0, self.index, values.detach(), "amax")
        raised = (values - largest[self.index]).exp()
        return raised / self.sum(raised)[self.index]


class GlobalContext(nn.Module):
    """The context block (GcBlock, arXiv 1904.11492) of one level: what attention over the map adds to every token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.Linear(channels, 1)
        last = nn.Linear(channels // 2, channels)
        self.transform = nn.Sequential(nn.Linear(channels, channels // 2), nn.LayerNorm(channels // 2), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class FgdBlocks(nn.Module):
    """The context blocks of student and teacher, one for each level; trained, and dropped with the projections."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.student = nn.ModuleList(GlobalContext(channels) for _ in range(levels))
        self.teacher = nn.ModuleList(GlobalContext(channels) for _ in range(levels))


def fgd_losses(
    student: Aligned,
    cached: CachedBatch,
    targets: PaddedTargets,
    blocks: FgdBlocks,
    weights: FgdWeights | None = None,
) -> dict[str, Tensor]:
    """The weighted terms `foreground`, `background`, `attention` and `relation`, means over samples, sums over levels.

    With A_S(F) = HW softmax over tokens of mean_c |F| / T and A_C(F) = C softmax over channels of mean_t |F| / T, those
    of the teacher in the first two terms, m_f(t) = 1 / area of the smallest box over t and m_b(t) = 1 / (number of
    tokens without a box):

    foreground + background = sum_t sum_c (alpha m_f(t) + beta m_b(t)) A_S(t) A_C(c) (F_T - F_S)^2;
    attention = gamma (|A_S(F_T) - A_S(F_S)|_1 + |A_C(F_T) - A_C(F_S)|_1);
    relation = lambda sum (R_T(F_T) - R_S(F_S))^2, R(F) = F + W_2 relu(LN(W_1 sum_t softmax_t(w F) F)).

    A box covers the cells from the floor of its low edges to the ceiling of its high ones, both included, as in the
    authors' code. A sample without boxes is all background.
    """
    weights = weights or FgdWeights()
    kept = matched_tokens(student, cached)
    segments, student_features = segments_of(student, cached, kept), student.rows()[kept].float()
    assert cached.neck is not None
    stored = (cached.neck, cached.neck_scales, cached.neck_channel_scale, cached.neck_channel_shift)
    features = decode_tokens(*stored, torch.float32, cached.neck_codebooks)[kept]
    if cached.neck_rotation is not None:  # attention is over channels, not over components
        features = features @ cached.neck_rotation.T

    mapped = (cached.level_shapes.prod(dim=-1) * student.level_matched).flatten().nonzero().squeeze(1)  # maps
    spatial, channel = attention(features, segments, weights.temperature)
    own_spatial, own_channel = attention(student_features, segments, weights.temperature)
    foreground, background = box_masks(segments, targets)
    difference = features - student_features
    error = spatial * (channel[segments.index] * difference.square()).sum(dim=-1)  # (S,)
    in_channels = (channel - own_channel).abs()[to_device(mapped, features.device)].sum()
    missed = (spatial - own_spatial).abs().sum() + in_channels
    context = _contexts(features, segments, blocks.teacher) - _contexts(student_features, segments, blocks.student)
    relation = (difference + context[segments.index]).square().sum()
    return {
        "foreground": weights.foreground * (foreground * error).sum() / segments.samples,
        "background": weights.background * (background * error).sum() / segments.samples,
        "attention": weights.attention * missed / segments.samples,
        "relation": weights.relation * relation / segments.samples,
    }


def matched_tokens(student: Aligned, cached: CachedBatch) -> Tensor:
    """Which of the teacher's tokens, all of which are stored, the student learns from: their indices (S,) int64."""
    tokens_of_level = cached.level_shapes.prod(dim=-1).flatten()
    matched = student.level_matched.flatten().repeat_interleave(tokens_of_level)
    return to_device(matched.nonzero().squeeze(1), student.sample.device)


def segments_of(student: Aligned, cached: CachedBatch, kept: Tensor) -> Segments:
    """The feature maps of the tokens at these indices (S,)."""
    samples, levels = cached.level_shapes.shape[:2]
    index = (student.sample * levels + student.level)[kept]
    sizes = (cached.level_shapes.prod(dim=-1) * student.level_matched).flatten().float()
    sizes, grids = (to_device(values, index.device) for values in (sizes, cached.level_shapes.flatten(0, 1)))
    return Segments(index, sizes, student.cells[kept], grids, samples)


def attention(features: Tensor, segments: Segments, temperature: float) -> tuple[Tensor, Tensor]:
    """A_S (S,) and A_C (N, C) of features (S, C)."""
    magnitude = features.abs()
    spatial = segments.sizes[segments.index] * segments.softmax(magnitude.mean(dim=-1) / temperature)
    channel = features.shape[-1] * (segments.mean(magnitude) / temperature).softmax(dim=-1)
    return spatial, channel


def box_masks(segments: Segments, targets: PaddedTargets) -> tuple[Tensor, Tensor]:
    """m_f (S,) and m_b (S,): one over the area in cells of the smallest box, one over the number of other tokens."""
    maps, levels = len(segments.sizes), len(segments.sizes) // segments.samples
    boxes_xyxy = cxcywh_to_xyxy(targets.boxes_cxcywh).repeat_interleave(levels, dim=0)  # (N, G, 4)
    rows, columns = segments.grids[:, :1], segments.grids[:, 1:]
    extent = torch.stack((columns, rows), dim=-1)  # (N, 1, 2), as x and y
    low, high = (boxes_xyxy[..., :2] * extent).floor(), (boxes_xyxy[..., 2:] * extent).ceil()
    valid = to_device(targets.valid.repeat_interleave(levels, dim=0), rows.device)
    share = 1 / (high - low + 1).prod(dim=-1) * valid  # (N, G)
    place = segments.cells.flip(-1).unsqueeze(1)  # (S, 1, 2), column and row
    inside = ((place >= low[segments.index]) & (place <= high[segments.index])).all(dim=-1)  # (S, G)
    if not targets.valid.shape[1]:
        foreground = low.new_zeros(len(segments.index))
    else:
        foreground = (inside * share[segments.index]).amax(dim=1)
    outside = (foreground == 0).float()
    assert len(share) == maps
    return foreground, outside / segments.sum(outside).clamp(min=1)[segments.index]


def _contexts(features: Tensor, segments: Segments, blocks: nn.ModuleList) -> Tensor:
    """(N, C): what each map's context block adds to every token."""
    levels, channels = len(blocks), features.shape[-1]
    of_level = segments.index % levels
    heads = torch.stack([block.attention.weight[0] for block in blocks])  # type: ignore[union-attr, index]
    biases = torch.stack([block.attention.bias[0] for block in blocks])  # type: ignore[union-attr, index]
    share = segments.softmax((features * heads[of_level]).sum(dim=-1) + biases[of_level])
    pooled = segments.sum(features * share.unsqueeze(-1)).view(-1, levels, channels)
    added = [block.transform(pooled[:, level]) for level, block in enumerate(blocks)]  # type: ignore[operator]
    return torch.stack(added, dim=1).flatten(0, 1)
