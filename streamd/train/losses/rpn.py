"""The losses of a region proposal network (Faster R-CNN, arXiv:1506.01497, section 3.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.train.losses.boxes import encode_deltas
from streamd.train.losses.config import LossConfig
from streamd.train.losses.matching import match, sample
from streamd.train.losses.normalize import mean
from streamd.train.targets import Targets


def rpn_losses(
    outputs: tuple[Tensor, Tensor],
    anchors: Tensor,
    box_weights: Sequence[float],
    targets: Sequence[Targets],
    config: LossConfig,
    generators: Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Return the losses `rpn_objectness` and `rpn_box`.

    `outputs` are logits [B,K] and deltas [B,K,4] of all levels' `anchors` [K,4], float32.
    """
    logits, deltas = outputs
    rpn = config.rpn
    objectness_sums, box_sums, counts = [], [], []
    for i, target in enumerate(targets):
        matches = match(anchors, target, rpn.iou_thresholds, every_object=True)
        positive, negative = sample(matches, rpn.num_samples, rpn.positive_fraction, generators[i])
        chosen = torch.cat((positive, negative))
        is_object = (matches[chosen] >= 0).float()
        objectness_sums.append(F.binary_cross_entropy_with_logits(logits[i, chosen], is_object, reduction="sum"))
        expected = encode_deltas(target.boxes[matches[positive]], anchors[positive], box_weights)
        box_sums.append(F.smooth_l1_loss(deltas[i, positive], expected, reduction="sum", beta=rpn.smooth_l1_beta))
        counts.append(len(chosen))
    return {
        "rpn_objectness": mean(torch.stack(objectness_sums), counts, config.normalization),
        "rpn_box": rpn.box_weight * mean(torch.stack(box_sums), counts, config.normalization),
    }
