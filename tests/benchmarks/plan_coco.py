"""Time and memory of `teacher_dump plan` at the size of COCO train2017: `python -m tests.benchmarks.plan_coco`.

118,287 images of COCO's commonest sizes, without and with 860,001 boxes, no polygons and no image files: planning looks
at neither. The targets are 20 s and 1 GB, the start of Python and the reading of the json included. Of the memory,
torch and torchvision take 0.7 GB before anything is planned, and parsing the boxes, not planning, takes most of the
rest.
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

IMAGES, CATEGORIES = 118_287, 80
SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 375), (640, 360), (612, 612)]


def write_annotations(folder: Path, boxes: int) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.choice(len(SIZES), IMAGES, p=[0.3, 0.1, 0.16, 0.06, 0.14, 0.1, 0.08, 0.06])
    images = [
        {"id": 3 * i + 9, "file_name": f"{3 * i + 9:012d}.jpg", "width": SIZES[size][0], "height": SIZES[size][1]}
        for i, size in enumerate(sizes.tolist())
    ]
    owners = generator.integers(0, IMAGES, boxes).tolist()
    labels = generator.integers(1, CATEGORIES + 1, boxes).tolist()
    corners = np.round(generator.uniform(5, 150, (boxes, 4)), 2).tolist()
    annotations = [
        {"id": i, "image_id": 3 * owner + 9, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (owner, label, box) in enumerate(zip(owners, labels, corners, strict=True))
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def main() -> None:
    for boxes, options in ((0, ()), (860_001, ()), (860_001, ("--preset", "compact", "--views", "8"))):
        with tempfile.TemporaryDirectory(prefix="detrcache-bench-") as folder:
            write_annotations(Path(folder), boxes)
            size_mb = (Path(folder) / "annotations" / "instances_train2017.json").stat().st_size / 1e6
            command = [sys.executable, "-m", "teacher_dump", "plan", "--data", folder, "--teacher", "random:r101"]
            start_s = time.perf_counter()
            process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            report = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            duration_s = time.perf_counter() - start_s
            assert status == 0
        print(report)
        print(
            f"plan {' '.join(options)}: {duration_s:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of CPU,"
            f" {usage.ru_maxrss / 1e6:.2f} GB at its peak; {boxes} boxes, {size_mb:.0f} MB of json"
        )


if __name__ == "__main__":
    main()
