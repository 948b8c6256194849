"""How far two models say the same, as a number from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from streamd.agreement import Agreement, compare
from streamd.messages import Detections, Rle, Segment
from streamd.models.spec import ModelSpec, PanopticRule

SPEC = ModelSpec(name="m", task="detect", labels=("person", "dog"), input_size=(64, 64), colour="bgr")
SEMANTIC = ModelSpec(name="m", task="semantic", labels=("sky", "grass"), input_size=(64, 64), colour="bgr")
Box = tuple[int, float, float, float, float]  # label, x1, y1, x2, y2


def found(*boxes: Box, segments: tuple[Segment, ...] | None = None) -> Detections:
    return Detections(
        boxes=np.array([box[1:] for box in boxes], np.float32).reshape(-1, 4),
        scores=np.full(len(boxes), 0.9, np.float32),
        labels=np.array([box[0] for box in boxes], np.int64),
        segments=segments,
    )


def agreement(first: Sequence[Box], second: Sequence[Box], spec: ModelSpec = SPEC) -> Agreement:
    return compare(found(*first), SPEC, found(*second), spec)


PERSON, OTHER = (0, 10, 10, 20, 30), (0, 40, 10, 50, 30)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([], [], 1.0),
        ([PERSON], [PERSON], 1.0),
        ([PERSON], [], 0.0),
        ([], [PERSON], 0.0),
        ([PERSON], [PERSON, OTHER], 2 / 3),
        ([PERSON, OTHER], [OTHER, PERSON], 1.0),
        ([PERSON], [(1, 10, 10, 20, 30)], 0.0),  # a dog in the same place
        ([PERSON], [(0, 13, 10, 23, 30)], 1.0),  # 7 of 13 columns: 0.54
        ([PERSON], [(0, 14, 10, 24, 30)], 0.0),  # 6 of 14 columns: 0.43
        ([PERSON], [PERSON, (0, 11, 10, 21, 30)], 2 / 3),  # each is in one pair at most
    ],
)
def test_agreement_is_the_part_that_is_in_pairs(first: list[Box], second: list[Box], value: float) -> None:
    assert agreement(first, second).value == pytest.approx(value)
    assert agreement(second, first).value == pytest.approx(value)


def test_the_best_pairs_are_made_first() -> None:
    near, nearer = (0, 12, 10, 22, 30), (0, 11, 10, 21, 30)
    assert agreement([PERSON, (0, 14, 10, 24, 30)], [nearer, near]).num_pairs == 2


def test_labels_are_compared_by_name() -> None:
    turned = ModelSpec(name="m", task="detect", labels=("dog", "person"), input_size=(64, 64), colour="bgr")
    assert agreement([PERSON], [(1, *PERSON[1:])], turned).value == 1.0
    assert agreement([PERSON], [PERSON], turned).value == 0.0


def test_frames_add_up_by_their_objects() -> None:
    total = agreement([PERSON], [PERSON]) + agreement([PERSON, OTHER], []) + agreement([], [])
    assert total == Agreement(num_pairs=1, num_first=3, num_second=1, num_frames=3)
    assert total.value == 0.5
    assert Agreement().value == 1.0


def region(label: int, columns: slice, *, is_thing: bool = False) -> Segment:
    pixels = np.zeros((8, 8), np.uint8, order="F")
    pixels[:, columns] = 1
    mask = Rle(8, 8, coco_mask.encode(pixels)["counts"])
    return Segment(label, is_thing, int(pixels.sum()), mask, 0 if is_thing else None)


def test_regions_of_stuff_are_paired_by_their_masks() -> None:
    first = found(segments=(region(0, slice(0, 4)), region(1, slice(4, 8))))
    assert compare(first, SEMANTIC, first, SEMANTIC).value == 1.0
    second = found(segments=(region(0, slice(0, 5)), region(1, slice(7, 8))))
    assert compare(first, SEMANTIC, second, SEMANTIC) == Agreement(1, 2, 2, 1)
    assert compare(first, SEMANTIC, found(segments=()), SEMANTIC).value == 0.0


def test_things_among_the_segments_count_as_objects_alone() -> None:
    panoptic = ModelSpec(
        name="m",
        task="panoptic",
        labels=("person",),
        input_size=(64, 64),
        colour="bgr",
        panoptic=PanopticRule(stuff_labels=("things", "sky")),
    )
    seen = found(PERSON, segments=(region(0, slice(0, 2), is_thing=True), region(1, slice(2, 8))))
    assert compare(seen, panoptic, seen, panoptic) == Agreement(2, 2, 2, 1)
