"""`student_train compare`: the table and the curves of runs on record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from student_train.__main__ import compare
from student_train.compare import draw_curves, read_run, table


def write_run(folder: Path, losses: dict[str, float], steps: int, step_s: float) -> Path:
    """A run's folder as training leaves it: `steps` equal steps, half as long waiting, and one evaluation."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"what": "tiny, plain", "parameters": 1_250_000}))
    waits = {"waiting_for_images_s": step_s / 4, "waiting_for_cache_s": step_s / 4}
    lines = [{"step": step + 1, "losses": losses, "step_s": step_s} | waits for step in range(steps)]
    metrics = {"ap": 0.123, "ap50": 0.2, "ap_small": 0.1, "ap_medium": 0.15, "ap_large": -1}
    lines.append({"step": steps, "evaluation": metrics})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_table_has_results_steps_times_and_parameters(tmp_path: Path) -> None:
    """Against numbers worked out by hand: 2 s steps that wait 1 s, 90 of them, take 4 minutes and a half."""
    run = read_run(write_run(tmp_path / "plain", {"detection/class": 1.0}, steps=90, step_s=2.0))
    header, row = table([run]).splitlines()
    assert " ".join(header.split()) == "run trained AP AP50 APs APm APl steps ms/step time M params"
    assert " ".join(row.split()) == "plain tiny, plain 12.3 20.0 10.0 15.0 - 90 3000 0:04:30 1.25"


def test_curves_of_every_kind_of_loss(tmp_path: Path) -> None:
    """One panel for AP and one for each kind of loss that some run has: two rows of up to three, where there are four
    in all, so that the picture is twice as high as that of a plain run alone."""
    plain = read_run(write_run(tmp_path / "plain", {"detection/class": 1.0, "detection/l1": 1.0}, 5, 0.1))
    losses = {"features": 2.0, "logits/class": 1.0, "detection/class": 1.0}
    distilled = read_run(write_run(tmp_path / "distilled", losses, 5, 0.1))
    assert (plain.loss_names, distilled.loss_names) == (["detection"], ["features", "logits", "detection"])
    draw_curves([plain], tmp_path / "plain.png")
    draw_curves([plain, distilled], tmp_path / "both.png")
    alone, both = (Image.open(tmp_path / name) for name in ("plain.png", "both.png"))
    assert (both.width, both.height) == (alone.width * 3 // 2, alone.height * 2)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the folder of a run, with run\.json"):
        read_run(tmp_path)


def test_a_run_whose_last_line_is_being_written(tmp_path: Path) -> None:
    """Without that line, wherever in it the file ends: the table says 4 steps, where it was 5 and an evaluation."""
    folder = write_run(tmp_path / "run", {"detection/class": 1.0}, steps=5, step_s=0.1)
    content = (folder / "metrics.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    for end in (1, 40, len(lines[4]) - 2):
        (folder / "metrics.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:end])
        (_, row) = table([read_run(folder)]).splitlines()
        assert " ".join(row.split()) == "run tiny, plain - - - - - 4 150 0:00:01 1.25"


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their paths, in the table and its curves; a run whose first evaluation is to come has no curve yet."""
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        folder = write_run(tmp_path / parent / "run", {"detection/class": 1.0}, 5, 0.1)
    (folder / "metrics.jsonl").write_text("")
    compare([str(tmp_path / "a" / "run"), str(folder), "--out", str(tmp_path / "new" / "compare.png")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        str(tmp_path / "a" / "run"),
        str(folder),
    ]
    assert (tmp_path / "new" / "compare.png").is_file()


def test_without_runs_there_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="expected the folders of some runs"):
        compare([])
