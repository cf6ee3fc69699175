"""`make gpu-results` without a GPU: the whole study in small, what its table says, how it goes on, and its limits."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from student_train.compare import Run, read_run
from tests.gpu import results, study
from tests.gpu.__main__ import AT_LIMIT, DONE, GRACE_S
from tests.gpu.study_report import row
from tests.studies import Curve
from tests.training_cases import PROCESSES

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["teacher", "plain-fresh", "plain-cached", "distilled", "distilled-live"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["tests.gpu.results"])
    assert results.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make gpu-results: expected a CUDA device")


def test_the_limits_add_up() -> None:
    """All together 25 minutes at most, some seconds left for the report; steps fit in each; docs/gpu.md says so."""
    setting = study.Setting()
    parts = [study.SCENES_LIMIT_S, study.TEACHER_LIMIT_S, study.STORE_LIMIT_S, *[study.STUDENT_LIMIT_S] * 4]
    assert sum(limit + GRACE_S for limit in parts) <= 25 * 60 - 10
    assert (setting.teacher_s, setting.student_s) < (study.TEACHER_LIMIT_S, study.STUDENT_LIMIT_S)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert f"{setting.teacher_s} s of steps | {study.TEACHER_LIMIT_S} s |" in page
    assert f"{setting.student_s} s of steps each | {study.STUDENT_LIMIT_S} s each |" in page
    assert all(f"| {limit} s |" in page for limit in (study.SCENES_LIMIT_S, study.STORE_LIMIT_S))


def run_module(module: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def in_forked_process(limit_s: float, module: str, *arguments: object) -> str:
    """`python -m MODULE ARGUMENTS` in a process that has PyTorch imported already."""
    process = PROCESSES.Process(target=run_module, args=(module, list(map(str, arguments))))
    process.start()
    process.join(limit_s)
    process.kill()
    process.join()
    return DONE if process.exitcode == 0 else f"exit status {process.exitcode}"


def test_the_whole_study_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with the demo's models and no more than the first steps of each run, in processes of their own: the
    figures of table and json against the runs' own records. Students begin alike, on the same samples: the views of the
    first epoch, the store's one, are no others when they are fresh; those of the second are. Then a run goes on for as
    many steps as fit in a longer time, and when they are done nothing is run."""
    monkeypatch.setattr(study, "_run", in_forked_process)
    monkeypatch.setattr(study, "SMALL", replace(study.SMALL, teacher_s=0, student_s=0))
    monkeypatch.setattr(study.Study, "workers", 1)
    monkeypatch.setattr(sys, "argv", ["tests.gpu.results", "--device", "cpu", "--out", str(tmp_path / "small")])
    assert results.main() == 0
    report = json.loads((tmp_path / "small.json").read_text())
    runs = {name: read_run(tmp_path / "small" / "runs" / name) for name in NAMES}
    assert [found["name"] for found in report["rows"]] == NAMES
    assert (report["equal_steps"], report["ended"]["store"]) == (8, DONE)
    seconds = [sum(runs[name].durations_s) for name in NAMES]
    assert report["equal_minutes"] == pytest.approx(min(seconds[1:]) / 60)
    page = (tmp_path / "small.md").read_text().splitlines()
    for name, length_s in zip(NAMES, seconds, strict=True):
        assert any(line.startswith(f"| {name} | 8 | {length_s / 60:.2f} |") for line in page)
    assert (tmp_path / "small.png").stat().st_size > 0
    kinds = {name: run.loss_names for name, run in runs.items()}
    assert kinds["plain-fresh"] == kinds["plain-cached"] == ["detection"]
    assert set(kinds["distilled"]) == set(kinds["distilled-live"]) == {"detection", "logits", "features", "assignment"}
    first, fifth = ({name: run.steps[at]["losses"]["detection/class"] for name, run in runs.items()} for at in (0, 4))
    assert first["plain-fresh"] == first["plain-cached"] == first["distilled"] == first["distilled-live"]
    assert fifth["plain-fresh"] != fifth["plain-cached"]

    setting = study.SMALL
    one = study.Study(setting, tmp_path / "small")
    config = one.config("plain-cached", study.arms(one.teacher)[1])
    rate = sum(runs["plain-cached"].durations_s[5:8]) / 3
    capsys.readouterr()
    assert study.train(config, setting, 11.2 * rate, limit_s=60) == DONE
    assert f"plain-cached: {1e3 * rate:.0f} ms a step, 11 steps fit" in capsys.readouterr().out
    longer = read_run(one.runs / "plain-cached")
    assert longer.steps[:8] == runs["plain-cached"].steps
    assert [step for step, _ in longer.evaluations][-1] == len(longer.steps) == 11
    monkeypatch.setattr(study, "_run", None)  # nothing is run again
    assert study.train(config, setting, 11.2 * rate, limit_s=60) == DONE


def test_a_row_is_made_of_a_run_s_record() -> None:
    """Four steps of 2 s, of which the first waits 1 s for images and another 1 s for the cache, and evaluations after
    two and four, against figures worked out by hand."""
    step = {"step_s": 2.0, "waiting_for_images_s": 0.0, "waiting_for_cache_s": 0.0}
    steps = ({**step, "waiting_for_images_s": 1.0, "waiting_for_cache_s": 1.0}, step, step, step)
    found = row(Run("r", "", 0, ((2, {"ap": 0.1}), (4, {"ap": 0.3})), steps, 7), batch_size=16)
    assert (found.over_steps.x, found.over_minutes.x) == ((2, 4), pytest.approx((0.1, 10 / 60)))
    assert (found.images_per_s, found.waiting_for_images, found.waiting_for_cache) == (8, 0.1, 0.1)
    assert found.peak_memory_bytes == 7
    assert found.over_steps.at(3) == pytest.approx(20)
    assert found.over_minutes.at(0.05) == pytest.approx(5)


def test_curves_are_read_between_evaluations() -> None:
    """Two seeds, against values worked out by hand: their mean rises from 0 to 4 at 10 and to 8 at 20."""
    curve = Curve((10, 20), ((3.0, 6.0), (5.0, 10.0)))
    assert [curve.at(x) for x in (0, 5, 15, 20)] == [0, 2, 6, 8]
    assert (curve.reaches(2), curve.reaches(6), curve.reaches(9), curve.final) == (5, 15, None, (6.0, 10.0))


@pytest.mark.parametrize(("how", "status"), [(f"{AT_LIMIT} of 180 s", 1), ("exit status 2", 1)])
def test_a_study_without_results_says_so(
    how: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is run ends so, without a result: the command's exit status."""
    monkeypatch.setattr(study, "_run", lambda *_: how)
    monkeypatch.setattr(sys, "argv", ["tests.gpu.results", "--device", "cpu", "--out", str(tmp_path / "none")])
    assert results.main() == status
