"""What a command imports before it has anything to do with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "numba", "scipy", "matplotlib", "zarr", "transformers", "timm", "pycocotools")
CALLED = f"""
import sys
from {{program}}.__main__ import COMMANDS, main
for arguments in {{lines}}:
    sys.argv = ["{{program}}", *arguments]
    try:
        main()
    except SystemExit as end:
        heavy = [name for name in {HEAVY} if name in sys.modules]
        print("ended", *arguments, end.code, *heavy)
"""


def ends(program: str, lines: str) -> list[list[str]]:
    """How each of the command lines (a list, in Python) ends, one after another in a process: its arguments, its exit
    status, and the heavy modules that are loaded by then."""
    code = CALLED.format(program=program, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ended ")]


@pytest.mark.parametrize(("program", "commands"), [("teacher_dump", 7), ("student_train", 6)])
def test_help_and_misspelt_options_load_nothing_heavy(program: str, commands: int) -> None:
    """`--help` and an unknown option of every command, against the list of what takes seconds to import."""
    lines = '[[command, flag] for command in COMMANDS for flag in ("--help", "--nonesuch")]'
    found = ends(program, lines)
    assert len(found) == 2 * commands
    for command, flag, status, *heavy in found:
        assert (status, heavy) == ({"--help": "0", "--nonesuch": "2"}[flag], []), (command, flag)


MISSING = {
    "teacher_dump": [
        "dump",
        "dump --data {scenes}",
        "plan",
        "plan --data {scenes} --split val2018",
        "plan --data {scenes} --teacher nonesuch.pth",
        "verify nonesuch.zarr",
        "repair nonesuch.zarr",
        "inspect nonesuch.zarr",
        "transcode nonesuch.zarr out.zarr",
        "prune nonesuch.zarr out.zarr",
    ],
    "student_train": [
        "--cache nonesuch.zarr",
        "--config nonesuch.toml",
        "--student r5",
        "--data {scenes} --val-split val2018",
        "--data {scenes} --init nonesuch.pth",
        "--data {scenes} --backbone-weights nonesuch.pth",
        "--data {scenes} --live-teacher nonesuch.pth",
        "evaluate nonesuch.safetensors --data {scenes}",
        "evaluate nonesuch.safetensors",
        "export nonesuch.safetensors --to onnx --out out.onnx",
        "compare nonesuch",
        "picture nonesuch.safetensors --data {scenes}",
    ],
}


@pytest.mark.parametrize("program", MISSING)
def test_missing_files_load_nothing_heavy(program: str, tmp_path: Path) -> None:
    """Stores, checkpoints, data and recipes that are not there: status 2, before anything heavy is imported."""
    scenes = tmp_path / "scenes"
    for split in ("train2017", "val2017"):
        (scenes / split).mkdir(parents=True)
    (scenes / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (scenes / "annotations" / f"instances_{split}.json").touch()
    lines = [line.format(scenes=scenes).split() for line in MISSING[program]]
    found = ends(program, repr(lines))
    assert found == [[*line, "2"] for line in lines]
