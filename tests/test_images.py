"""Decoding, normalising, padding and the pixel fingerprint."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from common import images, replay
from common.errors import UserError
from common.images import IMAGENET_MEAN, IMAGENET_STD, batch_to, collate, load_image, normalise, pixel_fingerprint
from common.records import Targets


def targets(count: int) -> Targets:
    return Targets(torch.rand(count, 4), torch.arange(count))


def test_real_jpegs_decode_as_in_torchvision(coco_nano: Path) -> None:
    """Another decoder on six real images; exactly equal."""
    for path in sorted((coco_nano / "train2017").glob("*.jpg"))[:6]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # since torchvision 0.29
            expected = torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
        assert torch.equal(load_image(path), expected)


KINDS = [("jpg", mode) for mode in ("L", "CMYK", "RGB")] + [("png", mode) for mode in ("L", "RGB", "RGBA", "P", "1")]


@pytest.mark.parametrize(("suffix", "mode"), KINDS)
def test_every_kind_of_pixels_becomes_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    """A red and a white half saved in each mode that the format has: within 40 of 255, for the loss of JPEG, CMYK."""
    picture = Image.new("RGB", (32, 16), (255, 255, 255))
    picture.paste((255, 0, 0), (0, 0, 16, 16))
    picture.convert(mode).save(tmp_path / f"a.{suffix}")
    image = load_image(tmp_path / f"a.{suffix}")
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 32))
    white, left = image[:, 4:12, 20:28].float().mean((1, 2)), image[:, 4:12, 4:12].float().mean((1, 2))
    assert (255 - white).max() < 40
    expected = torch.full((3,), 76.0) if mode in {"L", "1"} else torch.tensor([255.0, 0.0, 0.0])
    assert (left - expected).abs().max() < 40


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "whole JPEG"),
        (lambda data: data[:-40], "whole JPEG"),
        (lambda data: data[:30], "JPEG"),
        (lambda data: b"", "JPEG"),
        (lambda data: b"<html>not found</html>", "found something else"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    (tmp_path / "broken.jpg").write_bytes(damage(buffer.getvalue()))
    with pytest.raises(UserError, match=message) as caught:
        load_image(tmp_path / "broken.jpg")
    assert "broken.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_other_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: No such file"):
        load_image(tmp_path / "gone.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png to have 20 x 30 pixels.*found 30 x 20"):
        load_image(tmp_path / "a.png", expected_size=(20, 30))


def test_normalisation_equals_torchvisions() -> None:
    """All 256 values of each channel, against v2.functional in float64, 1e-6."""
    image = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = functional.normalize(image.double() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert normalise(image).dtype == torch.float32
    torch.testing.assert_close(normalise(image).double(), expected, rtol=0, atol=1e-6)
    assert image[0, 0, 3] == 3  # the argument is left as it is


def test_batches_are_padded_to_a_multiple_of_64() -> None:
    """Two unequal images: pixels in the top left corner, zeros and True elsewhere; one image that needs no padding."""
    samples: list[tuple[Tensor, Targets]] = [(torch.rand(3, 100, 64), targets(2)), (torch.rand(3, 50, 129), targets(0))]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 128, 192)
    assert batch.padding_mask.shape == (2, 128, 192)
    for row, (image, sample_targets) in enumerate(samples):
        _, height, width = image.shape
        assert torch.equal(batch.images[row, :, :height, :width], image)
        assert not batch.padding_mask[row, :height, :width].any()
        assert (~batch.padding_mask[row]).sum() == height * width
        assert (batch.images[row] * batch.padding_mask[row]).abs().max() == 0
        assert batch.targets[row] is sample_targets
    assert not collate([(torch.rand(3, 64, 128), targets(1))]).padding_mask.any()


def test_a_batch_of_bytes_is_normalised_on_its_device() -> None:
    """Bytes padded and then normalised, against floats normalised and then padded with zeros: equal bit for bit."""
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((100, 64), (50, 129))]
    bytes_ = collate([(image, targets(1)) for image in images])
    assert bytes_.images.dtype == torch.uint8
    batch = batch_to(bytes_, torch.device("cpu"))
    expected = collate([(normalise(image), targets(1)) for image in images])
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.padding_mask, expected.padding_mask)


def test_the_fingerprint_is_of_the_picture_its_comment_describes() -> None:
    """The built-in JPEG decoded, against the formula of its channels: mean difference under 10 of 255."""
    y, x = np.mgrid[0:40, 0:56]
    green = 215 - 3 * x - y + 40 * ((x // 5 + y // 5) % 2)
    formula = np.stack((4 * x + y, green, (x - 28) ** 2 // 8 + (y - 20) ** 2 // 4)).clip(0, 255)
    decoded = images.decode_image(base64.b64decode(images._FINGERPRINT_JPEG), "built-in", None).numpy()
    assert np.abs(decoded.astype(float) - formula).mean() < 10


def test_the_fingerprint_notices_another_resampler_or_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeatable; different with another filter, or once a single value of the decoded image differs by 3."""
    fingerprint = pixel_fingerprint()
    assert pixel_fingerprint() == fingerprint
    assert len(fingerprint) == 64
    decode = images.decode_image
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_RESAMPLING", Image.Resampling.HAMMING)
        assert pixel_fingerprint() != fingerprint

    def decode_otherwise(*arguments: Any) -> Tensor:
        image = decode(*arguments).clone()
        image[0, 20, 20] += 3
        return image

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode_image", decode_otherwise)
        assert pixel_fingerprint() != fingerprint
    assert pixel_fingerprint() == fingerprint


def test_the_fingerprint_does_not_depend_on_the_processor() -> None:
    """A fresh process with torch held to its plainest kernels, as on a processor without AVX2; exactly equal."""
    program = "from common.images import pixel_fingerprint; print(pixel_fingerprint())"
    process = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
    )
    assert process.stdout.strip() == pixel_fingerprint()
