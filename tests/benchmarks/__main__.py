"""Run the benchmarks, print the table and write build/bench.json."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import tests.benchmarks
from tests.benchmarks import Case, Result, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="run only the cases whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"medians of alternating runs, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':48} {'ours':>10} {'reference':>10} {'ratio':>6} {'runs':>5}  unit")
    results = []
    for case in _cases():
        if not arguments.names or any(name in case.name for name in arguments.names):
            results.append(measure(case))
            print(_row(results[-1]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(f"written: {arguments.out}")


def _cases() -> Iterator[Case]:
    for module in pkgutil.iter_modules(tests.benchmarks.__path__):
        if module.name.startswith("bench_"):
            yield from importlib.import_module(f"tests.benchmarks.{module.name}").cases()


def _row(result: Result) -> str:
    ours, reference = f"{result.ours_s * 1e3:.2f} ms", f"{result.reference_s * 1e3:.2f} ms"
    return f"{result.name:48} {ours:>10} {reference:>10} {result.ratio:6.2f} {result.runs:5d}  {result.unit}"


if __name__ == "__main__":
    main()
