"""The second stage of R-CNN: pool each proposal's features, say what it shows, and look closer at what is kept.

    feature maps, proposals -> pool -> box head -> predictor -> pairs of a box and a class
                               `-- again from the boxes found, in a cascade (Cascade R-CNN, arXiv:1712.00726)
    feature maps, boxes     -> pool -> mask head, keypoint head or DensePose head

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from streamd.models.anchors import clip_boxes
from streamd.models.box_head import BoxHeadConfig, BoxPredictor, make_box_head
from streamd.models.densepose_head import ChartPredictor, DensePoseHeadConfig, make_densepose_head
from streamd.models.keypoint_head import KeypointHead, KeypointHeadConfig
from streamd.models.layers import Backbone
from streamd.models.mask_head import MaskHead, MaskHeadConfig
from streamd.models.resnet import BlockConfig, bottleneck_stage
from streamd.models.roi_pooler import RoiPooler
from streamd.models.rpn import Proposals
from streamd.models.semantic import SemanticHead

Stage = tuple[Callable[[Tensor], Tensor], BoxPredictor]  # a box head and what reads it


@dataclass(frozen=True, slots=True, kw_only=True)
class Res5Config:
    """The numbers of a backbone's last stage where it serves as box head and mask head alike (C4)."""

    num_hidden: int = 512
    num_out: int = 2048
    block: BlockConfig = field(default_factory=BlockConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoiHeadsConfig:
    """The numbers of a second stage; the defaults are those of Faster R-CNN on a pyramid."""

    num_classes: int = 80
    in_features: tuple[str, ...] = ("p2", "p3", "p4", "p5")
    box: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    box_weights: tuple[tuple[float, ...], ...] = ((10.0, 10.0, 5.0, 5.0),)  # of each stage; a cascade has several
    cascade: bool = False  # a cascade of a single stage, whose head has the names of a cascade's; implied by several
    mask: MaskHeadConfig | None = None
    keypoints: KeypointHeadConfig | None = None
    densepose: DensePoseHeadConfig | None = None
    min_size: float = 0.0  # input pixels; a pair with a narrower or lower box takes no part, as in torchvision
    res5: Res5Config | None = None  # C4: a box head without layers of its own

    def __post_init__(self) -> None:
        if self.is_cascade and not self.box.class_agnostic:
            raise ValueError("a cascade needs class-agnostic boxes: each stage hands one box to the next")
        if self.res5 and (self.is_cascade or self.keypoints or self.densepose or len(self.in_features) > 1):
            raise ValueError("res5 serves as the head of one stage, one level, boxes and masks alone")

    @property
    def is_cascade(self) -> bool:
        return self.cascade or len(self.box_weights) > 1


class RoiHeads(nn.Module):
    """What all second stages share; subclasses have `box_predictor` and say how features are made."""

    classes: Tensor

    def __init__(self, backbone: Backbone, config: RoiHeadsConfig) -> None:
        super().__init__()
        num_channels = {backbone.num_channels[name] for name in config.in_features}
        if len(num_channels) != 1:
            raise ValueError(
                f"{', '.join(config.in_features)} have {sorted(num_channels)} channels: they share one head"
            )
        self.config = config
        self.num_in = num_channels.pop()
        self.strides = tuple(backbone.strides[name] for name in config.in_features)
        self.box_pooler = RoiPooler(config.box.pooler, self.strides)
        # A constant that moves with the module; not part of the state dict.
        self.register_buffer("classes", torch.arange(config.num_classes), persistent=False)
        self.mask_head: MaskHead | None = None
        self.keypoint_head: KeypointHead | None = None

    def stages(self) -> list[Stage]:
        raise NotImplementedError

    def mask_features(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return what the mask head reads for boxes [B,N,4]: [B * N, C, S, S]."""
        raise NotImplementedError

    def forward(self, features: Mapping[str, Tensor], proposals: Proposals, sizes: Tensor) -> dict[str, Tensor]:
        """Return `boxes` [B,K,4], `scores` [B,K] and `labels` [B,K], where K = proposals x classes.

        Boxes are in input pixels, clipped to pictures of `sizes` [B,2]. A pair has the score -inf where its proposal is
        not valid or its box too small. Where there are other methods also what they read: `features.0`, ...
        """
        # Pooling wants planes; what it would copy for each head is copied once.
        levels = [features[name].contiguous() for name in self.config.in_features]
        boxes, found, probabilities = proposals.boxes, [], []
        for head, predictor in self.stages():
            logits, deltas = predictor(head(self.box_pooler(levels, boxes)))
            probabilities.append(predictor.probabilities(logits).reshape(*boxes.shape[:2], -1))
            moved = predictor.decode(deltas, boxes)
            found.append(clip_boxes(moved.flatten(1, 2), sizes).reshape(moved.shape))
            boxes = found[-1][:, :, 0]
        takes_part = proposals.valid[..., None]
        if self.config.min_size > 0:
            takes_part = takes_part & (found[-1][..., 2:] - found[-1][..., :2] >= self.config.min_size).all(-1)
        scores = torch.where(takes_part, torch.stack(probabilities).mean(0), -torch.inf)
        output = {
            "boxes": found[-1].expand(-1, -1, self.config.num_classes, -1).flatten(1, 2),
            "scores": scores.flatten(1),
            "labels": self.classes.expand_as(scores).flatten(1),
        }
        if self.config.mask or self.config.keypoints or self.config.densepose:
            output |= {f"features.{index}": level for index, level in enumerate(levels)}
        return output

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities [B,N,S,S] of boxes [B,N,4] (input pixels) for their `labels` [B,N]."""
        assert self.mask_head is not None
        logits = self.mask_head(self.mask_features(features, boxes))
        return self.mask_head.probabilities(logits, labels)

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the heat maps [B,N,J,S,S], logits, of boxes [B,N,4] (input pixels)."""
        raise NotImplementedError

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the maps [B,N,C,S,S] of a `DensePoseRule` of boxes [B,N,4] (input pixels)."""
        raise NotImplementedError


class StandardRoiHeads(RoiHeads):
    """Heads of their own for all that is asked for; several box heads one after the other make a cascade."""

    def __init__(self, backbone: Backbone, config: RoiHeadsConfig) -> None:
        super().__init__(backbone, config)
        num_out = config.box.num_out(self.num_in)
        heads = [make_box_head(self.num_in, config.box) for _ in config.box_weights]
        predictors = [BoxPredictor(num_out, config.num_classes, weights, config.box) for weights in config.box_weights]
        is_cascade = config.is_cascade
        self.box_head = nn.ModuleList(heads) if is_cascade else heads[0]
        self.box_predictor = nn.ModuleList(predictors) if is_cascade else predictors[0]
        if config.mask:
            self.mask_pooler = RoiPooler(config.mask.pooler, self.strides)
            self.mask_head = MaskHead(self.num_in, config.num_classes, config.mask)
        if config.keypoints:
            self.keypoint_pooler = RoiPooler(config.keypoints.pooler, self.strides)
            self.keypoint_head = KeypointHead(self.num_in, config.keypoints)
        if config.densepose:
            self._add_densepose(backbone, config.densepose)

    def _add_densepose(self, backbone: Backbone, config: DensePoseHeadConfig) -> None:
        num_in, strides = self.num_in, self.strides
        if config.decoder:
            if config.decoder.stride != strides[0]:
                raise ValueError(
                    f"the decoder's map has stride {config.decoder.stride}, but boxes are pooled from it as from "
                    f"{self.config.in_features[0]}, of stride {strides[0]}"
                )
            self.decoder = SemanticHead(backbone, config.decoder)
            num_in, strides = config.decoder.num_classes, self.strides[:1]
        self.densepose_pooler = RoiPooler(config.pooler, strides)
        self.densepose_head = make_densepose_head(num_in, config)
        self.densepose_predictor = ChartPredictor(self.densepose_head.num_out, config)

    def stages(self) -> list[Stage]:
        if not self.config.is_cascade:
            return [(self.box_head, cast("BoxPredictor", self.box_predictor))]
        heads, predictors = cast("nn.ModuleList", self.box_head), cast("Iterable[BoxPredictor]", self.box_predictor)
        return list(zip(heads, predictors, strict=True))

    def mask_features(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        pooled: Tensor = self.mask_pooler(features, boxes)
        return pooled

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        assert self.keypoint_head is not None
        heat = self.keypoint_head(self.keypoint_pooler(features, boxes))
        return heat.float().reshape(*boxes.shape[:2], *heat.shape[1:])

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        assert self.config.densepose is not None
        if self.config.densepose.decoder:
            features = [self.decoder(dict(zip(self.config.in_features, features, strict=True)))]
        maps: Tensor = self.densepose_predictor(self.densepose_head(self.densepose_pooler(features, boxes)))
        return maps.reshape(*boxes.shape[:2], *maps.shape[1:])


class Res5RoiHeads(RoiHeads):
    """The backbone's last stage, run on each box, as the one head of boxes and masks."""

    def __init__(self, backbone: Backbone, config: RoiHeadsConfig, res5: Res5Config) -> None:
        super().__init__(backbone, config)
        self.res5 = bottleneck_stage(3, self.num_in, res5.num_hidden, res5.num_out, stride=2, config=res5.block)
        self.box_predictor = BoxPredictor(res5.num_out, config.num_classes, config.box_weights[0], config.box)
        if config.mask:
            self.mask_head = MaskHead(res5.num_out, config.num_classes, config.mask)

    def stages(self) -> list[Stage]:
        return [(self.describe, self.box_predictor)]

    def describe(self, pooled: Tensor) -> Tensor:
        """Turn pooled features [N,C,S,S] into [N,D]."""
        x: Tensor = self.res5(pooled)
        return x.mean((2, 3))

    def mask_features(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        x: Tensor = self.res5(self.box_pooler(features, boxes))
        return x


def make_roi_heads(backbone: Backbone, config: RoiHeadsConfig) -> RoiHeads:
    """Build the second stage that `config` describes."""
    if config.res5:
        return Res5RoiHeads(backbone, config, config.res5)
    return StandardRoiHeads(backbone, config)
