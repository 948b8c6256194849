"""The loss of semantic segmentation: the cross entropy of each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.models.deeplab import DeepLab
from streamd.models.semantic import SemanticSegmenter
from streamd.train.losses.config import LossConfig
from streamd.train.losses.normalize import mean
from streamd.train.targets import Targets, TrainBatch

UNLABELLED = 255


def compute(
    network: SemanticSegmenter | DeepLab, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the loss `semantic`."""
    if isinstance(network, DeepLab):
        logits = network(batch.images, batch.sizes)["semantic"]
    else:
        logits = network(batch.images)["semantic"]
    return {"semantic": config.semantic_weight * semantic_loss(logits, batch, config)}


@torch.compiler.disable
def semantic_loss(logits: Tensor, batch: TrainBatch, config: LossConfig) -> Tensor:
    """Compare logits [B,C,h,w], stretched to the images, with the labels; an image without labels has no loss."""
    with torch.autocast(batch.images.device.type, enabled=False):
        size = batch.images.shape[-2:]
        stretched = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        labels = torch.stack([_labels(target, batch.images) for target in batch.targets])
        sums = F.cross_entropy(stretched, labels, ignore_index=UNLABELLED, reduction="none").sum((1, 2))
        counts = (labels != UNLABELLED).sum((1, 2)).tolist()
        return mean(sums, counts, config.normalization)


def _labels(target: Targets, images: Tensor) -> Tensor:
    if target.semantic is not None:
        return target.semantic
    return torch.full(images.shape[-2:], UNLABELLED, dtype=torch.int64, device=images.device)
