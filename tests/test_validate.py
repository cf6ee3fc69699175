"""Stores that are not what the format says, under right checksums: refused in one line when opened, found by verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.cache.members import create_group
from common.cache.plan import token_offsets
from common.cache.reader import CacheReader, CorruptRecord
from common.cache.schema import ATTRIBUTE, CodecInfo
from common.cache.validate import check_manifest, check_record, check_table
from common.cache.writer import create_store
from common.errors import UserError
from student_train.teachers import open_teachers
from tests.benchmarks.cache_stores import plain_constants
from tests.crafted_stores import make_stores, manifest_of, outcome, rewrite_rows, summed, train, write_checksums
from tests.dump_cases import command
from tests.test_cache import make_store_inputs

Numbers = np.ndarray[Any, Any]
CRAFTED = range(12)  # of tests.crafted_stores, which tries as many as one asks it to


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small stores of tests.crafted_stores and their scenes."""
    folder = tmp_path_factory.mktemp("stores")
    make_stores(folder)
    return folder


@pytest.fixture
def store(stores: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stores / "int4.zarr", tmp_path / "store.zarr")


def change(store: Path, column: str, alter: Callable[[Numbers], None]) -> None:
    """Alter a column of the sample table; its checksum is right."""
    about = json.loads((store / f"samples/{column}/zarr.json").read_bytes())
    path = store.joinpath("samples", column, "c", *"0" * len(about["shape"]))
    values = np.frombuffer(path.read_bytes()[:-4], about["data_type"]).reshape(about["shape"]).copy()
    alter(values)
    path.write_bytes(summed(values.tobytes()))


def change_json(store: Path, key: str, alter: Callable[[Any], None]) -> None:
    """Alter a zarr.json; all checksums are right."""
    about = json.loads((store / key).read_bytes())
    alter(about)
    (store / key).write_text(json.dumps(about))
    write_checksums(store)


def negative_count(store: Path) -> None:
    change(store, "token_count", lambda counts: counts.put(0, -60))


def object_dtype(store: Path) -> None:
    change_json(store, "samples/image_id/zarr.json", lambda about: about.update(data_type="object"))


def too_many_tokens(store: Path) -> None:
    change(store, "token_count", lambda counts: counts.put(0, 2**31 - 1))


def offset_elsewhere(store: Path) -> None:
    change(store, "token_offset", lambda offsets: offsets.put(3, 2**40))


def other_grids(store: Path) -> None:
    change(store, "level_shapes", lambda shapes: shapes.put(1, 999))


def crop_outside(store: Path) -> None:
    change(store, "augmentation", lambda rows: rows.put(1, -1))


def same_image_twice(store: Path) -> None:
    change(store, "image_id", lambda ids: ids.put(1, ids[0]))


def short_column(store: Path) -> None:
    (store / "samples/view/c/0").write_bytes(summed(bytes(4)))


def field_of_another_dtype(store: Path) -> None:
    change_json(store, "logits/zarr.json", lambda about: about.update(data_type="float32"))


def no_scale(store: Path) -> None:
    shutil.rmtree(store / "teacher/channel_scale")


def scale_of_nan(store: Path) -> None:
    path = store / "teacher/channel_scale/c/0"
    path.write_bytes(summed(np.full(len(path.read_bytes()) // 4 - 1, np.nan, "<f4").tobytes()))


@pytest.mark.parametrize(
    ("craft", "message"),
    [
        (negative_count, "token_count: expected the share keep_tokens"),
        (too_many_tokens, "token_count: expected the share keep_tokens"),
        (object_dtype, "samples/image_id/zarr.json: expected data_type int64, found object"),
        (offset_elsewhere, "token_offset: expected page by page, found otherwise in 1 rows, the first is 3"),
        (other_grids, "level_shapes: expected the grids"),
        (crop_outside, "augmentation: expected a crop top of 0"),
        (same_image_twice, "image_id: expected every image once"),
        (short_column, "samples/view: expected 32 bytes, found 4"),
        (field_of_another_dtype, "logits/zarr.json: expected data_type float16, found float32"),
        (no_scale, "channel_scale"),
        (scale_of_nan, "channel_scale: expected finite numbers"),
    ],
)
def test_refused_when_opened_and_by_verify(
    store: Path, craft: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each crafted store against the line that refuses it; `verify` names the same fault and exits with 1."""
    CacheReader(store).close()
    craft(store)
    with pytest.raises(UserError) as error:
        CacheReader(store)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert command("verify", store) == 1
    assert message in capsys.readouterr().out


def test_a_changed_bit_of_the_manifest(store: Path) -> None:
    """A stride of 8 made 72, under the old checksum: refused, where it once trained on other grids."""
    text = (store / "zarr.json").read_text()
    about = json.loads(text)
    about["attributes"][ATTRIBUTE]["teacher"]["strides"][0] += 64
    (store / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="the manifest's checksum does not match"):
        CacheReader(store)
    write_checksums(store)
    with pytest.raises(UserError, match="level_shapes: expected the grids"):
        CacheReader(store)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        *[("teacher", name, value) for name in ("layers", "queries", "channels") for value in (0, 2**40)],
        *[("teacher", "strides", value) for value in ((), (0, 16), (8,) * 17, (2**31, 8))],
        ("teacher", "input_size", (0, 64)),
        ("data", "images", 39),
        ("data", "class_names", ("a",)),
        *[("views", name, value) for name in ("views", "seed") for value in (-1, 2**70)],
        *[("codec", "keep_tokens", value) for value in (0.0, 1.5, float("nan"))],
        ("codec", "neck", True),
        *[
            ("layout", name, value)
            for name in ("samples", "shard_samples", "shard_tokens", "page_tokens")
            for value in (0, -1, 2**50)
        ],
        ("layout", "shard_tokens", 193),
        ("layout", "page_tokens", 2**20),
    ],
)
def test_numbers_of_a_manifest(group: str, name: str, value: Any) -> None:
    """One number beyond its limits, or at odds with the others, in a manifest that passes as it is."""
    manifest, _ = make_store_inputs(CodecInfo("int8", 0.5))
    check_manifest(manifest)
    with pytest.raises(ValueError, match=name if name not in ("images", "class_names", "neck") else "expected"):
        check_manifest(replace(manifest, **{group: replace(getattr(manifest, group), **{name: value})}))


def test_offsets_are_those_of_the_format(tmp_path: Path) -> None:
    """Offsets one sample after another in plain Python, as docs/cache-format.md has them, against the plan's."""
    manifest, plan = make_store_inputs(CodecInfo("int8", 0.5))
    layout, expected, place = manifest.layout, [], 0
    for row, count in enumerate(plan.table.token_count.tolist()):
        if row % layout.shard_samples == 0:
            place = row // layout.shard_samples * layout.shard_tokens
        expected.append(place)
        place += -(-count // layout.page_tokens) * layout.page_tokens
    np.testing.assert_array_equal(token_offsets(plan.table.token_count, layout), expected)
    check_table(manifest, plan.table)


def test_create_store_asks_what_a_reader_asks(tmp_path: Path) -> None:
    """A store without the codec's constants, or of too large samples, is not written; nothing is left of it."""
    manifest, plan = make_store_inputs(CodecInfo("int8", 0.5))
    with pytest.raises(UserError, match="cannot be written, for no reader would take it: teacher: expected channel_"):
        create_store(tmp_path / "s.zarr", manifest, plan, {})
    huge = replace(manifest, views=replace(manifest.views, policy=replace(manifest.views.policy, max_long_side=10_000)))
    with pytest.raises(UserError, match="max_long_side: expected 1 to 8192, found 10000"):
        create_store(tmp_path / "s.zarr", huge, plan, plain_constants(manifest))
    assert not list(tmp_path.iterdir())


NAN = np.float32("nan")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes_cxcywh", NAN, "expected finite numbers"),
        ("logits", np.float16("inf"), "expected finite numbers"),
        ("quality", NAN, "expected finite numbers"),
        ("quality", np.float32(-0.5), "expected numbers of 0 and above"),
        ("token_weights", NAN, "expected finite numbers"),
        ("token_scales", np.float16("nan"), "expected finite numbers"),
        ("token_positions", np.int32(-1), "expected ascending positions of 0 to"),
        ("token_positions", np.int32(10**6), "expected ascending positions of 0 to"),
        ("assignment", np.int16(-2), "expected boxes, or -1"),
        ("assignment", np.int16(300), "expected each box of the sample once"),
    ],
)
def test_verify_reads_the_meaning(
    store: Path, field: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number of one record that cannot be, under right checksums: `verify` names field, image and view; indices of
    that kind never leave the reader either."""

    def alter(rows: Numbers) -> None:
        rows.flat[5] = value

    rewrite_rows(store, field, 1, alter)
    assert command("verify", store) == 1
    out = capsys.readouterr().out
    assert f"{field}: {message}" in out
    assert "(image " in out
    if field in ("token_positions", "assignment") and value != 300:
        reader = CacheReader(store)
        with pytest.raises(CorruptRecord, match="its numbers cannot be indices"):
            reader.read(reader.rows())
        reader.close()


def test_records_that_can_be() -> None:
    """More boxes than queries, no box at all, and the last position of the grids: all are what a teacher may say."""
    _, (*_, assignment) = (manifest := make_store_inputs(CodecInfo("int8", 0.5))[0]), manifest.fields()
    for layers in ([[3, 1, 9, 0, 4]] * 2, [[-1] * 5] * 2, [[-1, 1, 0, -1, -1]] * 2):
        check_record(assignment, np.array(layers, np.int16), 0)
    with pytest.raises(ValueError, match="once in a layer"):
        check_record(assignment, np.array([[0, 0, -1, -1, -1]], np.int16), 0)
    positions = next(field for field in manifest.fields() if field.name == "token_positions")
    check_record(positions, np.array([0, 3, 9], np.int32), 10)


def test_training_compares_store_and_data(stores: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record that assigns more boxes than its image has, and a crop larger than its image: each one line."""

    def of_box_40(rows: Numbers) -> None:
        rows[..., :] = np.arange(rows.shape[-1])

    crafted = shutil.copytree(store, store.with_name("boxes.zarr"))
    for shard in range(manifest_of(store).layout.shards):
        rewrite_rows(crafted, "assignment", shard, of_box_40)
    assert train(crafted, stores / "scenes") == 2
    assert "assigns a query to box 40 of" in capsys.readouterr().err

    change(store, "augmentation", lambda rows: rows.put(3, 65))  # the height of the first crop, of an image of 64
    assert train(store, stores / "scenes") == 2
    assert "augmentation: expected crops inside their images" in capsys.readouterr().err


def test_teachers_of_other_views(stores: Path, tmp_path: Path) -> None:
    """Two teachers whose manifests agree: taken together, and refused when one's table mirrors another sample."""
    pair = tmp_path / "pair.zarr"
    create_group(pair)
    for kind in ("int4", "half"):
        shutil.copytree(stores / f"{kind}.zarr", pair / kind)
    open_teachers(str(pair), None).close()

    def mirrored(rows: Numbers) -> None:
        rows[2, 0] = 1 - rows[2, 0]

    change(pair / "int4", "augmentation", mirrored)
    with pytest.raises(UserError, match="found int4 with another augmentation than half"):
        open_teachers(str(pair), None)


@pytest.mark.parametrize("number", CRAFTED)
def test_crafted_stores(stores: Path, number: int) -> None:
    """Store `number` of tests.crafted_stores through every command, in a process of its own: each works or refuses in
    one line, none crashes, hangs for 25 s or ends in a traceback."""
    told, found = outcome(stores, number)
    failed = {name: text for name, text in found.items() if text.startswith("FAILED")}
    assert not failed, "\n".join([told, *failed.values()])
