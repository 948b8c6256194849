"""Bring the annotations of pictures to where their pixels lie in a training image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamd.datasets import masks, pictures
from streamd.datasets.records import DataSet, Record
from streamd.models.spec import ModelSpec
from streamd.train.augment import Layer

UNLABELLED = 255  # of the semantic target

_MIN_VISIBLE = 0.2  # of an object's area; less of it is neither an object nor background
_MIN_SIDE_PX = 2.0  # the same for what became smaller than this
_MAX_MASKS = 100  # of an image; the smallest objects beyond count as crowds, so that memory stays bounded


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What an image shows, crowds too; N objects, in its pixels."""

    boxes: np.ndarray  # [N,4] float32
    labels: np.ndarray  # [N] int64
    is_crowd: np.ndarray  # [N] bool
    masks: np.ndarray | None  # [N,H,W] bool
    keypoints: np.ndarray | None  # [N,J,3] float32
    semantic: np.ndarray | None  # [H,W] uint8


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which targets a network learns from."""

    masks: bool
    keypoints: bool
    semantic: bool

    @classmethod
    def by(cls, spec: ModelSpec) -> Wanted:
        return cls(spec.masks is not None, spec.keypoints is not None, bool(spec.semantic_labels))


def place(dataset: DataSet, layer: Layer, size: tuple[int, int], wanted: Wanted) -> Scene:
    """Bring one picture's annotations to where the layer puts its pixels."""
    record = dataset.records[layer.record]
    objects = record.objects
    boxes, visible = _place_boxes(objects.boxes, layer, record.width)
    is_empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    is_crowd = objects.is_crowd.copy()
    if not layer.is_whole:
        sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        is_crowd |= (visible < _MIN_VISIBLE) | (sides < _MIN_SIDE_PX)
    keypoints = None
    if wanted.keypoints and objects.keypoints is not None:
        keypoints = _place_keypoints(objects.keypoints, layer, record.width, dataset.keypoint_names)
    has_masks = wanted.masks and objects.masks is not None
    scene = Scene(
        boxes=boxes,
        labels=objects.labels,
        is_crowd=_without_the_smallest(boxes, is_crowd, is_empty) if has_masks else is_crowd,
        masks=np.zeros((len(boxes), *size), bool) if has_masks else None,
        keypoints=keypoints,
        semantic=_place_semantic(record, layer, size) if wanted.semantic and record.segments_file else None,
    )
    if scene.masks is not None:
        is_empty |= _fill_masks(scene, record, layer, is_empty, visible < 1)
    return pick(scene, ~is_empty)


def _without_the_smallest(boxes: np.ndarray, is_crowd: np.ndarray, is_empty: np.ndarray) -> np.ndarray:
    """Let what is smaller than the largest _MAX_MASKS be crowds."""
    area = np.where(is_crowd | is_empty, -1.0, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    if np.count_nonzero(area >= 0) <= _MAX_MASKS:
        return is_crowd
    is_small = np.ones(len(area), bool)
    is_small[np.argsort(-area, kind="stable")[:_MAX_MASKS]] = False
    return is_crowd | is_small


def _place_boxes(boxes: np.ndarray, layer: Layer, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes [N,4] float32 in the image, cut to the layer, and which part of each is left."""
    box = layer.letterbox
    if layer.mirrored:
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)
    placed = boxes * _float32((box.scale_x, box.scale_y) * 2) + _float32(_offset(layer) * 2)
    low, high = (box.left, box.top), (box.left + box.width, box.top + box.height)
    cut = np.clip(placed, _float32(low * 2), _float32(high * 2))
    areas = [np.prod(corners[:, 2:] - corners[:, :2], axis=1) for corners in (cut, placed)]
    # Of a whole picture the letterbox may cut a part of a pixel off; that is no cut.
    visible = np.ones(len(boxes)) if layer.is_whole else areas[0] / np.maximum(areas[1], 1e-9)
    return cut.astype(np.float32), np.where(visible > 1 - 1e-5, 1.0, visible)


def _float32(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32)


def _offset(layer: Layer) -> tuple[float, float]:
    box = layer.letterbox
    return box.left - layer.crop[0] * box.scale_x, box.top - layer.crop[1] * box.scale_y


def _place_keypoints(points: np.ndarray, layer: Layer, width: int, names: Sequence[str]) -> np.ndarray:
    """Return [N,J,3] float32 in the image; a point that was cut off teaches nothing."""
    box = layer.letterbox
    placed = points.astype(np.float32, copy=True)
    if layer.mirrored:
        placed[..., 0] = width - placed[..., 0]
        placed = placed[:, mirror_order(names)]
    placed[..., :2] = placed[..., :2] * _float32((box.scale_x, box.scale_y)) + _float32(_offset(layer))
    low, high = _float32((box.left, box.top)), _float32((box.left + box.width, box.top + box.height))
    inside = ((placed[..., :2] >= low) & (placed[..., :2] <= high)).all(-1) & (placed[..., 2] > 0)
    placed *= inside[..., None]
    return placed


def mirror_order(names: Sequence[str]) -> list[int]:
    """Return for each point which one stands in its place in the mirror: left_eye for right_eye."""
    index = {name: number for number, name in enumerate(names)}
    order = []
    for number, name in enumerate(names):
        other = name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        order.append(index.get(other, number))
    return order


def _fill_masks(scene: Scene, record: Record, layer: Layer, is_empty: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
    """Draw the masks of all that is no crowd, each within its box, and tighten the boxes of objects that were cut.

    Returns which of those show no pixel any more, bool [N].
    """
    assert scene.masks is not None and record.objects.masks is not None
    is_gone = np.zeros(len(scene.boxes), bool)
    for number in np.flatnonzero(~is_empty & ~scene.is_crowd):
        drawn = masks.decode(record.objects.masks[number])
        x1, y1, x2, y2 = _around(scene.boxes[number], layer)
        rows, columns = _samples(layer, record.width, (x1, y1, x2, y2))
        scene.masks[number, y1:y2, x1:x2] = drawn[rows][:, columns]
        if is_cut[number]:
            tight = extent(scene.masks[number])
            is_gone[number] = tight is None
            scene.boxes[number] = scene.boxes[number] if tight is None else intersection(scene.boxes[number], tight)
    return is_gone


def _around(box: np.ndarray, layer: Layer) -> tuple[int, int, int, int]:
    """Return the whole pixels of the layer that a box touches, and one more on each side."""
    placed = layer.letterbox
    x1, y1 = max(placed.left, int(box[0]) - 1), max(placed.top, int(box[1]) - 1)
    x2 = min(placed.left + placed.width, int(np.ceil(box[2])) + 1)
    return x1, y1, x2, min(placed.top + placed.height, int(np.ceil(box[3])) + 1)


def _samples(layer: Layer, width: int, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the stored picture that are nearest to the pixels of a window of the image."""
    box, (left, top, right, bottom) = layer.letterbox, layer.crop
    x = (np.arange(window[0], window[2]) - box.left + 0.5) * ((right - left) / box.width)
    y = (np.arange(window[1], window[3]) - box.top + 0.5) * ((bottom - top) / box.height)
    columns = np.minimum(x.astype(np.int64), right - left - 1) + left
    rows = np.minimum(y.astype(np.int64), bottom - top - 1) + top
    return rows, (width - 1 - columns if layer.mirrored else columns)


def extent(mask: np.ndarray) -> np.ndarray | None:
    """Return the box around a mask's pixels, or None."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return None
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), np.float32)


def intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    both = np.concatenate((np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])))
    return both if (both[2:] > both[:2]).all() else second


def _place_semantic(record: Record, layer: Layer, size: tuple[int, int]) -> np.ndarray:
    """Return the channel of each pixel, uint8 [H,W]: 0 for things."""
    assert record.segments_file is not None
    ids = pictures.read_segment_ids(record.segments_file)
    box = layer.letterbox
    window = (box.left, box.top, box.left + box.width, box.top + box.height)
    rows, columns = _samples(layer, record.width, window)
    known = sorted(record.segments, key=lambda segment: segment.id)
    found = ids[rows][:, columns]
    channels = np.full(size, UNLABELLED, np.uint8)
    if known:
        numbers = np.array([segment.id for segment in known])
        labels = np.array([0 if segment.is_thing else segment.label for segment in known], np.uint8)
        place = np.minimum(np.searchsorted(numbers, found), len(known) - 1)
        values = np.where(numbers[place] == found, labels[place], UNLABELLED)
        channels[window[1] : window[3], window[0] : window[2]] = values
    return channels


def pick(scene: Scene, rows: np.ndarray) -> Scene:
    """Keep some of the objects."""
    if rows.all():
        return scene
    chosen = {
        name: value[rows]
        for name in ("boxes", "labels", "is_crowd", "masks", "keypoints")
        if (value := getattr(scene, name)) is not None
    }
    return replace(scene, **chosen)


def join(scenes: Sequence[Scene]) -> Scene:
    """Join what does not overlap. Without the masks of one, none are of use, unless it has no objects."""

    def stacked(values: Sequence[np.ndarray | None]) -> np.ndarray | None:
        there = [value for value, one in zip(values, scenes, strict=True) if len(one.boxes)]
        complete = [value for value in there or values if value is not None]
        return np.concatenate(complete) if complete and len(complete) == len(there or values) else None

    maps = [scene.semantic for scene in scenes if scene.semantic is not None]
    boxes, is_crowd = (np.concatenate([getattr(one, name) for one in scenes]) for name in ("boxes", "is_crowd"))
    masks_of_all = stacked([scene.masks for scene in scenes])
    if masks_of_all is not None:
        is_crowd = _without_the_smallest(boxes, is_crowd, np.zeros(len(boxes), bool))
    return Scene(
        boxes=boxes,
        labels=np.concatenate([scene.labels for scene in scenes]),
        is_crowd=is_crowd,
        masks=masks_of_all,
        keypoints=stacked([scene.keypoints for scene in scenes]),
        semantic=np.minimum.reduce(maps) if maps else None,  # elsewhere they are 255
    )
