"""Attack, print what failed, then the table of docs/reliability.md.

python -m tests.redteam                     # everything: about half an hour
python -m tests.redteam --rows flip craft   # rows whose names contain one of these
python -m tests.redteam --share .1 --seed 3 # a tenth of the trials, others than usual
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import tyro

from teacher_dump.tables import table
from tests.redteam import damage, inputs, kills, wires
from tests.redteam.trials import Row

ROWS = (
    Row("a dump killed (SIGKILL) at a random moment", 100, kills.kill_dumps),
    Row("a training killed or told to stop at a random moment", 100, kills.stop_runs),
    Row("a bit of a store flipped", 3200, damage.flip_bits),
    Row("a store crafted under right checksums, six commands each", 500, damage.craft_stores),
    Row("shards in the wrong place", 32, damage.swap_shards),
    Row("a bucket behind a bad wire", 32, wires.disturb_buckets),
    Row("a broken or hostile checkpoint", 200, inputs.break_checkpoints),
    Row("annotations changed at random", 150, inputs.change_annotations),
    Row("images damaged at random", 150, inputs.damage_images),
    Row("recipes changed at random", 100, inputs.change_recipes),
    Row("a mistake on the command line", 200, inputs.mistake_commands),
)


def attack(rows: tuple[str, ...] = (), share: float = 1.0, seed: int = 0) -> bool:
    """Run the rows whose names contain one of `rows` (all without), each with that share of its trials; whether
    everything survived."""
    results = []
    for row in ROWS:
        if rows and not any(part in row.name for part in rows):
            continue
        begun, tried, failed = time.monotonic(), 0, 0
        with tempfile.TemporaryDirectory(prefix="redteam-") as folder:
            for trial in row.run(Path(folder), max(1, round(row.count * share)), seed):
                tried += 1
                if trial.failure is not None:
                    failed += 1
                    print(f"FAILED {row.name}: {trial.what}\n    {trial.failure}", flush=True)
        results.append([row.name, str(tried), str(tried - failed), str(failed)])
        print(f"{row.name}: {tried} tried, {failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
    print("\n".join(table([["attack", "tried", "survived", "failed"], *results])))
    return all(result[-1] == "0" for result in results)


if __name__ == "__main__":
    sys.exit(0 if tyro.cli(attack) else 1)
