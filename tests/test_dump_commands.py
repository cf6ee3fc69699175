"""The commands around a store: verify and repair, transcode and prune, inspect."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.cache.reader import CacheReader
from tests.dump_cases import TEACHER, command, contents, draw_scenes, dump, same_bytes, swap, unseal

LOSSLESS = ("--preset", "half", "--tokens", "fp32", "--views", "2")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, the eleventh broken."""
    data = draw_scenes(tmp_path_factory.mktemp("data") / "scenes", images=20)
    (data / "train2017" / "000000000011.jpg").write_bytes(b"no image")
    return data


@pytest.fixture(scope="module")
def lossless(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossless") / "store.zarr"
    assert dump(scenes, out, *LOSSLESS, "--skip-broken") == 0
    return out


@pytest.fixture
def store(lossless: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(lossless, tmp_path / "store.zarr"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def test_verify_of_a_sound_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", store) == 0
    assert "sound" in capsys.readouterr().out
    (store / "tokens" / "c.1.0.partial-99").write_text("of a killed process")
    assert command("verify", store) == 0
    assert "1 files were left" in capsys.readouterr().out


def test_verify_finds_every_flipped_byte(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte flipped in each file of the store, at a random place, one after another: always status 1 or, where not
    even the manifest can be read, 2."""
    generator = np.random.default_rng(0)
    whole = contents(store)
    names = [name for name in whole if "/c." not in name] + [name for name in whole if "/c.3." in name]
    assert len(names) > 30
    for name in names:
        flip(store / name, int(generator.integers(len(whole[name]))))
        assert command("verify", store) in ((1, 2) if name == "zarr.json" else (1,)), name
        (store / name).write_bytes(whole[name])
    assert command("verify", store) == 0


def test_verify_finds_every_flipped_byte_of_the_manifest(store: Path) -> None:
    generator = np.random.default_rng(1)
    original = (store / "zarr.json").read_bytes()
    for position in generator.choice(len(original), 60, replace=False):
        flip(store / "zarr.json", int(position))
        assert command("verify", store) in (1, 2), original[position - 10 : position + 10]
        (store / "zarr.json").write_bytes(original)


def test_verify_names_samples_and_shards(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped byte in the page of a known sample, a truncated file, a missing file."""
    reader = CacheReader(store)
    layout = reader.manifest.layout
    queries = next(field for field in reader.fields if field.name == "queries")
    row = layout.shard_samples * 2 + 1
    flip(store / "queries" / "c.2.0.0.0", layout.page_bytes(queries) + 5)
    logits = store / "logits" / "c.4.0.0.0"
    logits.write_bytes(logits.read_bytes()[:-7])
    (store / "quality" / "c.6.0.0").unlink()
    assert command("verify", store) == 1
    lines = capsys.readouterr().out.splitlines()
    image_id, view = reader.table.image_id[row], reader.table.view[row]
    assert f"shard 2: queries/c.2.0.0.0: the checksum of page 1 does not match (image {image_id}, view {view})" in lines
    assert any(line.startswith("shard 4: logits/c.4.0.0.0: it has ") for line in lines)
    assert f"1 of {layout.shards} shards are missing: 6" in lines
    assert len([line for line in lines if line.startswith("shard 2:")]) == 1


@pytest.mark.parametrize("again", ["repair", "dump"])
def test_mending(scenes: Path, lossless: Path, store: Path, again: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged and missing shards are written again with the bytes they had; no other file is touched. (A dump looks for
    missing ones only.)"""
    if again == "repair":
        flip(store / "tokens" / "c.2.0", 100)
        flip(next((store / "skipped" / "c").iterdir()), 1)
    (store / "quality" / "c.6.0.0").unlink()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("c.3.*")}
    if again == "repair":
        assert command("repair", store, "--data", scenes, "--teacher", TEACHER, "--skip-broken") == 0
    else:
        assert dump(scenes, store, *LOSSLESS, "--skip-broken") == 0
    assert same_bytes(store, lossless)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("c.3.*")} == before


def test_repair_refuses_other_sources(
    scenes: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another teacher than the store's, and damage to what all else depends on: one line, nothing changed."""
    flip(store / "tokens" / "c.2.0", 100)
    before = contents(store)
    assert command("repair", store, "--data", scenes, "--teacher", "random:r18") == 2
    assert "teacher.name: 'random:r18' against 'random:tiny'" in capsys.readouterr().err
    flip(store / "samples" / "token_offset" / "c" / "0", 3)
    assert command("repair", store, "--data", scenes, "--teacher", TEACHER) == 2
    assert "cannot be repaired" in capsys.readouterr().err
    flip(store / "samples" / "token_offset" / "c" / "0", 3)
    assert contents(store) == before


def test_verify_against_teacher(
    scenes: Path, lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stores of every codec agree with a new run within their bounds; one whose tokens belong to other samples, with
    checksums that all match, does not."""
    options = ("--against-teacher", "8", "--data", scenes, "--teacher", TEACHER)
    assert command("verify", lossless, *options) == 0
    assert "agree within" in capsys.readouterr().out
    small = tmp_path / "small.zarr"
    assert command("transcode", lossless, small, "--tokens", "int8", "--keep-tokens", "0.5") == 0
    assert command("verify", small, *options) == 0
    capsys.readouterr()
    for rounding in ("nearest", "stochastic"):
        tiny = tmp_path / f"{rounding}.zarr"
        assert command("transcode", lossless, tiny, "--tokens", "int4", "--rounding", rounding, "--no-queries") == 0
        assert command("verify", tiny, *options) == 0
        assert "queries" not in capsys.readouterr().out
        assert command("inspect", tiny) == 0
        assert {"nearest": "0.501 steps", "stochastic": "1 steps"}[rounding] in capsys.readouterr().out
    two = tmp_path / "two.zarr"
    assert command("transcode", lossless, two, "--tokens", "pq8", "--logits", "uint8", "--keep-tokens", "0.6") == 0
    assert command("verify", two, *options) == 0
    assert command("inspect", two) == 0
    assert "scores within 0.0031" in capsys.readouterr().out
    half = tmp_path / "half.zarr"
    assert command("transcode", lossless, half, "--tokens", "fp16") == 0
    assert command("verify", half, *options) == 0
    unseal(half)  # seals would tell
    swap(half / "logits" / "c.0.0.0.0", half / "logits" / "c.1.0.0.0")
    assert command("verify", half) == 0
    capsys.readouterr()
    assert command("verify", half, "--against-teacher", "40", *options[2:]) == 1
    rows = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["logits"] == "WRONG"
    assert rows["tokens"] == rows["queries"] == "ok"


@pytest.mark.parametrize(
    "settings",
    [
        ("--tokens", "int8", "--keep-tokens", "0.3"),
        ("--tokens", "int4", "--keep-tokens", "0.5", "--rounding", "stochastic"),
        ("--tokens", "pq8", "--keep-tokens", "0.6", "--logits", "uint8"),
        ("--tokens", "pq4"),
        ("--tokens", "fp16"),
        ("--keep-tokens", "0.5"),
        ("--views", "1"),
    ],
    ids=" ".join,
)
def test_transcode_equals_a_dump(scenes: Path, lossless: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """From a lossless store with all tokens: the same bytes, metadata included, as the teacher would have written, the
    broken image left out in both."""
    small, dumped = tmp_path / "small.zarr", tmp_path / "dumped.zarr"
    assert command("transcode", lossless, small, *settings) == 0
    options = dict(zip(LOSSLESS[::2], LOSSLESS[1::2], strict=True)) | dict(
        zip(settings[::2], settings[1::2], strict=True)
    )
    assert dump(scenes, dumped, "--skip-broken", *(word for option in options.items() for word in option)) == 0
    assert same_bytes(small, dumped)


def test_transcode_of_sampled_and_rounded_stores(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens that are not there cannot be kept, nor digits that were rounded off; int8 tokens are kept bit for bit."""
    int8, sampled = tmp_path / "int8.zarr", tmp_path / "sampled.zarr"
    assert command("transcode", lossless, int8, "--tokens", "int8") == 0
    assert command("transcode", int8, sampled, "--keep-tokens", "0.5") == 0
    whole, part = CacheReader(int8), CacheReader(sampled)
    for row in part.rows()[::7]:
        dense, kept = whole.read([row]), part.read([row])
        positions = kept.token_positions
        assert len(positions) < len(dense.tokens)
        assert dense.tokens[positions].equal(kept.tokens)
        assert dense.token_scales is not None
        assert kept.token_scales is not None
        assert dense.token_scales[positions].equal(kept.token_scales)
    eight = tmp_path / "eight.zarr"
    assert command("transcode", int8, eight, "--logits", "uint8") == 0
    capsys.readouterr()
    for source, more in (
        (sampled, ("--keep-tokens", "0.25")),
        (int8, ("--tokens", "fp16")),
        (int8, ("--views", "3")),
        (eight, ("--logits", "float")),
        (lossless, ("--rounding", "stochastic", "--tokens", "pq8")),
    ):
        assert command("transcode", source, tmp_path / "no.zarr", *more) == 2
        assert more[0] in capsys.readouterr().err
        assert not (tmp_path / "no.zarr").exists()


def test_transcode_needs_a_complete_store(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "tokens" / "c.3.0").unlink()
    assert command("transcode", store, tmp_path / "no.zarr", "--tokens", "int8") == 2
    assert "1 shards" in capsys.readouterr().err


def test_prune_drops_views_and_shares_files(
    scenes: Path, lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of view 0 are those of the larger store, from the same files on disk; the result is sound, can be
    repaired, and the larger store is as before."""
    before, out = contents(lossless), tmp_path / "pruned.zarr"
    assert command("prune", lossless, out, "--views", "1") == 0
    assert command("verify", out) == 0
    old, new = CacheReader(lossless), CacheReader(out)
    assert new.complete
    assert len(new) == 20
    assert new.rows().tolist() == old.rows(0).tolist()
    for field, ours in vars(new.read(new.rows())).items():
        theirs = getattr(old.read(new.rows()), field)
        assert (ours is None and theirs is None) or ours.equal(theirs), field
    assert (out / "tokens" / "c.0.0").stat().st_ino == (lossless / "tokens" / "c.0.0").stat().st_ino
    whole = contents(out)
    (out / "tokens" / "c.4.0").unlink()
    assert command("repair", out, "--data", scenes, "--teacher", TEACHER, "--skip-broken") == 0
    assert contents(out) == whole
    assert contents(lossless) == before


def test_prune_drops_the_neck(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store with the neck's features, without them: the same bytes as a dump that never had them, but for the layout,
    which is kept; and nothing to leave out is an error."""
    full, out = tmp_path / "full.zarr", tmp_path / "out.zarr"
    assert dump(scenes, full, "--tokens", "int8", "--neck", "--skip-broken") == 0
    assert command("prune", full, out, "--no-neck") == 0
    assert command("verify", out) == 0
    assert not [name for name in contents(out) if "neck" in name]
    shared = [name for name in contents(full) if "/c." in name and "neck" not in name]
    assert len(shared) > 20
    assert all((full / name).samefile(out / name) for name in shared)
    assert CacheReader(out).complete
    capsys.readouterr()
    assert command("prune", out, tmp_path / "again.zarr", "--no-neck") == 2
    assert "expected something to leave out" in capsys.readouterr().err


def test_prune_drops_the_queries(lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store without its queries: all else is shared, zarr.json lists no such array, verify is content, the reader
    gives the same records with queries of no rows; dropping them again is an error."""
    out = tmp_path / "out.zarr"
    assert command("prune", lossless, out, "--no-queries") == 0
    assert command("verify", out) == 0
    names = {name for name in contents(lossless) if "queries" not in name}
    assert set(contents(out)) == names
    assert all((lossless / name).samefile(out / name) for name in names if "/c." in name)
    ours, theirs = CacheReader(out), CacheReader(lossless)
    assert not ours.manifest.codec.queries
    rows = theirs.rows().tolist()
    one, other = ours.read(rows), theirs.read(rows)
    assert len(one.queries) == 0
    assert len(other.queries) == len(rows)
    for name in ("tokens", "token_weights", "logits", "boxes_cxcywh", "quality", "assignment"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    ours.close()
    theirs.close()
    capsys.readouterr()
    assert command("prune", out, tmp_path / "again.zarr", "--no-queries") == 2
    assert "expected something to leave out" in capsys.readouterr().err


def test_inspect_describes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A screenful that names what matters; an unfinished store says so."""
    assert command("inspect", store) == 0
    text = capsys.readouterr().out
    for word in (
        "10 of 10 shards: complete",
        "40, of which 38 can be read, 2 broken",
        "random:tiny",
        "UNTRAINED",
        "exact",
    ):
        assert word in text, word
    assert len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) <= 160
    (store / "tokens" / "c.3.0").unlink()
    assert command("inspect", store) == 0
    assert "9 of 10 shards: UNFINISHED" in capsys.readouterr().out


def test_inspect_draws(scenes: Path, lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of a plausible size with green and red boxes in its first panel; images that are not there or were
    skipped are refused."""
    out = tmp_path / "drawing.png"
    assert command("inspect", lossless, "--data", scenes, "--image-id", "5", "--view", "1", "--out", out) == 0
    assert "84 of 84 tokens" in capsys.readouterr().out
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert pixels.shape[1] > 1000
    panel = pixels[:, : pixels.shape[1] // 4]
    assert ((panel - (255, 0, 0)) ** 2).sum(axis=2).min() < 100
    assert ((panel - (0, 255, 0)) ** 2).sum(axis=2).min() < 100
    for image_id in ("11", "999"):
        assert command("inspect", lossless, "--data", scenes, "--image-id", image_id) == 2
        assert image_id in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", "plan", "verify", "repair", "inspect", "transcode", "prune"):
        assert command(*filter(None, (name, "--help"))) == 0
        assert f"python -m teacher_dump {name}".strip() in " ".join(capsys.readouterr().out.split())
