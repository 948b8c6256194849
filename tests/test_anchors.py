"""Anchors and deltas against torchvision's and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from streamd.models.anchors import AnchorGrid, clip_boxes, decode_deltas

ONE_LEVEL = AnchorGrid(strides=(16,), sizes=((32.0, 64.0),), aspect_ratios=((0.5, 1.0, 2.0),))


def test_a_cells_anchors_go_size_by_size_and_ratio_by_ratio() -> None:
    anchors = torch.from_numpy(ONE_LEVEL.cell(0))
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(-1)
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2, 0.5, 1, 2]))
    torch.testing.assert_close((height * width).sqrt(), torch.tensor([32.0, 32, 32, 64, 64, 64]))
    torch.testing.assert_close(anchors[:, :2], -anchors[:, 2:])
    assert ONE_LEVEL.num_anchors == (6,)


def test_cells_go_row_by_row_from_the_corner_in_steps_of_the_stride() -> None:
    (anchors,) = ONE_LEVEL([torch.zeros(1, 8, 2, 3)])
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).reshape(2, 3, 6, 2)
    assert centres[..., 0, :].tolist() == [[[0, 0], [16, 0], [32, 0]], [[0, 16], [16, 16], [32, 16]]]
    assert (centres == centres[:, :, :1]).all()


def test_an_offset_moves_the_centres_by_a_part_of_the_stride() -> None:
    moved = AnchorGrid((16,), ((32.0,),), ((1.0,),), offset=0.5)
    still = AnchorGrid((16,), ((32.0,),), ((1.0,),))
    feature = torch.zeros(1, 8, 2, 3)
    torch.testing.assert_close(moved([feature])[0], still([feature])[0] + 8)


def test_one_row_of_sizes_serves_all_levels() -> None:
    grid = AnchorGrid((8, 16), ((32.0,),), ((1.0,), (2.0,)))
    square, tall = grid([torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2)])
    assert square.shape == (16, 4) and square[0].tolist() == [-16, -16, 16, 16]
    assert tall[0, 3] == pytest.approx(16 * math.sqrt(2))


def test_rows_that_fit_no_level_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of sizes for 3 levels"):
        AnchorGrid((8, 16, 32), ((32.0,), (64.0,)), ((1.0,),))


@pytest.mark.parametrize("size", [(128, 256), (96, 160)])  # 96 / 128 leaves a rest
def test_torchvisions_convention_gives_torchvisions_anchors(size: tuple[int, int]) -> None:
    sizes, ratios = ((32.0, 40.3), (64.0, 80.6), (128.0, 161.3)), ((0.5, 1.0, 2.0),) * 3
    images = torch.zeros(1, 3, *size)
    features = [torch.zeros(1, 8, -(-size[0] // stride), -(-size[1] // stride)) for stride in (8, 16, 128)]
    grid = AnchorGrid((8, 16, 128), sizes, ratios, convention="torchvision")
    (expected,) = AnchorGenerator(sizes, ratios)(ImageList(images, [size]), features)
    torch.testing.assert_close(torch.cat(grid(features, images)), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs the images"):
        grid(features)


def test_anchors_that_inference_made_first_serve_training() -> None:
    grid = AnchorGrid((8,), ((31.0,),), ((1.0,),))
    feature = torch.zeros(1, 8, 2, 2)
    with torch.inference_mode():
        grid([feature])
    deltas = torch.zeros(4, 4, requires_grad=True)
    decode_deltas(deltas, grid([feature])[0]).sum().backward()
    assert deltas.grad is not None


boxes = st.tuples(*[st.floats(-500, 500, width=32)] * 2, *[st.floats(1, 500, width=32)] * 2)
deltas = st.tuples(*[st.floats(-8, 8, width=32)] * 4)


@given(st.lists(st.tuples(boxes, deltas), min_size=1, max_size=20))
def test_deltas_are_decoded_as_torchvision_does(pairs: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> None:
    corners = torch.tensor([(x, y, x + w, y + h) for (x, y, w, h), _ in pairs])
    steps = torch.tensor([delta for _, delta in pairs])
    weights = (10.0, 10.0, 5.0, 5.0)
    expected: Tensor = BoxCoder(weights).decode_single(steps, corners)
    torch.testing.assert_close(decode_deltas(steps, corners, weights), expected, rtol=1e-5, atol=1e-2)


def test_a_delta_scales_an_anchor_of_16_px_to_1000_px_and_no_further() -> None:
    box = decode_deltas(torch.tensor([0.0, 0.0, 9.0, 0.0]), torch.tensor([0.0, 0.0, 16.0, 16.0]))
    torch.testing.assert_close(box, torch.tensor([-492.0, 0.0, 508.0, 16.0]))


def test_half_precision_deltas_still_give_boxes_in_single_precision() -> None:
    anchor = torch.tensor([[1999.0, 1999.0, 2001.0, 2001.0]])
    box = decode_deltas(torch.zeros(1, 4).half(), anchor)
    torch.testing.assert_close(box, anchor, rtol=0, atol=0)


def test_each_image_clips_its_boxes_to_its_own_size() -> None:
    sizes = torch.tensor([[20.0, 30.0], [40.0, 10.0]])
    random = torch.rand(2, 50, 4) * 80 - 20
    clipped = clip_boxes(random, sizes)
    for image, (height, width) in enumerate(sizes.tolist()):
        torch.testing.assert_close(clipped[image], clip_boxes_to_image(random[image], (int(height), int(width))))
