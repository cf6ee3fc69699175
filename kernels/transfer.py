"""From the host to a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to a GPU is queued behind its work, while the host goes on.

    CUDA copies asynchronously from page-locked memory only. What is not there goes through some that torch keeps for
    this purpose, and does not use again before the copy is made.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
