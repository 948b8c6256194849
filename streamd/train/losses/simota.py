"""Assign cells to objects by what the network itself makes of them (SimOTA; YOLOX, arXiv:2107.08430, section 2.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamd.train.losses.boxes import pairwise_iou
from streamd.train.losses.config import YoloxLossConfig
from streamd.train.targets import Targets

_MIN_LOG = -100.0  # of a probability, as in torch's binary cross entropy
_EPSILON = 1e-8


class Cells(NamedTuple):
    """Where the cells of all levels are, K of them."""

    grid: Tensor  # [K,2] x y in cells
    centres: Tensor  # [K,2] x y in input pixels
    strides: Tensor  # [K,1] input pixels


class Assignment(NamedTuple):
    """Cells that stand for objects, P of them."""

    cells: Tensor  # [P] index into K
    objects: Tensor  # [P] index of the object
    ious: Tensor  # [P] of the cell's predicted box with its object


@torch.no_grad()
def assign(
    boxes: Tensor, objectness: Tensor, classes: Tensor, cells: Cells, targets: Targets, config: YoloxLossConfig
) -> Assignment:
    """Assign the cells of one image, from predicted boxes [K,4], objectness [K,1] and class logits [K,C], float32.

    No memory is taken for pairs of objects with cells that are near to none.
    """
    centres = 0.5 * (targets.boxes[:, :2] + targets.boxes[:, 2:])
    reach = config.centre_radius * cells.strides
    near = ((cells.centres - centres[:, None]).abs() < reach).all(-1)
    candidates = near.any(0).nonzero()[:, 0]
    near = near[:, candidates]
    num_best = min(config.num_candidates, len(candidates))
    if num_best == 0:
        none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Assignment(none, none, boxes.new_zeros(0))
    overlaps = pairwise_iou(targets.boxes, boxes[candidates])
    class_cost = _class_cost(classes[candidates], objectness[candidates], targets.labels)
    cost = class_cost - config.iou_cost * (overlaps + _EPSILON).log()
    cost = torch.where(near, cost, torch.inf)
    lowest, order = cost.topk(num_best, dim=1, largest=False)
    num_cells = overlaps.topk(num_best, dim=1).values.sum(1).int().clamp(min=1)
    rank = torch.arange(num_best, device=boxes.device)
    lowest = torch.where(rank < num_cells[:, None], lowest, torch.inf)
    # A cell that several objects chose stands for the one that it costs least.
    least, owner = torch.full_like(cost, torch.inf).scatter_(1, order, lowest).min(0)
    chosen = least.isfinite().nonzero()[:, 0]
    objects = owner[chosen]
    return Assignment(candidates[chosen], objects, overlaps[objects, chosen])


def _class_cost(classes: Tensor, objectness: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross entropy of each candidate's class scores with each object's label: [N,M].

    A score is the root of class times objectness. Over all classes together, so that nothing is [N,M,C].
    """
    scores = (classes.sigmoid() * objectness.sigmoid()).sqrt()
    if_absent = -torch.log1p(-scores).clamp(min=_MIN_LOG)
    if_present = -scores.log().clamp(min=_MIN_LOG)
    return if_absent.sum(1) + (if_present - if_absent).T[labels]
