"""Recipes: files read before the flags, mistakes in them told in one line, and runs that repeat themselves."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from common.errors import UserError
from student_train import loop
from student_train.config import TrainConfig, parse_train
from student_train.recipe import configured, read_recipe
from student_train.run_folder import as_json
from tests.training_cases import configuration, make_store, steps_of

FLAT = """
student = "r18"
batch-size = 16
lr = 1
sizes = [480, 640]
cache = "store.zarr"
backbone_weights = "r18.pth"
two-stage = true
"""
GROUPED = """
[model]
student = "r18"
backbone-weights = "r18.pth"
two_stage = true
[optimisation]
batch_size = 16
lr = 1.0
[data]
sizes = [480, 640]
cache = "store.zarr"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", [FLAT, GROUPED])
def test_a_recipe_is_read_and_flags_go_before_it(tmp_path: Path, text: str) -> None:
    """Values on their own and in tables give the same configuration as the flags, and typed; a flag overrides its value
    and no other."""
    path = written(tmp_path, text)
    flags = ["--student", "r18", "--batch-size", "16", "--lr", "1", "--sizes", "480", "640", "--cache", "store.zarr"]
    flags += ["--backbone-weights", "r18.pth", "--two-stage"]
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        config = parse_train(arguments)
        assert as_json(config) == as_json(parse_train(flags)) | {"recipe": str(path)}
        assert type(config.optimisation.lr) is float
        assert config.model.backbone_weights == Path("r18.pth")
        assert config.data.sizes == (480, 640)
    config = parse_train(["--config", str(path), "--batch-size", "8"])
    assert (config.optimisation.batch_size, config.model.student) == (8, "r18")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sise = 16", r"recipe.toml: unknown key 'batch-sise', the nearest is 'batch-size'"),
        ("[model]\nlr = 1.0", r"unknown key 'lr' in \[model\]"),
        ("[modell]\nlr = 1.0", r"unknown key 'modell', the nearest is 'model'"),
        ("workers = 'four'", r"workers = 'four': input should be a valid integer"),
        ("workers = 4.5", r"workers = 4.5: "),
        ("skip-broken = 'yes'", r"skip-broken = 'yes': input should be a valid boolean"),
        ("amp = 'fp8'", r"amp = 'fp8': input should be 'off', 'bf16' or 'fp16'"),
        ("workers = 0", r"expected --workers of 1 or more, found 0"),
        ("ema = 1.5", r"expected --ema between 0 and 1"),
        ("lr = nan", r"lr = nan: "),
        ("lr = -inf", r"lr = -inf: "),
        ("sizes = [640, 99999999999999999999]", r"sizes = .*: expected a finite number"),
        ("epochs = 1" + "0" * 400, r"epochs = 1000.*: "),
        ("epochs = 1" + "0" * 5000, r"expected TOML, found a mistake: "),
        ("model = 3", r"recipe.toml: expected one table \[model\], found 3"),
        ("[[model]]\nstudent = 'r18'", r"expected one table \[model\]"),
        ("[student]\nname = 'r18'", r"student = .*: input should be a valid string"),
        ("student = " + "[" * 300 + "]" * 300, r"student"),
        ("student = " + "[" * 50_000 + "]" * 50_000, r"expected TOML, found a mistake"),
        ("name = 'a\\u0000b'".replace("'", '"'), r"expected text without zero bytes"),
        ('"\u0430mp" = "bf16"', r"unknown key 'аmp', the nearest is 'amp'"),  # a Cyrillic letter
        ('"" = 1', r"unknown key ''"),
        ("lr = 2020-01-01", r"lr = datetime.date"),
        ("workers = ", r"expected TOML, found a mistake: Invalid value"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    """Unknown keys with the nearest name, values of another type or out of range, and broken files: UserError."""
    with pytest.raises(UserError, match=message) as error:
        parse_train(["--config", str(written(tmp_path, text))])
    assert "\n" not in str(error.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    """No file, and a json that is none of a run's: UserError."""
    with pytest.raises(UserError, match=r"expected a recipe at .*No such file"):
        parse_train(["--config", str(tmp_path / "none.toml")])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected run\.json of a run"):
        parse_train(["--config", str(tmp_path / "x.json")])


def test_every_field_goes_through_a_recipe() -> None:
    """The defaults, written as json and read back as a recipe, are the defaults."""
    config = TrainConfig()
    values = {name: group for name, group in as_json(config).items() if name != "recipe"}
    assert configured(config, values, "json") == config


def test_a_run_repeats_itself(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """`--config run.json --name again`, which is what repeats a run, against that run: the same losses in every step.
    Without a name the new run gets a name of its own; with --resume the values name the run itself."""
    folder = make_store(tmp_path_factory.mktemp("config"))
    config = configuration(folder, tmp_path)
    loop.train(config)
    record = tmp_path / "run" / "run.json"
    loop.train(parse_train(["--config", str(record), "--name", "again"]))
    first, second = (
        [(line["step"], line["losses"]) for line in steps_of(tmp_path / name)] for name in ("run", "again")
    )
    assert first == second
    assert "recipe" in json.loads((tmp_path / "again" / "run.json").read_text())["config"]
    assert read_recipe(record)["output"]["name"] is None
    going_on = parse_train(["--config", str(record), "--resume"])
    assert (going_on.output.out / str(going_on.output.name), going_on.output.resume) == (record.parent, True)


def test_the_help_fits_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--help` has a group for each purpose, and all of it is below 160 lines of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse_train(["--help"])
    text = printed.getvalue()
    for group in ("data", "model", "distillation", "optimisation", "speed", "output"):
        assert f" {group} options " in text
    assert len(text.splitlines()) < 160


OUTSIDE = ["../../evil", "/tmp/evil", "a/../../evil", "a/..", ".", "..", "", "~/x", "a//b", "a/"]
ODD = [".hidden", "-x", "a\nb", "a\0b", "a\\b", "$HOME", "a*", "x ", " x", "a\x1b[31m"]


@pytest.mark.parametrize("name", OUTSIDE + ODD)
def test_a_name_stays_below_its_folder(name: str) -> None:
    """And is one that every shell, file system and tracker takes; from flags and recipes."""
    with pytest.raises(UserError, match="expected --name of letters") as raised:
        parse_train([f"--name={name}"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["r50", "2026-01-05", "first/r50.a", "r50 lr=1e-4, wd=0", "_x", "fünf", "模型", "timm:resnet50-1"]
)
def test_a_name_may_be(name: str) -> None:
    assert parse_train([f"--name={name}"]).output.name == name
