"""python -m student_train [train] | sweep | evaluate | export | compare | picture: phase two on the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace

from common.coco import check_images, load_annotations
from common.detr.weights import load_detector
from common.errors import run_command
from common.evaluate import write_results
from common.pixel_rule import PixelRule
from common.runtime import choose_device, log, read_ranks, start_logging
from student_train import BEGUN_S, loop
from student_train.compare import draw_curves, read_run, table
from student_train.config import (
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    PictureConfig,
    SweepConfig,
    parse,
    parse_train,
)
from student_train.evaluate import average_precision, class_table, detect_split, saved_policy
from student_train.export import export as write_export
from student_train.interruption import Interrupted
from student_train.run_folder import check_free_of_runs, record_evaluation
from student_train.sweep import sweep as run_sweep


def train(arguments: list[str]) -> None:
    """Train a student; the last line on stdout is its AP."""
    try:
        metrics = loop.train(parse_train(arguments), BEGUN_S)
    except Interrupted as stopped:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(stopped.exit_status)
    if read_ranks().is_first:
        print(metrics)


def evaluate(arguments: list[str]) -> None:
    """Evaluate a checkpoint; prints the AP and each class's."""
    config = parse(EvaluateConfig, arguments, "python -m student_train evaluate")
    start_logging()
    if config.record is not None:
        check_free_of_runs(config.record)
    device = choose_device(config.device)
    annotations = load_annotations(config.data, config.split, config.image_folder).decoded_by(PixelRule(config.exif))
    check_images(annotations)
    detector, report = load_detector(config.checkpoint, data=annotations.categories)
    for line in report.lines():
        log.info(line)
    policy = saved_policy(config.checkpoint, config.sizes)
    results = detect_split(
        detector.to(device),
        annotations,
        policy,
        batch_size=config.batch_size,
        workers=config.workers,
        name=str(config.checkpoint),
    )
    for line in annotations.rule.report():
        log.warning(line)
    if config.detections is not None:
        write_results(config.detections, results)
    metrics = average_precision(annotations, results)
    if config.record is not None:
        parameters = sum(parameter.numel() for parameter in detector.parameters())
        record_evaluation(config.record, f"evaluation of {config.checkpoint.name}", parameters, metrics)
    for line in class_table(annotations, metrics):
        log.info(line)
    print(metrics)


def sweep(arguments: list[str]) -> None:
    """Do the runs of a list, and print the table of them."""
    config = parse(SweepConfig, arguments, "python -m student_train sweep")
    start_logging()
    folders = run_sweep(config)
    if not config.dry_run:
        print(table([read_run(folder) for folder in folders]))


def export(arguments: list[str]) -> None:
    """Write a checkpoint as another program reads it."""
    config = parse(ExportConfig, arguments, "python -m student_train export")
    start_logging()
    write_export(config)


def compare(arguments: list[str]) -> None:
    """Print a table of runs and draw their curves."""
    config = parse(CompareConfig, arguments, "python -m student_train compare")
    runs = [read_run(folder) for folder in config.runs]
    print(table(runs))
    draw_curves(runs, config.out)
    print(f"curves: {config.out}")


def picture(arguments: list[str]) -> None:
    """Draw what some checkpoints find in some images."""
    config = parse(PictureConfig, arguments, "python -m student_train picture")
    from student_train.picture import draw_detections  # matplotlib takes its time, and a folder for its fonts

    start_logging()
    device = choose_device(config.device)
    annotations = load_annotations(config.data, config.split, config.image_folder).decoded_by(PixelRule(config.exif))
    shown = replace(annotations, entries=annotations.entries[: config.images])
    check_images(shown)
    results = {}
    for checkpoint in config.checkpoints:
        detector, report = load_detector(checkpoint, data=annotations.categories)
        for line in report.notes:
            log.info(f"{checkpoint}: {line}")
        policy = saved_policy(checkpoint, config.sizes)
        name = checkpoint.parent.name or checkpoint.name
        results[name] = detect_split(detector.to(device), shown, policy, batch_size=1, workers=1, name=str(checkpoint))
    draw_detections(shown, results, config.out, config.min_score)
    print(f"picture: {config.out}")


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
