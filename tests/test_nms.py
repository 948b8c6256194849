"""The kernels of `streamd::nms` against their twin: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamd.gpu import nms, ops, reference

repeatable = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
thresholds = st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 1 / 3, 0.45, 0.5, 2 / 3, 0.75, 1.0])

Candidates = tuple[Tensor, Tensor, Tensor]


def grid_candidates(seed: int, num_images: int, count: int, labels: list[int] | int = 3) -> Candidates:
    """Make boxes on a coarse grid, so that equal scores, equal boxes, empty boxes and exact thresholds are common."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, (num_images, count, 2))
    boxes = np.concatenate((corners, corners + rng.integers(0, 6, corners.shape)), axis=-1)
    scores = rng.integers(-1, 9, (num_images, count)) / 8
    chosen = rng.choice(np.asarray(labels if isinstance(labels, list) else range(labels)), (num_images, count))
    return torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), torch.from_numpy(chosen)


def crowd(seed: int, num_images: int, count: int, num_labels: int, spread_px: float = 600.0) -> Candidates:
    """Make boxes of up to 80 pixels in a square of `spread_px`, with scores of which nearly none are equal."""
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_images, count, 2, generator=rng) * spread_px
    boxes = torch.cat((corners, corners + torch.rand(corners.shape, generator=rng) * 80), dim=-1)
    scores = torch.rand(num_images, count, generator=rng)
    return boxes, scores, torch.randint(num_labels, (num_images, count), generator=rng)


def on(device: torch.device, candidates: Candidates) -> Candidates:
    boxes, scores, labels = candidates
    return boxes.to(device), scores.to(device), labels.to(device)


def agrees(device: torch.device, candidates: Candidates, iou: float, score: float, limit: int) -> Tensor:
    """Hold the kernels to their twin; return how many were kept."""
    boxes, scores, labels = on(device, candidates)
    ours = nms.nms(boxes, scores, labels, iou, score, limit)
    theirs = reference.nms(*candidates, iou, score, limit)
    for our, their in zip(ours, theirs, strict=True):
        assert our.device == device and our.dtype == torch.int64
        assert torch.equal(our.cpu(), their)
    return theirs[1]


@repeatable
@given(
    seed=seeds,
    num_images=st.integers(0, 3),
    count=st.sampled_from([0, 1, 2, 3, 31, 32, 33, 60, 255, 256, 257, 300]),
    iou=thresholds,
    score=thresholds,
    limit=st.sampled_from([0, 1, 5, 32, 500]),
)
def test_nms_keeps_what_its_twin_keeps_among_ties_and_empty_boxes(
    device: torch.device, seed: int, num_images: int, count: int, iou: float, score: float, limit: int
) -> None:
    agrees(device, grid_candidates(seed, num_images, count), iou, score, limit)


@pytest.mark.parametrize("count", [2047, 2048, 2049, 5000])
@pytest.mark.parametrize("num_labels", [1, 80])
@pytest.mark.parametrize("limit", [100, 5000])
def test_nms_keeps_what_its_twin_keeps_of_thousands(
    device: torch.device, count: int, num_labels: int, limit: int
) -> None:
    assert agrees(device, crowd(count, 2, count, num_labels), 0.45, 0.05, limit).min() >= 100


def test_nms_sweeps_a_crowd_of_one_label_through_many_tiles(device: torch.device) -> None:
    kept = agrees(device, crowd(1, 1, 3000, 1, spread_px=90.0), 0.6, 0.0, 3000)
    assert 100 < kept.item() < 1500


def test_nms_keeps_all_where_nothing_overlaps(device: torch.device) -> None:
    boxes = torch.arange(1301.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    scores = torch.rand(1301, generator=torch.Generator().manual_seed(9))
    assert agrees(device, (boxes[None], scores[None], torch.zeros(1, 1301).long()), 0.5, 0.0, 1301).item() == 1301


def test_nms_takes_few_of_very_many(device: torch.device) -> None:
    boxes, scores, labels = crowd(2, 1, 100_000, 80)
    assert agrees(device, (boxes, scores**4, labels), 0.5, 0.98, 300).item() > 100


@repeatable
@given(seed=seeds, limit=st.sampled_from([3, 400]))
def test_labels_are_any_number_and_meet_only_their_own(device: torch.device, seed: int, limit: int) -> None:
    labels = [0, 64, 128, -64, 5, -5, -(2**63), 2**63 - 1, 2**40, 2**40 + 64]  # most in one group of the kernel
    agrees(device, grid_candidates(seed, 2, 350, labels), 0.3, 0.0, limit)


@repeatable
@given(seed=seeds, count=st.integers(1, 90), iou=thresholds)
def test_nms_ignores_candidates_that_are_not_finite(device: torch.device, seed: int, count: int, iou: float) -> None:
    boxes, scores, labels = grid_candidates(seed, 2, count)
    rng = np.random.default_rng(seed)
    spoilt = torch.from_numpy(rng.random(boxes.shape) < 0.1)
    boxes[spoilt] = torch.tensor(rng.choice([np.nan, np.inf, -np.inf], int(spoilt.sum())), dtype=torch.float32)
    for value in (torch.nan, torch.inf, -torch.inf):
        scores[torch.from_numpy(rng.random(scores.shape) < 0.1)] = value
    agrees(device, (boxes, scores, labels), iou, 0.2, 50)
    agrees(device, (boxes, scores, labels), iou, -math.inf, 50)


def test_zeros_of_either_sign_are_ties(device: torch.device) -> None:
    boxes = torch.arange(5.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    scores = torch.tensor([[-0.0, 0.0, -0.0, 1e-45, -1e-45]])
    labels = torch.zeros(1, 5, dtype=torch.int64)
    agrees(device, (boxes[None], scores, labels), 0.5, -1.0, 5)
    agrees(device, (boxes[None], scores, labels), 0.5, 0.0, 5)
    assert reference.nms(boxes[None], scores, labels, 0.5, -1.0, 5)[0].tolist() == [[3, 0, 1, 2, 4]]


def test_nms_decides_at_the_thresholds_as_its_twin_does(device: torch.device) -> None:
    # IoU is exactly 3/10 and 9/20; rounded to float32 the first is above the double 0.3, the second below 0.45.
    boxes = torch.tensor([[[0, 0, 10, 1], [0, 0, 3, 1], [50, 0, 70, 1], [50, 0, 59, 1]]], dtype=torch.float32)
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.zeros(1, 4, dtype=torch.int64)
    for iou in (0.3, 0.45, math.nan):
        for score in (0.0, 0.6, 0.7, math.nan):
            agrees(device, (boxes, scores, labels), iou, score, 4)


def test_nms_survives_boxes_whose_area_overflows(device: torch.device) -> None:
    boxes = torch.tensor([[[-3e38, -3e38, 3e38, 3e38], [-3e38, 0, 3e38, 0], [0, 0, 1e30, 1e30], [0, 0, 1, 1]]])
    scores, labels = torch.tensor([[0.9, 0.85, 0.8, 0.7]]), torch.zeros(1, 4, dtype=torch.int64)
    agrees(device, (boxes, scores, labels), 0.5, 0.0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read_as_float32(device: torch.device, dtype: torch.dtype) -> None:
    boxes, scores, labels = crowd(3, 2, 400, 4, spread_px=200.0)
    agrees(device, (boxes.to(dtype), scores.to(dtype), labels), 0.5, 0.3, 100)


def test_views_are_read_by_their_strides(device: torch.device) -> None:
    head = torch.rand(2, 7, 50, generator=torch.Generator().manual_seed(4)) * 20
    boxes, scores, labels = head[:, 1:5].transpose(1, 2), head[:, 5], head[:, 6].long()
    agrees(device, (boxes, scores, labels), 0.1, 0.0, 20)


def test_boxes_may_begin_at_any_float(device: torch.device) -> None:
    boxes, scores, labels = grid_candidates(5, 1, 40)
    shifted = torch.empty(161, device=device)[1:].view(1, 40, 4).copy_(boxes)
    keep, _ = nms.nms(shifted, scores.to(device), labels.to(device), 0.3, 0.1, 9)
    assert torch.equal(keep.cpu(), reference.nms(boxes, scores, labels, 0.3, 0.1, 9)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b, s, n: (b[..., :3], s, n), r"boxes \[2, 5, 3\]"),
        (lambda b, s, n: (b, s[0], n), r"scores \[5\]"),
        (lambda b, s, n: (b, s, n[:, :4]), r"labels \[2, 4\]"),
        (lambda b, s, n: (b, s, n.int()), "labels of int64, not .*int32"),
        (lambda b, s, n: (b.int(), s, n), "floating type"),
        (lambda b, s, n: (b, s.to("meta"), n), "one device, not of cpu, meta, cpu"),
    ],
)
@pytest.mark.usefixtures("cuda_on_cpu")
def test_tensors_that_do_not_fit_together_are_refused(
    spoil: Callable[[Tensor, Tensor, Tensor], Candidates], message: str
) -> None:
    boxes, scores, labels = spoil(*grid_candidates(6, 2, 5))
    with pytest.raises(ValueError, match=message):
        nms.nms(boxes, scores, labels, 0.5, 0.1, 3)


def test_the_operator_is_there_for_both_kinds_of_device() -> None:
    for kind in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("streamd::nms", kind)


@pytest.mark.gpu
def test_the_operator_runs_in_a_graph_and_never_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    first, second = crowd(7, 4, 3000, 20), crowd(8, 4, 3000, 20)
    still = boxes, scores, labels = on(torch.device("cuda"), first)
    ops.nms(boxes, scores, labels, 0.5, 0.1, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep, count = ops.nms(boxes, scores, labels, 0.5, 0.1, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for candidates in (first, second):
        for tensor, fresh in zip(still, candidates, strict=True):
            tensor.copy_(fresh)
        graph.replay()
        expected = reference.nms(*candidates, 0.5, 0.1, 100)
        assert torch.equal(keep.cpu(), expected[0]) and torch.equal(count.cpu(), expected[1])
