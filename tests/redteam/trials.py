"""A trial is one attack and what came of it; commands are run in processes of their own, which may crash or hang."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import student_train.__main__ as phase_two
import teacher_dump.__main__ as phase_one
from tests.training_cases import PROCESSES

PATIENCE_S = 60  # for a command that takes 1 to 3 s: the machine may be busy
PROGRAMS: dict[str, Callable[[], None]] = {"teacher_dump": phase_one.main, "student_train": phase_two.main}


@dataclass(frozen=True)
class Trial:
    """what: the attack, so that it can be repeated. failure: what went wrong, None if all was as it should be."""

    what: str
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """One kind of attack. run(folder, count, seed) makes `count` trials in an empty folder."""

    name: str
    count: int
    run: Callable[[Path, int, int], Iterator[Trial]]


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: its exit status, the negative number of the signal that ended it, or None where it
    hung."""

    status: int | None
    output: str

    @property
    def error(self) -> str:
        """The last line, if it is an error of this project."""
        last = self.output.rstrip().split("\n")[-1].split("\r")[-1]
        return last if last.startswith("error: ") else ""

    @property
    def failure(self) -> str | None:
        """What is wrong with the way it ended, whatever it did: it worked, refused in a line, or found damage."""
        if self.status is None:
            return f"hung for {PATIENCE_S} s: {self.output[-2000:]}"
        if self.status < 0:
            return f"ended by signal {-self.status}: {self.output[-2000:]}"
        if "Traceback (most recent call last)" in self.output:
            return f"traceback: {self.output[-2000:]}"
        parsed = "For full helptext, run" in self.output or "Value error" in self.output  # the parser's own words
        if self.status == 2 and not self.error and not parsed:
            return f"refused without saying why: {self.output[-2000:]}"
        return None if self.status in (0, 1, 2) else f"exit status {self.status}: {self.output[-2000:]}"

    @property
    def refused(self) -> bool:
        return self.status == 2 and self.failure is None


def run(folder: Path, program: str, *arguments: object) -> Ended:
    """`python -m PROGRAM ARGUMENTS` in `folder`."""
    process, output = start(folder, program, *arguments)
    process.join(PATIENCE_S + 5)
    if process.is_alive():
        process.kill()
        process.join()
        return Ended(None, output.read_text(errors="replace"))
    text = output.read_text(errors="replace")
    return Ended(None if "Timeout (" in text and process.exitcode == 1 else process.exitcode, text)


def start(folder: Path, program: str, *arguments: object) -> tuple[PROCESSES.Process, Path]:
    """The same, under way; and the file that takes its output."""
    output = folder / "output.txt"
    words = [program, *map(str, arguments)]
    process = PROCESSES.Process(target=_command, args=(folder, words, output))
    process.start()
    return process, output


def _command(folder: Path, words: list[str], output: Path) -> None:
    """The body of a process."""
    os.chdir(folder)
    file = output.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    faulthandler.enable(file)
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=file)
    torch.set_num_threads(1)
    sys.argv = words
    PROGRAMS[words[0]]()
