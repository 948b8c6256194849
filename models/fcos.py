"""FCOS (arXiv:1904.01355): a class, a centre-ness and the distances to four sides at every cell of a feature pyramid.

    images -> backbone -> p3 ... p7 -> head -> the best (cell, class) pairs of each level -> boxes, scores, labels

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.anchors import AnchorGrid, clip_boxes
from streamd.models.dense import Subnet, best_pairs, join_levels, list_cells, predictor, take
from streamd.models.fpn import ConvLevels, Fpn
from streamd.models.layers import Backbone
from streamd.models.resnet import resnet50


@dataclass(frozen=True, slots=True)
class FcosConfig:
    """The numbers of a network, beside its backbone's."""

    num_classes: int
    anchors: AnchorGrid  # one a cell: its centre and its side, which is the unit of the distances
    in_features: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7")
    num_convs: int = 4
    norm: str = "GN"
    num_candidates: int = 1000  # (cell, class) pairs of each level that the suppression sees
    prior: float = 0.01  # probability that an untrained head gives to each class
    clipped: bool = False  # to the picture before the suppression, as torchvision does and Detectron2 does not


class FcosHead(nn.Module):
    """Predict class logits, distances and centre-ness of each cell."""

    def __init__(self, num_channels: int, config: FcosConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        num_levels = len(config.in_features)
        self.cls_subnet = Subnet(num_channels, config.num_convs, config.norm, num_levels)
        self.bbox_subnet = Subnet(num_channels, config.num_convs, config.norm, num_levels)
        self.cls_score = predictor(num_channels, config.num_classes, config.prior)
        self.bbox_pred = predictor(num_channels, 4)
        self.ctrness = predictor(num_channels, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return logits [B,h*w,C], distances [B,h*w,4] before their ReLU and centre-ness logits [B,h*w,1] by level."""
        logits, distances, centreness = [], [], []
        for level, x in enumerate(features):
            logits.append(list_cells(self.cls_score(self.cls_subnet(x, level)), self.num_classes))
            box_features = self.bbox_subnet(x, level)
            distances.append(list_cells(self.bbox_pred(box_features), 4))
            centreness.append(list_cells(self.ctrness(box_features), 1))
        return logits, distances, centreness


class Fcos(nn.Module):
    """Detect objects."""

    def __init__(self, backbone: Backbone, config: FcosConfig) -> None:
        super().__init__()
        if set(config.anchors.num_anchors) != {1}:
            raise ValueError(f"FCOS has one anchor a cell, got {config.anchors.num_anchors}")
        widths = {backbone.num_channels[name] for name in config.in_features}
        if len(widths) != 1:
            raise ValueError(f"FCOS has one head for all levels, which are of several widths: {sorted(widths)}")
        self.backbone = backbone
        self.head = FcosHead(widths.pop(), config)
        self.config = config

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Return the best pairs of each level: boxes [B,K,4] in input pixels, scores [B,K], labels [B,K].

        `images` is [B,3,H,W]; `sizes` [B,2] is needed where boxes are clipped.
        """
        features = self.features(images)
        anchors = self.config.anchors(features, images)
        levels = []
        for logits, distances, centreness, cells in zip(*self.head(features), anchors, strict=True):
            # As probabilities, since a product of two has no order of its logits.
            scores = (logits.float().sigmoid() * centreness.float().sigmoid()).sqrt()
            best, index, labels = best_pairs(scores, self.config.num_candidates)
            boxes = decode_distances(take(distances, index), take(cells, index))
            if self.config.clipped:
                assert sizes is not None
                boxes = clip_boxes(boxes, sizes)
            levels.append((boxes, best, labels))
        return join_levels(levels)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid that the head sees, fine to coarse."""
        maps = self.backbone(images)
        return [maps[name] for name in self.config.in_features]


def decode_distances(distances: Tensor, anchors: Tensor) -> Tensor:
    """Turn distances [...,4] from the centres of `anchors` [...,4] into corners, float32.

    They are to the left, upper, right and lower side, in sides of the anchor; a negative one counts as 0.
    """
    distances, anchors = F.relu(distances.float()), anchors.float()
    centres = 0.5 * (anchors[..., :2] + anchors[..., 2:])
    sides = anchors[..., 2:] - anchors[..., :2]
    return torch.cat((centres - distances[..., :2] * sides, centres + distances[..., 2:] * sides), dim=-1)


def fcos_resnet50_fpn(num_classes: int = 80) -> Fcos:
    """32.1 M parameters, as torchvision's and Detectron2's: p6 and p7 from p5, GroupNorm in the head."""
    bottom_up = resnet50(out_features=("res3", "res4", "res5"))
    backbone = Fpn(bottom_up, ("res3", "res4", "res5"), 256, top_block=ConvLevels(256, 256, "p5"))
    strides = tuple(backbone.strides.values())
    anchors = AnchorGrid(strides, tuple((float(stride),) for stride in strides), ((1.0,),))
    return Fcos(backbone, FcosConfig(num_classes, anchors))
