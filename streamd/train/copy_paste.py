"""Paste objects of one training image over another (arXiv:2012.07177), with all that is known of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streamd.train.scene import Scene, extent, intersection, join

_MIN_PIXELS = 10  # of an object that is pasted, or pasted over
_MIN_LEFT = 0.2  # of an object's pixels; what shows less is neither an object nor background
_PART = 0.5  # of the objects of the other picture


def choose(scene: Scene, seed: int, within: tuple[int, int, int, int]) -> np.ndarray:
    """Draw the objects to paste, bool [N]: some of those that lie `within` x1 y1 x2 y2 and can be seen."""
    if scene.masks is None or not len(scene.boxes):
        return np.zeros(len(scene.boxes), bool)
    drawn = np.random.default_rng(seed).random(len(scene.boxes)) < _PART
    is_inside = (scene.boxes[:, :2] >= within[:2]).all(1) & (scene.boxes[:, 2:] <= within[2:]).all(1)
    chosen: np.ndarray = drawn & is_inside & ~scene.is_crowd & (scene.masks.sum((1, 2)) >= _MIN_PIXELS)
    return chosen


def paste(scene: Scene, pasted: Scene, covered: np.ndarray) -> Scene:
    """Put objects over a scene whose masks are known, and cut from it what they cover."""
    assert scene.masks is not None
    boxes, is_crowd, remaining = scene.boxes.copy(), scene.is_crowd.copy(), scene.masks & ~covered
    for number in np.flatnonzero(~is_crowd & (scene.masks & covered).any((1, 2))):
        num_before, num_left = int(scene.masks[number].sum()), int(remaining[number].sum())
        is_crowd[number] = num_left < max(_MIN_PIXELS, _MIN_LEFT * num_before)
        tight = extent(remaining[number])
        if tight is not None:
            boxes[number] = intersection(boxes[number], tight)
    base = replace(scene, boxes=boxes, is_crowd=is_crowd, masks=remaining)
    if base.keypoints is not None:
        base = replace(base, keypoints=hidden_under(base.keypoints, covered))
    semantic = scene.semantic
    if semantic is not None and pasted.semantic is not None:
        semantic = np.where(covered, pasted.semantic, semantic)
    together = join([replace(base, semantic=None), replace(pasted, semantic=None)])
    return replace(together, semantic=semantic)


def hidden_under(points: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Mark points that were seen, and are covered now, as hidden."""
    height, width = covered.shape
    columns = np.clip(points[..., 0].astype(np.int64), 0, width - 1)
    rows = np.clip(points[..., 1].astype(np.int64), 0, height - 1)
    hidden = points.copy()
    hidden[..., 2] = np.where(covered[rows, columns], np.minimum(points[..., 2], 1), points[..., 2])
    return hidden
