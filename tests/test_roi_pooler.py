"""Pooling from the levels of a pyramid against a loop over boxes."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from streamd.models.roi_pooler import PoolerConfig, RoiPooler

Kind = Literal["align", "align_unshifted", "max"]


def random_features(strides: tuple[int, ...], height: int = 512, width: int = 576) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, height // stride, width // stride, generator=random) for stride in strides]


def random_boxes(num_boxes: int = 60, height: int = 512, width: int = 576) -> Tensor:
    """Make boxes [2,N,4] of all sizes, so that each level has some."""
    random = torch.Generator().manual_seed(1)
    sides = torch.rand(2, num_boxes, 2, generator=random) ** 2 * torch.tensor([width, height])
    corner = torch.rand(2, num_boxes, 2, generator=random) * (torch.tensor([width, height]) - sides)
    return torch.cat((corner, corner + sides), dim=-1)


def pool_one_by_one(
    features: list[Tensor], boxes: Tensor, strides: tuple[int, ...], config: PoolerConfig
) -> tuple[Tensor, set[int]]:
    """Return what each box pools, and the levels that were used."""
    pooled, used = [], set()
    for image, row in itertools.product(*map(range, boxes.shape[:2])):
        box = boxes[image, row]
        side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
        level = int((4 + (side / 224 + 1e-8).log2()).floor())
        index = min(max(level - strides[0].bit_length() + 1, 0), len(strides) - 1)
        used.add(index)
        feature, scale = features[index][image : image + 1], 1 / strides[index]
        if config.kind == "max":
            pooled.append(roi_pool(feature, [box[None]], config.resolution, scale))
        else:
            aligned = config.kind == "align"
            ratio = config.sampling_ratio
            pooled.append(roi_align(feature, [box[None]], config.resolution, scale, ratio, aligned))
    return torch.cat(pooled), used


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (16,)])
@pytest.mark.parametrize(("kind", "sampling_ratio"), [("align", 0), ("align", 2), ("align_unshifted", 0), ("max", 0)])
def test_each_box_is_pooled_from_the_level_of_its_size(
    strides: tuple[int, ...], kind: Kind, sampling_ratio: int
) -> None:
    config = PoolerConfig(7, sampling_ratio, kind)
    features, boxes = random_features(strides), random_boxes()
    pooled = RoiPooler(config, strides)(features, boxes)
    expected, used = pool_one_by_one(features, boxes, strides, config)
    torch.testing.assert_close(pooled, expected)
    assert used == set(range(len(strides)))


def test_levels_change_at_the_canonical_size_times_powers_of_two() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sides, sides), dim=-1)
    assert RoiPooler(PoolerConfig(7), (4, 8, 16, 32)).levels(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_zero_boxes_pool_zeros() -> None:
    strides = (4, 8, 16, 32)
    pooled = RoiPooler(PoolerConfig(7), strides)(random_features(strides), torch.zeros(2, 3, 4))
    assert pooled.shape == (6, 5, 7, 7)
    assert (pooled == 0).all()


def test_no_boxes_give_no_rows() -> None:
    strides = (4, 8)
    assert RoiPooler(PoolerConfig(3), strides)(random_features(strides), torch.zeros(2, 0, 4)).shape == (0, 5, 3, 3)


def test_half_precision_features_are_pooled_at_boxes_of_single_precision() -> None:
    strides = (4, 8, 16, 32)
    pooler = RoiPooler(PoolerConfig(7), strides)
    features, boxes = random_features(strides), random_boxes()
    pooled = pooler([x.half() for x in features], boxes)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), pooler(features, boxes), rtol=2e-3, atol=2e-3)


def test_gradients_reach_every_level() -> None:
    strides = (4, 8, 16, 32)
    features = [x.requires_grad_() for x in random_features(strides)]
    RoiPooler(PoolerConfig(7), strides)(features, random_boxes()).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in features)


@pytest.mark.parametrize("strides", [(4, 16), (6, 12), (8, 4)])
def test_strides_that_are_not_doubling_powers_of_two_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot pool from strides"):
        RoiPooler(PoolerConfig(7), strides)
