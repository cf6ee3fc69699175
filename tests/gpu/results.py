"""A teacher's cache on one device in 25 minutes: `make gpu-results`, or `python -m tests.gpu.results` (docs/gpu.md).

Stopped, it goes on where it was. Exit status: 0 if there are results of every student, 1 if not, 2 without a device or
without what it imports.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.gpu.__main__ import AT_LIMIT, BUILD, DONE, machine, what_is_lacking


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.results", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal in small")
    parser.add_argument("--out", type=Path, default=BUILD / "gpu-results", help="default: %(default)s")
    arguments = parser.parse_args()
    lacking = what_is_lacking(arguments.device)
    if lacking is not None:
        print(f"make gpu-results: {lacking}", file=sys.stderr)
        return 2
    from tests.gpu.study import SMALL, Setting, Study, arms, run_study
    from tests.gpu.study_report import rows_of, write

    study = Study(Setting() if arguments.device == "cuda" else SMALL, arguments.out.resolve())
    page, found, ended = study.out.with_suffix(".md"), machine(arguments.device), {}
    study.out.mkdir(parents=True, exist_ok=True)
    for name, how in run_study(study):
        ended[name] = how
        print(f"{name}: {how}", flush=True)
        if rows_of(study):
            print(f"{write(study, found, ended, page)}\nwritten: {page}, .json and .png", flush=True)
    wanted = {arm.name for arm in arms(study.teacher)}
    failed = [name for name, how in ended.items() if not how.startswith((DONE, AT_LIMIT))]
    return 0 if not failed and {row.name for row in rows_of(study)} >= wanted else 1


if __name__ == "__main__":
    sys.exit(main())
