"""What the documents say is true: links lead somewhere, commands parse and some run, recipes and messages are real."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import student_train.__main__ as phase_two
import teacher_dump.__main__ as phase_one
from common.detr.detector import DeformableDetr
from common.detr.presets import PRESETS
from common.detr.weights import save_detector
from common.synthetic import draw_data_set
from student_train import config as two
from student_train.sweep import flags, read_sweep
from teacher_dump import config as one
from tests import options_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.toml"))
CONFIGS: dict[str, dict[str, type[Any]]] = {
    "teacher_dump": {
        "dump": one.DumpConfig,
        "plan": one.PlanConfig,
        "verify": one.VerifyConfig,
        "repair": one.RepairConfig,
        "inspect": one.InspectConfig,
        "transcode": one.TranscodeConfig,
        "prune": one.PruneConfig,
    },
    "student_train": {
        "train": two.TrainConfig,
        "evaluate": two.EvaluateConfig,
        "sweep": two.SweepConfig,
        "export": two.ExportConfig,
        "compare": two.CompareConfig,
        "picture": two.PictureConfig,
    },
}
COMMAND = r"^    (?:\$ )?((?:python|torchrun [^#\n]*?) -m (?:teacher_dump|student_train)\b.*?)(?:\s+#.*)?$"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every link within the project against its files, and every anchor against the headings of the page it is in."""
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in headings(target), f"{page.name} links to {link}#{anchor}"


def commands_of(text: str) -> list[str]:
    """Every command of the two phases in an indented block, joined over lines, in order."""
    return re.findall(COMMAND, text.replace("\\\n", " "), flags=re.M)


def arguments_of(command: str) -> tuple[str, str, list[str]]:
    """Module, command and the words after it."""
    module, *words = shlex.split(command[re.search(r"-m (?=teacher_dump|student_train)", command).end() :])  # type: ignore[union-attr]
    known = CONFIGS[module]
    return (module, words[0], words[1:]) if words and words[0] in known else (module, next(iter(known)), words)


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))})
)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in the documents goes through the parser that the command itself uses, and every recipe that it
    names is read. (Of a run that the reader has yet to make, the record is left out.)"""
    monkeypatch.chdir(ROOT)
    module, name, words = arguments_of(command)
    if "--config" in words and words[words.index("--config") + 1].startswith("runs/"):
        del words[words.index("--config") : words.index("--config") + 2]
    config = CONFIGS[module][name]
    try:
        if config is two.TrainConfig:
            two.parse_train(words)
        elif module == "student_train":
            two.parse(config, words, command)
        else:
            one.parse(config, words, command)
    except SystemExit as end:
        pytest.fail(f"{command}: refused with status {end.code}")


def test_all_commands_are_covered() -> None:
    """The configurations above against the commands that there are; the first of each is what runs without a name."""
    assert {module: list(known) for module, known in CONFIGS.items()} == {
        "teacher_dump": list(phase_one.COMMANDS),
        "student_train": list(CONFIGS["student_train"]),
    }
    assert CONFIGS["student_train"].keys() == phase_two.COMMANDS.keys()


def test_options_page_is_current() -> None:
    """docs/options.md against what --help prints now; `python -m tests.options_page` mends it."""
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_read(recipe: Path) -> None:
    """Each recipe as `--config` or `sweep` reads it; what it sets is set, and docs/recipes.md lists it."""
    runs = read_sweep(recipe) if recipe.name == "sweep.toml" else [two.parse_train(["--config", str(recipe)])]
    for run in runs:
        assert {"--cache", "--batch-size"} <= set(flags(run))
        assert (run.optimisation.batch_size, run.optimisation.lr, run.optimisation.epochs >= 12) == (32, 2e-4, True)
    assert f"(recipes/{recipe.name})" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_messages_are_the_projects() -> None:
    """Every message of docs/troubleshooting.md is part of a string in the source, as Python joins its pieces; what is
    filled in is no part of it."""
    strings = set()
    for folder in ("common", "teacher_dump", "student_train", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                pieces = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
                strings.add("".join(piece for piece in pieces if isinstance(piece, str)))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(messages) > 30
    unknown = [message for message in messages if not any(message in string for string in strings)]
    assert not unknown


def small(module: str, name: str, words: list[str]) -> list[str]:
    """A command of the tutorial for drawn scenes and tiny models: the same options, with other values for some."""
    if "--backbone-weights" in words:
        del words[words.index("--backbone-weights") : words.index("--backbone-weights") + 2]
    for flag, value in (("--init", "start.safetensors"), ("--views", "2")):
        if flag in words:
            words[words.index(flag) + 1] = value
    cached = "--cache" in words
    if name == "train":
        shape = ["--width", "64", "--queries", "10", "--encoder-layers", "1", "--decoder-layers", "2"]
        words += [*(["--student", "timm:resnet10t", *shape] if cached else ["--student", "tiny", "--sizes", "64"])]
        words += ["--batch-size", "3", "--max-steps", "2"]
    if name in ("dump", "plan"):
        words += ["--sizes", "64"]
    if name in ("train", "dump", "plan", "evaluate", "picture"):
        words += ["--device", "cpu"]
    return words


def test_the_chapter_on_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's commands for own data, in order, on drawn scenes of three classes with ids 7, 3 and 900 in splits
    of their own names: all succeed, and what they leave behind knows the classes."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    draw_data_set(tmp_path / "data" / "fruit", train_images=6, val_images=3)
    classes = {7: "apple", 3: "pear", 900: "fig"}
    for split in ("train", "val"):
        (tmp_path / "data" / "fruit" / f"{split}2017").rename(tmp_path / "data" / "fruit" / split)
        path = tmp_path / "data" / "fruit" / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = list(classes)[annotation["category_id"] % 3]
        content["categories"] = [{"id": category_id, "name": name} for category_id, name in classes.items()]
        path.with_name(f"instances_{split}.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    save_detector(tmp_path / "start.safetensors", DeformableDetr(PRESETS["tiny"](7)))
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (chapter,) = re.findall(r"<!-- run: own data -->(.*?)<!-- end run -->", tutorial, flags=re.S)
    commands = commands_of(chapter)
    assert len(commands) == 10
    mains = {"teacher_dump": phase_one.main, "student_train": phase_two.main}
    for command in commands:
        module, name, words = arguments_of(command)
        with mock.patch.object(sys, "argv", [module, name, *small(module, name, words)]):
            mains[module]()
    assert {detection["category_id"] for detection in json.loads(Path("found.json").read_text())} <= classes.keys()
    names = json.loads(Path("fruit-r18", "config.json").read_text())["id2label"]
    assert names == {"0": "pear", "1": "apple", "2": "fig"}
    for product in ("fruit.zarr", "compare.png", "fruit.png", "fruit-r18/model.safetensors"):
        assert Path(product).exists()
