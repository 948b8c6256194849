"""Check what the readers found, and keep what is sound: the same rules for every format."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from streamd.datasets import masks, pictures
from streamd.datasets.findings import Draft, DraftObject, DraftPicture, Findings
from streamd.datasets.records import Objects, Record, Rle
from streamd.errors import DataError

# Tools round, and disagree about where the first pixel begins: less than this is cut off without a word.
_CLIP_SILENTLY_PX = 1.0


def accept(draft: Draft, findings: Findings, *, deep: bool = False) -> tuple[Record, ...]:
    """Return the sound records, list the rest in `findings`; `deep` decodes every picture."""
    records = []
    ids: set[int] = set()
    files: set[Path] = set()
    for picture in draft.pictures:
        if picture.image_id in ids:
            findings.add("duplicate id", picture.place, f"an earlier picture has the id {picture.image_id} too")
            continue
        ids.add(picture.image_id)
        if picture.file in files:
            findings.add("duplicate picture", picture.place, f"{picture.file.name} is listed a second time")
            continue
        files.add(picture.file)
        size = _size(picture, findings, deep)
        if size is not None:
            objects = _objects(picture, size, draft.keypoint_names, findings)
            records.append(
                Record(picture.file, picture.image_id, *size, objects, picture.segments_file, picture.segments)
            )
    return tuple(records)


def _size(picture: DraftPicture, findings: Findings, deep: bool) -> tuple[int, int] | None:
    """Return width and height of a picture that can be read and is what the annotations say; else None."""
    if not os.path.isfile(picture.file):  # unlike Path.is_file, of names too long for a file too
        findings.add("missing file", picture.place, f"there is no picture {picture.file}")
        return None
    try:
        size = pictures.inspect(picture.file, picture.size, deep=deep)
    except DataError as err:
        findings.add("unreadable picture", picture.place, f"{picture.file.name}: {err}")
        return None
    if picture.size is not None and size != picture.size:
        said = f"{picture.size[0]} x {picture.size[1]}"
        findings.add(
            "size differs", picture.place, f"{picture.file.name} has {size[0]} x {size[1]} pixels, annotated are {said}"
        )
        return None
    return size


def _objects(
    picture: DraftPicture, size: tuple[int, int], keypoint_names: Sequence[str], findings: Findings
) -> Objects:
    """Keep the sound objects of one picture."""
    kept: list[tuple[DraftObject, tuple[float, float, float, float], Rle | None]] = []
    seen: set[tuple[int, tuple[float, float, float, float]]] = set()
    has_masks = picture.has_masks is not False and any(
        one.mask is not None or one.segmentation is not None for one in picture.objects
    )
    for one in picture.objects:
        mask = _mask(one, size, findings) if has_masks or one.box is None else None
        box = _box(one, mask, size, findings)
        if box is None:
            continue
        if (one.label, box) in seen:
            findings.add("duplicate box", one.place, "an earlier object has the same label and box")
            continue
        seen.add((one.label, box))
        kept.append((one, box, mask))
    points = [_keypoints(one, len(keypoint_names), findings) for one, _, _ in kept]
    num = len(kept)
    return Objects(
        boxes=np.array([box for _, box, _ in kept], np.float32).reshape(num, 4),
        labels=np.array([one.label for one, _, _ in kept], np.int64),
        is_crowd=np.array([one.is_crowd for one, _, _ in kept], bool),
        masks=_all_masks(picture, [mask for _, _, mask in kept], findings) if has_masks or picture.has_masks else None,
        keypoints=np.array(points, np.float32).reshape(num, len(keypoint_names), 3) if keypoint_names else None,
        areas=np.array([one.area for one, _, _ in kept], np.float64),
    )


def _all_masks(picture: DraftPicture, found: Sequence[Rle | None], findings: Findings) -> tuple[Rle, ...] | None:
    """Return the masks of a picture if all are there: an object without one would be taught as background."""
    complete = tuple(mask for mask in found if mask is not None)
    if len(complete) == len(found):
        return complete
    num_missing = len(found) - len(complete)
    text = f"{num_missing} of {len(found)} objects have no sound mask: the picture counts as one without masks"
    findings.add("missing mask", picture.place, text)
    return None


def _mask(one: DraftObject, size: tuple[int, int], findings: Findings) -> Rle | None:
    if one.mask is not None or one.segmentation is None:
        return one.mask
    try:
        return masks.encode(one.segmentation, *size)
    except DataError as err:
        findings.add("bad mask", one.place, str(err))
        return None


def _box(
    one: DraftObject, mask: Rle | None, size: tuple[int, int], findings: Findings
) -> tuple[float, float, float, float] | None:
    """Return the box within the picture, or None for one that cannot be used."""
    if one.box is None and mask is None:
        findings.add("bad box", one.place, "has neither a box nor a sound mask")
        return None
    box = masks.as_numbers(list(one.box if one.box is not None else masks.box_of(_some(mask))))
    if box is None or len(box) != 4:
        findings.add("bad box", one.place, f"the box is not four finite numbers: {_short(one.box)}")
        return None
    x1, y1, x2, y2 = (float(value) for value in box)
    if x2 <= x1 or y2 <= y1:
        findings.add("no area", one.place, f"the box is {_px(x2 - x1)} x {_px(y2 - y1)} pixels")
        return None
    width, height = size
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    where = f"the box {_px(x1)} {_px(y1)} {_px(x2)} {_px(y2)} (x1 y1 x2 y2)"
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        findings.add("box outside", one.place, f"{where} lies outside the {width} x {height} pixels")
        return None
    overshoot = max(abs(kept - given) for kept, given in zip(inside, (x1, y1, x2, y2), strict=True))
    if overshoot > _CLIP_SILENTLY_PX:
        findings.add("box clipped", one.place, f"{where} left the {width} x {height} pixels and was cut to them")
    return inside


def _some(mask: Rle | None) -> Rle:
    assert mask is not None
    return mask


def _keypoints(one: DraftObject, num_points: int, findings: Findings) -> np.ndarray:
    """Return float64 [J, 3]; zeros, which teach nothing, where there are none or they cannot be used."""
    nothing = np.zeros((num_points, 3))
    if one.keypoints is None or not num_points:
        return nothing
    values = masks.as_numbers(one.keypoints)
    if values is None or len(values) != 3 * num_points:
        count = len(one.keypoints) if isinstance(one.keypoints, list) else type(one.keypoints).__name__
        text = f"expected {num_points} times x, y, visibility as finite numbers, got {count}: the points are left out"
        findings.add("bad keypoints", one.place, text)
        return nothing
    points = values.reshape(num_points, 3)
    if not set(points[:, 2].tolist()) <= {0, 1, 2}:
        findings.add("bad keypoints", one.place, "a visibility is not 0, 1 or 2: the points are left out")
        return nothing
    return points * (points[:, 2:] > 0)


def _px(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)


def _short(values: Iterable[object] | None) -> str:
    text = str(None if values is None else list(values))
    return text if len(text) <= 80 else f"{text[:77]}..."
