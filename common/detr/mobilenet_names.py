"""How MMDetection names the weights of torchvision's MobileNetV2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals of each stage (arXiv 1801.04381, table 2)

# torchvision       MMDetection
_FIRST = """
conv.0.0.           depthwise_conv.conv.
conv.0.1.           depthwise_conv.bn.
conv.1.             linear_conv.conv.
conv.2.             linear_conv.bn.
"""  # the first block does not widen its input
_FURTHER = """
conv.0.0.           expand_conv.conv.
conv.0.1.           expand_conv.bn.
conv.1.0.           depthwise_conv.conv.
conv.1.1.           depthwise_conv.bn.
conv.2.             linear_conv.conv.
conv.3.             linear_conv.bn.
"""


def to_mmdet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename torchvision's weights under `prefix` as in MMDetection 2 and 3; other names are kept."""
    return _renamed(state, prefix, dict(_rows()))


def from_mmdet(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `to_mmdet`."""
    return _renamed(state, prefix, {theirs: ours for ours, theirs in _rows()})


def _renamed(state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        known = names.get(module + ".") if name.startswith(prefix) else None
        renamed[f"{prefix}{known}{leaf}" if known else name] = tensor
    return renamed


def _rows() -> Iterator[tuple[str, str]]:
    """Beginnings of names: torchvision's (in `features`) and MMDetection's."""
    yield "0.0.", "conv1.conv."
    yield "0.1.", "conv1.bn."
    number = 0
    for stage, blocks in enumerate(BLOCKS, start=1):
        for block in range(blocks):
            number += 1
            for row in (_FIRST if number == 1 else _FURTHER).strip().splitlines():
                ours, theirs = row.split()
                yield f"{number}.{ours}", f"layer{stage}.{block}.{theirs}"
    yield "18.0.", "conv2.conv."
    yield "18.1.", "conv2.bn."
