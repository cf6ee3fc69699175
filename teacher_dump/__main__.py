"""python -m teacher_dump: phase one on the command line."""

from __future__ import annotations

import sys

import tyro

from common.errors import run_command
from common.runtime import log, start_logging
from teacher_dump.config import DumpConfig
from teacher_dump.dump import run_dump


def dump(arguments: list[str]) -> None:
    config = tyro.cli(DumpConfig, args=arguments, prog="python -m teacher_dump", config=(tyro.conf.OmitArgPrefixes,))
    summary = run_dump(config)
    rate = summary.samples / max(summary.duration_s, 1e-9)
    log.info(
        f"{config.store.out}: wrote {summary.samples} samples, {summary.written_bytes / 1e9:.3g} GB in"
        f" {summary.duration_s:.0f} s ({rate:.2f} samples/s)"
    )
    for reason in summary.broken:
        log.warning(f"left out: {reason}")


def main() -> None:
    start_logging()
    run_command(lambda: dump(sys.argv[1:]))


if __name__ == "__main__":
    main()
