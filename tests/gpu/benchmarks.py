"""One benchmark of the device, in a process of its own: `python -m tests.gpu.benchmarks NAME --out FILE`.

Each row is printed, and the file written, as soon as it is known: a benchmark that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from tests.gpu import bench_kernels, bench_phases
from tests.gpu.measuring import Place, Row

BENCHMARKS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "attention": bench_kernels.attention,
    "feature-loss": bench_kernels.feature_loss,
    "dump": bench_phases.dump,
    "steps": bench_phases.steps,
    "trace": bench_phases.trace,
    "reader": bench_phases.reader,
}


def run(name: str, place: Place, out: Path) -> None:
    rows: list[Row] = []
    for row in BENCHMARKS[name](place):
        rows.append(row)
        print(line(row), flush=True)
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def line(row: Row) -> str:
    figures = [
        f"{name} {figure if isinstance(figure, str) else f'{figure:.4g}'}" for name, figure in row.figures.items()
    ]
    return f"  {row.name:58} {', '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--device", default="cuda", help="default: %(default)s; on cpu, inputs are small")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(arguments.name, Place(torch.device(arguments.device), small=arguments.device == "cpu"), arguments.out)


if __name__ == "__main__":
    main()
