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
