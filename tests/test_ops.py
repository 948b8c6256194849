"""`streamd::nms`: what it keeps, against torchvision and by hand, and how torch sees it."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms

from streamd.gpu import ops, reference

repeatable = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


def grid_candidates(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make boxes on a coarse grid, so that equal scores, equal boxes, empty boxes and exact thresholds are common."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, (count, 2))
    boxes = np.concatenate((corners, corners + rng.integers(0, 6, (count, 2))), axis=1)
    scores = rng.integers(0, 9, count) / 8
    return (
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(rng.integers(0, 3, count)),
    )


def kept_of(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score: float, limit: int) -> list[int]:
    keep, count = ops.nms(boxes[None], scores[None], labels[None], iou, score, limit)
    assert keep.shape == (1, limit) and keep.dtype == count.dtype == torch.int64
    assert (keep[0, count[0] :] == -1).all()
    return keep[0, : count[0]].tolist()


def kept_by_torchvision(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score: float) -> list[int]:
    candidates = torch.nonzero(scores >= score)[:, 0]
    kept = batched_nms(boxes[candidates], scores[candidates], labels[candidates], iou)
    return sorted(candidates[kept].tolist(), key=lambda index: (-scores[index].item(), index))


def kept_by_hand(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score: float) -> list[int]:
    """Suppress one pair at a time, in float32 scalars."""
    b = boxes.numpy()
    ranked = [i for i in range(len(b)) if scores[i] >= score and all(map(math.isfinite, (scores[i], *b[i])))]
    ranked.sort(key=lambda i: (-scores[i].item(), i))
    kept: list[int] = []
    for i in ranked:
        if all(labels[i] != labels[j] or not overlap(b[j], b[i]) > iou for j in kept):
            kept.append(i)
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    zero = np.float32(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return float(width * height / union) if union else math.nan


thresholds = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1 / 3, 0.45, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 1.0])


@repeatable
@given(seed=seeds, count=st.sampled_from([0, 1, 2, 7, 60, 300]), iou=thresholds, score=thresholds)
def test_nms_keeps_what_torchvision_keeps_among_ties_and_empty_boxes(
    seed: int, count: int, iou: float, score: float
) -> None:
    candidates = grid_candidates(seed, count)
    expected = kept_by_torchvision(*candidates, iou, score)
    assert kept_of(*candidates, iou, score, 500) == expected
    assert kept_of(*candidates, iou, score, 5) == expected[:5]


@pytest.mark.parametrize(("count", "num_labels"), [(3000, 80), (3000, 1), (10_000, 80)])
def test_nms_keeps_what_torchvision_keeps_of_thousands(count: int, num_labels: int) -> None:
    rng = torch.Generator().manual_seed(count + num_labels)
    corners = torch.rand(count, 2, generator=rng) * 600
    boxes = torch.cat((corners, corners + torch.rand(count, 2, generator=rng) * 80), dim=1)
    scores, labels = torch.rand(count, generator=rng), torch.randint(num_labels, (count,), generator=rng)
    expected = kept_by_torchvision(boxes, scores, labels, 0.45, 0.05)
    assert kept_of(boxes, scores, labels, 0.45, 0.05, 10_000) == expected
    assert kept_of(boxes, scores, labels, 0.45, 0.05, 100) == expected[:100]


@repeatable
@given(seed=seeds, count=st.integers(1, 40), iou=thresholds)
def test_nms_ignores_candidates_that_are_not_finite(seed: int, count: int, iou: float) -> None:
    boxes, scores, labels = grid_candidates(seed, count)
    rng = np.random.default_rng(seed)
    spoilt = torch.from_numpy(rng.random(boxes.shape) < 0.1)
    boxes[spoilt] = torch.tensor(rng.choice([np.nan, np.inf, -np.inf], int(spoilt.sum())), dtype=torch.float32)
    scores[torch.from_numpy(rng.random(count) < 0.1)] = torch.nan
    scores[torch.from_numpy(rng.random(count) < 0.1)] = torch.inf
    assert kept_of(boxes, scores, labels, iou, 0.2, 50) == kept_by_hand(boxes, scores, labels, iou, 0.2)


def test_nms_decides_at_the_threshold_as_torchvision_does() -> None:
    # IoU is exactly 3/10 and 9/20; rounded to float32 the first is above the double 0.3, the second below 0.45.
    boxes = torch.tensor([[0, 0, 10, 1], [0, 0, 3, 1], [50, 0, 70, 1], [50, 0, 59, 1]], dtype=torch.float32)
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64)
    for iou in (0.3, 0.45):
        assert kept_of(boxes, scores, labels, iou, 0.0, 4) == kept_by_torchvision(boxes, scores, labels, iou, 0.0)


def test_nms_survives_boxes_whose_area_overflows() -> None:
    boxes = torch.tensor([[-3e38, -3e38, 3e38, 3e38], [0, 0, 1e30, 1e30], [0, 0, 1, 1]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    assert kept_of(boxes, scores, labels, 0.5, 0.0, 3) == kept_by_torchvision(boxes, scores, labels, 0.5, 0.0)


def test_nms_treats_each_image_alone() -> None:
    images = [grid_candidates(seed, 30) for seed in range(4)]
    images[2][1].zero_()
    boxes, scores, labels = (torch.stack(field) for field in zip(*images, strict=True))
    keep, count = ops.nms(boxes, scores, labels, 0.5, 0.3, 6)
    for row, number, image in zip(keep, count, images, strict=True):
        assert row[:number].tolist() == kept_of(*image, 0.5, 0.3, 6)
    assert count[2] == 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nms_of_nothing_is_nothing(shape: tuple[int, int]) -> None:
    keep, count = ops.nms(
        torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), 0.5, 0.3, 3
    )
    assert keep.tolist() == [[-1] * 3] * shape[0] and count.tolist() == [0] * shape[0]


def candidates() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, generator=rng) * 20
    boxes = torch.cat((corners, corners + 8), dim=-1)
    return boxes, torch.rand(2, 50, generator=rng), torch.randint(3, (2, 50), generator=rng)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    keep, count = torch.ops.streamd.nms(boxes, scores, labels, 0.45, 0.3, 10)
    result: Tensor = keep[:, 0] + count
    return result


def test_the_operator_gives_what_the_reference_gives() -> None:
    for ours, theirs in zip(
        ops.nms(*candidates(), 0.45, 0.3, 10), reference.nms(*candidates(), 0.45, 0.3, 10), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_function_can_call_the_operator() -> None:
    scripted = torch.jit.script(suppress)
    assert "streamd::nms" in str(scripted.graph)
    assert torch.equal(scripted(*candidates()), suppress(*candidates()))


def test_the_operator_obeys_its_schema_and_knows_its_shapes() -> None:
    torch.library.opcheck(
        torch.ops.streamd.nms, (*candidates(), 0.45, 0.3, 10), test_utils=("test_schema", "test_faketensor")
    )


def test_a_tensor_without_data_gives_shapes() -> None:
    boxes, scores, labels = (tensor.to("meta") for tensor in candidates())
    keep, count = ops.nms(boxes, scores, labels, 0.45, 0.3, 10)
    assert (keep.shape, count.shape) == ((2, 10), (2,))
    assert keep.dtype == count.dtype == torch.int64


def test_the_module_can_be_imported_again() -> None:
    importlib.reload(ops)
    assert ops.nms(*candidates(), 0.45, 0.3, 10)[0].shape == (2, 10)
