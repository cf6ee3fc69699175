"""Detections and COCO's average precision, against pycocotools called directly and against the ground truth itself."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.augment import EVAL_POLICY, TRAIN_POLICY, draw
from common.coco import Annotations, load_annotations
from common.errors import UserError
from common.evaluate import Result, coco_ap, coco_results, detect, ground_truth, original_boxes, write_results
from common.records import Augmentation
from common.replay import apply_boxes


def perfect_results(annotations: Annotations, seed: int | None = None) -> list[Result]:
    """The ground truth as detections with score 1; with a seed, boxes and scores are shaken and one in five is lost."""
    generator = np.random.default_rng(seed)
    results: list[Result] = []
    for entry in annotations.entries:
        for (x0, y0, x1, y1), label in zip(entry.boxes_xyxy_px.tolist(), entry.labels.tolist(), strict=True):
            box, score = [x0, y0, x1 - x0, y1 - y0], 1.0
            if seed is not None:
                if generator.random() < 0.2:
                    continue
                box = (np.array(box) * generator.uniform(0.8, 1.25, size=4)).tolist()
                score = float(generator.random())
            category_id = annotations.category_ids[label]
            results.append({"image_id": entry.image_id, "category_id": category_id, "bbox": box, "score": score})
    return results


def test_the_ground_truth_as_detections_has_ap_1(coco_nano: Path) -> None:
    """On 24 real images with crowd regions: AP, AP50 and AP75 and every class's AP are 1 (1e-9)."""
    annotations = load_annotations(coco_nano, "val2017")
    metrics = coco_ap(ground_truth(annotations), perfect_results(annotations))
    assert [metrics.ap, metrics.ap50, metrics.ap75] == pytest.approx([1, 1, 1], abs=1e-9)
    present = {annotations.class_names[label] for entry in annotations.entries for label in entry.labels}
    assert metrics.class_ap == pytest.approx(dict.fromkeys(present, 1.0), abs=1e-9)


def test_all_numbers_equal_a_direct_call_of_pycocotools(coco_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shaken ground truth on the first 20 images: the twelve numbers are exactly those of COCOeval's own summary."""
    annotations = load_annotations(coco_nano, "val2017")
    results = perfect_results(annotations, seed=0)
    image_ids = [entry.image_id for entry in annotations.entries[:20]]
    metrics = coco_ap(ground_truth(annotations), results, image_ids)
    assert capsys.readouterr().out == ""
    assert 0.05 < metrics.ap < 0.95

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations.annotation_file))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    m = metrics
    precision = [m.ap, m.ap50, m.ap75, m.ap_small, m.ap_medium, m.ap_large]
    recall = [m.ar_1, m.ar_10, m.ar_100, m.ar_small, m.ar_medium, m.ar_large]
    assert precision + recall == evaluation.stats.tolist()
    # The mean over classes is what the AP is made of.
    assert np.mean(list(m.class_ap.values())) == pytest.approx(m.ap, abs=1e-12)


def test_no_detections_are_an_ap_of_0(coco_nano: Path) -> None:
    annotations = load_annotations(coco_nano, "val2017")
    metrics = coco_ap(ground_truth(annotations), [])
    assert (metrics.ap, metrics.ar_100) == (0.0, 0.0)
    assert "AP 0.0" in str(metrics)


def test_evaluation_leaves_its_arguments_as_they_are(coco_nano: Path) -> None:
    """Twice on one index and one list: equal numbers, and nothing was written into the detections."""
    annotations = load_annotations(coco_nano, "val2017")
    truth, results = ground_truth(annotations), perfect_results(annotations, seed=1)
    first = coco_ap(truth, results)
    assert results == perfect_results(annotations, seed=1)
    assert coco_ap(truth, results) == first


def test_detections_of_another_split_are_an_error(coco_nano: Path) -> None:
    train, val = load_annotations(coco_nano, "train2017"), load_annotations(coco_nano, "val2017")
    with pytest.raises(UserError, match="24 other images"):
        coco_ap(ground_truth(val), perfect_results(train))


def test_custom_ground_truth_without_areas_and_numbered_from_0_has_ap_1(tmp_path: Path) -> None:
    """pycocotools alone would need 'area' and 'iscrowd' and would lose the match with annotation 0."""
    boxes = [[5.0, 5.0, 40.0, 30.0], [60.0, 20.0, 20.0, 20.0]]
    dataset = {
        "images": [{"id": 3, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": [{"id": i, "image_id": 3, "category_id": 0, "bbox": box} for i, box in enumerate(boxes)],
        "categories": [{"id": 0, "name": "thing"}],
    }
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(dataset))
    results = [{"image_id": 3, "category_id": 0, "bbox": box, "score": 0.9} for box in boxes]
    assert coco_ap(ground_truth(load_annotations(tmp_path, "val")), results).ap == pytest.approx(1)


@pytest.mark.parametrize("view", range(6))
def test_boxes_of_an_augmented_image_return_to_the_original(coco_nano: Path, view: int) -> None:
    """Mirrored, cropped and resized ground truth, taken back: the original boxes clipped to the crop, 1e-3 px."""
    for entry in load_annotations(coco_nano, "train2017").entries[:8]:
        a = draw(0, entry.image_id, view, entry.width, entry.height, TRAIN_POLICY)
        returned = original_boxes(apply_boxes(entry, a).boxes_cxcywh, a).numpy()
        low, high = np.array([a.crop_left, a.crop_top] * 2), [a.crop_width, a.crop_height] * 2
        expected = np.clip(entry.boxes_xyxy_px, low, low + np.array(high))
        expected = expected[(expected[:, 2:] > expected[:, :2]).all(axis=1)]
        np.testing.assert_allclose(returned, expected, rtol=0, atol=1e-3)


def test_detections_are_the_top_pairs_of_query_and_class() -> None:
    """Against a sort of all sigmoid scores in numpy: scores to 1e-6, labels and boxes exactly of the same pairs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    boxes_cxcywh = torch.rand(50, 4, generator=generator) / 2 + 0.1
    whole = Augmentation(False, 0, 0, crop_height=200, crop_width=300, height=400, width=600)
    detections = detect(logits, boxes_cxcywh, whole, limit=30)

    scores = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    order = np.argsort(-scores, axis=None)[:30]
    queries, labels = np.unravel_index(order, scores.shape)
    np.testing.assert_allclose(detections.scores.numpy(), scores.ravel()[order], rtol=0, atol=1e-6)
    assert detections.labels.tolist() == labels.tolist()
    cx, cy, w, h = boxes_cxcywh.numpy()[queries].T
    expected = np.stack(((cx - w / 2) * 300, (cy - h / 2) * 200, (cx + w / 2) * 300, (cy + h / 2) * 200), axis=-1)
    np.testing.assert_allclose(detections.boxes_xyxy_px.numpy(), expected, rtol=0, atol=1e-3)


def test_outputs_that_point_at_the_ground_truth_have_ap_1(coco_nano: Path) -> None:
    """The whole way, from logits and boxes of the evaluation transform to the AP; 1e-9."""
    annotations, results = load_annotations(coco_nano, "val2017"), []
    for entry in annotations.entries:
        a = draw(0, entry.image_id, 0, entry.width, entry.height, EVAL_POLICY)
        targets = apply_boxes(entry, a)
        logits = torch.full((len(targets.labels), annotations.num_classes), -20.0)
        logits[torch.arange(len(targets.labels)), targets.labels] = 5.0
        detections = detect(logits, targets.boxes_cxcywh, a)
        results += coco_results(entry.image_id, detections, annotations.category_ids)
    assert coco_ap(ground_truth(annotations), results).ap == pytest.approx(1, abs=1e-9)


def test_written_results_are_what_pycocotools_loads(coco_nano: Path, tmp_path: Path) -> None:
    """Through the file: pycocotools reads as many detections, and the metrics are the same."""
    annotations = load_annotations(coco_nano, "val2017")
    results = perfect_results(annotations, seed=2)
    write_results(tmp_path / "results.json", results)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(annotations.annotation_file)).loadRes(str(tmp_path / "results.json"))
    assert len(loaded.anns) == len(results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with pytest.raises(UserError, match="No such file"):
        write_results(tmp_path / "nowhere" / "results.json", results)
