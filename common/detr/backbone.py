"""Image -> feature maps: ResNets and MobileNetV2 from torchvision, timm's, and a small ResNet for drawn scenes.

Every backbone gives its stages at strides 8, 16 and 32 (C3, C4, C5 in the usual notation). Parameter names under
`body` are torchvision's, so that torchvision's ImageNet files load as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from common.detr.config import MOBILENETS
from common.detr.timm_backbone import PREFIX, TimmBackbone, build_timm


class Backbone(nn.Module):
    """A chain of modules, of which three give C3, C4 and C5.

    body: the chain by name. stages: the names of those three. channels: theirs. `forward` takes images (B, 3, H, W) and
    returns three maps (B, channels[i], ceil(H / stride), ceil(W / stride)) for strides 8, 16, 32.
    """

    def __init__(self, body: Iterable[tuple[str, nn.Module]], stages: Sequence[str], channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.channels = tuple(channels)
        self.body = nn.ModuleDict(dict(body))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = {}
        for name, module in self.body.items():
            images = maps[name] = module(images)
        return [maps[name] for name in self.stages]


def build_backbone(
    name: str, pretrained: bool = True, tiny_channels: Sequence[int] = (12, 16, 32, 64, 128), tiny_blocks: int = 2
) -> Backbone | TimmBackbone:
    """The backbone called `name`, with random weights. "timm:NAME" is timm's, see `build_timm`.

    pretrained: it is to receive ImageNet weights. Then batch norm is frozen, and so are the parameters up to stride 4
    (the stem and the first stage), as in the recipe of Deformable DETR. Otherwise everything trains. "tiny" always
    trains, and so does "mobilenet_v2_1280", DETRDistill's. tiny_channels are those of tiny's stem (stride 2) and of its
    stages at strides 4, 8, 16 and 32, each of `tiny_blocks` basic blocks.
    """
    if name.startswith(PREFIX):
        return build_timm(name.removeprefix(PREFIX), pretrained)
    if name == "tiny":
        return _tiny(tiny_channels, tiny_blocks)
    frozen = pretrained and name != "mobilenet_v2_1280"
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    backbone = _mobilenet_v2(name, norm) if name in MOBILENETS else _resnet(name, norm)
    if frozen:
        for child, module in backbone.body.items():
            if child in ("conv1", "layer1", "0", "1", "2", "3"):
                module.requires_grad_(False)
    return backbone


def _resnet(name: str, norm: type[nn.Module]) -> Backbone:
    network = torchvision.models.get_model(name, norm_layer=norm)
    channels = network.fc.in_features
    body = [(name, module) for name, module in network.named_children() if name not in ("avgpool", "fc")]
    return Backbone(body, ("layer2", "layer3", "layer4"), (channels // 4, channels // 2, channels))


def _mobilenet_v2(name: str, norm: type[nn.Module]) -> Backbone:
    """Its stages end in blocks 6, 13 and 17; block 18 only widens C5 from 320 to 1280 channels for the classifier, and
    DETRDistill takes it along."""
    body = list(torchvision.models.mobilenet_v2(norm_layer=norm).features.named_children())
    if name == "mobilenet_v2":
        return Backbone(body[:18], ("6", "13", "17"), (32, 96, 320))
    return Backbone(body, ("6", "13", "18"), (32, 96, 1280))


def _tiny(channels: Sequence[int], blocks: int) -> Backbone:
    stem, *stages = channels
    body: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(stem)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    for index, (before, after) in enumerate(zip(channels, stages, strict=False), start=1):
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        first = BasicBlock(before, after, stride=2, downsample=shortcut)
        body.append((f"layer{index}", nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))))
    for _, layer in body:
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(body, ("layer2", "layer3", "layer4"), stages[1:])
