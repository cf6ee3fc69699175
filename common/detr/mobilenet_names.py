"""How timm and MMDetection name the weights of torchvision's MobileNetV2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals of each stage (arXiv 1801.04381, table 2)

# torchvision       timm           MMDetection
_FIRST = """
conv.0.0.           conv_dw.       depthwise_conv.conv.
conv.0.1.           bn1.           depthwise_conv.bn.
conv.1.             conv_pw.       linear_conv.conv.
conv.2.             bn2.           linear_conv.bn.
"""  # the first block does not widen its input
_FURTHER = """
conv.0.0.           conv_pw.       expand_conv.conv.
conv.0.1.           bn1.           expand_conv.bn.
conv.1.0.           conv_dw.       depthwise_conv.conv.
conv.1.1.           bn2.           depthwise_conv.bn.
conv.2.             conv_pwl.      linear_conv.conv.
conv.3.             bn3.           linear_conv.bn.
"""


def to_timm(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename torchvision's weights under `prefix` as in timm's mobilenetv2_100; other names are kept."""
    return _renamed(state, prefix, {ours: theirs for ours, theirs, _ in _rows()})


def from_timm(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return _renamed(state, prefix, {theirs: ours for ours, theirs, _ in _rows()})


def to_mmdet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename torchvision's weights under `prefix` as in MMDetection 2 and 3; other names are kept."""
    return _renamed(state, prefix, {ours: theirs for ours, _, theirs in _rows()})


def from_mmdet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return _renamed(state, prefix, {theirs: ours for ours, _, theirs in _rows()})


def _renamed(state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        known = name.startswith(prefix) and names.get(module + ".")
        renamed[f"{prefix}{known}{leaf}" if known else name] = tensor
    return renamed


def _rows() -> Iterator[tuple[str, str, str]]:
    """Beginnings of names: torchvision's (in `features`), timm's, MMDetection's."""
    yield "0.0.", "conv_stem.", "conv1.conv."
    yield "0.1.", "bn1.", "conv1.bn."
    number = 0
    for stage, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            number += 1
            for row in (_FIRST if number == 1 else _FURTHER).strip().splitlines():
                ours, timm, mmdet = row.split()
                yield f"{number}.{ours}", f"blocks.{stage}.{block}.{timm}", f"layer{stage + 1}.{block}.{mmdet}"
