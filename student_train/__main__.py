"""python -m student_train [train] | sweep | evaluate | export | compare | picture: phase two on the command line.

Each command imports what it runs after it has read its options and looked for its files, so that help and mistakes do
not wait for PyTorch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace

from common.errors import run_command
from common.inputs import annotation_file, check_checkpoint, check_store, check_writable
from common.runtime import read_ranks, start_logging
from student_train import BEGUN_S, config
from student_train.config import parse, parse_train

PROGRAM = "python -m student_train"


def train(arguments: list[str]) -> None:
    """Train a student; the last line on stdout is its AP."""
    options = parse_train(arguments)
    data, model = options.data, options.model
    if data.cache is not None:
        check_store(data.cache)
    for split in (data.split, data.val_split):
        annotation_file(data.data, split, data.image_folder)
    for checkpoint in (model.init, model.backbone_weights, options.distillation.live_teacher):
        if checkpoint is not None:
            check_checkpoint(checkpoint)
    from student_train import loop
    from student_train.interruption import Interrupted

    try:
        metrics = loop.train(options, BEGUN_S)
    except Interrupted as stopped:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(stopped.exit_status)
    if read_ranks().is_first:
        print(metrics)


def evaluate(arguments: list[str]) -> None:
    """Evaluate a checkpoint; prints the AP and each class's."""
    options = parse(config.EvaluateConfig, arguments, f"{PROGRAM} evaluate")
    annotation_file(options.data, options.split, options.image_folder)
    check_checkpoint(options.checkpoint)
    for out in (options.detections, options.record and options.record / config.METRICS):
        if out is not None:
            check_writable(out)
    from student_train.evaluate import run_evaluate

    start_logging()
    print(run_evaluate(options))


def sweep(arguments: list[str]) -> None:
    """Do the runs of a list, and print the table of them."""
    options = parse(config.SweepConfig, arguments, f"{PROGRAM} sweep")
    from student_train.compare import read_run, table
    from student_train.sweep import sweep as run_sweep

    start_logging()
    folders = run_sweep(options)
    if not options.dry_run:
        print(table([read_run(folder) for folder in folders]))


def export(arguments: list[str]) -> None:
    """Write a checkpoint as another program reads it."""
    options = parse(config.ExportConfig, arguments, f"{PROGRAM} export")
    check_checkpoint(options.checkpoint)
    check_writable(options.out / "config.json" if options.to == "transformers" else options.out)
    from student_train.export import export as run_export

    start_logging()
    run_export(options)


def compare(arguments: list[str]) -> None:
    """Print a table of runs and draw their curves."""
    options = parse(config.CompareConfig, arguments, f"{PROGRAM} compare")
    check_writable(options.out)
    from student_train.compare import distinct, draw_curves, read_run, table

    names = distinct([[folder.resolve().name, str(folder)] for folder in options.runs])
    runs = [replace(read_run(folder), name=name) for folder, name in zip(options.runs, names, strict=True)]
    print(table(runs))
    draw_curves(runs, options.out)
    print(f"curves: {options.out}")


def picture(arguments: list[str]) -> None:
    """Draw what some checkpoints find in some images."""
    options = parse(config.PictureConfig, arguments, f"{PROGRAM} picture")
    annotation_file(options.data, options.split, options.image_folder)
    for checkpoint in options.checkpoints:
        check_checkpoint(checkpoint)
    check_writable(options.out)
    from student_train.picture import run_picture

    start_logging()
    run_picture(options)
    print(f"picture: {options.out}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "sweep": sweep,
    "export": export,
    "compare": compare,
    "picture": picture,
}


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    run_command(lambda: COMMANDS[name](arguments))


if __name__ == "__main__":
    main()
