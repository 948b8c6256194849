"""Say which object each anchor or proposal stands for, and draw those that are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from streamd.train.losses.boxes import crowded, pairwise_iou
from streamd.train.targets import Targets

BACKGROUND = -1
IGNORED = -2  # teaches neither object nor background


def match(boxes: Tensor, targets: Targets, thresholds: tuple[float, float], *, every_object: bool = False) -> Tensor:
    """Return for each of `boxes` [M,4] the index of the object that it overlaps most, or BACKGROUND, or IGNORED: [M].

    `thresholds` are (low, high): an IoU from `high` on is an object, one below `low` background, unless the box lies
    in a crowd. With `every_object` the boxes that overlap an object best stand for objects too, however little that is
    (Faster R-CNN, arXiv:1506.01497, section 3.1.2).
    """
    if len(targets.boxes):
        overlaps = pairwise_iou(targets.boxes, boxes)
        best, index = overlaps.max(dim=0)
        found = torch.where(best >= thresholds[1], index, torch.where(best >= thresholds[0], IGNORED, BACKGROUND))
        if every_object and len(boxes):
            most = overlaps.max(dim=1, keepdim=True).values
            found = torch.where(((overlaps == most) & (most > 0)).any(0), index, found)
    else:
        found = torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    if len(targets.crowds):
        found = torch.where((found == BACKGROUND) & crowded(boxes, targets.crowds), IGNORED, found)
    return found


def sample(
    matches: Tensor, num_samples: int, positive_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw indices of objects and of background from `matches` [M]: at most `num_samples` together.

    Objects are at most the part `positive_fraction`; what they leave is background.
    """
    positive = draw((matches >= 0).nonzero()[:, 0], int(num_samples * positive_fraction), generator)
    negative = draw((matches == BACKGROUND).nonzero()[:, 0], num_samples - len(positive), generator)
    return positive, negative


def draw(rows: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw `num_rows` of `rows` [R] without replacement, or take all if there are no more."""
    if len(rows) <= num_rows:
        return rows
    return rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:num_rows]]
