"""A region proposal network alone (arXiv:1506.01497): where something may be, not what it is.

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from streamd.models import backbones, rcnn
from streamd.models.importers.config import Config, base_spec
from streamd.models.layers import Backbone
from streamd.models.rpn import ProposalGenerator, RpnConfig
from streamd.models.spec import ModelSpec, NmsRule

LABELS = ("object",)


class ProposalNetwork(nn.Module):
    """Propose boxes in normalised images that lie at the top left of their padding."""

    def __init__(self, backbone: Backbone, config: RpnConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = ProposalGenerator(backbone.num_channels[config.in_features[0]], config)

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return proposals in `images` [B,3,H,W] with pictures of `sizes` [B,2] as pairs of a box and the one label.

        Boxes [B,K,4] are x1 y1 x2 y2 in input pixels, scores [B,K] how likely they show an object, 0..1 or -inf.
        """
        proposals, logits = self.proposal_generator.propose(self.backbone(images), images, sizes)
        scores = torch.where(proposals.valid, logits.sigmoid(), -torch.inf)
        return {"boxes": proposals.boxes, "scores": scores, "labels": torch.zeros_like(scores, dtype=torch.int64)}


def build(config: Config) -> tuple[ProposalNetwork, ModelSpec]:
    """Build the network of a Detectron2 configuration of a ProposalNetwork, untrained, and its description.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    backbone = backbones.build(config)
    rpn = rcnn.rpn_config(config, backbone)
    spec = base_spec(config, name="rpn", task="detect", num_classes=len(LABELS), size_multiple=backbone.size_divisor)
    # The network has suppressed overlapping boxes of each level, and Detectron2 gives all that are left.
    nms = NmsRule(score_threshold=0.0, iou_threshold=1.0, max_detections=rpn.post_nms_top_k)
    return ProposalNetwork(backbone, rpn), msgspec.structs.replace(spec, labels=LABELS, sized=True, nms=nms)
