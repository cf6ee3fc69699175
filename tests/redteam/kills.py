"""Processes killed, or told to stop, at random moments: what they leave ends as an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.dump_cases import OPTIONS, contents, draw_scenes
from tests.redteam.trials import Trial, run, start
from tests.training_cases import make_store, steps_of

STEPS = 12
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def kill_dumps(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """A dump is killed, and run again over what was left, until one gets through: the undisturbed one's bytes."""
    draw_scenes(folder / "scenes", images=64)
    options = ("--data", "scenes", *OPTIONS, "--views", 2, "--tokens", "int8", "--keep-tokens", 0.5)
    reference, out, chance = folder / "reference.zarr", folder / "store.zarr", random.Random(seed)
    run(folder, "teacher_dump", *options, "--out", out)  # the first process compiles and imports
    shutil.rmtree(out)
    begun = time.monotonic()
    assert run(folder, "teacher_dump", *options, "--out", reference).status == 0
    duration_s, expected = time.monotonic() - begun, contents(reference)
    killed = 0
    while killed < count:
        process, output = start(folder, "teacher_dump", *options, "--out", out)
        after_s = chance.uniform(0, duration_s)
        process.join(after_s)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            yield Trial(f"killed after {after_s:.2f} s")
        else:
            yield from _compared(process.exitcode, output, out, expected)
            shutil.rmtree(out, ignore_errors=True)
    process, output = start(folder, "teacher_dump", *options, "--out", out)
    process.join()
    yield from _compared(process.exitcode, output, out, expected)


def _compared(status: int | None, output: Path, out: Path, expected: dict[str, bytes]) -> Iterator[Trial]:
    """A failure where a dump that was not killed is not the undisturbed one."""
    if status != 0:
        yield Trial("a dump over what killed ones left", f"status {status}: {output.read_text()[-2000:]}")
    elif (found := contents(out)) != expected:
        differing = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        yield Trial("a dump over what killed ones left", f"{len(differing)} files differ, such as {differing[0]}")


def stop_runs(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """A training gets a signal at a random moment and goes on with --resume, again and again, to its end: every step
    once, the losses and the student of the undisturbed run, bit for bit."""
    make_store(folder)
    shared = ("--cache", "store.zarr", "--data", "scenes", "--student", "tiny", "--batch-size", 4, "--epochs", 4)
    shared += ("--max-steps", STEPS, "--workers", 1, "--device", "cpu", "--eval-every", 2, "--checkpoint-every", 2)
    whole, stopped, chance = folder / "whole/run", folder / "stopped/run", random.Random(seed)
    run(folder, "student_train", *shared, "--out", "first", "--name", "run")
    begun = time.monotonic()
    assert run(folder, "student_train", *shared, "--out", "whole", "--name", "run").status == 0
    duration_s = time.monotonic() - begun
    sent = 0
    while sent < count:
        resume = ("--resume",) if (stopped / "run.json").exists() else ()
        process, output = start(folder, "student_train", *shared, "--out", "stopped", "--name", "run", *resume)
        after_s, number = chance.uniform(0, duration_s), chance.choice(SIGNALS)
        process.join(after_s)
        what = f"{number.name} after {after_s:.2f} s"
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, number)
            process.join(60)
            sent += 1
            fine = process.exitcode in (-number, 128 + number, 0)  # before its handler was there, or at its very end
            yield Trial(what, None if fine else f"status {process.exitcode}: {output.read_text()[-2000:]}")
        elif process.exitcode == 0:
            if failure := _difference(stopped, whole):
                yield Trial(f"a run to its end, last {what}", failure)
            shutil.rmtree(stopped.parent)
        else:
            yield Trial("a run going on", f"status {process.exitcode}: {output.read_text()[-2000:]}")
            shutil.rmtree(stopped.parent, ignore_errors=True)


def _difference(run_folder: Path, whole: Path) -> str | None:
    ours, theirs = ([(line["step"], line["losses"]) for line in steps_of(path)] for path in (run_folder, whole))
    if ours != theirs:
        return f"other steps or losses: {[step for step, _ in ours]}"
    for name in ("last.safetensors", "best.safetensors"):
        one, other = load_file(run_folder / name), load_file(whole / name)
        if not all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys()):
            return f"{name} differs"
    found, expected = ((path / "metrics.jsonl").read_text().count('"evaluation"') for path in (run_folder, whole))
    if found != expected:
        return f"{found} evaluations in metrics.jsonl instead of {expected}"
    leftovers = [path.name for path in run_folder.rglob("*") if "partial" in path.name]
    return f"left behind: {leftovers}" if leftovers else None
