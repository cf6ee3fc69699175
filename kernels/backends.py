"""Which version of an operator runs where, and one line in the log that says so."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")

_log = logging.getLogger("kernels")


def choose(operator: str, backend: str, device: torch.device) -> str:
    """`backend`, or for "auto": "cpu" on the CPU, "triton" on CUDA where it is installed, "reference" elsewhere.

    While a model is exported to ONNX, "auto" is "reference": ONNX knows `grid_sample`, not our operators.
    Raises ValueError for a name that is not in BACKENDS or that does not run on `device`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {device}; leave it at 'auto'")
    if backend == "triton" and not _has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed; leave it at 'auto'")
    if backend == "auto":
        if torch.onnx.is_in_onnx_export():
            backend = "reference"
        elif device.type == "cpu":
            backend = "cpu"
        else:
            backend = "triton" if device.type == "cuda" and _has_triton() else "reference"
    if not torch.compiler.is_compiling():
        _announce(operator, device.type, backend)
    return backend


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _announce(operator: str, device_type: str, backend: str) -> None:
    _log.info("%s on %s: %s version", operator, device_type, backend)
