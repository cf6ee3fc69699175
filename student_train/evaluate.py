"""A detector over a split, to COCO's average precision."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common.ahead import map_ahead
from common.augment import AugmentPolicy, evaluation_policy, policy_of_sizes
from common.coco import Annotations, check_images, load_annotations
from common.detr.detector import DeformableDetr
from common.detr.weights import load_detector
from common.devices import choose_device
from common.evaluate import CocoMetrics, Result, coco_ap, coco_results, detect, ground_truth, shown_names, write_results
from common.finite import check_finite
from common.images import batch_to, collate
from common.pixel_rule import PixelRule
from common.records import Batch
from common.runtime import Ranks, log
from student_train.config import EvaluateConfig
from student_train.feed import FreshViews, Sample, replay
from student_train.run_folder import check_free_of_runs, record_evaluation

POLICY_KEY = "evaluation_policy"  # in the metadata of a student's file: how its images were resized


def run_evaluate(config: EvaluateConfig) -> CocoMetrics:
    """The AP of a checkpoint on a split; that of each class goes to the log."""
    if config.record is not None:
        check_free_of_runs(config.record)
    device = choose_device(config.device)
    annotations = load_annotations(config.data, config.split, config.image_folder).decoded_by(PixelRule(config.exif))
    check_images(annotations)
    detector, report = load_detector(config.checkpoint, data=annotations.categories)
    for line in report.lines():
        log.info(line)
    policy = saved_policy(config.checkpoint, config.sizes)
    results = detect_split(
        detector.placed(device),
        annotations,
        policy,
        batch_size=config.batch_size,
        workers=config.workers,
        name=str(config.checkpoint),
    )
    for line in annotations.rule.report():
        log.warning(line)
    if config.detections is not None:
        write_results(config.detections, results)
    metrics = average_precision(annotations, results)
    if config.record is not None:
        parameters = sum(parameter.numel() for parameter in detector.parameters())
        record_evaluation(config.record, f"evaluation of {config.checkpoint.name}", parameters, metrics)
    for line in class_table(annotations, metrics):
        log.info(line)
    return metrics


def saved_policy(checkpoint: Path, sizes: tuple[int, ...] | None) -> AugmentPolicy:
    """How to resize images for a checkpoint: as for `sizes` where they are given, else as the file says, else as
    training does by default."""
    if sizes is None and checkpoint.suffix == ".safetensors" and checkpoint.is_file():
        with contextlib.suppress(SafetensorError), safe_open(checkpoint, framework="pt") as file:
            saved = (file.metadata() or {}).get(POLICY_KEY)
            if saved is not None:
                return AugmentPolicy(**json.loads(saved))
    return evaluation_policy(policy_of_sizes(sizes))


@torch.inference_mode()
def detect_split(
    detector: DeformableDetr,
    annotations: Annotations,
    policy: AugmentPolicy,
    *,
    batch_size: int,
    workers: int,
    ranks: Ranks | None = None,
    name: str = "the student",
) -> list[Result]:
    """Detections in every image of the split, in COCO's results format, in the original images' pixels.

    detector: of the split's K classes. policy: how images are resized; those of similar size share a batch. Each rank
    takes its share of the batches and gets the results of all. The detector is put back into the mode it came in.
    UserError, with its name, where it gives NaN or infinity, which have no AP.
    """
    ranks = ranks or Ranks()
    device = next(detector.parameters()).device
    views = FreshViews(annotations, policy, seed=0)
    heights, widths = views.sizes(epoch=0).T
    order = np.lexsort((widths, heights)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[ranks.rank :: ranks.world_size]

    def load(indices: list[int]) -> tuple[list[Sample], Batch]:
        samples = [views.sample(0, index) for index in indices]
        replayed = [replay(sample, annotations) for sample in samples]
        return samples, collate([(one.image, one.targets) for one in replayed])

    results: list[Result] = []
    training = detector.training
    detector.eval()
    with ThreadPoolExecutor(workers, "evaluation") as pool:
        loaded = map_ahead(pool, load, own, ahead=workers)
        bar = tqdm(loaded, "evaluating", total=len(own), leave=False, disable=not ranks.is_first or None)
        for chosen, batch in bar:
            batch = batch_to(batch, device)
            output = detector(batch.images, batch.padding_mask)
            logits, boxes_cxcywh = output.logits[:, -1].cpu(), output.boxes_cxcywh[:, -1].cpu()
            images = [sample.entry.image_id for sample in chosen]
            check_finite({"logits": logits, "boxes_cxcywh": boxes_cxcywh}, images, name)
            for index, sample in enumerate(chosen):
                detections = detect(logits[index], boxes_cxcywh[index], sample.augmentation)
                results += coco_results(sample.entry.image_id, detections, annotations.category_ids)
    detector.train(training)
    return _of_all_ranks(results, ranks)


def average_precision(annotations: Annotations, results: list[Result]) -> CocoMetrics:
    """COCO's twelve numbers of the detections in a split."""
    return coco_ap(ground_truth(annotations), results)


def class_table(annotations: Annotations, metrics: CocoMetrics) -> list[str]:
    """A line for each class: its AP, a dash where there is nothing to find, and its boxes, crowd regions left out."""
    truth = annotations.truth
    boxes = np.bincount(truth.labels[~truth.crowd], minlength=annotations.num_classes).tolist()
    ap = {name: f"{100 * value:5.1f}" for name, value in metrics.class_ap.items()}
    names = shown_names(annotations)
    return [f"{ap.get(name, '    -')}  {count:7} boxes  {name}" for name, count in zip(names, boxes, strict=True)]


def _of_all_ranks(results: list[Result], ranks: Ranks) -> list[Result]:
    if ranks.world_size == 1:
        return results
    shares: list[list[Result]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(shares, results)
    return list(chain.from_iterable(shares))
