"""Launch gpu/nms.cu: non-maximum suppression on the device, without a word to the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import cuda
from streamd.gpu.reference import round_down_to_float32

_NUM_GROUPS = 64  # nms.cu has the same number
_NUM_THREADS = 256
_NUM_COLLECTORS = 1024
_BYTES_OF_FLOAT4 = 16


class _Ranking(NamedTuple):
    """The candidates of each image by falling score."""

    scores: Tensor  # [B, K] float32, -inf behind the last candidate that takes part
    order: Tensor  # [B, K] int64, indices into K


def nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """Keep the best candidates of each image and label, as `reference.nms` does; fit for a CUDA graph.

    About 70 bytes of scratch a candidate, and what torch's sort takes. ValueError for shapes, types or devices that
    do not fit together.
    """
    _check(boxes, scores, labels)
    boxes, scores, labels = _aligned(boxes.float().contiguous()), scores.float().contiguous(), labels.contiguous()
    num_images, num_candidates = scores.shape
    keep, count = labels.new_empty((num_images, max_detections)), labels.new_empty(num_images)
    if num_candidates == 0:
        return keep.fill_(-1), count.zero_()
    module = cuda.load("nms", boxes.device)
    ranking = _rank(module, boxes, scores, np.float32(score_threshold))
    ranked, group_sizes, survives = _gather(module, boxes, labels, ranking)
    row = np.int32(num_candidates), np.int32(survives.shape[1])
    limits = np.int32(min(max_detections, num_candidates)), round_down_to_float32(iou_threshold)
    scratch = torch.empty_like(boxes), torch.empty_like(labels)
    num_blocks = num_images * _NUM_GROUPS
    module.launch("nms_sweep", num_blocks, _NUM_THREADS, *ranked, group_sizes, *row, *limits, *scratch, survives)
    results = np.int64(max_detections), keep, count
    module.launch("nms_collect", num_images, _NUM_COLLECTORS, survives, ranking.order, group_sizes, *row, *results)
    return keep, count


def _rank(module: cuda.Module, boxes: Tensor, scores: Tensor, floor: np.float32) -> _Ranking:
    """Sort the candidates by falling score, stable; those that do not take part come last."""
    masked, num_candidates = torch.empty_like(scores), scores.numel()
    num_blocks = -(-num_candidates // _NUM_THREADS)
    module.launch("nms_mask", num_blocks, _NUM_THREADS, boxes, scores, floor, np.int64(num_candidates), masked)
    return _Ranking(*torch.sort(masked, dim=1, descending=True, stable=True))


def _gather(
    module: cuda.Module, boxes: Tensor, labels: Tensor, ranking: _Ranking
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return boxes, labels and groups by rank, the sizes of the groups, and a byte for each rank, still zero."""
    num_images, num_candidates = labels.shape
    pitch = -(-num_candidates // 4) * 4  # bytes, so that the kernels can read a row in words
    groups = torch.empty((num_images, pitch), dtype=torch.uint8, device=boxes.device)
    ranked, survives = (torch.empty_like(boxes), torch.empty_like(labels), groups), torch.empty_like(groups)
    group_sizes = torch.zeros((num_images, _NUM_GROUPS), dtype=torch.int32, device=boxes.device)
    num_blocks, row = num_images * -(-pitch // _NUM_THREADS), (np.int32(num_candidates), np.int32(pitch))
    module.launch("nms_gather", num_blocks, _NUM_THREADS, boxes, labels, *ranking, *row, *ranked, survives, group_sizes)
    return ranked, group_sizes, survives


def _check(boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    shapes = f"boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels {list(labels.shape)}"
    if scores.dim() != 2 or boxes.shape != (*scores.shape, 4) or labels.shape != scores.shape:
        raise ValueError(f"nms takes boxes [B, K, 4], scores [B, K] and labels [B, K], not {shapes}")
    if not (boxes.is_floating_point() and scores.is_floating_point() and labels.dtype == torch.int64):
        types = f"{boxes.dtype}, {scores.dtype} and {labels.dtype}"
        raise ValueError(f"nms takes boxes and scores of a floating type and labels of int64, not {types}")
    if not boxes.device == scores.device == labels.device:
        raise ValueError(f"nms takes tensors of one device, not of {boxes.device}, {scores.device}, {labels.device}")
    if scores.shape[1] >= 2**30:
        raise ValueError(f"nms takes fewer than 2**30 candidates an image, not {scores.shape[1]}")


def _aligned(boxes: Tensor) -> Tensor:
    """Copy boxes that begin where no float4 can."""
    return boxes.clone() if boxes.data_ptr() % _BYTES_OF_FLOAT4 else boxes
