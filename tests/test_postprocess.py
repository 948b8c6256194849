"""From raw output to detections: source pixels, clipping, masks, bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor

from streamd import wire
from streamd.announce import detections_message
from streamd.gpu.mask_reference import paste_prototypes
from streamd.messages import Batch, Detections, Frame, Picture, RawOutput, Result, Rle, Stamp
from streamd.models.contract import pack
from streamd.models.spec import DensePoseRule, KeypointRule, MaskRule, ModelSpec, NmsRule, PanopticRule, ResizeRule
from streamd.postprocess import Postprocessor, place, postprocess
from streamd.wire import Mask
from tests.fakes import NO_TIMES

SPEC = ModelSpec(
    name="any",
    task="segment",
    labels=("a", "b", "c"),
    input_size=(64, 96),
    colour="rgb",
    resize=ResizeRule(anchor="center"),
    masks=MaskRule(threshold=0.5),
)
RULE = NmsRule(score_threshold=0.3, iou_threshold=0.5, max_detections=10)


def frame(width: int, height: int) -> Frame:
    return Frame(
        stream="gate",
        seq=0,
        pts_s=0.0,
        stamp=Stamp(epoch=0, arrived_ns=0, arrived_at=0.0, captured_at=0.0, clock="arrival"),
        decode_ms=0.0,
        picture=Picture((torch.empty(0, 0, 3, dtype=torch.uint8),), "rgb", "bt601", True, 0),
        width=width,
        height=height,
        keyframe=True,
        corrupt=False,
    )


def batch_of(*sizes: tuple[int, int], spec: ModelSpec = SPEC) -> Batch:
    """Make a batch of frames of these (width, height); nobody looks at its images any more."""
    frames = tuple(frame(width, height) for width, height in sizes)
    return Batch(frames, torch.empty(0), tuple(spec.letterbox(width, height) for width, height in sizes))


def random_output(seed: int, images: int, candidates: int, labels: int = 3) -> RawOutput:
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, candidates, 2, generator=rng) * 120 - 20
    boxes = torch.cat((corners, corners + torch.rand(images, candidates, 2, generator=rng) * 40 - 2), dim=-1)
    return RawOutput(
        boxes,
        torch.rand(images, candidates, labels, generator=rng),
        torch.randn(images, 4, 16, 24, generator=rng),
        torch.randn(images, candidates, 4, generator=rng),
    )


def assert_well_formed(detections: Detections, width: int, height: int, limit: int) -> None:
    count = len(detections)
    assert count <= limit
    assert detections.boxes.shape == (count, 4) and detections.boxes.dtype == np.float32
    assert detections.scores.shape == (count,) and detections.scores.dtype == np.float32
    assert detections.labels.shape == (count,) and detections.labels.dtype == np.int64
    x1, y1, x2, y2 = detections.boxes.T
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)).all()
    assert (np.diff(detections.scores) <= 0).all()
    assert detections.masks is not None and len(detections.masks) == count
    for mask in detections.masks:
        assert (mask.height, mask.width) == (height, width)


def test_boxes_come_back_to_source_pixels_and_are_clipped_to_the_frame() -> None:
    batch = batch_of((48, 16))  # scale 2: 96 x 32 input pixels, 16 rows of padding above and below
    boxes = torch.tensor([[[10.0, 20.0, 30.0, 40.0], [60.0, 0.0, 200.0, 48.0], [0.0, 50.0, 20.0, 60.0]]])
    scores = torch.tensor([[[0.0, 0.5, 0.1], [0.9, 0.1, 0.1], [0.6, 0.1, 0.1]]])
    (found,) = postprocess(RawOutput(boxes, scores), batch, SPEC, RULE)
    # The third box lies in the padding and is dropped.
    np.testing.assert_array_equal(found.boxes, [[30, 0, 48, 16], [5, 2, 15, 12]])
    np.testing.assert_array_equal(found.scores, np.array([0.9, 0.5], dtype=np.float32))
    np.testing.assert_array_equal(found.labels, [0, 1])
    assert found.masks is None


def test_one_candidate_counts_once_per_label_only_with_multi_label() -> None:
    raw = RawOutput(torch.tensor([[[0.0, 0.0, 9.0, 9.0]]]), torch.tensor([[[0.4, 0.8, 0.2]]]))
    batch = batch_of((96, 64))
    (best,) = postprocess(raw, batch, SPEC, RULE)
    (every,) = postprocess(raw, batch, SPEC, msgspec.structs.replace(RULE, multi_label=True))
    assert best.labels.tolist() == [1]
    assert every.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(every.scores, np.array([0.8, 0.4], dtype=np.float32))


@pytest.mark.parametrize("multi_label", [False, True])
def test_masks_belong_to_their_boxes(multi_label: bool) -> None:
    raw, batch = random_output(1, 2, 40), batch_of((75, 50), (30, 60))
    rule = msgspec.structs.replace(RULE, multi_label=multi_label, max_detections=40)
    assert raw.prototypes is not None and raw.coefficients is not None
    for index, found in enumerate(postprocess(raw, batch, SPEC, rule)):
        shown, letterbox = batch.frames[index], batch.letterboxes[index]
        assert_well_formed(found, shown.width, shown.height, rule.max_detections)
        assert found.masks and len(found) > 1
        for box, score, label, mask in zip(found.boxes, found.scores, found.labels, found.masks, strict=True):
            candidate = int((raw.scores[index, :, label] == float(score)).nonzero()[0, 0])
            (bits,) = paste_prototypes(
                raw.prototypes[index],
                raw.coefficients[index, candidate, None],
                torch.from_numpy(box[None]),
                place([shown], [letterbox])[0],
                SPEC.input_size,
                0.5,
            )
            expected = np.zeros((shown.height, shown.width), dtype=np.uint8, order="F")
            rows, columns = bits.bits.shape
            expected[bits.y0 : bits.y0 + rows, bits.x0 : bits.x0 + columns] = bits.bits.numpy()
            assert mask.counts == coco.encode(expected)["counts"]


def test_an_image_gives_the_same_alone_and_in_a_batch() -> None:
    raw, sizes = random_output(2, 3, 60), [(75, 50), (30, 60), (200, 10)]
    together = postprocess(raw, batch_of(*sizes), SPEC, RULE)
    for index, (size, found) in enumerate(zip(sizes, together, strict=True)):
        part = slice(index, index + 1)
        assert raw.prototypes is not None and raw.coefficients is not None
        alone = RawOutput(raw.boxes[part], raw.scores[part], raw.prototypes[part], raw.coefficients[part])
        (expected,) = postprocess(alone, batch_of(size), SPEC, RULE)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        assert found.masks is not None and expected.masks is not None
        assert [mask.counts for mask in found.masks] == [mask.counts for mask in expected.masks]


def spoil(tensor: Tensor | None, rng: np.random.Generator) -> None:
    assert tensor is not None
    hit = torch.from_numpy(rng.random(tensor.shape) < 0.05)
    values = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0], int(hit.sum()))
    tensor[hit] = torch.tensor(values, dtype=torch.float32)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), candidates=st.sampled_from([0, 1, 50]), multi_label=st.booleans())
def test_whatever_the_model_says_the_output_is_well_formed(seed: int, candidates: int, multi_label: bool) -> None:
    raw, rng = random_output(seed, 2, candidates), np.random.default_rng(seed)
    for tensor in (raw.boxes, raw.scores, raw.prototypes, raw.coefficients):
        spoil(tensor, rng)
    rule = msgspec.structs.replace(RULE, multi_label=multi_label)
    sizes = [(75, 50), (30, 60)]
    for found, size in zip(postprocess(raw, batch_of(*sizes), SPEC, rule), sizes, strict=True):
        assert_well_formed(found, *size, rule.max_detections)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_output_of_one_senseless_value_is_no_detection(value: float) -> None:
    raw = RawOutput(torch.full((1, 20, 4), value), torch.full((1, 20, 3), 0.9))
    (found,) = postprocess(raw, batch_of((96, 64)), SPEC, RULE)
    assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_ten_thousand_candidates_give_no_more_than_the_rule_allows() -> None:
    raw = random_output(3, 1, 10_000)
    (found,) = postprocess(raw, batch_of((75, 50)), SPEC, msgspec.structs.replace(RULE, score_threshold=0.0))
    assert_well_formed(found, 75, 50, RULE.max_detections)
    assert len(found) > 1


def test_half_precision_output_is_understood() -> None:
    raw = RawOutput(
        torch.tensor([[[10.0, 20.0, 30.0, 40.0]]]).half(),
        torch.tensor([[[0.5, 0.1, 0.1]]]).half(),
        torch.ones(1, 2, 16, 24).half(),
        torch.ones(1, 1, 2).half(),
    )
    (found,) = postprocess(raw, batch_of((96, 64)), SPEC, RULE)
    np.testing.assert_array_equal(found.boxes, [[10, 20, 30, 40]])
    assert found.masks is not None
    assert coco.area({"size": [64, 96], "counts": found.masks[0].counts}) == 400


def yolox_decoded(raw: np.ndarray) -> RawOutput:
    """Decode a raw YOLOX head [1, 3549, 85] as the README beside it says."""
    cells, strides = [], []
    for stride, size in ((8, 52), (16, 26), (32, 13)):
        rows, columns = np.divmod(np.arange(size * size), size)
        cells.append(np.stack((columns, rows), axis=-1))
        strides.append(np.full((size * size, 1), stride))
    cell, stride_of = np.concatenate(cells), np.concatenate(strides)
    centre, half = (raw[..., :2] + cell) * stride_of, np.exp(raw[..., 2:4]) * stride_of / 2
    boxes = torch.from_numpy(np.concatenate((centre - half, centre + half), axis=-1)).float()
    return RawOutput(boxes, torch.from_numpy(raw[..., 4:5] * raw[..., 5:]))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_raw_yolox_output_gives_the_reference_detections(shared: Path, index: int) -> None:
    reference = np.load(shared / "parity" / "yolox_nano" / "io.npz")
    height, width, _ = reference[f"image{index}"].shape
    spec = ModelSpec(
        name="yolox_nano", task="detect", labels=tuple(map(str, range(80))), input_size=(416, 416), colour="bgr"
    )
    raw = yolox_decoded(reference[f"raw{index}"])
    (found,) = postprocess(raw, batch_of((width, height), spec=spec), spec, NmsRule())
    np.testing.assert_array_equal(found.labels, reference[f"out{index}_classes"])
    np.testing.assert_allclose(found.scores, reference[f"out{index}_scores"], atol=1e-5)
    clipped = reference[f"out{index}_boxes"].clip(0, [width, height, width, height])
    np.testing.assert_allclose(found.boxes, clipped, atol=0.05)


def test_pairs_of_a_box_and_a_label_are_taken_as_they_are() -> None:
    box = torch.tensor([10.0, 20.0, 30.0, 40.0])
    raw = RawOutput(
        boxes=torch.stack((box, box, box + 0.5, box))[None],
        scores=torch.tensor([[0.5, 0.7, 0.6, -torch.inf]]),
        labels=torch.tensor([[0, 2, 0, 1]]),
    )
    (found,) = postprocess(raw, batch_of((96, 64)), SPEC, msgspec.structs.replace(RULE, score_threshold=0.0))
    assert found.labels.tolist() == [2, 0], "boxes suppress those of their label alone, and -inf takes no part"
    np.testing.assert_array_equal(found.boxes, [[10, 20, 30, 40], [10.5, 20.5, 30.5, 40.5]])


def pixels_of(mask: Rle) -> np.ndarray:
    return Mask(size=(mask.height, mask.width), counts=mask.counts.decode()).decode()


SURFACE = DensePoseRule(num_parts=2)


class FakeHeads:
    """Give each box a mask of its label's half, and heat maps that are best in two corners; note what they get."""

    def __init__(self) -> None:
        self.boxes: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.images: list[int] = []  # what the features are filled with

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        self.images.append(int(features[0].flatten()[0]))
        self.boxes.append(boxes)
        self.labels.append(labels)
        columns = torch.arange(8)
        left = (columns < 4).float().expand(8, 8)
        return torch.where(labels[..., None, None] == 0, left, 1 - left)

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        self.boxes.append(boxes)
        maps = torch.zeros(*boxes.shape[:2], 2, 8, 8)
        maps[..., 0, 0, 0] = maps[..., 1, 7, 7] = 9.0
        return maps

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        self.boxes.append(boxes)
        maps = torch.zeros(*boxes.shape[:2], SURFACE.num_channels, 8, 8)
        maps[..., 1, :, :] = 9.0  # all of it is a body, its upper half part 1, its lower half part 2
        maps[..., 3, :4, :] = maps[..., 4, 4:, :] = 5.0
        maps[..., 6, :, :] = 0.25  # U of part 1
        maps[..., 7, :, :], maps[..., 10, :, :] = 0.5, 2.0  # U and V of part 2
        return maps


TWO_STAGES = msgspec.structs.replace(
    SPEC, task="keypoints", masks=MaskRule(kind="box"), keypoints=KeypointRule(names=("head", "tail"))
)


def two_objects() -> RawOutput:
    return RawOutput(
        boxes=torch.tensor([[[16.0, 20.0, 32.0, 36.0], [56.0, 24.0, 80.0, 40.0]], [[0.0] * 4] * 2]),
        scores=torch.tensor([[0.8, 0.9], [0.1, 0.1]]),
        labels=torch.tensor([[0, 1], [0, 0]]),
        features=(torch.zeros(2, 1, 8, 12),),
    )


def test_the_methods_get_each_image_s_objects_in_input_pixels_and_no_padding_on_a_cpu() -> None:
    raw, heads, rows = two_objects(), FakeHeads(), [0, 1, 0]
    raw = RawOutput(
        boxes=raw.boxes[rows],
        scores=torch.tensor([[0.8, 0.9], [0.1, 0.1], [0.0, 0.9]]),
        labels=torch.tensor([[0, 1], [0, 0], [0, 1]]),
        features=(torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 12),),
    )
    first, nothing, last = postprocess(raw, batch_of(*[(48, 16)] * 3), TWO_STAGES, RULE, heads=heads)
    both, one = [[56, 24, 80, 40], [16, 20, 32, 36]], [[56, 24, 80, 40]]
    assert [boxes.tolist() for boxes in heads.boxes] == [[both], [one]] * 2  # masks, then keypoints
    assert [labels.tolist() for labels in heads.labels] == [[[1, 0]], [[1]]]
    assert heads.images == [0, 2]
    assert (len(first), len(nothing), len(last)) == (2, 0, 1)
    assert first.masks and last.masks and first.masks[0].counts == last.masks[0].counts


def test_objects_of_labels_that_are_not_wanted_leave_nothing_to_look_closer_at() -> None:
    heads = FakeHeads()
    found, _ = postprocess(two_objects(), batch_of(*[(48, 16)] * 2), TWO_STAGES, RULE, labels=[2], heads=heads)
    assert len(found) == 0 and found.masks == ()
    assert all(boxes.tolist() == [[[0] * 4]] for boxes in heads.boxes)  # which says what shape the result has


def test_masks_over_boxes_and_keypoints_come_back_in_source_pixels() -> None:
    batch = batch_of((48, 16), (48, 16))  # scale 2, 16 rows of padding above and below
    found, nothing = postprocess(two_objects(), batch, TWO_STAGES, RULE, heads=FakeHeads())
    np.testing.assert_array_equal(found.boxes, [[28, 4, 40, 12], [8, 2, 16, 10]])
    assert found.masks is not None and found.keypoints is not None
    expected = np.zeros((2, 16, 48), dtype=np.uint8)
    expected[0, 4:12, 34:40] = 1
    expected[1, 2:10, 8:12] = 1
    for mask, pixels in zip(found.masks, expected, strict=True):
        np.testing.assert_array_equal(pixels_of(mask), pixels)
    # The best pixel of a corner is within the first or last of the map's eight elements.
    np.testing.assert_allclose(found.keypoints[..., :2], [[[28, 4], [40, 12]], [[8, 2], [16, 10]]], atol=1.5)
    assert len(nothing) == 0 and nothing.masks == () and nothing.keypoints is not None
    assert nothing.keypoints.shape == (0, 2, 3)


def test_charts_come_back_for_each_object_in_whole_source_pixels() -> None:
    batch = batch_of((48, 16), (48, 16))
    spec = msgspec.structs.replace(SPEC, task="densepose", densepose=SURFACE)
    found, nothing = postprocess(two_objects(), batch, spec, RULE, heads=FakeHeads())
    assert found.charts is not None and nothing.charts == ()
    assert [chart.box for chart in found.charts] == [(28, 4, 12, 8), (8, 2, 8, 8)]
    for chart in found.charts:
        assert chart.planes.shape == (3, chart.box[3], chart.box[2]) and chart.planes.dtype == np.uint8
        assert (chart.planes[:, :4] == np.array([1, 64, 0])[:, None, None]).all()
        assert (chart.planes[:, 4:] == np.array([2, 128, 255])[:, None, None]).all()


def test_charts_go_to_their_own_frames_though_some_frames_have_none() -> None:
    raw = two_objects()
    boxes = raw.boxes[[1, 0, 1, 0]].clone()
    boxes[3, 0] += 8
    labels = torch.tensor([[0, 0], [0, 1]] * 2)
    raw = replace(raw, boxes=boxes, scores=raw.scores[[1, 0, 1, 0]], labels=labels)
    spec = msgspec.structs.replace(SPEC, task="densepose", densepose=SURFACE)
    results = postprocess(raw, batch_of(*[(48, 16)] * 4), spec, RULE, heads=FakeHeads())
    for found, count in zip(results, (0, 2, 0, 2), strict=True):
        assert found.charts is not None and len(found.charts) == len(found) == count
        for chart, (x1, y1, x2, y2) in zip(found.charts, found.boxes.tolist(), strict=True):
            assert chart.box == (x1, y1, x2 - x1, y2 - y1)


def test_the_methods_are_not_called_where_no_frame_has_an_object() -> None:
    raw, heads = two_objects(), FakeHeads()
    rule = msgspec.structs.replace(RULE, score_threshold=0.95)
    for found in postprocess(raw, batch_of((48, 16), (30, 60)), TWO_STAGES, rule, heads=heads):
        assert len(found) == 0 and found.masks == () and found.keypoints is not None
    assert not heads.boxes


PANOPTIC = msgspec.structs.replace(
    SPEC,
    task="panoptic",
    masks=MaskRule(kind="box"),
    panoptic=PanopticRule(stuff_labels=("things", "sky", "grass"), stuff_area_limit=0),
    resize=ResizeRule(anchor="top_left"),
)


def test_panoptic_segments_are_objects_and_the_stuff_behind_them() -> None:
    logits = torch.zeros(2, 3, 16, 24)
    logits[:, 1, :8] = 5.0
    logits[:, 2, 8:] = 5.0
    raw = replace(two_objects(), semantic=logits)
    found, empty = postprocess(raw, batch_of((96, 64), (96, 64)), PANOPTIC, RULE, heads=FakeHeads())
    assert found.segments is not None and empty.segments is not None
    assert [(one.is_thing, one.label, one.detection) for one in found.segments] == [
        (True, 1, 0),
        (True, 0, 1),
        (False, 1, None),
        (False, 2, None),
    ]
    shown = [pixels_of(one.mask) for one in found.segments]
    assert [one.area for one in found.segments] == [int(pixels.sum()) for pixels in shown]
    assert (np.sum(shown, axis=0) == 1).all(), "every pixel has one segment"
    assert [(one.label, one.area) for one in empty.segments] == [(1, 32 * 96), (2, 32 * 96)]


def test_semantic_segments_cover_the_frame_with_the_labels_that_are_wanted() -> None:
    spec = msgspec.structs.replace(PANOPTIC, task="semantic", masks=None, panoptic=None)
    logits = torch.zeros(1, 3, 16, 24)
    logits[:, 0, :, :12], logits[:, 2, :, 12:] = 3.0, 3.0
    raw = pack({"semantic": logits})
    (found,) = postprocess(raw, batch_of((96, 64), spec=spec), spec, RULE)
    (wanted,) = postprocess(raw, batch_of((96, 64), spec=spec), spec, RULE, labels=[2])
    assert len(found) == 0 and found.segments is not None and wanted.segments is not None
    assert [(one.label, one.is_thing, one.area) for one in found.segments] == [(0, False, 3072), (2, False, 3072)]
    assert [one.label for one in wanted.segments] == [2]


class SenselessHeads(FakeHeads):
    """Say one value about everything."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(super().masks(features, boxes, labels), self.value)

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        return torch.full_like(super().keypoints(features, boxes), self.value)

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        return torch.full_like(super().densepose(features, boxes), self.value)


def as_read_by_a_subscriber(found: Detections, shown: Frame, spec: ModelSpec) -> wire.DetectionsMessage:
    result = Result(shown, found, NO_TIMES, 0, "m")
    message = detections_message(result, 0, spec.labels, "", spec.semantic_labels)
    return wire.decode(wire.encode(message), "detections")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_whatever_the_second_stage_says_a_subscriber_can_read_it(value: float) -> None:
    spec = msgspec.structs.replace(TWO_STAGES, task="densepose", densepose=SURFACE)
    batch = batch_of((48, 16), (48, 16))
    for found, shown in zip(
        postprocess(two_objects(), batch, spec, RULE, heads=SenselessHeads(value)), batch.frames, strict=True
    ):
        message = as_read_by_a_subscriber(found, shown, spec)
        assert len(message.objects) == len(found)
        for one in message.objects:
            assert one.mask is not None and one.mask.decode().shape == (16, 48)
            assert one.keypoints is not None and all(0 <= score <= 1 for _, _, score in one.keypoints)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_whatever_is_said_of_the_pixels_segments_stay_within_the_frame_and_can_be_read(value: float) -> None:
    raw = replace(two_objects(), semantic=torch.full((2, 3, 16, 24), value))
    batch = batch_of((96, 64), (96, 64))
    for found, shown in zip(
        postprocess(raw, batch, PANOPTIC, RULE, heads=SenselessHeads(value)), batch.frames, strict=True
    ):
        segments = as_read_by_a_subscriber(found, shown, PANOPTIC).segments
        assert segments is not None and sum(segment.area for segment in segments) <= 96 * 64


def test_masks_over_all_of_a_frame_are_right_and_small() -> None:
    raw = RawOutput(
        torch.tensor([[[-1e30, -1e30, 1e30, 1e30]]]).expand(1, 20, 4),
        torch.full((1, 20, 3), 0.9),
        torch.full((1, 1, 16, 24), 9.0),
        torch.ones(1, 20, 1),
    )
    batch = batch_of((1280, 720))
    (found,) = postprocess(raw, batch, SPEC, msgspec.structs.replace(RULE, iou_threshold=1.0))
    assert_well_formed(found, 1280, 720, RULE.max_detections)
    assert len(found) == RULE.max_detections and found.masks is not None
    for mask in found.masks:
        assert coco.area({"size": [720, 1280], "counts": mask.counts}) == 1280 * 720
    message = as_read_by_a_subscriber(found, batch.frames[0], SPEC)
    assert len(wire.encode(message)) < 5000


def test_boxes_without_area_are_no_detections_among_those_that_have_one() -> None:
    boxes = torch.tensor([[[10.0, 10, 10, 30], [10, 10, 30, 10], [30, 30, 10, 10], [10, 10, 30, 30]]])
    (found,) = postprocess(RawOutput(boxes, torch.full((1, 4, 3), 0.9)), batch_of((96, 64)), SPEC, RULE)
    np.testing.assert_array_equal(found.boxes, [[10, 10, 30, 30]])


@pytest.mark.parametrize(
    ("spoilt", "is_sane"),
    [
        ({}, True),
        ({"boxes": math.nan}, False),
        ({"boxes": math.inf}, False),
        ({"scores": math.nan}, False),
        ({"scores": -math.inf}, True),  # no candidate takes part
    ],
)
def test_an_image_of_which_nothing_but_nan_is_said_is_told_from_an_empty_one(
    spoilt: dict[str, float], is_sane: bool
) -> None:
    raw, batch = random_output(4, 2, 30), batch_of((75, 50), (30, 60))
    for name, value in spoilt.items():
        getattr(raw, name)[0] = value
    processor = Postprocessor(SPEC, RULE)
    assert processor.reduce(raw, place(batch.frames, batch.letterboxes)).sane.tolist() == [is_sane, True]
    nothing = replace(raw, boxes=raw.boxes[:, :0], scores=raw.scores[:, :0])
    nothing = replace(nothing, coefficients=None, prototypes=None)
    assert processor.reduce(nothing, place(batch.frames, batch.letterboxes)).sane.tolist() == [True, True]
