"""How far two models say the same of the same frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from streamd.messages import Detections
from streamd.models.spec import ModelSpec

MIN_IOU = 0.5


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts over frames: what each of the two models found, and how many of these in pairs."""

    num_pairs: int = 0
    num_first: int = 0
    num_second: int = 0
    num_frames: int = 0

    @property
    def value(self) -> float:
        """Return 2 * pairs / (all that both found), in 0..1; 1 where neither found anything."""
        total = self.num_first + self.num_second
        return 2 * self.num_pairs / total if total else 1.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_pairs + other.num_pairs,
            self.num_first + other.num_first,
            self.num_second + other.num_second,
            self.num_frames + other.num_frames,
        )


def compare(first: Detections, first_spec: ModelSpec, second: Detections, second_spec: ModelSpec) -> Agreement:
    """Pair what two models found in one frame.

    Objects of one label by the IoU of their boxes, regions of stuff by that of their masks, each at least 0.5, the best
    first; nothing is in two pairs. Labels are the same by their names.
    """
    count = Agreement(num_frames=1)
    objects = [_by_label(found.labels, spec.labels) for found, spec in ((first, first_spec), (second, second_spec))]
    for label in {*objects[0], *objects[1]}:
        rows = [of_model.get(label, np.zeros(0, np.int64)) for of_model in objects]
        count += _pair(_box_ious(first.boxes[rows[0]], second.boxes[rows[1]]))
    stuff = [dict(_stuff(found, spec)) for found, spec in ((first, first_spec), (second, second_spec))]
    for label in {*stuff[0], *stuff[1]}:
        masks = [[of_model[label]] if label in of_model else [] for of_model in stuff]
        count += _pair(_mask_ious(*masks))
    return count


def _pair(ious: np.ndarray) -> Agreement:
    """Count the pairs of a matrix [F, S] of overlaps."""
    num_pairs, left = 0, ious.copy()
    while left.size and left.max() >= MIN_IOU:
        row, column = np.unravel_index(left.argmax(), left.shape)
        left[row, :] = left[:, column] = -1
        num_pairs += 1
    return Agreement(num_pairs, *ious.shape)


def _by_label(labels: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    return {names[label]: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}


def _stuff(found: Detections, spec: ModelSpec) -> Iterator[tuple[str, dict[str, object]]]:
    """Name the regions that are no objects; a model gives one for each label."""
    for segment in found.segments or ():
        if not segment.is_thing:
            mask = segment.mask
            yield spec.semantic_labels[segment.label], {"size": [mask.height, mask.width], "counts": mask.counts}


def _box_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU [F, S] of boxes x1 y1 x2 y2."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared))


def _mask_ious(first: list[dict[str, object]], second: list[dict[str, object]]) -> np.ndarray:
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(first, second, [0] * len(second)))
