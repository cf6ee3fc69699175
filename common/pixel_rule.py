"""Which pixels an image file stands for: which way up, and how 16 bits become 8.

Cameras store rows as their sensor has them and note in EXIF how they are to be turned. Viewers turn them, and so most
tools draw boxes on the turned picture; COCO's boxes are on the rows as stored. The size in the annotations tells the
two apart, except for squares, half turns and mirrored images.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from common.errors import UserError
from common.runtime import log

Exif = Literal["auto", "apply", "ignore"]
Size = tuple[int, int]  # width, height

_SAYING = threading.Lock()
UPRIGHT = 1
SIDEWAYS = (5, 6, 7, 8)  # shown with width and height exchanged
_TURNS = {  # EXIF orientation -> what shows the picture upright (CIPA DC-008, orientation)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PixelRule:
    """How the image files of a data set become pixels.

    exif: apply the orientation, ignore it, or do what the annotated size says. None: the rule of the stores that were
    written before there was one: the decoder's pixels as they are, 16 bits of grey cut off at 255. guessed, left: names
    of the images that were turned without their size saying so, and of those left as stored because it does.
    """

    exif: Exif | None = "auto"
    guessed: set[str] = field(default_factory=set, compare=False)
    left: set[str] = field(default_factory=set, compare=False)

    def orientation(self, name: str, stored: Size, found: int, expected: Size | None) -> int:
        """The EXIF orientation to apply (`UPRIGHT`: none) to the image file called `name`, which notes `found`.

        stored: its size. expected: that of the annotations, or None; UserError where it is neither the stored nor the
        shown one, or not the one that the rule asks for.
        """
        shown = stored[::-1] if found in SIDEWAYS else stored
        result = UPRIGHT if self.exif in (None, "ignore") else found
        if self.exif == "auto" and expected == stored != shown:
            result = UPRIGHT
            self._say(
                self.left,
                name,
                f"{name} is turned by its EXIF orientation, but annotated in the size of the stored pixels: it is left"
                " so, as by --exif ignore; if its boxes are on the turned picture, exchange width and height in the"
                " annotations",
            )
        elif self.exif == "auto" and found != UPRIGHT and stored == shown:
            self._say(
                self.guessed,
                name,
                f"{name} is turned or mirrored by its EXIF orientation, as viewers do; its size cannot tell whether its"
                " boxes are on that (--exif ignore leaves such images as stored)",
            )
        size = stored if result == UPRIGHT else shown
        if expected is not None and size != expected:
            raise UserError(_mismatch(name, stored, shown, expected))
        return result

    def report(self) -> list[str]:
        """How many images were turned on a guess or left as stored, where that is more than the one named already."""
        counts = (
            (self.guessed, "were turned or mirrored by their EXIF orientation though their size cannot tell"),
            (self.left, "were left as stored, whose EXIF orientation contradicts their annotated size"),
        )
        return [f"{len(names)} images {what}" for names, what in counts if len(names) > 1]

    def _say(self, names: set[str], name: str, line: str) -> None:
        with _SAYING:  # several threads decode
            if not names:
                log.warning(line)
            names.add(name)


def rule_of_store(store: object, written: Exif | None, wanted: Exif | None) -> PixelRule:
    """The rule of a store, which was `written` with one or with none. UserError where another one is `wanted`."""
    if written is None:
        log.info(
            f"{store} was written before stores noted how images are decoded: EXIF orientations are ignored and grey of"
            " 16 bits is cut off at 255, as then"
        )
    if wanted not in (None, written):
        how = "ignored EXIF" if written is None else f"--exif {written}"
        raise UserError(
            f"--exif {wanted} was given, but {store} was written with {how}: leave the option out, or dump again"
        )
    return PixelRule(written)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned and mirrored as its EXIF orientation says; any number but 2..8 leaves it."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def grey_of_8_bits(values: npt.NDArray[np.integer], largest: int) -> npt.NDArray[np.uint8]:
    """Grey values 0..largest (4095 or 65535) as 0..255, rounded to the nearest."""
    table = np.rint(np.arange(largest + 1) * (255 / largest)).astype(np.uint8)
    grey: npt.NDArray[np.uint8] = table[values]
    return grey


def orientation_of(file: Image.Image) -> int:
    """The EXIF orientation that a file notes, 1..8, and 1 where it notes none. The opened image forgets it.

    Pillow turns TIFF files while it loads them, but not such that forgot.
    """
    try:
        found = file.getexif().pop(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # EXIF that cannot be read, of an image that can
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def _mismatch(name: str, stored: Size, shown: Size, expected: Size) -> str:
    found = _text(stored)
    advice = "is it the file that was annotated?"
    if shown != stored:
        found += f", or {_text(shown)} as its EXIF orientation shows it"
        if expected in (stored, shown):
            advice = f"--exif auto or {'ignore' if expected == stored else 'apply'} fits"
    return f"expected {name} to have {_text(expected)} pixels, as in the annotations, found {found}: {advice}"


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
