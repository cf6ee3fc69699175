"""Stores that somebody altered and gave right checksums again, and what the commands make of them.

    python -m tests.crafted_stores --first 0 --count 500

crafts that many from small stores, each in a process of its own, and prints those at which a command crashed, hung,
ended in a traceback or refused in more than a line. A number names a crafted store for good.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import tyro

import student_train.__main__ as phase_two
from common.cache.buffers import BatchBuffers
from common.cache.members import member_names
from common.cache.plan import SampleTable, token_offsets
from common.cache.reader import CacheReader
from common.cache.schema import ATTRIBUTE, CHECKSUMS, MISSING, SEAL_BYTES, Manifest
from common.cache.seal import MAGIC, Seal, field_sum, owners, pages_sum
from common.cache.validate import check_manifest
from common.cache.writer import finished_shards, read_skipped, shard_key
from common.errors import UserError
from tests.dump_cases import TEACHER, command, draw_scenes, dump
from tests.training_cases import PROCESSES

IMAGES, VIEWS = 4, 2
PATIENCE_S = 25
Array = npt.NDArray[Any]
MORE_MEMORY_BYTES = 6 * 2**30  # than a process has at the start
KINDS = {  # of small stores
    "pq8": ("--keep-tokens", 0.5),
    "int4": ("--tokens", "int4", "--keep-tokens", 0.5, "--queries", "True", "--logits", "float"),
    "half": ("--preset", "half", "--neck"),
}
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 63, 64, 255, 1e9, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.5, 1.5, float("nan"), float("inf")),
)
VALUES: tuple[Any, ...] = (*NUMBERS, None, True, "", "x", "object", "float16", "int64", "/etc", "../..", [], [1], {})


def make_stores(folder: Path) -> None:
    """scenes/ and, for each of KINDS, a whole store of them, KIND.zarr."""
    draw_scenes(folder / "scenes", images=IMAGES)
    for kind, options in KINDS.items():
        assert dump(folder / "scenes", folder / f"{kind}.zarr", "--views", VIEWS, "--batch-size", 2, *options) == 0


def craft(folder: Path, store: Path, number: int) -> str:
    """Write crafted store `number` to `store`, made of the stores in `folder`; says what was done to it."""
    chance = random.Random(number)
    kind = chance.choice(list(KINDS))
    shutil.copytree(folder / f"{kind}.zarr", store)
    change = chance.choice(CHANGES)
    told = change(store, chance)
    write_checksums(store)
    return f"{number} ({kind}): {told}"


def write_checksums(store: Path) -> None:
    """Make the checksums of the metadata right; those of arrays are with whoever changes them."""
    try:
        root = json.loads((store / "zarr.json").read_bytes())
        sums, manifest = root["attributes"][CHECKSUMS], root["attributes"][ATTRIBUTE]
        for path in store.rglob("zarr.json"):
            key = path.relative_to(store).as_posix()
            if key in sums and path.is_file():
                sums[key] = google_crc32c.value(path.read_bytes())
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        sums[ATTRIBUTE] = google_crc32c.value(canonical)
        (store / "zarr.json").write_text(json.dumps(root))
        _seal(store)
    except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, OSError, RecursionError, UserError):
        pass  # what was done to the store leaves nothing to sum up


def _seal(store: Path) -> None:
    """Give every shard file that has a seal the one that fits what the store says now."""
    manifest = manifest_of(store)
    check_manifest(manifest)
    layout, columns = manifest.layout, {}
    for name, (shape, dtype) in manifest.columns().items():
        chunk = store.joinpath("samples", name, "c", *"0" * len(shape)).read_bytes()[:-4]
        columns[name] = np.frombuffer(chunk, dtype).reshape(shape)
    owner = owners(manifest, SampleTable(**columns), read_skipped(store, layout).tolist())
    for field in manifest.fields():
        tail_bytes, page_bytes = layout.tail_bytes(field), layout.page_bytes(field)
        for shard in range(min(layout.shards, 100)):
            path = store / shard_key(field, shard)
            content = path.read_bytes() if path.is_file() else b""
            before, tail = content[:-tail_bytes], content[-tail_bytes:]
            if tail.startswith(MAGIC):
                sums = np.frombuffer(before, np.uint8)[: len(before) // page_bytes * page_bytes].reshape(-1, page_bytes)
                pages = pages_sum(np.ascontiguousarray(sums[:, -4:]).view("<u4")[:, 0])
                path.write_bytes(
                    before + Seal(owner(shard), field_sum(field), pages).to_bytes().tobytes() + tail[SEAL_BYTES:]
                )


def summed(content: bytes) -> bytes:
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


def manifest_of(store: Path) -> Manifest:
    return Manifest.from_json(json.loads((store / "zarr.json").read_bytes())["attributes"][ATTRIBUTE], "crafted")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything within a json value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def alter_json(path: Path, within: tuple[str, ...], chance: random.Random) -> str:
    """Replace, double, remove or add something at a random place of a json file, below `within`."""
    root = json.loads(path.read_bytes())
    value = root
    for key in within:
        value = value[key]
    *way, last = chance.choice(list(places(value)))
    for key in way:
        value = value[key]
    before = value[last]
    what = chance.random()
    if what < 0.1:
        del value[last]
        after: Any = "nothing"
    elif what < 0.4 and isinstance(before, int | float):
        value[last] = after = chance.choice(
            (before + 1, before - 1, before * 2, -before, before * 2 ** chance.randrange(60))
        )
    elif what < 0.5 and isinstance(before, list):
        value[last] = after = before * chance.choice((2, 1000))
    else:
        value[last] = after = chance.choice(VALUES)
    path.write_text(json.dumps(root))
    return f"{path.name} {'.'.join(map(str, (*within, *way, last)))}: {str(after)[:60]}, was {str(before)[:60]}"


def change_manifest(store: Path, chance: random.Random) -> str:
    return alter_json(store / "zarr.json", ("attributes", ATTRIBUTE), chance)


def change_root(store: Path, chance: random.Random) -> str:
    return alter_json(store / "zarr.json", (), chance)


def change_array_metadata(store: Path, chance: random.Random) -> str:
    path = chance.choice(sorted(store.rglob("*/zarr.json")))
    return f"{path.parent.relative_to(store)}: {alter_json(path, (), chance)}"


def change_layout_throughout(store: Path, chance: random.Random) -> str:
    """A number of the manifest, and all that follows from it: every zarr.json, offsets, the shards' names."""
    before = manifest_of(store)
    group = chance.choice(("teacher", "layout", "layout", "codec", "data"))
    names = {
        "teacher": ("layers", "queries", "channels"),
        "layout": ("samples", "shard_samples", "shard_tokens", "page_tokens"),
        "codec": ("tokens", "neck", "queries", "logits", "keep_tokens"),
        "data": ("images",),
    }
    name = chance.choice(names[group])
    old = getattr(getattr(before, group), name)
    choices: dict[str, tuple[Any, ...]] = {
        "tokens": ("fp32", "fp16", "int8", "int4", "pq4", "pq8"),
        "neck": (not old,),
        "queries": (not old,) if group == "codec" else (1, old * 2, 2**16),
        "logits": ("float", "uint8"),
        "keep_tokens": (1.0, 0.1),
    }
    new = chance.choice(choices.get(name, (1, 2, 3, 16, 32, 1024, 2**16, 2**20, 2**31 - 1)))
    after = replace(before, **{group: replace(getattr(before, group), **{name: new})})
    root = json.loads((store / "zarr.json").read_bytes())
    root["attributes"][ATTRIBUTE] = after.to_json()
    (store / "zarr.json").write_text(json.dumps(root))
    try:
        fields, columns, constants = after.fields(), after.columns(), after.constants()
    except UserError:  # channels that do not fill bytes
        return f"{group}.{name}: {new}"
    layout = after.layout
    for field in fields:
        rows = layout.shards * layout.shard_tokens if field.per == "token" else layout.samples
        page, shard = [layout.page_rows(field)], [layout.shard_rows(field)]
        rest = list(field.row_shape)
        alter_array(store / field.name, [rows, *rest], field.dtype, [*shard, *rest], [*page, *rest])
    for column, (shape, dtype) in columns.items():
        alter_array(store / "samples" / column, list(shape), dtype, list(shape))
    for constant, shape in constants.items():
        alter_array(store / "teacher" / constant, list(shape), "float32", list(shape))
    alter_array(store / "skipped", [layout.samples], "uint8", [layout.shard_samples])
    chunk = store / "samples/token_count/c/0"
    counts = np.frombuffer(chunk.read_bytes()[:-4], "<i4")
    if layout.samples < 2**20 and layout.page_tokens:
        counts = np.resize(counts, layout.samples)
        for column, (shape, dtype) in columns.items():
            path = store.joinpath("samples", column, "c", *"0" * len(shape))
            values = np.frombuffer(path.read_bytes()[:-4], np.dtype(dtype))
            values = np.resize(values, shape)
            path.write_bytes(summed(values.tobytes()))
        offsets = token_offsets(counts, layout).astype("<i8")
        (store / "samples/token_offset/c/0").write_bytes(summed(offsets.tobytes()))
    return f"{group}.{name} and what follows from it: {new}, was {old}"


def alter_array(folder: Path, shape: list[int], dtype: str, chunk: list[int], inner: list[int] | None = None) -> None:
    """Make a zarr.json describe another array; none is made up."""
    if not (folder / "zarr.json").exists():
        return
    about = json.loads((folder / "zarr.json").read_bytes())
    about |= {"shape": shape, "data_type": dtype}
    about["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    if inner is not None:
        about["codecs"][0]["configuration"]["chunk_shape"] = inner
    (folder / "zarr.json").write_text(json.dumps(about))


def change_table(store: Path, chance: random.Random) -> str:
    """Numbers of a column, in one row or in all."""
    name, (shape, dtype) = chance.choice(list(manifest_of(store).columns().items()))
    path = store.joinpath("samples", name, "c", *"0" * len(shape))
    values = np.frombuffer(path.read_bytes()[:-4], dtype).copy()
    limits = np.iinfo(dtype)
    value = int(np.clip(int(min(chance.choice(NUMBERS[:19]), 2.0**64)), limits.min, limits.max))
    where: Any = slice(None) if chance.random() < 0.2 else chance.randrange(len(values))
    if chance.random() < 0.5:
        values[where] += np.array(chance.choice((1, -1, 16, -16)), dtype)
    else:
        values[where] = value
    path.write_bytes(summed(values.tobytes()))
    return f"samples/{name}[{where}]: {values[where]}"


def change_bytes(store: Path, chance: random.Random) -> str:
    """A chunk of another length, or with other numbers, in the table, the constants or `skipped`."""
    chunks = [path for group in ("samples", "teacher", "skipped") for path in sorted((store / group).rglob("c/*"))]
    path = chance.choice(
        [path for path in chunks if path.is_file()] + [store / "skipped/c/0", store / "skipped/c/99999"]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()[:-4] if path.exists() else b"\1\1"
    numbers = np.array([np.nan, np.inf, -np.inf, 1e38, -1, 0], "<f4")
    crafted = chance.choice(
        [
            *(
                b"",
                content[:-1],
                content[: len(content) // 2],
                content * 2,
                bytes(len(content)),
                b"\xff" * len(content),
            ),
            *(np.full(-(-len(content) // 4), number).tobytes()[: len(content)] for number in numbers),
            *(number.tobytes() + content[4:] for number in numbers),
        ]
    )
    path.write_bytes(summed(crafted) if chance.random() < 0.95 else crafted)
    return f"{path.relative_to(store)}: {len(crafted)} bytes, {crafted[:8].hex()}..., were {len(content)}"


def change_records(store: Path, chance: random.Random) -> str:
    """Other rows in a field, under right checksums."""
    manifest = manifest_of(store)
    chosen = chance.choice(manifest.fields() + tuple(f for f in manifest.fields() if "i" in f.dtype) * 2)
    whole = chance.random() < 0.3
    shards = range(manifest.layout.shards) if whole else [chance.randrange(manifest.layout.shards)]
    pattern = chance.choice((b"\xff", b"\x7f", b"\x80", b"\0", b"\0\x7c", b"\0\0\xc0\x7f", b"\x05\0", b"\xfe\xff"))
    pattern = pattern if chance.random() < 0.8 else chance.randbytes(64)

    def alter(rows: Array) -> None:
        content = rows.reshape(-1).view(np.uint8)
        part = slice(None)
        if chance.random() < 0.5:
            start = chance.randrange(len(content))
            part = slice(start, start + 8)
        content[part] = np.resize(np.frombuffer(pattern, np.uint8), len(content))[part]

    for shard in shards:
        rewrite_rows(store, chosen.name, shard, alter)
    return f"{chosen.name} of shard {'all' if whole else shards[0]}: {pattern[:8].hex()}..."


def rewrite_rows(store: Path, name: str, shard: int, alter: Callable[[Array], None]) -> None:
    """Alter the rows of every page of a shard file, (rows of a page, ...), and sum them up again."""
    manifest = manifest_of(store)
    layout, field = manifest.layout, next(field for field in manifest.fields() if field.name == name)
    path, page_bytes = store / shard_key(field, shard), layout.page_bytes(field)
    content = bytearray(path.read_bytes())
    index = np.frombuffer(content[-layout.index_bytes(field) : -4], "<u8").reshape(-1, 2)
    for page in range(int((index[:, 0] != MISSING).sum())):
        place = slice(page * page_bytes, (page + 1) * page_bytes)
        rows = np.frombuffer(content[place][:-4], np.dtype(field.dtype).newbyteorder("<")).copy()
        alter(rows.reshape(layout.page_rows(field), *field.row_shape))
        content[place] = summed(rows.tobytes())
    path.write_bytes(content)


def change_shard_file(store: Path, chance: random.Random) -> str:
    """Another length, or another index with a right checksum."""
    manifest = manifest_of(store)
    field = chance.choice(manifest.fields())
    path = store / shard_key(field, chance.randrange(manifest.layout.shards))
    content, index_bytes = path.read_bytes(), manifest.layout.index_bytes(field)
    what = chance.randrange(4)
    if what == 0:
        content = content[: chance.randrange(len(content))]
    elif what == 1:
        content = content[:-index_bytes][: chance.randrange(len(content))] + content[-index_bytes:]
    elif what == 2:
        index = np.frombuffer(content[-index_bytes:-4], "<u8").copy()
        index[chance.randrange(len(index))] = chance.choice((0, 1, 2**32, 2**63, 2**64 - 1))
        content = content[:-index_bytes] + summed(index.tobytes())
    else:
        content = content[:-index_bytes] + chance.randbytes(chance.randrange(1, 2000)) + content[-index_bytes:]
    path.write_bytes(content)
    return f"{path.relative_to(store)}: {('cut', 'pages cut', 'index', 'more bytes')[what]}"


def change_files(store: Path, chance: random.Random) -> str:
    """A file or folder gone, empty, of another kind, or under another name."""
    path = chance.choice(
        [path for path in sorted(store.rglob("*")) if path != store / "zarr.json" or chance.random() < 0.3]
    )
    what = chance.choice(("removed", "emptied", "a folder", "not json", "deep json", "renamed", "copied"))
    if what == "renamed":
        path.rename(path.with_name(chance.choice(("0", "99999", "²", "00", "x", "zarr.json.bak", "c.999999999999.0"))))
    elif what == "copied":
        names = ("0", "7", "99999", "²", "00", "-1", "99999999999999999999", "x.partial-1")
        target = path.with_name(chance.choice(names))
        shutil.copytree(path, target, dirs_exist_ok=True) if path.is_dir() else shutil.copy(path, target)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what != "removed":
            path.write_bytes({"emptied": b"", "not json": b'{"attributes": nothing', "deep json": b"[" * 10**5}[what])
    return f"{path.relative_to(store)}: {what}"


CHANGES: tuple[Callable[[Path, random.Random], str], ...] = (
    *(change_manifest, change_manifest, change_root, change_array_metadata, change_layout_throughout),
    *(change_layout_throughout, change_table, change_table, change_bytes, change_records, change_records),
    *(change_shard_file, change_files),
)


def read_everything(store: Path) -> int:
    """Open a store and read all its rows with as many fields as a loss may need."""
    try:
        for path in [store / name for name in member_names(store)] or [store]:
            reader, buffers = CacheReader(path), BatchBuffers()
            for rows in np.array_split(reader.rows(), -(-max(1, len(reader.rows())) // 3)):
                reader.read_sound(rows, buffers)
            finished_shards(path, reader.manifest)
            reader.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(store: Path, scenes: Path) -> int:
    """`python -m student_train` for two steps."""
    arguments = ["student_train", "--cache", store, "--data", scenes, "--student", "tiny", "--batch-size", "3"]
    arguments += ["--max-steps", "2", "--device", "cpu", "--workers", "1", "--eval-every", "0", "--name", "run"]
    arguments += ["--out", store.with_name("runs")]
    with mock.patch.object(sys, "argv", [*map(str, arguments)]):
        try:
            phase_two.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def exercise(store: Path, scenes: Path, record: Path) -> None:
    """In a process of its own: every command on a store, and after each a line in `record` of what came of it."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES,) * 2)
    copy = store.with_name("copy.zarr")
    shutil.copytree(store, copy)
    source = ("--data", scenes, "--teacher", TEACHER, "--device", "cpu")
    commands: dict[str, Callable[[], int]] = {
        "read": partial(read_everything, store),
        "verify": partial(command, "verify", store),
        "inspect": partial(command, "inspect", store),
        "train": partial(train, store, scenes),
        "transcode": partial(command, "transcode", store, store.with_name("out.zarr"), "--tokens", "pq8"),
        "repair": partial(command, "repair", copy, *source, "--workers", 1),
    }
    with record.open("w", buffering=1) as file:
        faulthandler.enable(file)
        for name, run in commands.items():
            output = io.StringIO()
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=file)
            file.write(f"{name}: ")
            with redirect_stdout(output), redirect_stderr(output):
                try:
                    status = run()
                except BaseException:
                    import traceback

                    output.write(traceback.format_exc())
                    status = -1
            faulthandler.cancel_dump_traceback_later()
            file.write(json.dumps([status, output.getvalue()[-3000:]]) + "\n")
    os._exit(0)  # threads of a command that failed need not end


def outcome(folder: Path, number: int) -> tuple[str, dict[str, str]]:
    """Craft a store and exercise it. What was done to it, and for each command "worked", "refused" or what failed."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store, record = Path(place) / "store.zarr", Path(place) / "record.txt"
        told = craft(folder, store, number)
        process = PROCESSES.Process(target=exercise, args=(store, folder / "scenes", record))
        process.start()
        process.join()
        found = {}
        written = record.read_text() if record.exists() else ""
        for line in written.split("\n"):
            name, _, text = line.partition(": ")
            if text.startswith("["):
                found[name] = _judged(*json.loads(text))
        if len(found) < 6:
            found["ended"] = f"FAILED with exit status {process.exitcode}: {written[-1500:]}"
    return told, found


def _judged(status: int, output: str) -> str:
    last = output.rstrip().split("\n")[-1].split("\r")[-1]
    if status == 0 or (status == 1 and "NOT sound" in output):
        return "worked"
    if status == 2 and last.startswith("error: ") and "Traceback" not in output:
        return f"refused: {last}"
    return f"FAILED with status {status}: {output}"


def main(folder: Path | None = None, first: int = 0, count: int = 100, verbose: bool = False) -> None:
    """Craft stores and print what failed, then how often each command worked or refused."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        if not (place / "scenes").exists():
            place.mkdir(parents=True, exist_ok=True)
            make_stores(place)
        counted: Counter[str] = Counter()
        for number in range(first, first + count):
            told, found = outcome(place, number)
            failed = [f"  {name}: {text}" for name, text in found.items() if text.startswith("FAILED")]
            if failed or verbose:
                print("\n".join([told, *(failed or [f"  {name}: {text}" for name, text in found.items()])]), flush=True)
            counted.update(f"{name} {text.split(':')[0].split(' ')[0]}" for name, text in found.items())
            counted["stores"] += 1
            counted["stores that failed"] += bool(failed)
    print("\n".join(f"{count:6d} {name}" for name, count in sorted(counted.items())))


if __name__ == "__main__":
    tyro.cli(main)
