"""What the documents say is true: links lead somewhere, commands parse, the options page is current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import student_train.__main__ as phase_two
import teacher_dump.__main__ as phase_one
from tests import options_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {"teacher_dump": (phase_one.COMMANDS, "dump"), "student_train": (phase_two.COMMANDS, "train")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def commands() -> list[str]:
    """Every `python -m teacher_dump ...` and `python -m student_train ...` of an indented block, joined over lines."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(
            r"^    (?:\$ )?(python -m (?:teacher_dump|student_train)\b.*?)(?:\s+#.*)?$", text, flags=re.M
        )
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_name_real_options(command: str) -> None:
    """Every option of a documented command against those of the command's --help: none is made up."""
    words = shlex.split(command)[2:]
    module, rest = words[0], words[1:]
    known, default = COMMANDS[module]
    name = rest[0] if rest and rest[0] in known else default
    help_text = options_page.help_of(module, name, default)
    for word in rest:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", help_text), f"{command}: no option {word}"


def test_options_page_is_current() -> None:
    """docs/options.md against what --help prints now; `python -m tests.options_page` mends it."""
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()
