"""Charts against DensePose's own way to them: enlarge, enlarge to the box, take the best part and its U and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd import charts
from streamd.gpu.densepose import MAX_SIDE, chart_sizes, cut_charts, make_charts, whole_boxes
from streamd.gpu.graph import Graph
from streamd.models.spec import DensePoseRule

RULE = DensePoseRule(num_parts=4, num_coarse=2)
# x1 y1 x2 y2: odd sizes, one of a single pixel, one with no pixel at all, one of the largest size without scaling
BOXES = [(3.7, 5.2, 40.4, 71.9), (0.0, 0.0, 1.9, 1.2), (7.5, 7.5, 7.9, 7.6), (10.0, 0.0, 138.0, 97.3)]


def smooth_maps(num_boxes: int, rule: DensePoseRule = RULE, side: int = 14) -> Tensor:
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(num_boxes, rule.num_channels, 4, 4, generator=random)
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)


def as_densepose_does(maps: Tensor, size: tuple[int, int], rule: DensePoseRule) -> np.ndarray:
    """Return the planes [3, height, width] of one box's maps [C, S, S], of floating point."""
    larger = F.interpolate(maps[None], scale_factor=float(rule.up_scale), mode="bilinear", align_corners=False)
    at_box = F.interpolate(larger, size, mode="bilinear", align_corners=False)[0]
    coarse, fine, u, v = at_box.split([rule.num_coarse] + [rule.num_parts + 1] * 3)
    part = fine.argmax(0) * (coarse.argmax(0) > 0)
    planes = np.zeros((3, *size))
    for index in range(1, rule.num_parts + 1):
        here = (part == index).numpy()
        planes[0][here] = index
        planes[1][here] = u[index].clamp(0, 1).numpy()[here]
        planes[2][here] = v[index].clamp(0, 1).numpy()[here]
    return planes


def assert_same(planes: np.ndarray, expected: np.ndarray) -> None:
    """Compare a chart in uint8 with one in numbers, but for cells where rounding decides between two parts."""
    assert planes.shape == expected.shape
    same = planes[0] == expected[0]
    assert same.mean() > 0.999
    np.testing.assert_allclose(planes[1:, same] / 255, expected[1:, same], atol=0.5 / 255 + 1e-5)


@pytest.mark.parametrize("rule", [RULE, DensePoseRule(), DensePoseRule(num_coarse=15, up_scale=1)])
def test_a_chart_has_what_densepose_says_of_each_pixel_of_a_small_box(rule: DensePoseRule) -> None:
    boxes, maps = torch.tensor(BOXES), smooth_maps(len(BOXES), rule)
    found = cut_charts(make_charts(maps[None], boxes[None], rule)[0], boxes.numpy())
    for chart, (x1, y1, x2, y2), own in zip(found, BOXES, maps, strict=True):
        width, height = max(int(x2 - x1), 1), max(int(y2 - y1), 1)
        assert chart.box == (int(x1), int(y1), width, height)
        assert_same(chart.planes, as_densepose_does(own, (height, width), rule))
    assert found[0].planes[0].max() > 0 and found[0].planes[0].min() == 0, "a comparison of nothing"


def test_the_longer_side_of_a_large_box_has_as_many_cells_as_a_chart_may_have() -> None:
    boxes = torch.tensor([[20.0, 10.0, 324.4, 610.9], [0.0, 0.0, 4000.0, 2.0]])
    maps = smooth_maps(2)
    tall, flat = cut_charts(make_charts(maps[None], boxes[None], RULE)[0], boxes.numpy())
    assert tall.box == (20, 10, 304, 600) and tall.planes.shape == (3, 128, 65)
    assert flat.box == (0, 0, 4000, 2) and flat.planes.shape == (3, 1, 128)
    assert_same(tall.planes, as_densepose_does(maps[0], (128, 65), RULE))
    assert MAX_SIDE == charts.MAX_SIDE, "what the daemon makes is what a reader takes"


def test_no_box_has_a_chart_that_is_larger_than_the_limit_or_empty() -> None:
    sides = torch.arange(1, 700)
    whole = torch.stack(torch.meshgrid(torch.tensor([0]), torch.tensor([0]), sides, sides[::7], indexing="ij"))
    sizes = chart_sizes(whole.flatten(1).T)
    assert sizes.min() >= 1 and sizes.max() == MAX_SIDE


def test_a_box_gives_the_same_alone_and_among_many() -> None:
    boxes, maps = torch.tensor(BOXES).repeat(5, 1), smooth_maps(20)
    together = make_charts(maps.reshape(2, 10, *maps.shape[1:]), boxes.reshape(2, 10, 4), RULE)
    assert list(together.shape) == [2, 10, 3, MAX_SIDE, MAX_SIDE] and together.dtype == torch.uint8
    for index, chart in enumerate(together.flatten(0, 1)):
        alone = make_charts(maps[index][None, None], boxes[index][None, None], RULE)[0, 0]
        assert (alone != chart).float().mean() < 1e-4


def test_outside_of_its_cells_a_chart_is_zero() -> None:
    chart = make_charts(smooth_maps(1)[None], torch.tensor([[BOXES[0]]]), RULE)[0, 0]
    height, width = chart_sizes(whole_boxes(torch.tensor(BOXES[0]))).tolist()
    assert (height, width) == (66, 36)
    assert not chart[:, height:].any() and not chart[:, :, width:].any() and chart[:, :height, :width].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_on_a_gpu_makes_the_charts_that_the_cpu_makes() -> None:
    boxes, maps = torch.tensor(BOXES)[None], smooth_maps(len(BOXES))[None]
    stream, on_gpu = torch.cuda.Stream(), (maps.cuda(), boxes.cuda())
    graph = Graph(lambda: make_charts(*on_gpu, RULE), stream)
    with torch.cuda.stream(stream):
        made = graph.replay()
    stream.synchronize()
    # Where rounding decides, a part or a step of U or V may differ.
    assert (made.cpu() != make_charts(maps, boxes, RULE)).float().mean() < 1e-3


def test_no_boxes_have_no_charts() -> None:
    empty = make_charts(torch.zeros(2, 0, RULE.num_channels, 4, 4), torch.zeros(2, 0, 4), RULE)
    assert list(empty.shape) == [2, 0, 3, MAX_SIDE, MAX_SIDE]
