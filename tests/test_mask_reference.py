"""Pasted masks against explicit oracles and Detectron2's way to call grid_sample."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.gpu.mask_reference import paste_boxes, paste_prototypes
from streamd.gpu.rle import Bits
from streamd.messages import Letterbox
from tests.test_reference import bilinear

repeatable = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


def pasted(bits: Bits, height: int, width: int) -> np.ndarray:
    rows, columns = bits.bits.shape
    frame = np.zeros((height, width), dtype=bool)
    frame[bits.y0 : bits.y0 + rows, bits.x0 : bits.x0 + columns] = bits.bits.numpy()
    return frame


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Make boxes in and around a frame, half of them on half pixels, some empty."""
    corners = rng.uniform([-8, -8], [width + 4, height + 4], (count, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(0, 20, (count, 2))), axis=1)
    boxes[::2] = np.round(boxes[::2] * 2) / 2
    boxes[3::4, 2:] = boxes[3::4, :2]
    return boxes.astype(np.float32)


@repeatable
@given(seed=seeds, count=st.integers(0, 6), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_prototype_masks_are_sampled_at_each_pixel_centre(seed: int, count: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    height, width, input_size, threshold = 13, 17, (24, 20), 0.4
    letterbox = Letterbox(20 / 17, 20 / 17, 0, 4, 20, 15)
    prototypes, coefficients = rng.normal(size=(3, *grid)), rng.normal(size=(count, 3))
    boxes = random_boxes(rng, count, height, width)
    masks = paste_prototypes(
        torch.tensor(prototypes, dtype=torch.float32),
        torch.tensor(coefficients, dtype=torch.float32),
        torch.from_numpy(boxes),
        torch.tensor([letterbox.scale_x, letterbox.scale_y, letterbox.left, letterbox.top, width, height]),
        input_size,
        threshold,
    )
    assert len(masks) == count
    limit = math.log(threshold / (1 - threshold))
    for mask, box, mix in zip(masks, boxes, coefficients, strict=True):
        logits = np.einsum("p,phw->hw", mix, prototypes)
        frame = pasted(mask, height, width)
        for y, x in product(range(height), range(width)):
            inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
            grid_y = ((y + 0.5) * letterbox.scale_y + letterbox.top) * grid[0] / input_size[0] - 0.5
            grid_x = ((x + 0.5) * letterbox.scale_x + letterbox.left) * grid[1] / input_size[1] - 0.5
            logit = bilinear(logits, grid_y, grid_x)
            if abs(logit - limit) > 1e-4:  # closer than float32 can tell
                assert frame[y, x] == (inside and logit > limit), (y, x)


@repeatable
@given(seed=seeds, count=st.integers(0, 6), size=st.sampled_from([1, 2, 5]), threshold=st.sampled_from([0.3, 0.5, 0.7]))
def test_box_masks_are_stretched_over_their_boxes(seed: int, count: int, size: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    height, width = 13, 17
    masks, boxes = rng.random((count, size, size)), random_boxes(rng, count, height, width)
    bits = paste_boxes(torch.tensor(masks, dtype=torch.float32), torch.from_numpy(boxes), width, height, threshold)
    assert len(bits) == count
    for mask, box, region in zip(masks, boxes.astype(np.float64), bits, strict=True):
        frame = pasted(region, height, width)
        ringed = np.pad(mask, 1)
        for y, x in product(range(height), range(width)):
            near = math.floor(box[0]) - 1 <= x < math.ceil(box[2]) + 1
            near &= math.floor(box[1]) - 1 <= y < math.ceil(box[3]) + 1
            if not near or box[2] <= box[0] or box[3] <= box[1]:
                assert not frame[y, x]
                continue
            mask_y = (y + 0.5 - box[1]) / (box[3] - box[1]) * size + 0.5
            mask_x = (x + 0.5 - box[0]) / (box[2] - box[0]) * size + 0.5
            value = bilinear(ringed, mask_y, mask_x)
            if abs(value - threshold) > 1e-4:
                assert frame[y, x] == (value >= threshold), (y, x)


def test_box_masks_equal_grid_sample_as_detectron2_calls_it() -> None:
    rng = torch.Generator().manual_seed(6)
    height, width = 60, 80
    masks = torch.rand(8, 28, 28, generator=rng)
    corners = torch.rand(8, 2, generator=rng) * 50 - 5
    boxes = torch.cat((corners, corners + 3 + torch.rand(8, 2, generator=rng) * 60), dim=1)
    for mask, box, bits in zip(masks, boxes, paste_boxes(masks, boxes, width, height, 0.5), strict=True):
        grid_y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid_x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.meshgrid(grid_x, grid_y, indexing="xy"), dim=-1)
        value = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0].numpy()
        differs = pasted(bits, height, width) != (value >= 0.5)
        assert (np.abs(value[differs] - 0.5) < 1e-4).all()


@pytest.mark.parametrize(
    "spoilt", [[0, 0, math.nan, 5], [math.nan] * 4, [-math.inf, 0, 5, 5], [5, 5, 1, 1], [3, 3, 3, 9]]
)
def test_masks_of_senseless_boxes_are_empty(spoilt: list[float]) -> None:
    boxes = torch.tensor([spoilt, [-1e30, -1e30, 1e30, 1e30]])
    for bits in (
        paste_boxes(torch.ones(2, 4, 4), boxes, 10, 8, 0.5),
        paste_prototypes(
            torch.ones(1, 2, 2), torch.ones(2, 1), boxes, torch.tensor([1.0, 1.0, 0.0, 0.0, 10.0, 8.0]), (8, 10), 0.5
        ),
    ):
        assert bits[0].bits.numel() == 0
        assert bits[1].bits.all() and bits[1].bits.shape == (8, 10)


def test_masks_of_neighbouring_boxes_neither_overlap_nor_leave_a_gap() -> None:
    edges = [0.0, 2.5, 3.3, 7.0, 10.0]
    boxes = torch.tensor([[left, 0.0, right, 4.0] for left, right in pairwise(edges)])
    masks = paste_prototypes(
        torch.ones(1, 2, 2), torch.ones(4, 1), boxes, torch.tensor([1.0, 1.0, 0.0, 0.0, 10.0, 4.0]), (4, 10), 0.5
    )
    np.testing.assert_array_equal(np.sum([pasted(mask, 4, 10) for mask in masks], axis=0), np.ones((4, 10)))
