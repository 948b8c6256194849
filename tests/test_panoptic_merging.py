"""Merging of objects and stuff into segments, against a plain reading of the rule and Detectron2's own output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from streamd.gpu.panoptic import Segments, classify_pixels, merge
from streamd.gpu.rle import Bits
from streamd.messages import Letterbox
from streamd.models.spec import PanopticRule

STUFF = ("things", "sky", "grass", "road")


def rule(**numbers: float) -> PanopticRule:
    return PanopticRule(**{"stuff_labels": STUFF, "stuff_area_limit": 4, **numbers})  # type: ignore[arg-type]


def whole(mask: np.ndarray) -> Bits:
    return Bits(0, 0, torch.from_numpy(mask))


def square(x0: int, y0: int, side: int) -> Bits:
    return Bits(x0, y0, torch.ones(side, side, dtype=torch.bool))


def classes_of(*rows: str) -> Tensor:
    """Draw a map of channels, one digit a pixel."""
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def merge_slowly(masks: list[np.ndarray], scores: list[float], classes: np.ndarray, limits: PanopticRule) -> np.ndarray:
    """Do what `merge` says, one object and one channel after the other, on the host."""
    ids = np.zeros(classes.shape, dtype=np.int32)
    last = 0
    for mask, score in zip(masks, scores, strict=True):
        area = int(mask.sum())
        if score < limits.score_threshold or area == 0:
            continue
        if int((mask & (ids > 0)).sum()) / area <= limits.overlap_threshold:
            last += 1
            ids[mask & (ids == 0)] = last
    free = ids == 0
    for channel in range(1, len(limits.stuff_labels)):
        region = free & (classes == channel)
        if region.sum() >= max(limits.stuff_area_limit, 1):
            last += 1
            ids[region] = last
    return ids


def test_a_better_object_keeps_the_pixels_that_two_objects_claim() -> None:
    segments = merge([square(0, 0, 3), square(2, 2, 3)], [0.9, 0.8], torch.zeros(5, 5, dtype=torch.int64), rule())
    assert segments.ids.tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 2, 2],
        [0, 0, 2, 2, 2],
        [0, 0, 2, 2, 2],
    ]
    assert segments.things.tolist() == [1, 2]


def test_an_object_that_is_covered_by_more_than_the_limit_leaves_no_trace() -> None:
    masks = [square(0, 0, 4), square(2, 0, 4), square(1, 0, 4)]  # half of the second and all of the third is covered
    segments = merge(masks, [0.9, 0.8, 0.7], torch.zeros(4, 6, dtype=torch.int64), rule(overlap_threshold=0.5))
    assert segments.things.tolist() == [1, 2, 0]
    assert segments.ids[0].tolist() == [1, 1, 1, 1, 2, 2]


def test_numbers_have_no_gap_where_objects_are_left_out() -> None:
    masks = [square(0, 0, 2), square(0, 0, 2), square(2, 0, 2)]
    segments = merge(masks, [0.9, 0.8, 0.7], classes_of("1111", "1111", "1111"), rule())
    assert segments.things.tolist() == [1, 0, 2]
    assert segments.stuff.tolist() == [0, 3, 0, 0]


def test_an_object_below_the_score_and_one_without_pixels_become_no_segment() -> None:
    empty = Bits(1, 1, torch.zeros(0, 3, dtype=torch.bool))
    blank = Bits(1, 1, torch.zeros(2, 2, dtype=torch.bool))
    masks = [empty, blank, square(0, 0, 2), square(2, 2, 2)]
    segments = merge(masks, [0.9, 0.8, 0.5, 0.49], torch.zeros(4, 4, dtype=torch.int64), rule(score_threshold=0.5))
    assert segments.things.tolist() == [0, 0, 1, 0]


def test_a_stuff_region_counts_only_the_pixels_that_no_object_took() -> None:
    classes = classes_of("1122", "1122", "1133")
    segments = merge([square(0, 0, 2)], [0.9], classes, rule(stuff_area_limit=3))
    assert segments.stuff.tolist() == [0, 0, 2, 0]
    assert segments.ids.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0]]


def test_the_channel_that_stands_for_things_gives_no_segment() -> None:
    segments = merge([], [], torch.zeros(8, 8, dtype=torch.int64), rule())
    assert not segments.ids.any()
    assert segments.things.shape == (0,)
    assert segments.stuff.tolist() == [0, 0, 0, 0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_segments_equal_a_plain_reading_of_the_rule(seed: int, num: int, overlap: float, area_limit: int) -> None:
    random = np.random.default_rng(seed)
    masks = [random.random((9, 11)) < random.random() for _ in range(num)]
    scores = np.sort(random.random(num))[::-1].tolist()
    classes = random.integers(0, len(STUFF), (9, 11))
    limits = rule(overlap_threshold=overlap, stuff_area_limit=area_limit, score_threshold=0.3)
    segments = merge([whole(mask) for mask in masks], scores, torch.from_numpy(classes), limits)
    np.testing.assert_array_equal(segments.ids.numpy(), merge_slowly(masks, scores, classes, limits))


def test_pixels_are_classified_after_both_stretches_as_detectron2_does() -> None:
    logits = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(0))  # more than are stretched at once
    letterbox = Letterbox(scale_x=0.5, scale_y=0.5, left=4, top=2, width=80, height=55)
    upsampled = F.interpolate(logits[None], scale_factor=4.0, mode="bilinear", align_corners=False)[:, :, 2:57, 4:84]
    expected = F.interpolate(upsampled, (110, 160), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(classify_pixels(logits, letterbox, 160, 110, (64, 96)), expected)


def test_of_equal_channels_the_first_wins_also_across_blocks_of_channels() -> None:
    letterbox = Letterbox(scale_x=1, scale_y=1, left=0, top=0, width=8, height=8)
    logits = torch.zeros(40, 2, 2)
    logits[3] = logits[37] = 1.0
    assert classify_pixels(logits, letterbox, 8, 8, (8, 8)).unique().tolist() == [3]


@pytest.mark.parametrize("i", range(2))
def test_objects_and_classes_of_detectron2_give_its_segments(shared: Path, i: int) -> None:
    with np.load(shared / "parity/panoptic_fpn_R_50/io.npz") as arrays:
        _, _, width = arrays[f"out{i}_masks_shape"]
        masks = np.unpackbits(arrays[f"out{i}_masks"], axis=-1, count=width).astype(bool)
        scores = arrays[f"out{i}_scores"].tolist()
        classes = torch.from_numpy(arrays[f"out{i}_sem_seg"]).long()
        ids = arrays[f"out{i}_panoptic"]
        info = json.loads(bytes(arrays[f"out{i}_panoptic_info"]))
    limits = PanopticRule(stuff_labels=tuple(str(channel) for channel in range(54)))
    segments = merge([whole(mask) for mask in masks], scores, classes, limits)
    np.testing.assert_array_equal(segments.ids.numpy(), ids)
    assert numbered(segments) == {
        segment["id"]: segment["instance_id"] if segment["isthing"] else ("stuff", segment["category_id"])
        for segment in info
    }


def numbered(segments: Segments) -> dict[int, int | tuple[str, int]]:
    """Say which object or stuff channel each segment is."""
    things = {number: index for index, number in enumerate(segments.things.tolist()) if number}
    stuff = {number: ("stuff", channel) for channel, number in enumerate(segments.stuff.tolist()) if number}
    return {**things, **stuff}
