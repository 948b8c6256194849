"""The loss of masks that are mixtures of prototypes (YOLACT, arXiv:1904.02689, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def prototype_mask_losses(
    prototypes: Tensor, coefficients: Tensor, objects: Tensor, masks: Tensor, boxes: Tensor
) -> Tensor:
    """Return the mean cross entropy of each of R masks within its object's box: [R].

    `prototypes` [P,h,w] cover the image that `masks` [N,H,W] do; `coefficients` are [R,P], `objects` [R] indices into
    N, `boxes` [N,4] in input pixels. What a cell should say is the part of it that the mask covers: the service
    enlarges the probabilities and cuts them at one half, so that edges may lie within cells.
    """
    height, width = prototypes.shape[1:]
    step_y, step_x = masks.shape[1] // height, masks.shape[2] // width
    used, index = objects.unique(return_inverse=True)  # several cells stand for one object
    expected = F.avg_pool2d(masks[used].float(), (step_y, step_x))[index]
    inside = _cells_inside(boxes[used], (step_y, step_x), (height, width))[index]
    logits = (coefficients @ prototypes.flatten(1)).unflatten(1, (height, width))
    each = F.binary_cross_entropy_with_logits(logits, expected, reduction="none")
    return (each * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


def _cells_inside(boxes: Tensor, step: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Say which cells, `step` pixels high and wide, `boxes` [N,4] touch: [N, *size]; the smallest touches one."""
    rows, columns = (torch.arange(count, device=boxes.device) for count in size)
    left, top = (boxes[:, 0] / step[1]).floor(), (boxes[:, 1] / step[0]).floor()
    right, bottom = (boxes[:, 2] / step[1]).ceil(), (boxes[:, 3] / step[0]).ceil()
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    return in_rows[:, :, None] & in_columns[:, None]
