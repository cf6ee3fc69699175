"""The values that cross rooms.

Shape letters, used in every docstring of the project: B batch, L decoder layers, Q queries, K classes, C channels,
T tokens (all positions of all feature levels, levels one after another, rows before columns), S kept tokens,
G ground-truth boxes, V views.

Boxes say their convention in their name: `boxes_cxcywh` are centre, width and height relative to the sample's own
width and height, in 0..1; `boxes_xyxy_px` are corners in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # drawing views, plans and manifests need no torch
    from torch import Tensor

LevelShapes = list[tuple[int, int]]  # (height, width) of each feature level, fine to coarse


@dataclass(frozen=True)
class ImageEntry:
    """One image of the annotation index, before any augmentation.

    boxes_xyxy_px: (G, 4) float32, clipped to the image, none empty. labels: (G,) int64 class indices 0..K-1.
    Crowd regions are not among them: DETR trains without them, and the evaluation has them (`common.coco.GroundTruth`).
    """

    image_id: int
    file_name: str
    width: int
    height: int
    boxes_xyxy_px: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augmentation:
    """One view of one image, as resolved integers: replaying them needs no random generator.

    The crop (top, left, height, width) is in pixels of the original image; its pixels are resized once, with
    antialiasing, to (height, width), and mirrored left to right where `flip` says so.
    """

    flip: bool
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int
    height: int
    width: int


@dataclass(frozen=True)
class Targets:
    """Ground truth of one sample: boxes_cxcywh (G, 4) float32 and labels (G,) int64, on the host."""

    boxes_cxcywh: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples padded to one size, right and bottom, to a multiple of the coarsest stride.

    images: (B, 3, H, W), uint8 as `common.images.collate` gives them; float32, normalised, 0 where padded, once
    `common.images.batch_to` has put them on a device. padding_mask: (B, H, W) bool, True where padded.
    """

    images: Tensor
    padding_mask: Tensor
    targets: list[Targets]


@dataclass(frozen=True)
class DetectorOutput:
    """Everything one forward pass gives, and everything that is cached of a teacher.

    memory: (B, T, C) encoder output; neck: (B, T, C) encoder input (after 1x1 convolution and group norm, without
    position encoding). token_mask: (B, T) True where padded. queries: (B, L, Q, C) output of each decoder layer.
    logits: (B, L, Q, K) before the sigmoid. boxes_cxcywh: (B, L, Q, 4) of each
    decoder layer. level_shapes: of the padded batch. proposals: the two-stage variant's encoder predictions
    (logits (B, T, K), boxes_cxcywh (B, T, 4)), None otherwise.
    """

    memory: Tensor
    neck: Tensor
    token_mask: Tensor
    level_shapes: LevelShapes
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    proposals: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class CachedBatch:
    """A batch of records as it leaves the store: still quantised, ragged over tokens.

    tokens: (S, C) float32, float16 or int8, or uint8: (S, C/2) of two int4 each, or (S, M) codes of product
    quantisation; the kept tokens of all samples one after another. token_scales: (S, G) float16, one for each group of
    C/G channels, and channel_scale, channel_shift: (C,) float32 decode int8 and int4 as
    q * token_scale * channel_scale + channel_shift. codebooks: (M, 256, C/M) float32, whose entries, group after group,
    are the token @ rotation, (C, C) float32. Each None where tokens are stored otherwise.
    token_positions: (S,) int32, index of each token in its own sample's unpadded T. token_weights: (S,) float32,
    W(t)/pi(t), so that sum(weight * squared error) over kept tokens estimates the sum over all tokens.
    token_offsets: (B + 1,) int64 into S. level_shapes: (B, levels, 2) int64, each sample's own unpadded grids.
    level_strides: (B, levels, 2) float32, pixels of the sample from token to token, down and across: the teacher's
    strides, scaled where it resized the sample to its own input; None if they are the student's.
    queries (B, L, Q, C), logits (B, L, Q, K), boxes_cxcywh (B, L, Q, 4), quality (B, L, Q) in 0..1, all floating, or
    logits as uint8 codes, which cache.codec.decode_logits turns into floats;
    assignment (B, L, Q) int64: which ground-truth box the teacher's own Hungarian matching gave the query, -1 for none.
    neck (T, C), neck_scales, neck_channel_scale and so on: the encoder's input, as tokens is its output;
    neck_weights (T,) float32, the weight map of the released code. None unless the store holds them, with all tokens.
    A field that the store does not hold, or that was left out when reading, has no rows.

    token_offsets, level_shapes, level_strides and assignment are always on the host, which has to know them.
    """

    tokens: Tensor
    token_scales: Tensor | None
    channel_scale: Tensor | None
    channel_shift: Tensor | None
    token_positions: Tensor
    token_weights: Tensor
    token_offsets: Tensor
    level_shapes: Tensor
    queries: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    quality: Tensor
    assignment: Tensor
    level_strides: Tensor | None = None
    codebooks: Tensor | None = None
    rotation: Tensor | None = None
    neck: Tensor | None = None
    neck_scales: Tensor | None = None
    neck_channel_scale: Tensor | None = None
    neck_channel_shift: Tensor | None = None
    neck_codebooks: Tensor | None = None
    neck_rotation: Tensor | None = None
    neck_weights: Tensor | None = None
