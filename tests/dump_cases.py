"""What the tests of phase one share: drawn scenes, a tiny teacher, and commands run as a user runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from common.synthetic import draw_data_set
from teacher_dump.__main__ import main

SIDE = 64
TEACHER = "random:tiny"
OPTIONS = ("--teacher", TEACHER, "--sizes", SIDE, "--device", "cpu", "--workers", "2")


def draw_scenes(folder: Path, images: int) -> Path:
    """A data set of `images` training images of 64 x 64 pixels."""
    draw_data_set(folder, train_images=images, val_images=1, size=SIDE)
    return folder


def command(*arguments: object) -> int:
    """`python -m teacher_dump ARGUMENTS...` in this process; its exit status."""
    with mock.patch.object(sys, "argv", ["teacher_dump", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def dump(data: Path, out: Path, *more: object) -> int:
    return command("--data", data, *OPTIONS, "--out", out, *more)


def run_in_child(arguments: tuple[object, ...]) -> None:
    """The body of a process of its own: as `command`, with its exit status."""
    torch.set_num_threads(1)
    sys.exit(command(*arguments))


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two stores hold the same files with the same bytes; says which differ where they do not."""
    ours, theirs = contents(one), contents(other)
    differing = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    assert not differing, f"{len(differing)} files differ: {sorted(differing)[:5]}"
    return True


def unseal(store: Path) -> None:
    """Make a store what it would have been before there were seals."""
    about = json.loads((store / "zarr.json").read_bytes())
    del about["attributes"]["sealed"]
    (store / "zarr.json").write_text(json.dumps(about, indent=2))
    layout = about["attributes"]["detrcache"]["layout"]
    for path in store.glob("*/c.*"):
        per_token = path.parent.name.startswith(("token", "neck"))
        pages = layout["shard_tokens"] // layout["page_tokens"] if per_token else layout["shard_samples"]
        content = path.read_bytes()
        index = len(content) - (pages * 16 + 4)
        assert content[index - 32 : index - 28] == b"SEAL"
        path.write_bytes(content[: index - 32] + content[index:])


def swap(one: Path, other: Path) -> None:
    """Exchange two files."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
