"""A dump into a bucket, a check and a training from it, through a wire that spoils some of the answers."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.bad_wire import FAULTS, bad_wire
from tests.dump_cases import OPTIONS, contents, draw_scenes
from tests.redteam.trials import Trial, run
from tests.s3_server import CannotStart, environment, running_server


def disturb_buckets(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Each fault on a share of all answers: a dump, `verify` and a training with --local-cache end well or in a line,
    and what was copied from the bucket has the bytes of the same store in a folder."""
    draw_scenes(folder / "scenes", images=24)
    assert run(folder, "teacher_dump", "--data", "scenes", *OPTIONS, "--out", "folder.zarr").status == 0
    expected = contents(folder / "folder.zarr")
    try:
        with running_server() as server:
            for number in range(count):
                chance, fault = random.Random(f"{seed} {number}"), FAULTS[number % len(FAULTS)]
                share = chance.choice((0.02, 0.1, 0.3))
                with bad_wire(server.port) as wire, mock.patch.dict(os.environ, environment(wire.url)):
                    wire.spoil = lambda _: fault if chance.random() < share else None  # noqa: B023 - used in here only
                    failure = _use(folder, f"s3://redteam/{seed}-{number}/store.zarr", expected)
                yield Trial(f"{fault} in {share:.0%} of the answers", failure)
    except CannotStart as reason:
        yield Trial("none", str(reason))


def _use(folder: Path, url: str, expected: dict[str, bytes]) -> str | None:
    dumped = run(folder, "teacher_dump", "--data", "scenes", *OPTIONS, "--out", url)
    if dumped.failure or dumped.status != 0:
        return dumped.failure
    for left in ("copies", "runs"):
        shutil.rmtree(folder / left, ignore_errors=True)
    verified = run(folder, "teacher_dump", "verify", url)
    options = ("--student", "tiny", "--device", "cpu", "--batch-size", 8, "--epochs", 2, "--workers", 1)
    options += ("--eval-every", 0, "--out", "runs", "--name", "run", "--local-cache", "copies")
    trained = run(folder, "student_train", "--cache", url, "--data", "scenes", *options)
    if failure := verified.failure or trained.failure:
        return failure
    copied = {path.name: path.read_bytes() for path in (folder / "copies").rglob("c.*")}
    wrong = [name for name, content in copied.items() if content not in expected.values()]
    return f"copies with other bytes: {wrong[:3]}" if wrong else None
