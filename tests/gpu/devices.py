"""Which devices a test runs on: the CPU with small inputs and, where there is one, CUDA with these and large ones.

`pytest -m gpu` runs the latter alone. Without a CUDA device they do not exist, rather than be skipped by the hundred.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_CUDA else [])]


def devices_and(small: Iterable[Any], large: Iterable[Any]) -> list[Any]:
    """Parameters (device, value): `small` values on both devices, `large` ones on CUDA alone."""
    small, large = list(small), list(large)
    on_cuda = [pytest.param("cuda", value, marks=pytest.mark.gpu) for value in [*small, *large]]
    return [("cpu", value) for value in small] + (on_cuda if HAS_CUDA else [])
