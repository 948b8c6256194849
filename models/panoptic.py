"""Panoptic FPN (Kirillov et al., 2019, arXiv:1901.02446): Mask R-CNN and a semantic head on one pyramid.

    images -> backbone -> feature maps -> Rcnn          -> boxes, scores, labels; masks of the boxes that are kept
                                     `--> semantic head -> logits of each cell

`streamd.gpu.panoptic` makes segments of both. Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor

from streamd.errors import ModelError
from streamd.models import backbones, coco_stuff, rcnn
from streamd.models.importers.config import Config
from streamd.models.layers import Backbone
from streamd.models.rcnn import Rcnn, RcnnConfig
from streamd.models.semantic import SemanticHead, SemanticHeadConfig, head_config
from streamd.models.spec import ModelSpec, PanopticRule


class PanopticFpn(Rcnn):
    """Detect objects and classify each cell of normalised images that lie at the top left of their padding."""

    def __init__(self, backbone: Backbone, config: RcnnConfig, semantic: SemanticHeadConfig) -> None:
        super().__init__(backbone, config)
        self.sem_seg_head = SemanticHead(backbone, semantic)

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return what `Rcnn` does, and `semantic`: logits [B, classes, H / stride, W / stride]."""
        features = self.backbone(images)
        return self.detect(features, images, sizes) | {"semantic": self.sem_seg_head(features)}


def build(config: Config) -> tuple[PanopticFpn, ModelSpec]:
    """Build the network of a Detectron2 configuration of a PanopticFPN, untrained, and its description.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    if not config["MODEL"]["MASK_ON"]:
        raise ModelError("MODEL.MASK_ON is false, and a PanopticFPN without masks has no segments of things")
    backbone = backbones.build(config)
    stages = RcnnConfig(rcnn.rpn_config(config, backbone), rcnn.roi_heads_config(config))
    semantic = head_config(config)
    combine = config["MODEL"]["PANOPTIC_FPN"]["COMBINE"]
    spec = msgspec.structs.replace(
        rcnn.describe(config, backbone),
        name="panoptic_fpn",
        task="panoptic",
        panoptic=PanopticRule(
            stuff_labels=stuff_labels(config["DATASETS"]["TRAIN"], semantic.num_classes),
            score_threshold=combine["INSTANCES_CONFIDENCE_THRESH"],
            overlap_threshold=combine["OVERLAP_THRESH"],
            stuff_area_limit=combine["STUFF_AREA_LIMIT"],
        ),
    )
    return PanopticFpn(backbone, stages, semantic), spec


def stuff_labels(data_sets: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return COCO's stuff for its data sets if they have as many classes, else things, stuff_1, stuff_2, ..."""
    if num_classes == len(coco_stuff.LABELS) and any(name.startswith("coco") for name in data_sets):
        return coco_stuff.LABELS
    return ("things", *(f"stuff_{index}" for index in range(1, num_classes)))
