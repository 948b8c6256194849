"""The losses of SSD (arXiv:1512.02325)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.models.ssd import Ssd
from streamd.train.losses.boxes import encode_deltas, pairwise_iou
from streamd.train.losses.config import LossConfig
from streamd.train.losses.matching import BACKGROUND, match
from streamd.train.losses.normalize import mean
from streamd.train.targets import Targets, TrainBatch


def compute(
    network: Ssd, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the losses `class` and `box`."""
    return _compare(network, network.head(list(network.backbone(batch.images).values())), batch, config)


@torch.compiler.disable
def _compare(network: Ssd, output: dict[str, Tensor], batch: TrainBatch, config: LossConfig) -> dict[str, Tensor]:
    """Compare logits and deltas with the targets."""
    class_sums, box_sums, counts = [], [], []
    with torch.autocast(batch.images.device.type, enabled=False):
        logits, deltas = output["cls_logits"].float(), output["bbox_regression"].float()
        for i, target in enumerate(batch.targets):
            matches = _match(network.anchors, target, config.ssd.iou_threshold)
            positive = (matches >= 0).nonzero()[:, 0]
            objects = matches[positive]
            labels = torch.zeros_like(matches)  # the background is torchvision's class 0
            labels[positive] = target.labels[objects] + 1
            each = F.cross_entropy(logits[i], labels, reduction="none")
            num_worst = min(config.ssd.num_negatives * len(positive), len(each))
            worst = torch.where(matches == BACKGROUND, each, 0).topk(num_worst).values
            class_sums.append(each[positive].sum() + worst.sum())
            expected = encode_deltas(target.boxes[objects], network.anchors[positive], network.box_weights)
            box_sums.append(F.smooth_l1_loss(deltas[i, positive], expected, reduction="sum"))
            counts.append(len(positive))
        return {
            "class": mean(torch.stack(class_sums), counts, config.normalization),
            "box": config.ssd.box_weight * mean(torch.stack(box_sums), counts, config.normalization),
        }


def _match(anchors: Tensor, target: Targets, threshold: float) -> Tensor:
    """Match as others do, but let each object have one anchor, whatever that one overlaps more."""
    matches = match(anchors, target, (threshold, threshold))
    if len(target.boxes):
        best = pairwise_iou(target.boxes, anchors).argmax(1)
        matches[best] = torch.arange(len(best), device=best.device)
    return matches
