"""The losses of FCOS (arXiv:1904.01355)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from streamd.models.fcos import Fcos, decode_distances
from streamd.train.losses.boxes import area, crowded
from streamd.train.losses.config import LossConfig
from streamd.train.losses.matching import BACKGROUND, IGNORED
from streamd.train.losses.normalize import mean
from streamd.train.targets import Targets, TrainBatch

SCALE_RANGE = (4.0, 8.0)  # strides: a level has the objects whose farthest side is so far from the cell


def compute(
    network: Fcos, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the losses `class`, `box` and `centreness`."""
    features = network.features(batch.images)
    return _compare(network, features, network.head(features), batch, config)


@torch.compiler.disable
def _compare(
    network: Fcos,
    features: Sequence[Tensor],
    outputs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    batch: TrainBatch,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Compare the logits, distances and centre-ness of each level with the targets."""
    levels = network.config.anchors(features, batch.images)
    anchors, numbers = torch.cat(levels), config.fcos
    class_sums, box_sums, centreness_sums, counts = [], [], [], []
    with torch.autocast(batch.images.device.type, enabled=False):
        logits, distances, centreness = (torch.cat(output, dim=1).float() for output in outputs)
        for i, target in enumerate(batch.targets):
            matches = assign(levels, target, numbers.centre_radius)
            positive = (matches >= 0).nonzero()[:, 0]
            objects, cells = matches[positive], anchors[positive]
            boxes, classes = target.boxes[objects], torch.zeros_like(logits[i])
            classes[positive, target.labels[objects]] = 1
            each = sigmoid_focal_loss(logits[i], classes, numbers.focal_alpha, numbers.focal_gamma)
            class_sums.append(each.masked_fill((matches == IGNORED)[:, None], 0).sum())
            found = decode_distances(distances[i, positive], cells)
            box_sums.append(generalized_box_iou_loss(found, boxes, reduction="sum"))
            expected = _centreness(cells, boxes)
            at_cells = centreness[i, positive, 0]
            centreness_sums.append(F.binary_cross_entropy_with_logits(at_cells, expected, reduction="sum"))
            counts.append(len(positive))
        losses = {
            "class": class_sums,
            "box": [numbers.box_weight * x for x in box_sums],
            "centreness": [numbers.centreness_weight * x for x in centreness_sums],
        }
        return {name: mean(torch.stack(sums), counts, config.normalization) for name, sums in losses.items()}


def assign(levels: Sequence[Tensor], target: Targets, centre_radius: float) -> Tensor:
    """Return for each cell of all levels the index of its object, or BACKGROUND, or IGNORED: [K].

    `levels` are each level's anchors [k,4]. A cell may stand for an object if it lies within its box and near its
    centre, and if the object is of the size that is the level's; of several it takes the smallest.
    """
    anchors = torch.cat(list(levels))
    centres, strides = 0.5 * (anchors[:, :2] + anchors[:, 2:]), anchors[:, 2] - anchors[:, 0]
    found = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    if len(target.boxes):
        object_centres = 0.5 * (target.boxes[:, :2] + target.boxes[:, 2:])
        is_near = (centres[:, None] - object_centres).abs().amax(-1) < centre_radius * strides[:, None]
        sides = torch.cat((centres[:, None] - target.boxes[:, :2], target.boxes[:, 2:] - centres[:, None]), dim=-1)
        farthest = sides.amax(-1)
        lower, upper = (factor * strides for factor in SCALE_RANGE)
        lower[: len(levels[0])] = 0
        upper[len(anchors) - len(levels[-1]) :] = torch.inf
        suits = (farthest > lower[:, None]) & (farthest < upper[:, None])
        areas = torch.where(is_near & suits & (sides.amin(-1) > 0), area(target.boxes), torch.inf)
        smallest, index = areas.min(1)
        found = torch.where(smallest.isfinite(), index, found)
    if len(target.crowds):
        found = torch.where((found == BACKGROUND) & crowded(anchors, target.crowds), IGNORED, found)
    return found


def _centreness(cells: Tensor, boxes: Tensor) -> Tensor:
    """Say how central the centres of cells [P,4] lie within boxes [P,4]: [P], 0..1 (equation 3)."""
    centres = 0.5 * (cells[:, :2] + cells[:, 2:])
    before, after = centres - boxes[:, :2], boxes[:, 2:] - centres
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).sqrt()
