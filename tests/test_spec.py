"""Where a picture lands in the input, by each resize rule, and what a spec says of its model."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.models.spec import DensePoseRule, KeypointRule, MaskRule, ModelSpec, PanopticRule, ResizeRule, just_above

SPEC = ModelSpec(
    name="rcnn",
    task="detect",
    labels=("person",),
    input_size=(800, 1344),
    size_multiple=32,
    colour="bgr",
    mean=(103.53, 116.28, 123.675),
    resize=ResizeRule(kind="shortest_edge", min_size=800, max_size=1333, pad=None),
)


@pytest.mark.parametrize(
    ("source", "resized"),
    [
        ((640, 480), (1067, 800)),
        ((640, 427), (1199, 800)),
        ((1920, 1080), (1333, 750)),
        ((1242, 375), (1333, 402)),
        ((800, 800), (800, 800)),
    ],
)
def test_the_shortest_edge_rule_rounds_as_detectron2_does(source: tuple[int, int], resized: tuple[int, int]) -> None:
    letterbox = SPEC.letterbox(*source)
    assert (letterbox.width, letterbox.height) == resized
    assert (letterbox.left, letterbox.top) == (0, 0)
    assert (letterbox.scale_x, letterbox.scale_y) == (resized[0] / source[0], resized[1] / source[1])


def test_a_picture_that_the_rule_makes_larger_than_the_input_is_made_to_fit() -> None:
    portrait = SPEC.letterbox(1080, 1920)  # by the rule 750 x 1333
    assert (portrait.width, portrait.height) == (450, 800)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(224, 320), (800, 1344), (1333, 1333)]))
def test_a_picture_lies_within_the_input_and_keeps_its_shape(
    width: int, height: int, input_size: tuple[int, int]
) -> None:
    spec = msgspec.structs.replace(SPEC, input_size=input_size, size_multiple=1)
    letterbox = spec.letterbox(width, height)
    assert 1 <= letterbox.width <= input_size[1] and 1 <= letterbox.height <= input_size[0]
    # Rounding moves each side by half a pixel, and no side is less than one pixel.
    assert abs(letterbox.width * height - letterbox.height * width) <= width + height


def test_padding_without_a_value_is_the_mean_so_that_it_is_zero_when_normalised() -> None:
    assert SPEC.padding == SPEC.mean
    assert msgspec.structs.replace(SPEC, resize=ResizeRule(pad=114.0)).padding == (114.0, 114.0, 114.0)


@given(st.floats(-1e30, 1e30))
def test_a_score_above_a_threshold_is_at_least_the_number_just_above(threshold: float) -> None:
    rounded, above = np.float32(threshold), np.float32(just_above(threshold))
    assert above > rounded
    between = np.float32((np.float64(rounded) + np.float64(above)) / 2)
    assert between in (rounded, above), "no float32 lies between"


def test_a_spec_names_the_channels_of_semantic_and_the_methods() -> None:
    assert SPEC.semantic_labels == () and SPEC.methods == ()
    semantic = msgspec.structs.replace(SPEC, task="semantic", labels=("road", "car"))
    assert semantic.semantic_labels == ("road", "car")
    panoptic = msgspec.structs.replace(
        SPEC,
        task="panoptic",
        masks=MaskRule(kind="box"),
        keypoints=KeypointRule(names=("nose",)),
        panoptic=PanopticRule(stuff_labels=("things", "sky")),
    )
    assert panoptic.semantic_labels == ("things", "sky")
    assert panoptic.methods == ("masks", "keypoints")
    assert msgspec.structs.replace(SPEC, masks=MaskRule(kind="prototype")).methods == ()
    densepose = msgspec.structs.replace(SPEC, task="densepose", densepose=DensePoseRule(num_parts=3))
    assert densepose.methods == ("densepose",) and DensePoseRule(num_parts=3).num_channels == 2 + 3 * 4


def test_a_spec_is_read_as_it_was_written() -> None:
    spec = msgspec.structs.replace(SPEC, task="panoptic", panoptic=PanopticRule(stuff_labels=("things", "sky")))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec


def test_a_stretched_picture_fills_the_input_with_a_scale_of_its_own_for_each_side() -> None:
    spec = msgspec.structs.replace(SPEC, input_size=(320, 320), size_multiple=1, resize=ResizeRule(kind="stretch"))
    letterbox = spec.letterbox(640, 480)
    assert (letterbox.width, letterbox.height, letterbox.left, letterbox.top) == (320, 320, 0, 0)
    assert (letterbox.scale_x, letterbox.scale_y) == (0.5, 320 / 480)
