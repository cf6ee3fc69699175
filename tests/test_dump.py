"""Phase one from end to end: what is planned is what is written, and what is written is what the teacher says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr

from common.augment import TRAIN_POLICY
from common.cache.plan import field_bytes, make_plan
from common.cache.reader import CacheReader
from common.cache.schema import CodecInfo, DataInfo, Layout, Manifest, TeacherInfo, ViewInfo
from common.coco import load_annotations
from common.images import load_image
from common.records import Targets
from common.replay import apply_boxes, apply_image
from teacher_dump.job import augmentation_of
from teacher_dump.teachers import load_teacher
from tests.dump_cases import TEACHER, command, draw_scenes, dump, same_bytes

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=12)


def weight_map(queries: Floats, memory: Floats, quality: Floats) -> npt.NDArray[np.float64]:
    """W (T,) by its definition, one layer and one query after another, in float64."""
    unit = memory.astype(np.float64) / np.linalg.norm(memory.astype(np.float64), axis=1, keepdims=True)
    total = np.zeros(len(memory))
    for layer in range(len(queries)):
        mask = np.zeros(len(memory))
        for query, weight in zip(queries[layer].astype(np.float64), quality[layer], strict=True):
            mask += weight * (unit @ query) / np.linalg.norm(query)
        total += mask**2
    return total


def check_against_teacher(data: Path, store: Path, batches: list[list[int]]) -> None:
    """The records of a lossless store, read by zarr-python, against the teacher run on these batches of rows, on pixels
    replayed from the stored augmentation."""
    annotations = load_annotations(data, "train2017")
    teacher = load_teacher(TEACHER, annotations, torch.device("cpu"))
    entries = {entry.image_id: entry for entry in annotations.entries}
    group = zarr.open_group(store, mode="r")

    def stored(name: str, rows: int | slice) -> npt.NDArray[Any]:
        array = group[name]
        assert isinstance(array, zarr.Array)
        return np.asarray(array[rows])

    for rows in batches:
        images, truth = [], []
        for row in rows:
            entry = entries[int(stored("samples/image_id", row))]
            augmentation = augmentation_of(stored("samples/augmentation", row))
            images.append(apply_image(load_image(annotations.image_path(entry)), augmentation))
            truth.append(apply_boxes(entry, augmentation))
        output = teacher.run(images)
        for index, row in enumerate(rows):
            start, count = (int(stored(f"samples/{name}", row)) for name in ("token_offset", "token_count"))
            tokens = stored("tokens", slice(start, start + count))
            np.testing.assert_allclose(tokens, output.memory[index].numpy(), atol=2e-4)
            for name in ("queries", "logits", "boxes_cxcywh"):
                expected = getattr(output, name)[index].numpy()
                np.testing.assert_allclose(stored(name, row), expected, atol=2e-4, err_msg=name)
            quality = stored("quality", row)
            weights = stored("token_weights", slice(start, start + count))
            expected_weights = weight_map(stored("queries", row), tokens, quality)
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-4, atol=1e-7)
            check_assignment(truth[index], stored("assignment", row), quality)


def check_assignment(targets: Targets, assignment: npt.NDArray[np.int16], quality: Floats) -> None:
    """Each layer gives each ground-truth box to one query, and only those have a quality, in 0..1."""
    for layer_assignment in assignment:
        assert sorted(layer_assignment[layer_assignment >= 0].tolist()) == list(range(len(targets.labels)))
    assert not quality[assignment < 0].any()
    assert ((quality >= 0) & (quality <= 1)).all()


def test_store_is_what_the_teacher_says(scenes: Path, tmp_path: Path) -> None:
    """Drawn scenes, all of one size, lossless, every record against the teacher run on its sample alone: features,
    queries, logits and boxes within 2e-4 (another batch may sum in another order), weights within 1e-4 of W."""
    out = tmp_path / "s.zarr"
    assert dump(scenes, out, "--preset", "half", "--tokens", "fp32", "--views", "2", "--batch-size", "5") == 0
    check_against_teacher(scenes, out, [[row] for row in range(24)])


def test_real_images_with_crops(coco_nano: Path, tmp_path: Path) -> None:
    """COCO images of different sizes with the recipe's crops, dumped in batches of two: as above. Group normalisation
    sees the padding of a batch, so this holds only because no sample is padded more than it would be alone."""
    out = tmp_path / "s.zarr"
    arguments = (
        "--teacher",
        TEACHER,
        "--device",
        "cpu",
        "--preset",
        "half",
        "--tokens",
        "fp32",
        "--batch-size",
        "2",
        "--out",
        out,
    )
    assert command("--data", coco_nano, *arguments) == 0
    check_against_teacher(coco_nano, out, [[0], [1], [22], [23]])


@pytest.mark.parametrize("options", [(), ("--tokens", "int8", "--keep-tokens", "0.3", "--views", "3")], ids=str)
def test_plan_is_exact(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """The bytes that `plan` prints against the sizes of the finished store's shard files: equal; no file is written
    and no image decoded."""
    out = tmp_path / "s.zarr"
    assert command("plan", "--data", scenes, "--teacher", TEACHER, "--sizes", "64", "--out", out, *options) == 0
    planned = re.search(r"exactly (\d+) in shard files", capsys.readouterr().out)
    assert planned is not None
    assert not out.exists()
    assert dump(scenes, out, *options) == 0
    fields = [field.name for field in CacheReader(out).manifest.fields()]
    written = sum(path.stat().st_size for name in fields for path in (out / name).glob("c*"))
    assert int(planned[1]) == written


def test_plan_measures(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --measure: the time of the whole follows from the printed time of a sample, the runs from its formula."""
    options = ("--data", scenes, "--teacher", TEACHER, "--sizes", "64", "--out", tmp_path / "s.zarr")
    assert (
        command("plan", *options, "--measure", "2", "--tokens", "int8", "--views", "2", "--student-epochs", "10") == 0
    )
    text = capsys.readouterr().out
    found = re.search(
        r"time +([\d.]+) s on .* ([\d.]+) s a sample.*teacher ([\d.]+) s.*after +([\d.]+) student", text, re.S
    )
    assert found is not None, text
    whole_s, sample_s, teacher_s, runs = map(float, found.groups())
    assert whole_s == pytest.approx(24 * sample_s, rel=0.02)
    assert runs == pytest.approx(whole_s / (10 * 12 * teacher_s), rel=0.02)


def test_a_dump_does_not_depend_on_its_history(scenes: Path, tmp_path: Path) -> None:
    """int8, whose channel statistics are measured once at creation: shards removed and written again are the same."""
    options = ("--tokens", "int8", "--keep-tokens", "0.5")
    reference, out = tmp_path / "reference.zarr", tmp_path / "s.zarr"
    assert dump(scenes, reference, *options) == 0
    assert dump(scenes, out, *options, "--workers", "1") == 0
    for path in [*out.glob("tokens/c.1.*"), *out.glob("logits/c.2.*")]:
        path.unlink()
    assert dump(scenes, out, *options) == 0
    assert same_bytes(out, reference)


def coco_like_sizes(count: int) -> np.ndarray[Any, Any]:
    """Widths and heights (N, 2) as COCO's images have them."""
    generator = np.random.default_rng(0)
    common = np.array([(640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 375), (640, 360), (612, 612)])
    sizes = common[generator.choice(len(common), count, p=[0.25, 0.08, 0.14, 0.05, 0.14, 0.14, 0.1, 0.1])]
    odd = generator.random(count) < 0.3
    sizes[odd] = generator.integers(200, 641, (int(odd.sum()), 2))
    return sizes


@pytest.mark.parametrize("keep_tokens", [1.0, 0.25])
def test_plan_of_coco(keep_tokens: float) -> None:
    """118,287 images: every offset and the bytes of the tokens against plain arithmetic in Python's integers."""
    codec = CodecInfo("fp16", keep_tokens)
    teacher = TeacherInfo("r101", "", True, layers=6, queries=300, channels=256, strides=(8, 16, 32, 64))
    views = ViewInfo(0, 1, TRAIN_POLICY, "")
    draft = Manifest(teacher, DataInfo("train2017", "", 118287, (1,), ("a",)), views, codec, Layout(0, 1, 1, 1), 4, {})
    plan = make_plan(
        3 * np.arange(118_287) + 9,
        coco_like_sizes(118_287),
        seed=0,
        views=1,
        policy=TRAIN_POLICY,
        strides=teacher.strides,
        keep_tokens=keep_tokens,
        token_bytes=draft.row_bytes("token"),
        sample_bytes=draft.row_bytes("sample"),
        group=4,
    )
    layout, table = plan.layout, plan.table
    page, offset, pages = layout.page_tokens, 0, 0
    counts, offsets = table.token_count.tolist(), table.token_offset.tolist()
    for row, (height, width) in enumerate(table.augmentation[:, 5:7].tolist()):
        tokens = sum(-(-height // stride) * -(-width // stride) for stride in teacher.strides)
        if keep_tokens == 1:
            assert counts[row] == tokens
        else:
            assert counts[row] % page == 0
            assert abs(counts[row] - keep_tokens * tokens) <= page / 2
        if row % layout.shard_samples == 0:
            offset = row // layout.shard_samples * layout.shard_tokens
        assert offsets[row] == offset
        used = -(-counts[row] // page)
        offset, pages = offset + used * page, pages + used
    field = draft.fields()[0]
    tails = layout.shards * (32 + layout.shard_tokens // page * 16 + 4)
    assert field_bytes(_with_layout(draft, layout), table, field) == pages * (page * 512 + 4) + tails
    assert sorted(table.image_id.tolist()) == [3 * i + 9 for i in range(118_287)]


def _with_layout(manifest: Manifest, layout: Layout) -> Manifest:
    return Manifest(**{**vars(manifest), "layout": layout})
