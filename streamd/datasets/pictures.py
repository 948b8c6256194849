"""Read the pictures of a data set, and say what is wrong with one.

A picture is taken as it is stored. Only where the annotations speak of its size after the turn that EXIF asks for is it
turned: some tools annotate what a viewer shows, others what the file holds, and the size tells which.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from streamd.errors import DataError

_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset((5, 6, 7, 8))  # orientations that swap width and height
_EIGHT_BIT = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))
# What Pillow raises for files that are cut off, damaged, of a foreign kind, or enormous.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, Image.DecompressionBombError)


def inspect(file: Path, size: tuple[int, int] | None, *, deep: bool = False) -> tuple[int, int]:
    """Return width and height of a picture, as `read` will give it to whom knows `size`; `deep` decodes all of it.

    Raises DataError with what is wrong, without the file's name.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in _EIGHT_BIT:
                raise DataError(f"has the pixel format {image.mode}; convert it to 8 bits a channel")
            if deep:
                image.load()
            return _turned(image).size if size is not None and _must_turn(image, size) else image.size
    except _DAMAGE as err:
        raise DataError(_reason(err)) from err


def read(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Return a picture of (width, height) `size` as uint8 RGB [H, W, 3]. Raises DataError."""
    try:
        with Image.open(file) as image:
            upright = _turned(image) if _must_turn(image, size) else image
            pixels = np.array(upright.convert("RGB"))  # a copy, since torch wants to be able to write
    except _DAMAGE as err:
        advice = "`streamd data check --deep` finds all such pictures"
        raise DataError(f"{file}: cannot read the picture: {_reason(err)}; {advice}") from err
    if pixels.shape[:2] != size[::-1]:
        raise DataError(
            f"{file}: has {pixels.shape[1]} x {pixels.shape[0]} pixels where {size[0]} x {size[1]} were found when "
            "the data set was checked; it changed since then: start again"
        )
    return pixels


def read_segment_ids(file: Path) -> np.ndarray:
    """Return the segment of each pixel of a panoptic PNG, int32 [H, W]. Raises DataError."""
    try:
        with Image.open(file) as image:
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    except _DAMAGE as err:
        raise DataError(f"{file}: cannot read the segments: {_reason(err)}") from err
    ids: np.ndarray = red + 256 * green + 65536 * blue
    return ids


def _must_turn(image: Image.Image, size: tuple[int, int]) -> bool:
    is_other_size = image.size != size and image.size == size[::-1]
    return is_other_size and image.getexif().get(_EXIF_ORIENTATION) in _TURNED


def _turned(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image)


def _reason(err: Exception) -> str:
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    if isinstance(err, UnidentifiedImageError):
        return "no picture of a known format"
    return str(err).rstrip(".") or type(err).__name__
