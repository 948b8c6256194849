"""The losses of networks of two stages, and of Panoptic FPN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamd.models.panoptic import PanopticFpn
from streamd.models.rcnn import Rcnn
from streamd.models.rpn import Proposals
from streamd.train.losses.config import LossConfig
from streamd.train.losses.roi_heads import roi_heads_losses
from streamd.train.losses.rpn import rpn_losses
from streamd.train.losses.semantic import semantic_loss
from streamd.train.targets import TrainBatch


def compute(
    network: Rcnn, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the losses of `rpn_losses` and `roi_heads_losses`, and `semantic` of a Panoptic FPN."""
    return _compare(network, network.backbone(batch.images), batch, config, generators)


@torch.compiler.disable
def _compare(
    network: Rcnn,
    features: dict[str, Tensor],
    batch: TrainBatch,
    config: LossConfig,
    generators: Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Run all that comes after the backbone, whose shapes depend on what is found, and compare it with the targets."""
    generator = network.proposal_generator
    levels = [features[name] for name in generator.config.in_features]
    outputs = generator.rpn_head(levels)
    anchors = generator.config.anchors(levels, batch.images)
    with torch.autocast(batch.images.device.type, enabled=False):
        logits, deltas = ([x.float() for x in output] for output in outputs)
        losses = rpn_losses(
            (torch.cat(logits, dim=1), torch.cat(deltas, dim=1)),
            torch.cat(anchors),
            generator.config.box_weights,
            batch.targets,
            config,
            generators,
        )
        proposals = _propose(network, logits, deltas, anchors, batch.sizes, config)
    losses |= roi_heads_losses(network.roi_heads, features, proposals, batch, config, generators)
    if isinstance(network, PanopticFpn):
        loss = semantic_loss(network.sem_seg_head(features), batch, config)
        losses["semantic"] = config.panoptic_semantic_weight * loss
    return losses


@torch.no_grad()
def _propose(
    network: Rcnn,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Tensor,
    config: LossConfig,
) -> Proposals:
    generator = network.proposal_generator
    candidates = generator.candidates(logits, deltas, anchors, config.rpn.pre_nms_top_k)
    return generator.select(*candidates, sizes, config.rpn.post_nms_top_k)
