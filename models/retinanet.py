"""RetinaNet (arXiv:1708.02002): classes and boxes at every anchor of a feature pyramid.

    images -> backbone -> p3 ... p7 -> head -> the best (anchor, class) pairs of each level -> boxes, scores, labels

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor, nn

from streamd.models import backbones
from streamd.models.anchors import AnchorGrid, clip_boxes, decode_deltas
from streamd.models.dense import Subnet, best_pairs, join_levels, list_cells, predictor, take
from streamd.models.fpn import ConvLevels, Fpn
from streamd.models.importers.config import Config, anchor_grid, base_spec, max_detections
from streamd.models.layers import Backbone
from streamd.models.resnet import resnet50
from streamd.models.spec import ModelSpec, NmsRule, just_above


@dataclass(frozen=True, slots=True)
class RetinanetConfig:
    """The numbers of a network, beside its backbone's."""

    num_classes: int
    anchors: AnchorGrid
    in_features: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7")
    num_convs: int = 4
    norm: str = ""
    box_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    num_candidates: int = 1000  # (anchor, class) pairs of each level that the suppression sees
    prior: float = 0.01  # probability that an untrained head gives to each class
    clipped: bool = False  # to the picture before the suppression, as torchvision does and Detectron2 does not

    def __post_init__(self) -> None:
        if len(self.box_weights) != 4:
            raise ValueError(f"RetinaNet: the box weights are {self.box_weights}, want four of them")


class RetinanetHead(nn.Module):
    """Predict class logits and box deltas of each anchor."""

    def __init__(self, num_channels: int, config: RetinanetConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        num_levels, num_anchors = len(config.in_features), set(config.anchors.num_anchors)
        if len(num_anchors) != 1:
            raise ValueError(f"RetinaNet has one head for all levels: {num_anchors} anchors a cell must be one number")
        (anchors_per_cell,) = num_anchors
        self.cls_subnet = Subnet(num_channels, config.num_convs, config.norm, num_levels)
        self.bbox_subnet = Subnet(num_channels, config.num_convs, config.norm, num_levels)
        self.cls_score = predictor(num_channels, anchors_per_cell * config.num_classes, config.prior)
        self.bbox_pred = predictor(num_channels, anchors_per_cell * 4)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B,h*w*A,C] and deltas [B,h*w*A,4] of each level."""
        logits = [self.cls_score(self.cls_subnet(x, level)) for level, x in enumerate(features)]
        deltas = [self.bbox_pred(self.bbox_subnet(x, level)) for level, x in enumerate(features)]
        return [list_cells(x, self.num_classes) for x in logits], [list_cells(x, 4) for x in deltas]


class Retinanet(nn.Module):
    """Detect objects."""

    def __init__(self, backbone: Backbone, config: RetinanetConfig) -> None:
        super().__init__()
        widths = {backbone.num_channels[name] for name in config.in_features}
        if len(widths) != 1:
            raise ValueError(f"RetinaNet has one head for all levels, which are of several widths: {sorted(widths)}")
        self.backbone = backbone
        self.head = RetinanetHead(widths.pop(), config)
        self.config = config

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Return the best pairs of each level: boxes [B,K,4] in input pixels, scores [B,K], labels [B,K].

        `images` is [B,3,H,W]; `sizes` [B,2] is needed where boxes are clipped.
        """
        features = self.features(images)
        logits, deltas = self.head(features)
        return self.select(logits, deltas, self.config.anchors(features, images), sizes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid that the head sees, fine to coarse."""
        maps = self.backbone(images)
        return [maps[name] for name in self.config.in_features]

    def select(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Tensor | None,
    ) -> dict[str, Tensor]:
        """Take the best pairs of each level and decode their boxes."""
        levels = []
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
            best, index, labels = best_pairs(level_logits, self.config.num_candidates)
            boxes = decode_deltas(take(level_deltas, index), take(level_anchors, index), self.config.box_weights)
            if self.config.clipped:
                assert sizes is not None
                boxes = clip_boxes(boxes, sizes)
            levels.append((boxes, best.float().sigmoid(), labels))
        return join_levels(levels)


def retinanet_resnet50_fpn(num_classes: int = 80) -> Retinanet:
    """37.9 M parameters: Detectron2's retinanet_R_50_FPN with torchvision's stride in the 3x3."""
    bottom_up = resnet50(out_features=("res3", "res4", "res5"))
    top_block = ConvLevels(bottom_up.num_channels["res5"], 256)
    backbone = Fpn(bottom_up, ("res3", "res4", "res5"), 256, top_block=top_block)
    sizes = tuple(tuple(side * 2 ** (step / 3) for step in range(3)) for side in (32, 64, 128, 256, 512))
    anchors = AnchorGrid(tuple(backbone.strides.values()), sizes, ((0.5, 1.0, 2.0),))
    return Retinanet(backbone, RetinanetConfig(num_classes, anchors))


def build(config: Config) -> tuple[Retinanet, ModelSpec]:
    """Build the network of a Detectron2 configuration, untrained, and its description.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    given = config["MODEL"]["RETINANET"]
    backbone = backbones.build(config)
    in_features = tuple(given["IN_FEATURES"])
    network = Retinanet(
        backbone,
        RetinanetConfig(
            num_classes=given["NUM_CLASSES"],
            anchors=anchor_grid(config, [backbone.strides[name] for name in in_features]),
            in_features=in_features,
            num_convs=given["NUM_CONVS"],
            norm=given["NORM"],
            box_weights=tuple(given["BBOX_REG_WEIGHTS"]),
            num_candidates=given["TOPK_CANDIDATES_TEST"],
            prior=given["PRIOR_PROB"],
        ),
    )
    spec = base_spec(
        config,
        name="retinanet",
        task="detect",
        num_classes=given["NUM_CLASSES"],
        size_multiple=backbone.size_divisor,
    )
    nms = NmsRule(
        score_threshold=just_above(given["SCORE_THRESH_TEST"]),
        iou_threshold=given["NMS_THRESH_TEST"],
        max_detections=max_detections(config),
    )
    return network, msgspec.structs.replace(spec, nms=nms)
