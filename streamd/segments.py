"""What a frame is made of: the segments of a semantic or panoptic model, on the host."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from streamd.gpu.mask_reference import paste_boxes
from streamd.gpu.panoptic import classify_pixels, merge
from streamd.gpu.segment_runs import encode_segments
from streamd.messages import Frame, Letterbox, Rle, Segment

if TYPE_CHECKING:
    from streamd.models.spec import ModelSpec


class Things(NamedTuple):
    """The N objects of one frame by falling score, on the model's device but for what is said."""

    masks: Tensor  # [N, S, S] probabilities over the boxes
    boxes: Tensor  # [N, 4] in source pixels
    scores: np.ndarray  # [N], on the host
    labels: np.ndarray  # [N], on the host


class _Owner(NamedTuple):
    """What the number of a segment stands for."""

    label: int
    detection: int | None


def semantic_segments(
    logits: Tensor, frame: Frame, letterbox: Letterbox, spec: ModelSpec, labels: Collection[int] | None = None
) -> tuple[Segment, ...]:
    """Give each pixel to the best of the labels: `logits` [S, h, w]; with `labels`, regions of others are left out."""
    classes = classify_pixels(logits, letterbox, frame.width, frame.height, spec.input_size)
    owners = {index + 1: _Owner(index, None) for index in range(len(logits)) if labels is None or index in labels}
    return _encode(classes + 1, owners, frame)


def panoptic_segments(
    logits: Tensor, things: Things, frame: Frame, letterbox: Letterbox, spec: ModelSpec
) -> tuple[Segment, ...]:
    """Share the pixels out among objects and stuff, whose `logits` are [S, h, w]; see `gpu.panoptic.merge`."""
    assert spec.panoptic is not None and spec.masks is not None
    classes = classify_pixels(logits, letterbox, frame.width, frame.height, spec.input_size)
    masks = paste_boxes(things.masks, things.boxes, frame.width, frame.height, spec.masks.threshold)
    merged = merge(masks, things.scores.tolist(), classes, spec.panoptic)
    owners = {
        number: _Owner(int(things.labels[index]), index)
        for index, number in enumerate(merged.things.tolist())
        if number
    }
    owners |= {number: _Owner(channel, None) for channel, number in enumerate(merged.stuff.tolist()) if number}
    return _encode(merged.ids, owners, frame)


def _encode(ids: Tensor, owners: dict[int, _Owner], frame: Frame) -> tuple[Segment, ...]:
    """Name and encode the segments of a map [H, W] of numbers; those without pixels are left out."""
    strings, areas = encode_segments(ids, max(owners, default=0))
    return tuple(
        Segment(
            label=owner.label,
            is_thing=owner.detection is not None,
            area=int(areas[number - 1]),
            mask=Rle(frame.height, frame.width, strings[number - 1]),
            detection=owner.detection,
        )
        for number, owner in sorted(owners.items())
        if areas[number - 1] > 0
    )
