"""Everything that only a GPU can show, by one command: `make gpu`, or `python -m tests.gpu` (docs/gpu.md).

The tests marked `gpu`, then the benchmarks: each in a process of its own that is ended at its limit, so that nothing
that hangs or crashes takes the rest with it. Prints what they print and a table, and writes build/gpu.json. Exit
status: 0 if every test passed, 1 if not, 2 without a device or without what the tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LIMIT_S = 720
GRACE_S = 5  # for a job at its limit to write what it has
DONE, AT_LIMIT = "done", "ended at its limit"
PACKAGES = ("torch", "torchvision", "triton", "numba", "numpy", "zarr", "transformers", "deformops")


@dataclass(frozen=True)
class Job:
    """A file of tests or a benchmark, and the seconds after which it is ended: with GRACE_S each, at most LIMIT_S."""

    name: str
    limit_s: int
    tests: bool = False

    def command(self, device: str, out: Path) -> list[str]:
        """Writes its results to `out`: JUnit's XML for tests, rows of a benchmark as JSON."""
        if not self.tests:
            return [sys.executable, "-m", "tests.gpu.benchmarks", self.name, "--device", device, "--out", str(out)]
        chosen = ["-m", "gpu" if device == "cuda" else "not gpu", "-p", "no:cacheprovider", f"--junitxml={out}"]
        return [sys.executable, "-m", "pytest", f"tests/gpu/test_{self.name}.py", *chosen]


JOBS = (
    Job("kernels", 140, tests=True),
    Job("phases", 180, tests=True),
    Job("sizes", 75, tests=True),
    Job("attention", 60),
    Job("feature-loss", 25),
    Job("dump", 55),
    Job("steps", 80),
    Job("trace", 30),
    Job("reader", 25),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a job. ended: how, in words. tests: of each its result, its seconds and what it noted."""

    name: str
    ended: str
    passed: bool
    wall_s: float
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(job.name for job in JOBS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with small inputs")
    parser.add_argument("--out", type=Path, default=BUILD / "gpu.json", help="default: %(default)s")
    arguments = parser.parse_args()
    lacking = what_is_lacking(arguments.device)
    if lacking is not None:
        print(f"make gpu: {lacking}", file=sys.stderr)
        return 2
    jobs = [job for job in JOBS if not arguments.names or job.name in arguments.names]
    report: dict[str, Any] = {"machine": machine(arguments.device), "jobs": []}
    print(json.dumps(report["machine"], indent=1))
    outcomes = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        print(f"{job.name}: at most {job.limit_s} s", flush=True)
        outcomes.append(run(job, arguments.device, arguments.out.parent))
        report["jobs"].append(asdict(outcomes[-1]))
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(outcomes))
    print(f"written: {arguments.out}")
    tests = {job.name for job in jobs if job.tests}
    return 0 if all(outcome.passed for outcome in outcomes if outcome.name in tests) else 1


def what_is_lacking(device: str) -> str | None:
    """Why nothing can be run here, in a line."""
    try:
        import torch
    except ImportError:
        return f"expected PyTorch, found none for {sys.executable}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"expected a CUDA device, but torch {torch.__version__} finds none; nothing was run"
    try:
        for name in ("pytest", "student_train.loop", "teacher_dump.dump"):
            importlib.import_module(name)
    except ImportError as error:
        return f"{error}: bring the wheels that this machine lacks, `python -m tests.gpu.wheels` (docs/gpu.md)"
    return None


def machine(device: str) -> dict[str, Any]:
    """The device, its driver, and the versions that decide a result."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device == "cpu":
        return {"device": "cpu", **found}
    properties = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(driver, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        found["driver"] = None
    memory = {"memory_bytes": properties.total_memory, "devices": torch.cuda.device_count()}
    return {"device": properties.name, "capability": f"{properties.major}.{properties.minor}", **memory, **found}


def run(job: Job, device: str, folder: Path) -> Outcome:
    """Run a job to its end or its limit; what it has written by then counts."""
    out = out_of(job, folder)
    out.unlink(missing_ok=True)
    begun = time.monotonic()
    ended = within(job.limit_s, job.command(device, out))
    wall_s = time.monotonic() - begun
    if job.tests:
        return Outcome(job.name, ended, ended == DONE, wall_s, tests=results_of(out))
    return Outcome(job.name, ended, ended == DONE, wall_s, rows=json.loads(out.read_text()) if out.is_file() else [])


def within(limit_s: float, command: Sequence[str]) -> str:
    """Run a command to its end or its limit, and end what it started; says how it ended."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit_s)
        ended = DONE if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended = f"{AT_LIMIT} of {limit_s:.0f} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGINT)  # pytest then writes the results that it has, a training saves itself
            process.wait(GRACE_S)
    finally:  # after Ctrl-C, too
        end_group(process)
    return ended


def out_of(job: Job, folder: Path) -> Path:
    return folder / f"gpu-{job.name}.{'xml' if job.tests else 'json'}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a job and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def results_of(junit: Path) -> dict[str, dict[str, Any]]:
    """By test: passed, failed or skipped, seconds, the first line of what went wrong, and recorded properties. Empty if
    pytest could not write them; what it printed says how far it came."""
    if not junit.is_file():
        return {}
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        result = {None: "passed", "skipped": "skipped"}.get(None if wrong is None else wrong.tag, "failed")
        noted = {item.get("name"): item.get("value") for item in case.iter("property")}
        message = "" if wrong is None else (wrong.get("message") or "").split("\n")[0]
        found[str(case.get("name"))] = {
            "result": result, "seconds": float(case.get("time", 0)), "message": message, **noted
        }  # fmt: skip
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for outcome in outcomes:
        counted = f"{len(outcome.rows)} rows"
        if not outcome.rows:
            results = [test["result"] for test in outcome.tests.values()]
            counted = ", ".join(f"{results.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
        lines.append(f"{outcome.name:14} {outcome.ended:34} {outcome.wall_s:6.0f} s  {counted}")
        lines += [f"  {name}: {test['message']}" for name, test in outcome.tests.items() if test["result"] == "failed"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
