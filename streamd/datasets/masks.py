"""Turn the masks of annotation files into run lengths, and refuse what would lead pycocotools astray.

Its C code trusts what it gets: polygons of a billion pixels and run lengths beyond the picture are stopped here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from pycocotools import mask as coco_mask

from streamd import wire
from streamd.datasets.records import Rle
from streamd.errors import DataError, WireError


def encode(segmentation: object, width: int, height: int) -> Rle:
    """Return a mask from polygons, or run lengths of either kind, as COCO writes them.

    Raises DataError with what is wrong, without the place.
    """
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, width, height)
    if isinstance(segmentation, Mapping):
        return _from_runs(segmentation, width, height)
    raise DataError(f"the mask is neither polygons nor run lengths but {type(segmentation).__name__}")


def encode_pixels(mask: np.ndarray) -> Rle:
    """Return bool [H, W] as run lengths."""
    encoded: Rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return encoded


def decode(rle: Rle) -> np.ndarray:
    """Return uint8 [H, W] of 0 and 1, of run lengths that were checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 gives one under numpy 2
        pixels: np.ndarray = coco_mask.decode(rle)
    return pixels


def box_of(rle: Rle) -> tuple[float, float, float, float]:
    """Return x1 y1 x2 y2 of the smallest box around a mask."""
    left, top, width, height = (float(value) for value in coco_mask.toBbox(rle))
    return left, top, left + width, top + height


def _from_polygons(polygons: list[object], width: int, height: int) -> Rle:
    if not polygons:
        raise DataError("the mask has no polygon")
    clipped = [_clipped(polygon, width, height) for polygon in polygons]
    merged: Rle = coco_mask.merge(coco_mask.frPyObjects(clipped, height, width))
    return merged


def _clipped(polygon: object, width: int, height: int) -> list[float]:
    """Return a polygon with its points moved into the picture, since time and memory grow with its length."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        length = f"{len(polygon)} numbers" if isinstance(polygon, list) else type(polygon).__name__
        raise DataError(f"a polygon needs at least three pairs of x and y, got {length}")
    points = as_numbers(polygon)
    if points is None:
        raise DataError("a polygon has a coordinate that is no finite number")
    clipped: list[float] = np.clip(points.reshape(-1, 2), 0, (width, height)).reshape(-1).tolist()
    return clipped


def _from_runs(mask: Mapping[object, object], width: int, height: int) -> Rle:
    if mask.get("size") != [height, width]:
        raise DataError(
            f"the mask has the size {mask.get('size')!s:.40}, its picture [{height}, {width}] (height, width)"
        )
    counts = mask.get("counts")
    if isinstance(counts, str):
        try:
            return encode_pixels(wire.Mask(size=(height, width), counts=counts).decode())
        except WireError as err:
            raise DataError("the mask's run lengths are damaged: they do not add up to the picture") from err
    if not isinstance(counts, list) or not all(type(run) is int and 0 <= run <= width * height for run in counts):
        raise DataError("the mask's counts are neither a string nor a list of run lengths")
    if sum(counts) != width * height:
        raise DataError(f"the mask's run lengths add up to {sum(counts)} pixels, its picture has {width * height}")
    encoded: Rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return encoded


def as_numbers(values: object) -> np.ndarray | None:
    """Return finite numbers as float64, or None for anything else."""
    if not isinstance(values, (list, tuple)) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        numbers = np.array(values, dtype=np.float64)
    except OverflowError:
        return None
    return numbers if np.isfinite(numbers).all() else None
