"""The store: what is written is what any Zarr reader finds, what our reader gives, and as large as planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from common.augment import flip_policy
from common.cache.buffers import BatchBuffers
from common.cache.codec import (
    SCORE_ERROR,
    STEP_ERROR,
    decode_logits,
    decode_tokens,
    encode_logits,
    encode_tokens,
    measure_channels,
    pack_int4,
    token_steps,
    unpack_int4,
)
from common.cache.plan import Plan, field_bytes, make_plan, store_bytes
from common.cache.reader import CacheReader, CorruptRecord, read_manifest
from common.cache.schema import (
    CodecInfo,
    DataInfo,
    Layout,
    Manifest,
    Rounding,
    TeacherInfo,
    TokenCodec,
    ViewInfo,
    differences,
)
from common.cache.writer import (
    Record,
    ShardWriter,
    blank_record,
    create_store,
    finished_shards,
    remove_partial,
    shard_key,
)
from common.errors import UserError
from kernels.feature_loss_reference import decode_tokens as kernels_decode
from tests.benchmarks.cache_stores import plain_constants

SIZES = [(64, 48), (200, 100), (90, 160), (128, 128), (33, 70)]


def make_store_inputs(codec: CodecInfo, images: int = 40, views: int = 2) -> tuple[Manifest, Plan]:
    policy = flip_policy(96)
    draft = Manifest(
        teacher=TeacherInfo("test", "", True, layers=2, queries=5, channels=16, strides=(8, 16)),
        data=DataInfo("train2017", "abc", images, (1, 2, 90), ("a", "b", "c")),
        views=ViewInfo(3, views, policy, "pixels"),
        codec=codec,
        layout=Layout(0, 1, 1, 1),
        batch_size=2,
        software={},
    )
    fields = draft.fields()
    plan = make_plan(
        7 * np.arange(images) + 3,
        np.array([SIZES[i % len(SIZES)] for i in range(images)]),
        seed=3,
        views=views,
        policy=policy,
        strides=(8, 16),
        keep_tokens=codec.keep_tokens,
        token_bytes=sum(f.row_bytes for f in fields if f.per == "token"),
        sample_bytes=sum(f.row_bytes for f in fields if f.per == "sample"),
        group=2,
    )
    return replace(draft, layout=plan.layout), plan


def make_record(manifest: Manifest, plan: Plan, row: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random values of every field, decided by the row."""
    generator = np.random.default_rng(row)
    count = int(plan.table.token_count[row])
    record = {
        f.name: (generator.standard_normal((*((count,) if f.per == "token" else ()), *f.row_shape)) * 40).astype(
            f.dtype
        )
        for f in manifest.fields()
    }
    record["assignment"] = generator.integers(-1, 4, record["assignment"].shape).astype(np.int16)
    if "token_positions" in record:
        tokens = int(plan.table.level_shapes[row].prod(axis=1).sum())
        record["token_positions"] = np.sort(generator.permutation(tokens)[:count]).astype(np.int32)
    return record


def write_all(store: Path | str, manifest: Manifest, plan: Plan) -> list[Record]:
    constants = {"query_embeddings": np.arange(160, dtype=np.float32).reshape(5, 32), **plain_constants(manifest)}
    create_store(store, manifest, plan, constants)
    records: list[Record] = [make_record(manifest, plan, row) for row in range(len(plan.table))]
    for shard in range(manifest.layout.shards):
        writer = ShardWriter(store, manifest, plan.table, shard)
        first = shard * manifest.layout.shard_samples
        writer.add(records[first : first + manifest.layout.shard_samples])
        writer.commit()
    return records


CODECS = [
    CodecInfo("fp16", 1.0),
    CodecInfo("int8", 0.5),
    CodecInfo("fp32", 0.3),
    CodecInfo("int4", 0.4, queries=False),
    CodecInfo("int4", 1.0, neck=True),
    CodecInfo("pq8", 0.6, queries=False, logits="uint8"),
]


@pytest.fixture(params=CODECS, ids=str)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Manifest, Plan, list[Record]]:
    manifest, plan = make_store_inputs(request.param)
    store = tmp_path / "store.zarr"
    return store, manifest, plan, write_all(store, manifest, plan)


Written = tuple[Path, Manifest, Plan, list[Record]]


def test_plain_zarr_reads_every_row_that_was_written(written: Written) -> None:
    """zarr-python against what was given to the writer: equal bytes, every field and row."""
    store, manifest, plan, records = written
    group = zarr.open_group(store, mode="r")
    for field in manifest.fields():
        array = group[field.name]
        assert isinstance(array, zarr.Array)
        for row, record in enumerate(records):
            if field.per == "token":
                start = int(group["samples/token_offset"][row])  # type: ignore[index, call-overload, arg-type]
                found = array[start : start + int(plan.table.token_count[row])]
            else:
                found = array[row]
            np.testing.assert_array_equal(found, record[field.name], err_msg=f"{field.name} of row {row}")
            assert np.asarray(found).dtype == np.dtype(field.dtype)


def test_reader_equals_what_was_written(written: Written) -> None:
    """Our reader in shuffled batches, with reused buffers, against the arrays given to the writer: equal bytes."""
    store, manifest, plan, records = written
    reader, buffers = CacheReader(store), BatchBuffers()
    assert reader.complete
    assert reader.manifest == manifest
    order = np.random.default_rng(0).permutation(len(records))
    for rows in np.split(order, [3, 4, 20, 21, 60]):
        batch = reader.read(rows, buffers)
        for index, row in enumerate(rows):
            span = slice(int(batch.token_offsets[index]), int(batch.token_offsets[index + 1]))
            record = records[row]
            np.testing.assert_array_equal(batch.tokens[span].numpy(), record["tokens"])
            np.testing.assert_array_equal(batch.token_weights[span].numpy(), record["token_weights"])
            count = plan.table.token_count[row]
            positions = record.get("token_positions", np.arange(count))
            np.testing.assert_array_equal(batch.token_positions[span].numpy(), positions)
            np.testing.assert_array_equal(batch.level_shapes[index].numpy(), plan.table.level_shapes[row])
            for name in {"queries", "logits", "boxes_cxcywh", "quality", "assignment"} & record.keys():
                np.testing.assert_array_equal(getattr(batch, name)[index].numpy(), record[name], err_msg=name)
        assert len(batch.queries) == (len(rows) if manifest.codec.queries else 0)
    assert torch.equal(reader.constants["query_embeddings"], torch.arange(160.0).view(5, 32))
    reader.close()


def test_plan_is_exact(written: Written) -> None:
    """The plan's bytes of every field against the sizes of the files on disk: equal."""
    store, manifest, plan, _ = written
    for field in manifest.fields():
        on_disk = sum(path.stat().st_size for path in (store / field.name).glob("c.*"))
        assert on_disk == field_bytes(manifest, plan.table, field), field.name
    whole = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    constants_bytes = sum(value.nbytes for value in plain_constants(manifest).values())
    overhead = whole - store_bytes(manifest, plan.table) - constants_bytes
    assert 0 < overhead < 100 * len(plan.table) + 25_000


def test_every_flipped_byte_is_noticed(written: Written) -> None:
    """Flip one byte of a page, of a checksum and of the index in each field: reading all rows must fail each time."""
    store, manifest, plan, _ = written
    generator = np.random.default_rng(5)
    for field in manifest.fields():
        path = store / shard_key(field, 1)
        original = path.read_bytes()
        for position in (0, len(original) - 1, len(original) - 5, *generator.integers(0, len(original), 5)):
            damaged = bytearray(original)
            damaged[position] ^= 0x10
            path.write_bytes(bytes(damaged))
            reader = CacheReader(store)
            with pytest.raises(CorruptRecord, match=rf"{field.name}.* image \d+, view \d"):
                reader.read(reader.rows())
            reader.close()
        path.write_bytes(original[:-20])
        with pytest.raises(CorruptRecord):
            CacheReader(store).read(CacheReader(store).rows())
        path.write_bytes(original)
    CacheReader(store).read(range(len(plan.table)))


def test_unfinished_store_gives_only_finished_shards(tmp_path: Path) -> None:
    """A shard that lacks one field's file is not there; a failed or abandoned writer leaves no trace of it."""
    manifest, plan = make_store_inputs(CodecInfo("fp16", 1.0))
    store = tmp_path / "store.zarr"
    write_all(store, manifest, plan)
    (store / shard_key(manifest.fields()[-1], 2)).unlink()
    reader = CacheReader(store)
    first = 2 * manifest.layout.shard_samples
    gone = set(range(first, first + manifest.layout.shard_samples))
    assert not reader.complete
    assert set(reader.rows().tolist()) == set(range(len(plan.table))) - gone

    writer = ShardWriter(store, manifest, plan.table, 2)
    with pytest.raises(KeyError):
        writer.add([{}])
    ShardWriter(store, manifest, plan.table, 2)  # a process killed here
    remove_partial(store)
    assert not list(store.rglob("*partial*"))
    assert not finished_shards(store, manifest)[2]


def test_skipped_rows_are_not_listed(tmp_path: Path) -> None:
    manifest, plan = make_store_inputs(CodecInfo("fp16", 1.0))
    store = tmp_path / "store.zarr"
    records = write_all(store, manifest, plan)
    writer = ShardWriter(store, manifest, plan.table, 0)
    writer.add(records[: manifest.layout.shard_samples])
    writer.commit(skipped=[1])
    assert np.flatnonzero(np.asarray(zarr.open_array(store, path="skipped", mode="r")[:])).tolist() == [1]
    rows = CacheReader(store).rows()
    assert set(rows.tolist()) == set(range(len(plan.table))) - {1}
    blank = blank_record(manifest, 7)
    assert blank["tokens"].shape == (7, 16)
    assert (blank["assignment"] == -1).all()
    assert not blank["token_weights"].any()


def test_plan_is_fair_and_tight() -> None:
    """Views follow one another, each with every image once; groups are of nearly equal size; offsets never overlap."""
    _, plan = make_store_inputs(CodecInfo("fp16", 1.0), images=101, views=3)
    table, layout = plan.table, plan.layout
    assert [table.view[0], table.view[101], table.view[202]] == [0, 1, 2]
    for view in range(3):
        assert sorted(table.image_id[table.view == view]) == [7 * i + 3 for i in range(101)]
    areas = table.augmentation[:, 5].astype(int) * table.augmentation[:, 6]
    grouped = areas[:100].reshape(50, 2)
    assert np.mean(grouped.max(1) / grouped.min(1)) < 1.05
    assert abs(np.corrcoef(np.arange(50), grouped.mean(1))[0, 1]) < 0.4  # a prefix is no sample of one size
    ends = table.token_offset + -(-table.token_count // layout.page_tokens) * layout.page_tokens
    shard = np.arange(len(table)) // layout.shard_samples
    same = shard[1:] == shard[:-1]
    np.testing.assert_array_equal(table.token_offset[1:][same], ends[:-1][same])
    np.testing.assert_array_equal(table.token_offset[1:][~same], shard[1:][~same] * layout.shard_tokens)
    assert (ends <= (shard + 1) * layout.shard_tokens).all()
    assert not (table.token_offset % layout.page_tokens).any()


def test_manifest_survives_json_and_names_differences() -> None:
    manifest, _ = make_store_inputs(CodecInfo("int8", 0.5))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "here") == manifest
    other = replace(manifest, codec=CodecInfo("fp16", 0.5), batch_size=9)
    assert differences(manifest, other) == ["codec.tokens: 'int8' against 'fp16'", "batch_size: 2 against 9"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "format version 99"), ({"batch_size": "many"}, "damaged at batch_size")],
)
def test_foreign_manifests_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    manifest, _ = make_store_inputs(CodecInfo("fp16", 1.0))
    with pytest.raises(UserError, match=message) as caught:
        Manifest.from_json(manifest.to_json() | change, "store.zarr")
    assert "\n" not in str(caught.value)


def test_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        read_manifest(tmp_path / "no.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match="no DETRCache manifest"):
        read_manifest(tmp_path / "other.zarr")


def tokens_with_outliers(channels: int = 192) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.default_rng(0)
    spread = np.exp(generator.standard_normal(channels))
    tokens = (generator.standard_normal((500, channels)) * spread + 3).astype(np.float32)
    tokens[::50] *= 20
    tokens[7] = 0
    return tokens


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("codec", "relative"), [("int8", 0.01), ("int4", 0.15)])
def test_quantisation_error_is_within_its_bound(codec: TokenCodec, relative: float, rounding: Rounding) -> None:
    """Decoded against the tokens: at most half a step of each value's own (one, stochastically), also with outliers;
    the norm of all errors against that of all tokens, below .01 (int8) and .15 (int4), twice that stochastically."""
    tokens = tokens_with_outliers()
    statistics = measure_channels(tokens)
    stored = encode_tokens(tokens, codec, statistics, rounding, (1, 2, 3, 0))
    error = np.abs(decode_tokens(stored, statistics) - tokens)
    assert (error <= STEP_ERROR[rounding] * token_steps(stored["token_scales"], statistics)).all()
    assert error.max() > 0
    assert np.linalg.norm(error) / np.linalg.norm(tokens) < relative * (1 if rounding == "nearest" else 2)


def test_logits_as_codes_of_scores() -> None:
    """Scores of decoded logits against those of the logits, over every logit from -30 to 30 in steps of .001: within
    SCORE_ERROR (the sigmoid in float64 from numpy), and .0007 below scores of .01; all codes are used; each code
    decodes to a logit that is encoded as that code; order is kept."""
    logits = np.arange(-30, 30, 0.001).astype(np.float32)
    codes = encode_logits(logits)
    decoded = decode_logits(torch.from_numpy(codes)).numpy()
    assert decoded.dtype == np.float32
    scores, stored = (1 / (1 + np.exp(-x.astype(np.float64))) for x in (logits, decoded))
    error = np.abs(stored - scores)
    assert 0.95 * SCORE_ERROR < error.max() <= SCORE_ERROR
    assert error[scores < 0.01].max() < 0.0007
    assert (np.diff(codes.astype(int)) >= 0).all()
    every = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(encode_logits(decode_logits(every).numpy()), every.numpy())
    assert set(codes.tolist()) == set(range(256))
    assert np.isfinite(decoded).all()
    floats = torch.randn(3).half()
    assert decode_logits(floats) is floats
    np.testing.assert_array_equal(encode_logits(np.array([-np.inf, 1e9, -1e9], np.float32)), [0, 255, 0])


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_stochastic_rounding_is_unbiased(codec: TokenCodec) -> None:
    """The mean of 400 encodings of a sample's tokens under different views against the tokens, in steps: the standard
    error of one value is at most .5 / 20, so five of them for every value and .001 on average over all; rounding to
    nearest is off by a quarter of a step on average. The same key gives the same bytes, any other one others."""
    tokens = tokens_with_outliers(64)[:40]
    statistics = measure_channels(tokens_with_outliers(64))

    def encoded(*key: int) -> dict[str, np.ndarray[Any, Any]]:
        return encode_tokens(tokens, codec, statistics, "stochastic", key)  # type: ignore[arg-type]

    total = sum(decode_tokens(encoded(3, 17, view, 0), statistics).astype(np.float64) for view in range(400))
    steps = token_steps(encoded(0, 0, 0, 0)["token_scales"], statistics)
    error = (total / 400 - tokens) / steps
    assert np.abs(error).max() < 5 * 0.5 / 20
    assert abs(error.mean()) < 0.001
    first = encoded(3, 17, 0, 0)["tokens"]
    np.testing.assert_array_equal(first, encoded(3, 17, 0, 0)["tokens"])
    for other in ((4, 17, 0, 0), (3, 18, 0, 0), (3, 17, 1, 0), (3, 17, 0, 1)):
        assert (encoded(*other)["tokens"] != first).mean() > 0.2


def test_int4_is_what_the_loss_kernels_decode() -> None:
    """Packed nibbles against their values, -8..7, through our decoder and the kernels' reference: equal to rounding."""
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    np.testing.assert_array_equal(unpack_int4(pack_int4(values)), values)
    tokens = tokens_with_outliers()
    statistics = measure_channels(tokens)
    stored = encode_tokens(tokens, "int4", statistics)
    assert stored["tokens"].shape == (500, 96)
    assert stored["token_scales"].shape == (500, 3)
    by_kernels = kernels_decode(
        torch.from_numpy(stored["tokens"]),
        torch.from_numpy(stored["token_scales"]),
        torch.from_numpy(statistics.channel_scale),
        torch.from_numpy(statistics.channel_shift),
        torch.float32,
    )
    np.testing.assert_allclose(decode_tokens(stored, statistics), by_kernels.numpy(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(256, 4), (64, 1), (16, 1), (48, 1), (96, 2), (130, 5)])
def test_int4_groups(channels: int, groups: int) -> None:
    """As few groups of at most 64 channels as divide them evenly."""
    assert CodecInfo("int4", 1.0).scales(channels) == groups


def test_channels_must_fill_bytes() -> None:
    with pytest.raises(UserError, match="a multiple of 2 for int4, found 7"):
        CodecInfo("int4", 1.0).width(7)
    with pytest.raises(UserError, match="a multiple of 8 for pq8, found 12"):
        CodecInfo("pq8", 1.0).width(12)
    assert CodecInfo("pq4", 1.0).width(12) == 3


def test_manifests_of_before_logits_had_a_codec() -> None:
    """A manifest without the key is read as one of floats, and one of floats is written without it, so that stores from
    before are read, verified and completed."""
    manifest, _ = make_store_inputs(CodecInfo("fp16", 1.0))
    written = manifest.to_json()
    assert "logits" not in written["codec"]
    assert Manifest.from_json(written, "here") == manifest
    eight, _ = make_store_inputs(CodecInfo("fp16", 1.0, logits="uint8"))
    assert Manifest.from_json(eight.to_json(), "here") == eight
    assert differences(eight, manifest)[0] == "codec.logits: 'uint8' against None"
