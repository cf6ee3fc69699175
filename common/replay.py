"""The second half of augmentation: the integers that `common.augment` drew, replayed on an image and its boxes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.records import Augmentation, ImageEntry, Targets

_RESAMPLING = Image.Resampling.BILINEAR  # Pillow's filters widen when they shrink: that is the antialiasing


def apply_image(image: Tensor, augmentation: Augmentation) -> Tensor:
    """Crop, resize and mirror uint8 pixels (3, H, W) -> (3, height, width): one antialiased bilinear resampling.

    Raises ValueError where the crop leaves the image: it was drawn for an image of another size.
    """
    a = augmentation
    right, bottom = a.crop_left + a.crop_width, a.crop_top + a.crop_height
    if bottom > image.shape[-2] or right > image.shape[-1]:
        raise ValueError(f"{augmentation} does not fit an image of {image.shape[-1]} x {image.shape[-2]} pixels")
    cropped = image[:, a.crop_top : bottom, a.crop_left : right].permute(1, 2, 0).contiguous()
    # Pillow resamples in integers, the same on every processor. torchvision's uint8 path needs AVX2 and differs without
    # it in one value of six: a cache dumped on x86 could not be replayed on ARM.
    resized = np.array(Image.fromarray(cropped.numpy()).resize((a.width, a.height), _RESAMPLING))
    pixels = torch.from_numpy(resized).permute(2, 0, 1)
    return pixels.flip(-1) if a.flip else pixels.contiguous()


def apply_boxes(entry: ImageEntry, augmentation: Augmentation) -> Targets:
    """The entry's ground truth as the augmented image shows it; boxes that the crop leaves empty are dropped.

    The others keep their order. Computed in float64 and rounded once, so that every replay gives the same bits.
    """
    a = augmentation
    crop_size = np.array([a.crop_width, a.crop_height, a.crop_width, a.crop_height], dtype=np.float64)
    offset = np.array([a.crop_left, a.crop_top, a.crop_left, a.crop_top], dtype=np.float64)
    corners = np.clip(entry.boxes_xyxy_px.astype(np.float64) - offset, 0, crop_size)
    kept = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    corners = corners[kept] / crop_size
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    if a.flip:
        centres[:, 0] = 1 - centres[:, 0]
    boxes_cxcywh = np.concatenate((centres, sizes), axis=1).astype(np.float32)
    return Targets(torch.from_numpy(boxes_cxcywh), torch.from_numpy(entry.labels[kept]))
