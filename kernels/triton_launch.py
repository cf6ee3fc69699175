"""What launching a Triton kernel needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's; none for the interpreter's CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
