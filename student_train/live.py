"""A teacher in memory beside the student, for comparison with the cache: the same targets, computed in every step.

It runs sample by sample, each padded for itself alone: what a detector says of a sample depends, in the last bits and
at the image's borders, on what else is in its batch. A store dumped with --batch-size 1 holds what is computed here, to
the bit where its codec is fp32 (the test suite proves it); one dumped in larger batches differs by that much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.cache.plan import level_strides
from common.cache.schema import TeacherInfo
from common.detr.detector import DeformableDetr
from common.geometry import level_shapes, token_count
from common.images import PADDING_MULTIPLE
from common.records import CachedBatch, Targets
from common.teacher import TeacherOutput, answers, detector_output


@dataclass(frozen=True)
class LiveOutput:
    """What a live teacher says of the B samples of a batch. sizes: (height, width) of each in pixels."""

    info: TeacherInfo
    samples: tuple[TeacherOutput, ...]
    sizes: tuple[tuple[int, int], ...]


class LiveTeacher:
    """A detector of this project, its output `columns` in the order of the data set's classes.

    No nn.Module, so that it is neither saved, nor trained, nor part of what processes share.
    """

    def __init__(self, model: DeformableDetr, info: TeacherInfo, columns: Sequence[int]) -> None:
        self.model, self.info, self.columns = model.eval().requires_grad_(False), info, tuple(columns)

    def look(self, images: Tensor, padding_mask: Tensor) -> LiveOutput:
        """images: (B, 3, H, W), padding_mask: (B, H, W) bool, as the student sees them."""
        self.model.placed(images.device)
        outputs = []
        valid = ~padding_mask
        sizes = torch.stack((valid[:, :, 0].sum(1), valid[:, 0].sum(1)), dim=1).tolist()
        for image, mask, size in zip(images, padding_mask, sizes, strict=True):
            height, width = (-(-side // PADDING_MULTIPLE) * PADDING_MULTIPLE for side in size)
            with torch.autocast(images.device.type, enabled=False):
                outputs.append(
                    detector_output(
                        self.model,
                        self.columns,
                        image[None, :, :height, :width].contiguous(),
                        mask[None, :height, :width].contiguous(),
                        [(size[0], size[1])],
                    )
                )
        return LiveOutput(self.info, tuple(outputs), tuple((height, width) for height, width in sizes))


def live_targets(live: LiveOutput, targets: Sequence[Targets], *, with_neck: bool) -> CachedBatch:
    """The batch that a store of these samples would give, with codec fp32 and all tokens."""
    grids = [level_shapes(height, width, live.info.strides) for height, width in live.sizes]
    found = [
        answer
        for output, target, grid in zip(live.samples, targets, grids, strict=True)
        for answer in answers(output, [target], [grid], with_neck=with_neck)
    ]
    device = found[0].memory.device
    counts = [token_count(grid) for grid in grids]
    heights, widths = np.array(live.sizes).T
    necks = [answer.neck for answer in found if answer.neck is not None]
    neck_weights = [answer.neck_weights for answer in found if answer.neck_weights is not None]
    return CachedBatch(
        tokens=torch.cat([answer.memory for answer in found]),
        token_scales=None,
        channel_scale=None,
        channel_shift=None,
        token_positions=torch.cat([torch.arange(count, device=device) for count in counts]),
        token_weights=torch.cat([answer.weights for answer in found]),
        token_offsets=torch.tensor([0, *counts]).cumsum(0),
        level_shapes=torch.tensor(grids),
        queries=torch.stack([answer.queries for answer in found]),
        logits=torch.stack([answer.logits for answer in found]),
        boxes_cxcywh=torch.stack([answer.boxes_cxcywh for answer in found]),
        quality=torch.stack([answer.quality for answer in found]),
        assignment=torch.stack([answer.assignment for answer in found]),
        level_strides=torch.from_numpy(level_strides(live.info, heights, widths)),
        neck=torch.cat(necks) if necks else None,
        neck_weights=torch.cat(neck_weights) if neck_weights else None,
    )
