"""The attacks of `python -m tests.redteam`, a few of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.redteam.__main__ import ROWS
from tests.redteam.trials import Row

FEW = {"a bit of a store flipped": 40, "a mistake on the command line": 12}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_attack_is_survived(row: Row, tmp_path: Path) -> None:
    """Trials of each row end as docs/reliability.md says: exactly right afterwards, or refused in a line."""
    trials = list(row.run(tmp_path, FEW.get(row.name, 2), 1))
    if any(trial.what == "none" for trial in trials):
        pytest.skip(f"{trials[0].failure}")
    assert trials
    assert [trial for trial in trials if trial.failure is not None] == []
