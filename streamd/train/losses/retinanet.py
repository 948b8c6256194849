"""The losses of RetinaNet (arXiv:1708.02002)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from streamd.models.retinanet import Retinanet
from streamd.train.losses.boxes import encode_deltas
from streamd.train.losses.config import LossConfig
from streamd.train.losses.matching import IGNORED, match
from streamd.train.losses.normalize import mean
from streamd.train.targets import TrainBatch


def compute(
    network: Retinanet, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the losses `class` and `box`."""
    features = network.features(batch.images)
    return _compare(network, features, network.head(features), batch, config)


@torch.compiler.disable
def _compare(
    network: Retinanet,
    features: Sequence[Tensor],
    outputs: tuple[list[Tensor], list[Tensor]],
    batch: TrainBatch,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Compare the logits and deltas of each level with the targets."""
    anchors = torch.cat(network.config.anchors(features, batch.images))
    numbers = config.retinanet
    class_sums, box_sums, counts = [], [], []
    with torch.autocast(batch.images.device.type, enabled=False):
        logits, deltas = (torch.cat(levels, dim=1).float() for levels in outputs)
        for i, target in enumerate(batch.targets):
            matches = match(anchors, target, numbers.iou_thresholds, every_object=True)
            positive = (matches >= 0).nonzero()[:, 0]
            objects = matches[positive]
            classes = torch.zeros_like(logits[i])
            classes[positive, target.labels[objects]] = 1
            each = sigmoid_focal_loss(logits[i], classes, numbers.focal_alpha, numbers.focal_gamma)
            class_sums.append(each.masked_fill((matches == IGNORED)[:, None], 0).sum())
            expected = encode_deltas(target.boxes[objects], anchors[positive], network.config.box_weights)
            beta = numbers.smooth_l1_beta
            box_sums.append(F.smooth_l1_loss(deltas[i, positive], expected, reduction="sum", beta=beta))
            counts.append(len(positive))
        return {
            "class": mean(torch.stack(class_sums), counts, config.normalization),
            "box": numbers.box_weight * mean(torch.stack(box_sums), counts, config.normalization),
        }
