"""Heat maps become points: the twin against what it must mean, the kernel against the twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from streamd.gpu import keypoints, ops
from streamd.gpu.reference import MAX_BOX_SIDE_PX, locate_keypoints

SIZE = 14


def peak_map(row: int, column: int, value: float = 8.0) -> Tensor:
    heatmap = torch.zeros(SIZE, SIZE)
    heatmap[row, column] = value
    return heatmap


def test_the_best_element_of_a_map_is_its_point_where_the_box_has_the_size_of_the_map() -> None:
    heatmaps = torch.stack((peak_map(3, 5), peak_map(13, 0)))[None, None]
    points = locate_keypoints(heatmaps, torch.tensor([[[100.0, 200.0, 100.0 + SIZE, 200.0 + SIZE]]]))
    torch.testing.assert_close(points[0, 0, :, :2], torch.tensor([[105.5, 203.5], [100.5, 213.5]]))
    torch.testing.assert_close(points[0, 0, :, 2], heatmaps[0, 0].flatten(1).softmax(1).amax(1))


def test_a_point_stays_at_its_place_in_the_box_when_the_box_grows() -> None:
    for factor in (0.5, 3.0, 10.3):
        side = SIZE * factor
        ((found,),) = locate_keypoints(peak_map(6, 2)[None, None, None], torch.tensor([[[0.0, 0.0, side, side]]]))
        assert found[0, :2].tolist() == pytest.approx([2.5 * factor, 6.5 * factor], abs=max(1.0, factor / 2))


def test_a_box_is_rounded_up_to_whole_pixels_and_its_points_are_scaled_back() -> None:
    ((found,),) = locate_keypoints(peak_map(0, SIZE - 1)[None, None, None], torch.tensor([[[2.0, 3.0, 15.1, 16.1]]]))
    assert found[0, :2].tolist() == pytest.approx([2 + 13.5 * 13.1 / 14, 3 + 0.5 * 13.1 / 14], rel=1e-6)


def test_the_first_of_equal_points_counts() -> None:
    flat = torch.zeros(1, 1, 1, SIZE, SIZE)
    ((found,),) = locate_keypoints(flat, torch.tensor([[[0.0, 0.0, 40.0, 30.0]]]))
    assert found[0].tolist() == pytest.approx([0.5, 0.5, 1 / SIZE**2])


SENSELESS = [
    [0.0, 0.0, 0.0, 0.0],
    [5.0, 5.0, 5.0, 9.0],
    [9.0, 5.0, 5.0, 9.0],
    [0.0, 0.0, torch.nan, 9.0],
    [0.0, 0.0, MAX_BOX_SIDE_PX + 1.0, 9.0],
    [0.0, 0.0, torch.inf, 9.0],
]


def test_a_box_without_area_or_beyond_all_bounds_gets_zeros(device: torch.device) -> None:
    boxes, heatmaps = torch.tensor([SENSELESS], device=device), torch.randn(1, len(SENSELESS), 3, 8, 8, device=device)
    for locate in (keypoints.locate_keypoints, locate_keypoints):
        assert (locate(heatmaps, boxes) == 0).all()


def test_memory_stays_bounded_for_a_box_as_large_as_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    interpolate, sizes = F.interpolate, []

    def watched(maps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        stretched: Tensor = interpolate(maps, *arguments, **options)
        sizes.append(stretched.numel())
        return stretched

    monkeypatch.setattr(F, "interpolate", watched)
    locate_keypoints(torch.randn(1, 1, 17, 56, 56), torch.tensor([[[0.0, 0.0, 1333.0, 800.0]]]))
    assert max(sizes) <= 1333 * 800 and len(sizes) == 17


def stretched(heatmap: Tensor, box: Tensor) -> Tensor:
    width, height = (box[2:] - box[:2]).clamp(min=1).ceil().int().tolist()
    return F.interpolate(heatmap[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 2, 14, 56]), half=st.booleans())
def test_the_kernel_finds_a_point_as_good_as_the_best(device: torch.device, seed: int, size: int, half: bool) -> None:
    rng = np.random.default_rng(seed)
    heatmaps = torch.from_numpy(rng.normal(size=(2, 3, 2, size, size)) * 3).to(torch.float16 if half else torch.float32)
    corners = rng.uniform(0, 30, (2, 3, 2))
    boxes = torch.from_numpy(np.concatenate((corners, corners + rng.uniform(0, 70, (2, 3, 2))), axis=-1)).float()
    ours = keypoints.locate_keypoints(heatmaps.to(device), boxes.to(device)).cpu()
    twins = locate_keypoints(heatmaps, boxes)
    torch.testing.assert_close(ours[..., 2], twins[..., 2], rtol=1e-4, atol=1e-6)
    for index in np.ndindex(2, 3, 2):
        box = boxes[index[:2]]
        shown = stretched(heatmaps[index].float(), box)
        sides = (box[2:] - box[:2]).clamp(min=1)
        column, row = ((ours[index][:2] - box[:2]) * (sides.ceil() / sides) - 0.5).round().int().tolist()
        assert shown[row, column] >= shown.max() - 1e-4


@pytest.mark.parametrize("shape", [(0, 3, 17), (2, 0, 17), (2, 3, 0)])
def test_no_maps_give_no_points(device: torch.device, shape: tuple[int, int, int]) -> None:
    heatmaps, boxes = torch.zeros(*shape, 8, 8, device=device), torch.zeros(*shape[:2], 4, device=device)
    assert keypoints.locate_keypoints(heatmaps, boxes).shape == locate_keypoints(heatmaps, boxes).shape == (*shape, 3)


def test_maps_and_boxes_that_do_not_fit_are_refused(cuda_on_cpu: None) -> None:
    with pytest.raises(ValueError, match=r"not \[1, 2, 3, 8, 8\] and \[1, 3, 4\]"):
        keypoints.locate_keypoints(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="200 x 200 are too large"):
        keypoints.locate_keypoints(torch.zeros(1, 1, 1, 200, 200), torch.zeros(1, 1, 4))


def test_the_operator_runs_where_its_tensors_are() -> None:
    heatmaps, boxes = torch.randn(1, 2, 3, 8, 8), torch.tensor([[[0.0, 0.0, 20.0, 9.0], [3.0, 3.0, 4.0, 4.0]]])
    torch.testing.assert_close(ops.locate_keypoints(heatmaps, boxes), locate_keypoints(heatmaps, boxes))
