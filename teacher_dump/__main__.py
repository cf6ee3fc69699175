"""python -m teacher_dump: phase one on the command line.

Each command imports what it runs after it has read its options and looked for its files, so that help and mistakes do
not wait for PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from common.errors import run_command
from common.inputs import annotation_file, check_store
from common.runtime import log, read_ranks, start_logging
from teacher_dump import config
from teacher_dump.config import check_teacher, parse, split_name

PROGRAM = "python -m teacher_dump"


def dump(arguments: list[str], prog: str) -> None:
    options = parse(config.DumpConfig, arguments, prog)
    check_sources(options)
    from teacher_dump.dump import run_dump

    summary = run_dump(options)
    rate = summary.samples / max(summary.duration_s, 1e-9)
    log.info(
        f"{options.store.out}: wrote {summary.samples} samples, {summary.written_bytes / 1e9:.3g} GB in"
        f" {summary.duration_s:.0f} s ({rate:.2f} samples/s)"
    )
    for reason in summary.broken:
        log.warning(f"left out: {reason}")


def plan(arguments: list[str], prog: str) -> None:
    options = parse(config.PlanConfig, arguments, prog)
    check_sources(options)
    from teacher_dump.plan_report import run_plan

    print(run_plan(options))


def verify(arguments: list[str], prog: str) -> None:
    options = parse(config.VerifyConfig, arguments, prog)
    check_store(options.store)
    from teacher_dump.verify import run_verify

    if not run_verify(options):
        sys.exit(1)


def repair(arguments: list[str], prog: str) -> None:
    options = parse(config.RepairConfig, arguments, prog)
    check_store(options.store)
    from teacher_dump.repair import run_repair

    run_repair(options)


def inspect(arguments: list[str], prog: str) -> None:
    options = parse(config.InspectConfig, arguments, prog)
    check_store(options.store)
    from teacher_dump.inspect import run_inspect

    print(run_inspect(options))


def transcode(arguments: list[str], prog: str) -> None:
    options = parse(config.TranscodeConfig, arguments, prog)
    check_store(options.store)
    from teacher_dump.transcode import run_transcode

    run_transcode(options)


def prune(arguments: list[str], prog: str) -> None:
    options = parse(config.PruneConfig, arguments, prog)
    check_store(options.store)
    from teacher_dump.transcode import run_prune

    run_prune(options)


def check_sources(options: config.DumpConfig | config.PlanConfig) -> None:
    """UserError where what is to be read is not there. A teacher with a name of its own may be: if it is in the store
    already, it is not read again."""
    annotation_file(options.data.data, options.data.split, options.data.image_folder)
    if len(teachers := options.teacher.teachers) == 1 and not split_name(teachers[0])[0]:
        check_teacher(teachers[0])


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "dump": dump,
    "plan": plan,
    "verify": verify,
    "repair": repair,
    "inspect": inspect,
    "transcode": transcode,
    "prune": prune,
}


def main() -> None:
    start_logging(read_ranks())
    name, arguments = "dump", sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        name, *arguments = arguments
    prog = PROGRAM if name == "dump" else f"{PROGRAM} {name}"
    run_command(partial(COMMANDS[name], arguments, prog))


if __name__ == "__main__":
    main()
