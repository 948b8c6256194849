"""Both ways to pool from several levels give the same, and torch knows the operator that a trace holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamd.gpu import pooling
from streamd.models.roi_pooler import PoolerConfig, RoiPooler
from tests.test_roi_pooler import random_boxes, random_features

STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]
POOLER = RoiPooler(PoolerConfig(7, 2), STRIDES)


def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    boxes = random_boxes()
    return random_features(STRIDES), boxes, POOLER.levels(boxes)


@pytest.mark.parametrize(("kind", "sampling_ratio"), [("align", 0), ("align", 2), ("max", 0)])
def test_the_way_of_a_gpu_gives_what_picking_out_gives(
    kind: str, sampling_ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = pooling.pool_levels(*inputs(), SCALES, 7, sampling_ratio, kind)
    monkeypatch.setattr(pooling, "_pool_own", pooling._pool_all)
    torch.testing.assert_close(pooling.pool_levels(*inputs(), SCALES, 7, sampling_ratio, kind), picked)


def test_maps_in_channels_last_memory_pool_the_same() -> None:
    features, boxes, levels = inputs()
    turned = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    expected, pooled = (pooling.pool_levels(maps, boxes, levels, SCALES, 7, 2, "align") for maps in (features, turned))
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("kind", ["align", "align_unshifted"])
def test_gradients_of_the_maps_are_torchvisions(kind: str) -> None:
    features, boxes, levels = inputs()
    for feature in features:
        feature.requires_grad_()
    expected = torch.stack(
        [
            torch.ops.torchvision.roi_align(feature, pooling._rois(boxes), scale, 7, 7, 2, kind == "align")
            * (levels.flatten() == level)[:, None, None, None]
            for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True))
        ]
    ).sum(0)
    pooled = pooling.pool_levels(features, boxes, levels, SCALES, 7, 2, kind)
    torch.testing.assert_close(pooled, expected)
    weights = torch.rand_like(expected)
    for got, wanted in zip(
        torch.autograd.grad((pooled * weights).sum(), features),
        torch.autograd.grad((expected * weights).sum(), features),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_level_without_boxes_pools_nothing() -> None:
    features, boxes, levels = inputs()
    broken = [features[0], *(torch.full_like(feature, torch.nan) for feature in features[1:])]
    pooled = pooling.pool_levels(broken, boxes, torch.zeros_like(levels), SCALES, 7, 2, "align")
    assert pooled.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_trace_holds_the_operator_and_serves_other_numbers_of_boxes() -> None:
    features, boxes, _ = inputs()
    traced = torch.jit.trace(lambda *arguments: POOLER(arguments[:-1], arguments[-1]), (*features, boxes))
    assert "streamd::pool_levels" in str(traced.graph)
    fewer = boxes[:, :7]
    torch.testing.assert_close(traced(*features, fewer), POOLER(features, fewer))


def test_the_operator_obeys_its_schema_and_knows_its_shapes() -> None:
    arguments = (*inputs(), SCALES, 7, 2, "align")
    torch.library.opcheck(torch.ops.streamd.pool_levels, arguments, test_utils=("test_schema", "test_faketensor"))
