"""timm's backbones by name: against timm's own feature extractors, from files of timm's, frozen as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.detr.backbone import build_backbone
from common.detr.config import DetectorConfig
from common.detr.detector import DeformableDetr
from common.detr.weights import load_backbone, load_detector, save_detector
from common.errors import UserError

timm = pytest.importorskip("timm")

NETWORKS = ("resnet10t", "mobilenetv3_small_050", "convnext_atto")


def detector(name: str) -> DeformableDetr:
    config = DetectorConfig(f"timm:{name}", 3, width=32, encoder_layers=1, decoder_layers=1, queries=5, feedforward=32)
    torch.manual_seed(0)
    return DeformableDetr(config).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_imagenet_weights_and_maps(name: str, tmp_path: Path) -> None:
    """A classifier of timm's saved to a file and loaded as backbone: its maps at strides 8, 16 and 32 against those of
    the classifier's own `forward_intermediates` (exact but for the order of sums: 1e-5 of the largest value)."""
    torch.manual_seed(1)
    classifier = timm.create_model(name).eval()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    model = detector(name)
    assert load_backbone(model, tmp_path / "weights.pth") == []
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        maps = model.backbone(images)
        wanted = {x.shape[-1]: x for x in classifier.forward_intermediates(images, intermediates_only=True)}
    assert [tuple(x.shape[-2:]) for x in maps] == [(8, 16), (4, 8), (2, 4)]
    assert model.backbone.channels == tuple(x.shape[1] for x in maps)
    for found in maps:
        expected = wanted[found.shape[-1]]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_frozen(name: str) -> None:
    """With ImageNet weights to come, batch norm has no parameters and no statistics that training moves, everything
    else trains; without them everything trains."""
    frozen, free = build_backbone(f"timm:{name}", pretrained=True), build_backbone(f"timm:{name}", pretrained=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    before = {buffer_name: buffer.clone() for buffer_name, buffer in frozen.named_buffers()}
    frozen.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(buffer, before[buffer_name]) for buffer_name, buffer in frozen.named_buffers())
    assert all(parameter.requires_grad for parameter in frozen.parameters())
    assert sum(p.numel() for p in free.parameters()) >= sum(p.numel() for p in frozen.parameters())
    assert all(parameter.requires_grad for parameter in free.parameters())


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A detector on timm's backbone comes back from its own file with the same output (exact)."""
    model = detector("resnet10t")
    save_detector(tmp_path / "detector.safetensors", model)
    loaded, report = load_detector(tmp_path / "detector.safetensors")
    assert not report.unused
    images, mask = torch.randn(1, 3, 128, 64), torch.zeros(1, 128, 64, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model(images, mask).logits, loaded(images, mask).logits)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """A name timm does not know, a backbone of a single stride, one of a single image size, another network's file."""
    with pytest.raises(UserError, match=r"found 'resnet10': is it resnet1.*\?"):
        build_backbone("timm:resnet10")
    with pytest.raises(UserError, match="timm's vit_tiny_patch16_224 has not"):
        build_backbone("timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="timm's swin_tiny_patch4_window7_224 has not"):
        build_backbone("timm:swin_tiny_patch4_window7_224")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights of timm:resnet10t") as caught:
        load_backbone(detector("resnet10t"), tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
