"""Time and memory of `teacher_dump plan` at the size of COCO train2017: `python -m tests.benchmarks.plan_coco`.

118,287 images of COCO's commonest sizes with 860,001 boxes, without and with polygons as long as COCO's (0.5 GB);
no image files: planning does not look at them. The targets are 20 s and 1 GB, the start of Python and the reading of
the json included. Of the memory, torch (a build for CUDA), torchvision and numba take 0.8 GB before anything is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common.annotation_cache import FOLDER_VARIABLE

IMAGES, BOXES, CATEGORIES = 118_287, 860_001, 80
SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 375), (640, 360), (612, 612)]
CORNERS = 27  # of a polygon


def write_annotations(folder: Path, polygons: bool, image_count: int = IMAGES, box_count: int = BOXES) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.choice(len(SIZES), image_count, p=[0.3, 0.1, 0.16, 0.06, 0.14, 0.1, 0.08, 0.06])
    images = [
        {"id": 3 * i + 9, "file_name": f"{3 * i + 9:012d}.jpg", "width": SIZES[size][0], "height": SIZES[size][1]}
        for i, size in enumerate(sizes.tolist())
    ]
    owners = generator.integers(0, image_count, box_count).tolist()
    labels = generator.integers(1, CATEGORIES + 1, box_count).tolist()
    boxes = np.round(generator.uniform(5, 150, (box_count, 4)), 2).tolist()
    shapes = [
        [polygon] if polygons else [] for polygon in np.round(generator.uniform(0, 640, (997, 2 * CORNERS)), 2).tolist()
    ]
    written = [json.dumps(shape) for shape in shapes]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)]
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    with (folder / "annotations" / "instances_train2017.json").open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for i, (owner, label, box) in enumerate(zip(owners, labels, boxes, strict=True)):
            file.write(
                f'{", " if i else ""}{{"segmentation": {written[i % len(written)]}, "area": {box[2] * box[3]},'
                f' "iscrowd": 0, "image_id": {3 * owner + 9}, "bbox": {box}, "category_id": {label}, "id": {i}}}'
            )
        file.write("]}")


def main() -> None:
    for polygons, options in ((False, ()), (True, ()), (True, ("--views", "8"))):
        with tempfile.TemporaryDirectory(prefix="detrcache-bench-") as folder:
            write_annotations(Path(folder), polygons)
            size_mb = (Path(folder) / "annotations" / "instances_train2017.json").stat().st_size / 1e6
            command = [sys.executable, "-m", "teacher_dump", "plan", "--data", folder, "--teacher", "random:r101"]
            environment = os.environ | {FOLDER_VARIABLE: f"{folder}/cache"}
            time.sleep(3)  # until the json's hash is noted, which it is not while it could still change unseen
            for which in ("first", "again"):
                start_s = time.perf_counter()
                process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
                assert process.stdout is not None
                report = process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
                duration_s = time.perf_counter() - start_s
                assert status == 0
                print(
                    f"plan {' '.join(options)}, {which}: {duration_s:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of"
                    f" CPU, {usage.ru_maxrss / 1e6:.2f} GB at its peak; {size_mb:.0f} MB of json"
                )
        print(report)


if __name__ == "__main__":
    main()
