"""What the mask head and the keypoint head should say of a box."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from streamd.train.losses.config import RoiHeadsLossConfig


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, side: int, config: RoiHeadsLossConfig) -> Tensor:
    """Cut `boxes` [R,4] out of `masks` [N,H,W], each from the mask of its object [R]: [R,side,side], 0..1."""
    used, index = objects.unique(return_inverse=True)  # masks of float32 are large
    rois = torch.cat((index[:, None].to(boxes), boxes), dim=1)
    pooled = roi_align(masks[used][:, None].float(), rois, side, 1.0, -1, config.masks_aligned)[:, 0]
    return (pooled >= 0.5).float() if config.masks_binary else pooled


def keypoint_targets(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Say in which cell of a heat map over its box each keypoint lies, row by row: [R,J], and which count: [R,J] bool.

    `keypoints` are [R,J,3] and `boxes` [R,4], not empty. Those that are unmarked or outside of their box do not count.
    """
    points, corner, end = keypoints[..., :2], boxes[:, None, :2], boxes[:, None, 2:]
    cells = ((points - corner) * (side / (end - corner))).floor()
    cells = torch.where(points == end, side - 1, cells)  # the last cell has its far edge too
    counts = (keypoints[..., 2] > 0) & ((cells >= 0) & (cells < side)).all(-1)
    x, y = cells.clamp(0, side - 1).long().unbind(-1)
    return y * side + x, counts
