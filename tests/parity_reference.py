"""Reference outputs of other projects' own code, and what counts as the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from streamd.messages import Detections, Rle, Segment
from streamd.wire import Mask

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE_PX = 0.1  # for 99 of 100 boxes
WORST_BOX_TOLERANCE_PX = 0.5
KEYPOINT_TOLERANCE_PX = 0.5
MIN_MASK_IOU = 0.99  # for 99 of 100 masks
MAX_MASK_PIXELS = 3  # that may differ where a mask is so small that each of them counts a hundredth
MIN_EQUAL_SEGMENTS = 0.995  # of a frame's pixels


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The pictures of one folder, and what its project saw in them."""

    resized: list[np.ndarray]  # [3, h, w] uint8
    sizes: list[tuple[int, int]]  # height, width of the sources
    detections: list[Detections]


def read_reference(folder: Path) -> Reference:
    """Read the io.npz of a folder whose pictures are 0 and 1."""
    with np.load(folder / "io.npz") as io:
        arrays = dict(io)
    return Reference(
        [arrays[f"resized{index}"] for index in (0, 1)],
        [(arrays[f"image{index}"].shape[0], arrays[f"image{index}"].shape[1]) for index in (0, 1)],
        [_detections(arrays, f"out{index}") for index in (0, 1)],
    )


def _detections(arrays: dict[str, Any], prefix: str) -> Detections:
    masks = segments = None
    if f"{prefix}_masks" in arrays:
        width = arrays[f"{prefix}_masks_shape"][2]
        masks = tuple(map(_rle, np.unpackbits(arrays[f"{prefix}_masks"], axis=-1)[..., :width]))
    if f"{prefix}_panoptic" in arrays:
        ids = arrays[f"{prefix}_panoptic"]
        segments = tuple(
            Segment(
                label=info["category_id"],
                is_thing=info["isthing"],
                area=int((ids == info["id"]).sum()),
                mask=_rle(ids == info["id"]),
                detection=info.get("instance_id"),
            )
            for info in json.loads(arrays[f"{prefix}_panoptic_info"].tobytes())
        )
    return Detections(
        arrays[f"{prefix}_boxes"],
        arrays[f"{prefix}_scores"],
        arrays[f"{prefix}_classes"],
        masks,
        arrays.get(f"{prefix}_keypoints"),
        segments=segments,
    )


def _rle(pixels: np.ndarray) -> Rle:
    counts = coco.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"]
    return Rle(height=pixels.shape[0], width=pixels.shape[1], counts=counts)


def assert_same(found: Detections, expected: Detections, max_lost: int = 0) -> None:
    """Compare what was found with what was to be found, by the tolerances above.

    Objects are matched by label, score and place, because objects of nearly equal scores may change places. At most
    `max_lost` objects may have no partner.
    """
    assert len(found) == len(expected)
    pairs = _match(found, expected)
    assert len(pairs) >= len(expected) - max_lost
    ours, theirs = np.array(pairs).T
    differences = np.abs(found.boxes[ours] - expected.boxes[theirs]).max(axis=1)
    assert (differences > BOX_TOLERANCE_PX).sum() <= len(pairs) // 100 and differences.max() <= WORST_BOX_TOLERANCE_PX
    if expected.masks is not None:
        assert found.masks is not None
        unlike = [pair for pair in pairs if not _is_same_mask(found.masks[pair[0]], expected.masks[pair[1]])]
        assert len(unlike) <= len(pairs) // 100, unlike
    if expected.keypoints is not None:
        assert found.keypoints is not None
        far = np.linalg.norm((found.keypoints[ours] - expected.keypoints[theirs])[..., :2], axis=-1)
        # The heat maps of a network that knows nothing are flat: one in a thousand has two peaks of one height.
        assert (far > KEYPOINT_TOLERANCE_PX).sum() <= far.size // 1000, np.sort(far.ravel())[-5:]
    if expected.segments is not None:
        assert found.segments is not None
        ours_map = _segment_map(found, dict(pairs))
        theirs_map = _segment_map(expected, {index: index for _, index in pairs})
        assert (ours_map == theirs_map).all(axis=-1).mean() >= MIN_EQUAL_SEGMENTS


def _match(found: Detections, expected: Detections) -> list[tuple[int, int]]:
    """Pair the indices of objects that may be the same, each used once."""
    pairs = []
    free = np.ones(len(found), dtype=bool)
    for index in range(len(expected)):
        like = free & (found.labels == expected.labels[index])
        like &= np.abs(found.scores - expected.scores[index]) <= SCORE_TOLERANCE
        distances = np.where(like, np.abs(found.boxes - expected.boxes[index]).max(axis=1), np.inf)
        nearest = int(distances.argmin())
        if distances[nearest] <= WORST_BOX_TOLERANCE_PX:
            free[nearest] = False
            pairs.append((nearest, index))
    return pairs


def _is_same_mask(found: Rle, expected: Rle) -> bool:
    ours, theirs = pixels_of(found), pixels_of(expected)
    common, either = int((ours & theirs).sum()), int((ours | theirs).sum())
    return common >= MIN_MASK_IOU * either or either - common <= MAX_MASK_PIXELS


def _segment_map(detections: Detections, names: Mapping[int, int]) -> np.ndarray:
    """Return [H, W, 2]: the label of each pixel's segment, and the name of its object, -1 for stuff."""
    assert detections.segments
    mask = detections.segments[0].mask
    segments = np.full((mask.height, mask.width, 2), -1)
    for segment in detections.segments:
        name = -1 if segment.detection is None else names.get(segment.detection, -2)
        segments[pixels_of(segment.mask)] = segment.label, name
    return segments


def pixels_of(mask: Rle) -> np.ndarray:
    """Return a mask as bool [H, W]."""
    return Mask(size=(mask.height, mask.width), counts=mask.counts.decode()).decode()
