"""Pixels: from a file to uint8, to normalised floats, to a padded batch, and a fingerprint of the whole way."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from torch import Tensor

from common.coco import Annotations
from common.errors import UserError
from common.pixel_rule import SIDEWAYS, UPRIGHT, PixelRule, Size, grey_of_8_bits, orientation_of, upright
from common.records import Augmentation, Batch, ImageEntry, Targets
from common.replay import apply_image
from kernels import to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDING_MULTIPLE = 64  # the coarsest stride: no level of the pyramid gets a partly padded last cell


LARGEST_PIXELS = 89_478_485  # of a file: a quarter of a GB as RGB, the size from which on Pillow warns

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused here, without its warning
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # alpha is left out, as it should be
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the picture is none the worse for it


class BrokenImage(UserError):
    """A file that cannot be decoded: what --skip-broken goes on without."""


def load_entry(annotations: Annotations, entry: ImageEntry) -> Tensor:
    """`load_image` for an image of the annotations, by their rule."""
    return load_image(annotations.image_path(entry), (entry.width, entry.height), annotations.rule)


def load_image(path: Path, expected_size: Size | None = None, rule: PixelRule | None = None) -> Tensor:
    """Decode an image file (JPEG, PNG, ...) to uint8 RGB (3, H, W).

    Grey, palettes and CMYK are converted, 16 bits of grey scaled to 8, alpha is left out, of several frames the first
    is taken. rule: which way up it is (default: auto). Raises BrokenImage, naming the file, where it cannot be decoded,
    and UserError where it cannot be read or is not of the expected (width, height).
    """
    return decode_image(read_image(path), str(path), expected_size, rule)


def read_image(path: Path) -> bytes:
    """The bytes of an image file. UserError where it is missing, is no file, or cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.readall()
    except FileNotFoundError:
        raise UserError(f"expected an image at {path}: No such file or directory") from None
    except OSError as error:
        raise UserError(f"expected an image at {path}, which cannot be read: {error.strerror}") from None
    raise UserError(f"expected an image at {path}, found something that is no file")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would have us wait for who writes to it


def normalise(image: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32, ImageNet's mean and standard deviation taken out."""
    shape = (3, 1, 1)
    mean, std = (torch.tensor(values).mul_(255).view(shape) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return image.float().sub_(to_device(mean, image.device)).div_(to_device(std, image.device))


def collate(samples: Sequence[tuple[Tensor, Targets]]) -> Batch:
    """Images (3, h, w) of one dtype and their targets as one batch, padded with 0 right and bottom to a multiple of
    PADDING_MULTIPLE."""
    height, width = (
        -(-max(image.shape[axis] for image, _ in samples) // PADDING_MULTIPLE) * PADDING_MULTIPLE for axis in (1, 2)
    )
    images = torch.zeros(len(samples), 3, height, width, dtype=samples[0][0].dtype)
    padding_mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for row, (image, _) in enumerate(samples):
        images[row, :, : image.shape[1], : image.shape[2]] = image
        padding_mask[row, : image.shape[1], : image.shape[2]] = False
    return Batch(images, padding_mask, [targets for _, targets in samples])


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """A batch of uint8 images on a device, normalised there: a quarter of the bytes to copy.

    The ground truth stays on the host, where matchings are solved.
    """
    padding_mask = to_device(batch.padding_mask, device)
    images = normalise(to_device(batch.images, device)).masked_fill_(padding_mask[:, None], 0.0)
    return replace(batch, images=images, padding_mask=padding_mask)


def pixel_fingerprint() -> str:
    """sha256 of a small built-in JPEG through decoder, crop, resize, mirror and normalisation, in hexadecimal.

    Two installations with the same fingerprint replay the same pixels. Where it differs, their decoders or resamplers
    do, and a student would be given pixels that the teacher did not see.
    """
    image = decode_image(base64.b64decode(_FINGERPRINT_JPEG), "the built-in image", (56, 40))
    digest = hashlib.sha256()
    for augmentation in _FINGERPRINT_VIEWS:
        pixels = apply_image(image, augmentation)
        digest.update(pixels.numpy().tobytes())
        digest.update(normalise(pixels).numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def decode_image(data: bytes, name: str, expected_size: Size | None, rule: PixelRule | None = None) -> Tensor:
    """`load_image` for the bytes of a file; name: of the file, for the error."""
    # Pillow, as the official code: torchvision's decoders are on their way out (deprecated in 0.29).
    rule = rule or PixelRule()
    try:
        with Image.open(io.BytesIO(data)) as file:
            pixels = np.array(_rgb(file, name, expected_size, rule))
    except UserError:
        raise
    except UnidentifiedImageError:
        found = f"something else, which begins with {data[:12]!r}" if data else "an empty file"
        raise BrokenImage(f"expected a JPEG or PNG image at {name}, found {found}") from None
    except Image.DecompressionBombError:
        raise BrokenImage(_too_large(name, f"over {2 * LARGEST_PIXELS}")) from None
    except MemoryError:
        raise UserError(f"there is not enough memory to decode {name}: use fewer --workers") from None
    except Exception as error:  # decoders raise all kinds of things
        if isinstance(error, OSError) and error.errno is not None:  # what the system says is not the file's fault
            raise UserError(f"{name} could not be decoded: {error.strerror}") from None
        raise BrokenImage(f"expected a whole JPEG or PNG image at {name}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(file: Image.Image, name: str, expected_size: Size | None, rule: PixelRule) -> Image.Image:
    """The opened file decoded, in RGB and by the rule; its size is looked at before."""
    if rule.exif is None:
        rule.orientation(name, file.size, UPRIGHT, expected_size)
        return file.convert("RGB")
    found = orientation_of(file)
    stored = file.size[::-1] if file.format == "TIFF" and found in SIDEWAYS else file.size  # Pillow gives the shown one
    orientation = rule.orientation(name, stored, found, expected_size)
    if file.width * file.height > LARGEST_PIXELS:
        raise BrokenImage(_too_large(name, f"{file.width} x {file.height}"))
    return upright(_eight_bits(file, name).convert("RGB"), orientation)


def _eight_bits(file: Image.Image, name: str) -> Image.Image:
    """An image of 16 bits of grey in 8; any other as it is. BrokenImage where values have no fixed range."""
    if not file.mode.startswith(("I", "F")):
        return file
    if file.mode in ("I", "F") and file.format not in ("PNG", "PPM"):  # whose I is of 16 bits
        raise BrokenImage(
            f"expected 8 or 16 bits a value in {name}, found Pillow's mode {file.mode}, whose values have no fixed"
            " range: convert it to 8 bits"
        )
    bits = file.tag_v2[BITSPERSAMPLE][0] if isinstance(file, TiffImageFile) else 16  # also 12
    return Image.fromarray(grey_of_8_bits(np.asarray(file.copy()), 2**bits - 1))


def _too_large(name: str, found: str) -> str:
    return f"expected at most {LARGEST_PIXELS} pixels in {name}, found {found}: scale it down, and its boxes with it"


# A crop that shrinks, a crop that grows and is mirrored, and the whole image to an uneven size.
_FINGERPRINT_VIEWS = (
    Augmentation(False, crop_top=3, crop_left=5, crop_height=33, crop_width=47, height=19, width=27),
    Augmentation(True, crop_top=11, crop_left=2, crop_height=21, crop_width=30, height=64, width=91),
    Augmentation(True, crop_top=0, crop_left=0, crop_height=40, crop_width=56, height=37, width=51),
)

# Ramps, a checkerboard that does not keep to the decoder's 8 x 8 blocks, and a bowl, saved by Pillow with quality 75.
# With y, x = np.mgrid[0:40, 0:56], the channels are, clipped to 0..255, 4 * x + y,
# 215 - 3 * x - y + 40 * ((x // 5 + y // 5) % 2), and (x - 28) ** 2 // 8 + (y - 20) ** 2 // 4.
_FINGERPRINT_JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PTgy"
    "PC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/wAARCAAoADgD"
    "ASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKB"
    "kaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZ"
    "mqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQF"
    "BgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5"
    "OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX"
    "2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDXObRjJIQQfl+WqshMkn2kEbAd2D14/wD1U4u8jEXOQnUbht5qrI7iTYmfIzjgZGO/"
    "P515WJxkrvXU/PcBRd/MdNJ9sx5fGzru9/8A9VRPOJI/swzvHy5PTj/9VMmby8fZec/e2/N9KicqI96Y8/rgHJz34/OvMeMZ9jgaKsvwJFnFoPLk"
    "ySTn5aYmbRvMkIIIx8tRKUkGbkgPnjcdvFMSR5Gxc5CdtwxzXXQxjv8AmfW4Oj/wf+AWDmST7SCNg+bB68f/AKqKrl3EmxM+RnGQMjHfn86K9+lj"
    "HyK59HTorlV0bEkn2z93jZj5s9f89arPJ5f+i4zn5d319vxqzOVkGLbAfqdo28VWYqI9j48/pyMnPbn8q+ZxNN9j8NwEFpp8iBj9i/29/wCGMf8A"
    "66hZPL/0rOc/Nt+vv+NSj93n7Vzn7u75vrUBVxJvfPkZzgnIx24/KvOdOV/61PssFD+u40p9s/eZ2Y+XHX/PWm+b9s/d42Y+bPX/AD1pZFeRs22Q"
    "nQ7Tt5pJCsgxbYD5ydoxxXVQpu6/qx9bg4bf1YPM8v8A0XGc/Lu+vt+NFAKiPY+PP6ZIyc9ufyor6ChTly6aH0lGHu6O36m/PELQeZHkknb81Vmi"
    "Ekf2k53gbsDpx/8AqoorXE0YWufgOAfup9SuF+2Z8zjZ02+9QljJJ9mIGwHbkdeP/wBVFFee6EOZq2x9pgkrtdiORjaN5cYBB+b5qSSIWg8yPJJO"
    "35qKK6qFCF15n1mC+z5gIhJH9pOd4G7A6cf/AKqKKK+hw+HpuOqPpaCTTv0P/9k="
)
