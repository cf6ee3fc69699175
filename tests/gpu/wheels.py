"""Put the packages that a machine without network lacks into build/packages, from where `make gpu` imports them:

    python -m tests.gpu.wheels --python 3.12 --present freeze.txt

run where there is a network, with the machine's own list of packages (`pip freeze`). PyTorch, torchvision and triton
are always the machine's; whatever else it has stays as it is, in the version it has, or pip says what does not fit.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "build" / "packages"
TORCH = {"torch", "torchvision", "triton"}
TESTS = ["pytest"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", help="the machine's; default: %(default)s")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", help="default: %(default)s")
    parser.add_argument(
        "--present", type=Path, help="what the machine has, as `pip freeze` writes it; default: nothing"
    )
    parser.add_argument("--out", type=Path, default=PACKAGES, help="default: %(default)s")
    arguments = parser.parse_args()
    present = versions(arguments.present.read_text()) if arguments.present else {}
    machine = target(arguments.python, arguments.platform)
    chosen = lacking(resolved(requirements(), present, machine), present)
    shutil.rmtree(arguments.out, ignore_errors=True)
    pip("install", "--no-deps", "--no-compile", "--target", str(arguments.out), *machine, *chosen)
    print(f"{arguments.out}: {', '.join(chosen)}")
    tree = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    tree_bytes = sum(
        (ROOT / name.decode()).stat().st_size for name in tree if name and (ROOT / name.decode()).is_file()
    )
    packages_bytes = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"packages {packages_bytes / 1e6:.1f} MB, working tree {tree_bytes / 1e6:.1f} MB")


def requirements() -> list[str]:
    """What the project and its tests import, but for PyTorch's own."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    return [line for line in lines if line.strip() and name_of(line) not in TORCH] + TESTS


def name_of(requirement: str) -> str:
    """The normalised name that a requirement begins with (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


def versions(frozen: str) -> dict[str, str]:
    """Package -> version, from the lines `name==version`."""
    pairs = (line.split("==") for line in frozen.splitlines() if re.match(r"[\w.-]+==", line))
    return {name_of(name): number.strip() for name, number in pairs}


def target(python: str, platform: str) -> list[str]:
    """pip's options for another machine: wheels only, those for older systems too."""
    platforms = [platform, "manylinux2014_x86_64", "manylinux_2_17_x86_64"]
    options = [option for name in platforms for option in ("--platform", name)]
    return ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", *options]


def resolved(required: Sequence[str], present: dict[str, str], machine: Sequence[str]) -> dict[str, str]:
    """Package -> version of all that the requirements need, with what is present in its version."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        public = {name: number for name, number in present.items() if "+" not in number}
        constraints.write_text("".join(f"{name}=={number}\n" for name, number in public.items()))
        pip("install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", folder,
            "--constraint", str(constraints), *machine, *required)  # fmt: skip
        found: dict[str, Any] = json.loads(report.read_text())
    return {name_of(item["metadata"]["name"]): item["metadata"]["version"] for item in found["install"]}


def lacking(needed: dict[str, str], present: Collection[str]) -> list[str]:
    return [f"{name}=={number}" for name, number in sorted(needed.items()) if name not in TORCH and name not in present]


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
