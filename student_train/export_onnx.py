"""A detector as an ONNX file: raw pixels in, detections out, standard operators only (deformable attention becomes
GridSample). Needs the packages onnx and onnxscript; what runs it needs neither."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from common.augment import AugmentPolicy
from common.boxes import cxcywh_to_xyxy
from common.categories import Categories
from common.detr.detector import DeformableDetr
from common.errors import UserError
from common.evaluate import DETECTIONS_PER_IMAGE
from common.files import write_atomically
from common.images import PADDING_MULTIPLE, normalise
from common.runtime import log

INPUTS = ("images", "padding_mask", "sizes")
OUTPUTS = ("scores", "labels", "boxes_xyxy_px")
OPSET = 18  # GridSample is from 16
OLDEST_EXPORTER = "2.11"  # of those tried; 2.6's refuses the model
DESCRIPTION = (
    "images: (B, 3, H, W) uint8 RGB, each resized (bilinear, antialiased) to its short_side, its long side at most"
    " max_long_side, and placed in the top left corner; H and W are multiples of {multiple}. padding_mask: (B, H, W),"
    " true where an image does not reach. sizes: (B, 2) float32, height and width to give boxes in, e.g. the original"
    " image's. scores: (B, N) in 0..1, descending. labels: (B, N), an index into the metadata's categories."
    " boxes_xyxy_px: (B, N, 4), corners in pixels of sizes. The N best are given, whatever their score."
)


class DetectingModel(nn.Module):
    """A detector between its pre- and post-processing, as `DESCRIPTION` has it."""

    def __init__(self, detector: DeformableDetr) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, padding_mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = normalise(images).masked_fill(padding_mask[:, None], 0.0)
        output = self.detector(pixels, padding_mask)
        logits, boxes_cxcywh = output.logits[:, -1], output.boxes_cxcywh[:, -1]
        classes = logits.shape[-1]
        limit = min(DETECTIONS_PER_IMAGE, logits.shape[1] * classes)
        scores, pairs = logits.sigmoid().flatten(1).topk(limit)
        queries = pairs.div(classes, rounding_mode="floor")
        boxes = boxes_cxcywh.gather(1, queries[..., None].expand(-1, -1, 4))
        height, width = sizes.unbind(-1)
        scale = torch.stack((width, height, width, height), -1)
        return scores, pairs % classes, cxcywh_to_xyxy(boxes) * scale[:, None]


def to_onnx(
    path: Path,
    detector: DeformableDetr,
    categories: Categories | None,
    policy: AugmentPolicy,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Write the detector, its weights, its categories and how it wants its images into one file.

    policy: the evaluation's. image_size: (H, W) of one padded image, for programs that want fixed shapes; None leaves
    batch, height and width open. UserError for a size that is no multiple of the coarsest stride.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: python -m pip install 'detrcache[onnx]'")
    if image_size is not None and any(side < 1 or side % PADDING_MULTIPLE for side in image_size):
        raise UserError(
            f"expected --image-size of two multiples of {PADDING_MULTIPLE}, as images are padded to, found"
            f" {image_size[0]} {image_size[1]}"
        )
    if torch.__version__ < OLDEST_EXPORTER:
        raise UserError(
            f"expected PyTorch {OLDEST_EXPORTER} or newer for --to onnx, whose exporter understands the model, found"
            f" {torch.__version__}"
        )
    batch, (height, width) = (1, image_size) if image_size else (2, (2 * PADDING_MULTIPLE, 3 * PADDING_MULTIPLE))
    example = (
        torch.zeros(batch, 3, height, width, dtype=torch.uint8),
        torch.zeros(batch, height, width, dtype=torch.bool),
        torch.full((batch, 2), 100.0),
    )
    shapes = None
    if image_size is None:
        samples, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
        high, wide = PADDING_MULTIPLE * rows, PADDING_MULTIPLE * columns
        shapes = ({0: samples, 2: high, 3: wide}, {0: samples, 1: high, 2: wide}, {0: samples})
    log.info("tracing the detector, which takes a minute or two at full size")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes on itself
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            DetectingModel(detector.cpu()).eval(),
            example,
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.doc_string = DESCRIPTION.format(multiple=PADDING_MULTIPLE)
    program.model.metadata_props.update(
        {
            "short_side": str(max(policy.short_sides)),
            "max_long_side": str(policy.max_long_side),
            **({} if categories is None else categories.to_metadata()),
        }
    )
    write_atomically(path, lambda temporary: program.save(temporary, external_data=False))
