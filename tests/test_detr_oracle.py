"""The whole model against transformers' implementation, weight for weight."""

from __future__ import annotations

import pytest
import torch

from common.detr.detector import DeformableDetr
from common.detr.weights import load_detector
from tests import detr_oracle

pytest.importorskip("transformers")
pytest.importorskip("timm")


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
@pytest.mark.parametrize("variant", detr_oracle.VARIANTS)
def test_equals_transformers(variant, backbone, tmp_path):
    """Same random weights, a padded batch of two unequal images: memory, and queries, logits and boxes of all layers.

    Oracle: DeformableDetrForObjectDetection (6 + 6 layers, width 256, 4 levels). Its weights reach our model through
    `load_detector`. Logits, memory and queries agree to 1e-4, boxes to 1e-5 (absolute).
    """
    oracle = detr_oracle.build(variant, backbone, num_queries=50, two_stage_num_proposals=50, num_labels=17)
    oracle.save_pretrained(tmp_path)
    model, report = load_detector(tmp_path)
    assert (report.config.backbone, report.config.num_classes, report.config.queries) == (backbone, 17, 50)
    assert not report.unused

    images, padding_mask = detr_oracle.padded_batch()
    expected = detr_oracle.run(oracle, images, padding_mask)
    found = _run(model, images, padding_mask)
    differences = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    print(variant, backbone, {name: f"{value:.1e}" for name, value in differences.items()})
    for name, difference in differences.items():
        assert difference <= (1e-5 if "boxes" in name else 1e-4), f"{name} differs by {difference:.1e}"


@torch.no_grad()
def _run(model: DeformableDetr, images: torch.Tensor, padding_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    output = model(images, padding_mask)
    found = {name: getattr(output, name) for name in ("memory", "queries", "logits", "boxes_cxcywh")}
    found |= {"last_logits": output.logits[:, -1], "last_boxes_cxcywh": output.boxes_cxcywh[:, -1]}
    if output.proposals is not None:
        found |= {"proposal_logits": output.proposals[0], "proposal_boxes_cxcywh": output.proposals[1]}
    return found
