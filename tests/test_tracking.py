"""What is reported besides metrics.jsonl, and flags that say yes and no."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from student_train import loop
from student_train.config import OptimisationOptions, parse_train
from student_train.run_folder import RunFolder
from student_train.tracking import TRACKERS, flat
from tests.training_cases import configuration, make_store


@pytest.mark.filterwarnings("ignore")  # MLflow's, of its file store
def test_mlflow_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--track mlflow` of two steps and an evaluation, read back by MLflow's own client, against metrics.jsonl: every
    loss of every step, the AP in percent, the options and the name of the run; all exact."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    config = configuration(make_store(tmp_path), tmp_path)
    config = replace(config, optimisation=OptimisationOptions(batch_size=3, max_steps=2))
    loop.train(replace(config, output=replace(config.output, track="mlflow")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'detrcache'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["model.student"]) == ("run", "FINISHED", "tiny")
    steps = [line for line in lines if "losses" in line]
    assert len(steps) == 2
    for name in steps[0]["losses"]:
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, f"losses/{name}")]
        assert found == [(line["step"], line["losses"][name]) for line in steps]
    assert run.data.metrics["evaluation/ap"] == 100 * lines[-1]["evaluation"]["ap"]


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps and an evaluation after the second through `wandb` offline, against the summary that it keeps of the
    newest step that is complete, the second: of its losses and of the evaluation, which has the same step."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    tracker = TRACKERS["wandb"]("run", {"model": {"student": "tiny"}})
    run = wandb.run
    assert (run.name, run.project, run.config["model"]) == ("run", "detrcache", {"student": "tiny"})
    steps = [{"step": n, "loss": n + 0.5, "losses": {"logits/class": n}, "step_s": 0.25} for n in (1, 2, 3)]
    evaluation = {"step": 2, "evaluation": {"ap": 0.5, "class_ap": {"cat": 0.25}}}
    for line in [*steps[:2], evaluation, steps[2]]:
        tracker.add(line)
    summary = dict(run.summary)
    tracker.close()
    numbers = {key: value for key, value in summary.items() if key not in ("_runtime", "_timestamp", "_wandb")}
    losses = {"loss": 2.5, "loss/logits/class": 2, "time/step_s": 0.25}
    assert numbers == {"_step": 2, **losses, "evaluation/ap": 50, "class AP/cat": 25}


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of that name: how to get it, before anything is written."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = RunFolder(tmp_path / "run", writes=True)
    config = parse_train(["--track", "wandb"])
    with pytest.raises(UserError, match=r"--track wandb needs the package wandb: python -m pip install wandb"):
        folder.start(config, None, 1)
    assert not folder.path.exists()


def test_configurations_are_flat() -> None:
    """Groups become prefixes, and what a tracker may not take becomes text."""
    assert flat({"a": {"x": 1, "y": [2, 3], "z": None}, "recipe": None}) == {"a.x": 1, "a.y": "[2, 3]", "a.z": "None"}


def test_flags_say_yes_and_no(tmp_path: Path) -> None:
    """A recipe's truth values are overridden in both directions, and repeating one is no mistake."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("scale-lr = true\nsimilar-sizes = false\n")
    read = parse_train(["--config", str(recipe)])
    assert (read.optimisation.scale_lr, read.speed.similar_sizes) == (True, False)
    said = parse_train(["--config", str(recipe), "--no-scale-lr", "--similar-sizes"])
    assert (said.optimisation.scale_lr, said.speed.similar_sizes) == (False, True)
    same = parse_train(["--config", str(recipe), "--scale-lr", "--no-similar-sizes"])
    assert (same.optimisation.scale_lr, same.speed.similar_sizes) == (True, False)
