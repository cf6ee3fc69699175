"""Where a command says its time went: shares that add up to it, with the first steps, evaluation and saving apart."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.synthetic import draw_data_set
from student_train import loop
from student_train.progress import FIRST_STEPS, Account, Progress, time_spent
from tests.training_cases import SIDE, configuration

STEP: Any = SimpleNamespace(image_ids=(1, 2), waiting_for_images_s=0.25, waiting_for_cache_s=0.5)


def test_shares_add_up() -> None:
    """With a clock that stands still between the times that are given it: every share by hand, their sum the whole,
    exactly; a first step that waited for the compiler counts neither as computing nor as waiting, nor in the speed."""
    now = 100.0
    account = Account(begun_s=90.0, clock=lambda: now)
    account.started()
    for _ in range(FIRST_STEPS):
        account.add(STEP, 7.25, loss=1.0)
        now += 8
    for _ in range(10):
        account.add(STEP, 1.25, loss=1.0)
        now += 2.5
    with account.spent("evaluating"):
        now += 30
    for _ in range(2):
        with account.spent("saving"):
            now += 1
    assert account.seconds() == {
        "starting": 10.0,
        "first steps": 40.0,
        "computing": 12.5,
        "waiting for images": 2.5,
        "waiting for the cache": 5.0,
        "evaluating": 30.0,
        "saving": 2.0,
        "other": 5.0,
    }
    assert time_spent(account) == (
        "15 steps in 107.0 s, 1.00 samples/s after the first steps (starting 9%, first steps 37%, computing 12%,"
        " waiting for images 2%, waiting for the cache 5%, evaluating 28%, saving 2%, other 5%)"
    )


def test_the_log_leaves_the_first_steps_out() -> None:
    """Steps of 9 s, then of 0.25 s: the first line of the log is of those alone; where there are no others, of the
    first ones, and every later line of its own."""
    progress = Progress(every=FIRST_STEPS + 2)
    lines = [progress.line(step, 99, STEP, 9.0 if step <= FIRST_STEPS else 0.25, 1.0, 1e-3) for step in range(1, 15)]
    assert [line is None for line in lines] == [step % (FIRST_STEPS + 2) != 0 for step in range(1, 15)]
    assert all(line is None or "1.000 s/step" in line for line in lines)
    line = Progress(every=2)
    assert [line.line(step, 99, STEP, 9.0, 1.0, 1e-3) is None for step in (1, 2)] == [True, False]


@pytest.mark.parametrize("advice_from", [1, 100])
def test_a_run_accounts_for_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice_from: int) -> None:
    """Six steps, a slow first one among them, and an evaluation: the account, as it is when the run reports it, against
    this test's own clock around all of it, to two seconds of what comes after the report. Below the number of steps
    that advice needs there is none."""
    draw_data_set(tmp_path / "scenes", train_images=6, val_images=2)
    accounts, lines = list[dict[str, float]](), list[str]()

    def reported(account: Account) -> str:
        accounts.append(account.seconds())
        return time_spent(account)

    train_step, calls = loop.train_step, list[int]()

    def slow_at_first(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        time.sleep(1.0 if len(calls) == 1 else 0)
        return train_step(*arguments, **options)

    monkeypatch.setattr(loop, "time_spent", reported)
    monkeypatch.setattr(loop, "train_step", slow_at_first)
    monkeypatch.setattr(loop, "STEPS_FOR_ADVICE", advice_from)
    monkeypatch.setattr(loop.log, "info", lines.append)
    config = configuration(tmp_path, tmp_path, cached=False)
    options = replace(config.optimisation, batch_size=1, epochs=1)
    begun_s = time.perf_counter()
    loop.train(replace(config, optimisation=options, data=replace(config.data, sizes=(SIDE,))))
    wall_s = time.perf_counter() - begun_s
    (seconds,) = accounts
    assert sum(seconds.values()) == pytest.approx(wall_s, abs=2)
    assert all(spent_s >= 0 for spent_s in seconds.values())
    assert seconds["first steps"] >= 1.0
    assert seconds["computing"] > 0
    assert seconds["evaluating"] > 0
    assert seconds["saving"] > 0
    assert any("the bottleneck is" in line for line in lines) == (advice_from == 1)
