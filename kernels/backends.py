"""Which version of an operator runs where, and one line in the log that says so."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton")

_log = logging.getLogger("kernels")


def choose(operator: str, backend: str, tensor: Tensor) -> str:
    """`backend`, or for "auto" what suits the tensor: "cpu" on the CPU, "triton" on CUDA where it is installed and the
    dtype is not float64, "reference" elsewhere.

    While a model is exported to ONNX, "auto" is "reference": ONNX knows `grid_sample`, not our operators.
    Raises ValueError for a name that is not in BACKENDS, or for a version that cannot take the tensor.
    """
    device, triton_fits = tensor.device, tensor.dtype != torch.float64
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {device}; leave it at 'auto'")
    if backend == "triton" and not _has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed; leave it at 'auto'")
    if backend == "triton" and not triton_fits:
        raise ValueError("backend 'triton' sums in float32 and does not take float64; leave it at 'auto'")
    if backend == "auto":
        if torch.onnx.is_in_onnx_export():
            backend = "reference"
        elif device.type == "cpu":
            backend = "cpu"
        else:
            backend = "triton" if device.type == "cuda" and triton_fits and _has_triton() else "reference"
    if not torch.compiler.is_compiling():
        _announce(operator, device.type, backend)
    return backend


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _announce(operator: str, device_type: str, backend: str) -> None:
    _log.info("%s on %s: %s version", operator, device_type, backend)
