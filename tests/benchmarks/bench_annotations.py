"""Opening annotations: kept arrays against reading the json."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.annotation_cache import FOLDER_VARIABLE, load_instances
from common.instances_json import read_instances
from tests.benchmarks import Case
from tests.benchmarks.plan_coco import write_annotations

IMAGES, BOXES = 20_000, 145_000


def cases() -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="detrcache-bench-") as name:
        folder = Path(name)
        os.environ[FOLDER_VARIABLE] = f"{name}/cache"
        write_annotations(folder, True, IMAGES, BOXES)
        path, images = folder / "annotations" / "instances_train2017.json", folder / "train2017"
        yield Case(
            "annotations, opened again",
            lambda: load_instances(path, images),
            lambda: read_instances(path, images),
            f"{IMAGES:,} images, {BOXES:,} boxes; reference: the json",
            runs=3,
        )
