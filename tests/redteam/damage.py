"""Damage to finished stores: flipped bits, and whole shards that are another's."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cache.reader import CacheReader
from common.errors import UserError
from tests import crafted_stores
from tests.dump_cases import command, draw_scenes, dump
from tests.redteam.trials import Trial, run
from tests.training_cases import PROCESSES

TOGETHER = 50  # flips that share a process


def flip_bits(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """One bit of one file, chosen in two steps, so that small files have their share: `verify` notices it, and reading
    all records gives the very numbers that were stored or an error."""
    draw_scenes(folder / "scenes", images=12)
    assert dump(folder / "scenes", folder / "store.zarr", "--views", 2, "--keep-tokens", 0.5) == 0
    for first in range(0, count, TOGETHER):
        told, numbers = folder / "told.jsonl", range(first, min(count, first + TOGETHER))
        told.unlink(missing_ok=True)
        copy = folder / "copy.zarr"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "store.zarr", copy)
        process = PROCESSES.Process(target=_flip_and_read, args=(folder / "store.zarr", copy, seed, numbers, told))
        process.start()
        process.join(len(numbers) * 20)
        trials = [Trial(*json.loads(line)) for line in told.read_text().splitlines()]
        yield from trials
        if len(trials) < len(numbers):
            yield Trial(f"flip {first + len(trials)}", f"the process ended with {process.exitcode}, or hung")
        if process.is_alive():
            process.kill()


def _flip_and_read(sound: Path, copy: Path, seed: int, numbers: range, told: Path) -> None:
    """The body of a process: flips one bit after the other, each mended before the next."""
    torch.set_num_threads(1)
    expected = _read(sound)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    with told.open("w", buffering=1) as lines:
        for number in numbers:
            chance = random.Random(f"{seed} {number}")
            path = chance.choice(files)
            content = path.read_bytes()
            place, bit = chance.randrange(len(content)), chance.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                failure = _failure(copy, expected)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            path.write_bytes(content)
            lines.write(json.dumps([f"{path.relative_to(copy)}: bit {bit} of byte {place}", failure]) + "\n")
    os._exit(0)


def _failure(store: Path, expected: dict[str, torch.Tensor]) -> str | None:
    if command("verify", store) == 0:
        return "verify calls the store sound"
    try:
        found = _read(store)
    except UserError:
        return None
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    return f"read without an error, with other numbers in {', '.join(wrong)}" if wrong else None


def _read(store: Path) -> dict[str, torch.Tensor]:
    """All records and what decoding them takes."""
    reader = CacheReader(store, verify="always")
    try:
        batch: dict[str, Any] = vars(reader.read(np.arange(len(reader))))
        values = batch | reader.constants
        return {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
    finally:
        reader.close()


def craft_stores(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Contents changed under right checksums; each store goes through six commands."""
    crafted_stores.make_stores(folder)
    for number in range(seed * 10**6, seed * 10**6 + count):
        told, found = crafted_stores.outcome(folder, number)
        failed = [f"{name}: {text}" for name, text in found.items() if text.startswith("FAILED")]
        yield Trial(told, "; ".join(failed) or None)


# Options of stores whose shards have the same sizes as those of the one they are put into.
OTHER_STORES = {
    "another seed of the views": ("--seed", 5),
    "another teacher": ("--teacher", "random:tiny_teacher"),
    "another dump of the same": (),
}


def swap_shards(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Shards, or single files of them, exchanged within a store or taken from another: `verify` and a training say so.
    (A shard of another dump of the same is the same shard.)"""
    draw_scenes(folder / "scenes", images=24)
    options = ("--views", 2)
    chance = random.Random(seed)
    assert dump(folder / "scenes", folder / "store.zarr", *options) == 0
    for name, other in OTHER_STORES.items():
        assert dump(folder / "scenes", folder / f"{name}.zarr", *options, *other) == 0
    cases = itertools.cycle(["the same store", *OTHER_STORES])
    for source, number in zip(cases, range(count), strict=False):
        shutil.rmtree(folder / "copy.zarr", ignore_errors=True)
        shutil.copytree(folder / "store.zarr", folder / "copy.zarr")
        if source == "the same store":
            what, same = _swap_within(folder / "copy.zarr", chance), False
        else:
            what, same = _take_from(folder / f"{source}.zarr", folder / "copy.zarr", chance), not OTHER_STORES[source]
        verified = run(folder, "teacher_dump", "verify", "copy.zarr")
        runs = ("--out", "runs", "--name", f"{number}", "--eval-every", 0, "--epochs", 2, "--workers", 1)
        train = ("--cache", "copy.zarr", "--data", "scenes", "--student", "tiny", "--device", "cpu", *runs)
        trained = run(folder, "student_train", *train)
        failure = verified.failure or trained.failure
        if failure is None and (verified.status, trained.status) != ((0, 0) if same else (1, 2)):
            failure = f"verify ends with {verified.status}, training with {trained.status}: {verified.output[-500:]}"
        yield Trial(f"{source}: {what}", failure)


def _shards(store: Path) -> dict[str, list[Path]]:
    """The files of each shard, by its number."""
    found: dict[str, list[Path]] = {}
    for path in sorted(store.rglob("*")):
        if path.relative_to(store).parts[0] in ("samples", "teacher"):
            continue
        if path.is_file() and (match := re.fullmatch(r"(?:c[./])?(\d+)(\.0)*", path.name)):
            found.setdefault(match[1], []).append(path)
    return found


def _swap_within(store: Path, chance: random.Random) -> str:
    shards = _shards(store)
    one, other = chance.sample(sorted(shards), 2)
    pairs = list(zip(shards[one], shards[other], strict=True))
    if chance.random() < 0.5:
        pairs = [pair for pair in pairs if pair[0].parent.name == "logits"]
    for first, second in pairs:
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    return f"{len(pairs)} files of shards {one} and {other} swapped"


def _take_from(other: Path, store: Path, chance: random.Random) -> str:
    shard = chance.choice(sorted(_shards(store)))
    paths = [path for path in _shards(store)[shard] if (other / path.relative_to(store)).exists()]
    if chance.random() < 0.5:
        paths = [path for path in paths if path.parent.name in ("logits", "boxes_cxcywh")]
    for path in paths:
        shutil.copyfile(other / path.relative_to(store), path)
    return f"{len(paths)} files of shard {shard}"
