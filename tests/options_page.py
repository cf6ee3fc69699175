"""docs/options.md: what every command's --help prints. `python -m tests.options_page` writes it anew."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import student_train.__main__ as phase_two
import teacher_dump.__main__ as phase_one

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """# Every option of every command

What `--help` prints, command by command; `python -m tests.options_page` writes this page, and a test compares it.
"""


def help_of(module: str, name: str, default: str) -> str:
    """What `python -m MODULE [NAME] --help` prints, 100 columns wide and without colours."""
    main = {"teacher_dump": phase_one.main, "student_train": phase_two.main}[module]
    arguments = [module, *([] if name == default else [name]), "--help"]
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main()
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def page() -> str:
    parts = [HEAD]
    for module, commands, default in (
        ("teacher_dump", phase_one.COMMANDS, "dump"),
        ("student_train", phase_two.COMMANDS, "train"),
    ):
        for name in commands:
            title = f"python -m {module}" + ("" if name == default else f" {name}")
            parts.append(f"## {title}\n\n```text\n{help_of(module, name, default)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
