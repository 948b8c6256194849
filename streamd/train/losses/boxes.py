"""Geometry that only training needs: overlaps of pairs, and the deltas that a network should have predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-7  # square pixels: boxes without area overlap nothing


def area(boxes: Tensor) -> Tensor:
    """Return the areas [...] of boxes [...,4] in square pixels."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Return the area that boxes [...,4] share with boxes [...,4], which broadcast."""
    # Side by side: for all anchors and objects, one tensor of both sides would be large.
    width = torch.minimum(first[..., 2], second[..., 2]) - torch.maximum(first[..., 0], second[..., 0])
    height = torch.minimum(first[..., 3], second[..., 3]) - torch.maximum(first[..., 1], second[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return intersection over union of boxes [...,4], which broadcast."""
    shared = intersection(first, second)
    return shared / (area(first) + area(second) - shared).clamp(min=_EPSILON)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return intersection over union of each of boxes [N,4] with each of boxes [M,4]: [N,M]."""
    return iou(first[:, None], second[None])


def crowded(boxes: Tensor, crowds: Tensor, least: float = 0.5) -> Tensor:
    """Say which of `boxes` [M,4] have at least the part `least` of their area within one of `crowds` [K,4]: [M]."""
    shared = intersection(boxes[:, None], crowds[None])
    return (shared >= least * area(boxes)[:, None].clamp(min=_EPSILON)).any(1)


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return the deltas [...,4] by which `models.anchors.decode_deltas` turns `anchors` [...,4] into `boxes` [...,4].

    Neither may be empty.
    """
    sizes, anchor_sizes = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centres, anchor_centres = boxes[..., :2] + 0.5 * sizes, anchors[..., :2] + 0.5 * anchor_sizes
    deltas = torch.cat(((centres - anchor_centres) / anchor_sizes, (sizes / anchor_sizes).log()), dim=-1)
    return deltas * deltas.new_tensor(weights)
