"""What several test files share: the real data, where it is present, an S3 server, and torch's threads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.s3_server import CannotStart, Server, running_server

# One worker of pytest-xdist or one developer: more threads than this only fight each other on small tensors.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is kept in the folders of whoever runs the tests."""
    os.environ["DETRCACHE_CACHE_FOLDER"] = str(tmp_path_factory.mktemp("cache"))


def _shared_data(name: str) -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DETRCACHE_TEST_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set DETRCACHE_TEST_DATA to the folder that holds {name}")
    return folder


@pytest.fixture(scope="session")
def coco_nano() -> Path:
    """24 + 24 real COCO 2017 images with their annotations, in COCO's layout."""
    return _shared_data("coco_nano")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """364 real images of blood cells, splits train and val, three classes."""
    return _shared_data("bccd")


@pytest.fixture(scope="session")
def deimv2_atto() -> Path:
    """A trained COCO detector of the DETR family: config.json, model.safetensors and the ONNX file."""
    return _shared_data("deimv2_atto")


@pytest.fixture(scope="session")
def two_images(coco_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real images of val2017 in COCO's layout, as training and as validation split."""
    data = tmp_path_factory.mktemp("two_images")
    content = json.loads((coco_nano / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:2]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
    (data / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (data / split).mkdir()
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            shutil.copy(coco_nano / "val2017" / image["file_name"], data / split)
    return data


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real S3 server."""
    try:
        with running_server() as server:
            yield server
    except CannotStart as reason:
        pytest.skip(str(reason))
