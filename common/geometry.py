"""The arithmetic of feature grids: which tokens a sample has, and where they lie in a padded batch.

The plan of a store needs it before any model runs, and the model obeys it; so it stands between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.records import LevelShapes


def level_shapes(height: int, width: int, strides: Sequence[int]) -> LevelShapes:
    """Grids (height, width) of each level for an image of `height` x `width` pixels: division, rounded up.

    This is what a chain of stride-2 convolutions gives. It is also what the padding mask leaves of a sample in a batch
    padded to a multiple of the coarsest stride: cell i of a level is valid if pixel i * stride is inside the image.
    """
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def token_count(shapes: LevelShapes) -> int:
    """T: the positions of all levels together."""
    return sum(height * width for height, width in shapes)


def token_positions_in_batch(sample_shapes: LevelShapes, batch_shapes: LevelShapes) -> Tensor:
    """Where each token of a sample's own unpadded grids lies in the padded batch's T.

    Returns (T_sample,) int64: indices into the flattened tokens of `batch_shapes`, in the order of the sample's own
    tokens (levels one after another, rows before columns). Raises ValueError if a grid does not fit into the batch's.
    """
    if len(sample_shapes) != len(batch_shapes):
        raise ValueError(f"a sample of {len(sample_shapes)} levels in a batch of {len(batch_shapes)}")
    positions, start = [], 0
    for (height, width), (batch_height, batch_width) in zip(sample_shapes, batch_shapes, strict=True):
        if height > batch_height or width > batch_width:
            raise ValueError(f"a grid of {height}x{width} does not fit into {batch_height}x{batch_width}")
        rows = torch.arange(height)[:, None] * batch_width
        positions.append((start + rows + torch.arange(width)).flatten())
        start += batch_height * batch_width
    return torch.cat(positions)
