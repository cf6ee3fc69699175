"""Full size: COCO's largest images through R-50 in training and R-101 as a teacher, without running out of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from tests.benchmarks.step_cost import CLASSES, Steps
from tests.gpu.measuring import Place, fits

SIZE = {"cpu": (64, 96), "cuda": (800, 1333)}
BATCHES = {"cpu": (2, 1), "cuda": (16, 12, 8, 6, 4, 2, 1)}


def largest(batches: tuple[int, ...], runs: Callable[[int], object]) -> int:
    """The first of these batch sizes for which there is enough memory."""
    for images in batches:
        if fits(lambda images=images: runs(images)):  # type: ignore[misc]
            return images
    raise AssertionError(f"not even a batch of {batches[-1]} fits")


def note(device: str, record: Callable[[str, object], None], images: int) -> None:
    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    record("batch size", images)
    record("peak MiB", peak_bytes / 2**20)
    print(f"batch size {images}, peak {peak_bytes / 2**20:.0f} MiB")


def test_ten_steps(device: str, record_property: Callable[[str, object], None]) -> None:
    """R-50 (a tiny student on the CPU), all losses from the cache, AdamW: ten steps of the largest batch size that
    fits; all of them change the weights, which stay finite."""
    student = "tiny" if device == "cpu" else "r50"

    def ten(images: int) -> None:
        steps = Steps(student, torch.device(device), ("cached+group",), images, SIZE[device])
        (model,) = steps.students.values()
        weights = list(model.detector.parameters())
        for _ in range(10):
            before = [weight.detach().clone() for weight in weights]
            steps.step("cached+group")
            assert not all(map(torch.equal, weights, before))
        assert all(torch.isfinite(weight).all() for weight in weights)

    note(device, record_property, largest(BATCHES[device], ten))


def test_ten_teacher_batches(device: str, record_property: Callable[[str, object], None]) -> None:
    """R-101 (a tiny teacher on the CPU) without gradients: ten batches of the largest size that fits; logits and
    boxes of all of them are finite and on the device."""
    teacher = "tiny" if device == "cpu" else "r101"
    torch.manual_seed(0)
    model = DeformableDetr(PRESETS[teacher](CLASSES)).to(device).eval()

    @torch.no_grad()
    def ten(images: int) -> None:
        for _ in range(10):
            pixels = torch.randn(images, 3, *SIZE[device], device=device)
            output = model(pixels, torch.zeros(images, *SIZE[device], dtype=torch.bool, device=device))
            assert output.logits.device.type == output.boxes_cxcywh.device.type == device
            assert torch.isfinite(output.logits).all()
            assert torch.isfinite(output.boxes_cxcywh).all()
        Place(torch.device(device)).wait()

    note(device, record_property, largest(BATCHES[device], ten))
