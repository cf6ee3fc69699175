"""student_train.set_loss against transformers' loss of Deformable DETR, and its behaviour at the edges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from common.matching import detection_cost, pad_targets
from common.records import Targets
from kernels import hungarian
from student_train.set_loss import focal_loss, proposal_losses, set_loss

LAYERS, QUERIES, CLASSES = 3, 12, 5


def draw(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[Targets]]:
    """Logits and boxes of three layers that want gradients, and ground truth with the given numbers of boxes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), LAYERS, QUERIES, CLASSES, generator=generator).requires_grad_()
    boxes_cxcywh = (torch.rand(len(counts), LAYERS, QUERIES, 4, generator=generator) * 0.5 + 0.1).requires_grad_()
    targets = [
        Targets(
            torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
            torch.randint(CLASSES, (count,), generator=generator),
        )
        for count in counts
    ]
    return logits, boxes_cxcywh, targets


def losses_of(logits: Tensor, boxes_cxcywh: Tensor, targets: list[Targets]) -> dict[str, Tensor]:
    truth = pad_targets(targets, torch.device("cpu"))
    matched = hungarian(detection_cost(logits, boxes_cxcywh, truth), column_mask=truth.valid.unsqueeze(1))
    return set_loss(logits, boxes_cxcywh, truth, matched, box_count=max(1, sum(len(t.labels) for t in targets)))


def transformers_loss(logits: Tensor, boxes_cxcywh: Tensor, targets: list[Targets]) -> tuple[Tensor, dict[str, Tensor]]:
    """The total of transformers' criterion, and its parts summed over layers. It weighs the class with 2 there too."""
    config = SimpleNamespace(
        class_cost=2, bbox_cost=5, giou_cost=2, num_labels=CLASSES, focal_alpha=0.25, auxiliary_loss=True,
        bbox_loss_coefficient=5, giou_loss_coefficient=2, decoder_layers=LAYERS,
    )  # fmt: skip
    labels = [{"class_labels": target.labels, "boxes": target.boxes_cxcywh} for target in targets]
    _, parts, _ = DeformableDetrForObjectDetectionLoss(
        logits[:, -1], labels, "cpu", boxes_cxcywh[:, -1], config, logits.transpose(0, 1), boxes_cxcywh.transpose(0, 1)
    )
    names = {"class": ("loss_ce", 2.0), "l1": ("loss_bbox", 5.0), "giou": ("loss_giou", 2.0)}
    sums = {
        name: weight * torch.stack([value for key, value in parts.items() if key.startswith(theirs)]).sum()
        for name, (theirs, weight) in names.items()
    }
    return torch.stack(list(sums.values())).sum(), sums


@pytest.mark.parametrize("counts", [[4, 1, 7], [3, 0], [1]])
def test_equals_transformers(counts: list[int]) -> None:
    """Each loss summed over layers and the gradients of the total, against transformers' criterion: within 1e-5."""
    logits, boxes_cxcywh, targets = draw(counts)
    found = losses_of(logits, boxes_cxcywh, targets)
    expected_total, expected = transformers_loss(logits, boxes_cxcywh, targets)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(sum(found.values()), (logits, boxes_cxcywh))
    expected_gradients = torch.autograd.grad(expected_total, (logits, boxes_cxcywh))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[0, 0], [QUERIES + 3]])
def test_no_boxes_and_too_many(counts: list[int]) -> None:
    """Without any box the class loss alone remains; with more boxes than queries each query gets one. All finite."""
    logits, boxes_cxcywh, targets = draw(counts)
    losses = losses_of(logits, boxes_cxcywh, targets)
    if not any(counts):
        nothing = torch.zeros_like(logits)
        torch.testing.assert_close(losses["class"], 2 * focal_loss(logits, nothing).sum(), atol=1e-5, rtol=1e-5)
        assert losses["l1"] == losses["giou"] == 0
    gradients = torch.autograd.grad(sum(losses.values()), (logits, boxes_cxcywh))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0


def test_proposals_ignore_padding_and_classes() -> None:
    """Two-stage proposals: the loss of a padded batch is that of the unpadded one, and labels do not matter.

    Sample 0 with 5 tokens of padding against the same without, and with other labels: equal to 1e-6.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 20, CLASSES, generator=generator)
    boxes_cxcywh = torch.rand(1, 20, 4, generator=generator) * 0.5 + 0.1
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, 15:] = True
    boxes = torch.rand(3, 4, generator=generator) * 0.5 + 0.1
    truth = pad_targets([Targets(boxes, torch.tensor([4, 0, 2]))], torch.device("cpu"))
    others = pad_targets([Targets(boxes, torch.tensor([1, 1, 3]))], torch.device("cpu"))
    padded = proposal_losses(logits, boxes_cxcywh, mask, truth, 3)
    unpadded = proposal_losses(logits[:, :15], boxes_cxcywh[:, :15], mask[:, :15], others, 3)
    for name, value in padded.items():
        torch.testing.assert_close(value, unpadded[name], atol=1e-6, rtol=0)
    assert padded["class"] > 0
