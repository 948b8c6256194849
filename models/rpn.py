"""The region proposal network (Faster R-CNN, arXiv:1506.01497): where something may be, before what it is.

    feature maps -> head -> logits, deltas -> best of each level -> clip -> NMS by level -> proposals

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from streamd.gpu import ops
from streamd.models.anchors import AnchorGrid, clip_boxes, decode_deltas
from streamd.models.layers import ConvNorm, static_size


@dataclass(frozen=True, slots=True)
class RpnConfig:
    """The numbers of a region proposal network; the defaults are those of the pyramid in inference."""

    anchors: AnchorGrid
    in_features: tuple[str, ...] = ("p2", "p3", "p4", "p5", "p6")
    conv_dims: tuple[int, ...] = (-1,)  # channels of the hidden convolutions; -1: as many as come in
    box_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    pre_nms_top_k: int = 1000  # of each level
    post_nms_top_k: int = 1000  # of each image
    nms_threshold: float = 0.7
    min_size: float = 0.0  # input pixels; a proposal must be wider and higher


class Proposals(NamedTuple):
    """Where something may be: P boxes in each image, by falling objectness."""

    boxes: Tensor  # [B,P,4] float32 x1 y1 x2 y2 in input pixels, clipped to the picture; zeros where not valid
    valid: Tensor  # [B,P] bool


class RpnHead(nn.Module):
    """Say for each anchor of each cell whether it shows an object, and how to move its sides."""

    def __init__(self, num_in: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)) -> None:
        super().__init__()
        convs = OrderedDict[str, nn.Module]()
        num_channels = num_in
        for index, dim in enumerate(conv_dims):
            num_out = num_channels if dim == -1 else dim
            convs[f"conv{index}"] = ConvNorm(num_channels, num_out, 3, relu=True)
            num_channels = num_out
        self.conv = convs["conv0"] if len(convs) == 1 else nn.Sequential(convs)
        self.objectness_logits = nn.Conv2d(num_channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(num_channels, num_anchors * 4, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B,K] and deltas [B,K,4] of each level, whose K anchors are in the order of `AnchorGrid`."""
        logits, deltas = [], []
        for x in features:
            hidden = self.conv(x)
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.anchor_deltas(hidden).permute(0, 2, 3, 1).unflatten(-1, (-1, 4)).flatten(1, 3))
        return logits, deltas


class ProposalGenerator(nn.Module):
    """Turn feature maps into proposals."""

    def __init__(self, num_in: int, config: RpnConfig) -> None:
        super().__init__()
        num_anchors = set(config.anchors.num_anchors)
        if len(num_anchors) != 1:
            raise ValueError(f"the levels have {config.anchors.num_anchors} anchors a cell: they share one head")
        self.config = config
        self.rpn_head = RpnHead(num_in, num_anchors.pop(), config.conv_dims)

    def forward(self, features: Mapping[str, Tensor], images: Tensor, sizes: Tensor) -> Proposals:
        """Propose boxes within pictures of `sizes` [B,2] (height, width in input pixels) in `images` [B,3,H,W]."""
        return self.propose(features, images, sizes)[0]

    def propose(self, features: Mapping[str, Tensor], images: Tensor, sizes: Tensor) -> tuple[Proposals, Tensor]:
        """Do what `forward` does, and return the logits [B,P] of the proposals too."""
        levels = [features[name] for name in self.config.in_features]
        logits, deltas = self.rpn_head(levels)
        return self.rank(*self.candidates(logits, deltas, self.config.anchors(levels, images)), sizes)

    def candidates(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        top_k: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the best anchors of each level: boxes [B,K,4], logits [B,K] and index of the level [B,K].

        `top_k` of each level, or as many as in inference.
        """
        top_k = self.config.pre_nms_top_k if top_k is None else top_k
        boxes, scores, levels = [], [], []
        for level, (level_logits, level_deltas) in enumerate(zip(logits, deltas, strict=True)):
            num_anchors = static_size(level_deltas)[0]
            score, index = level_logits.topk(min(top_k, num_anchors), dim=1)
            delta = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(decode_deltas(delta, anchors[level][index], self.config.box_weights))
            scores.append(score.float())
            levels.append(torch.full_like(index, level))
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels, dim=1)

    def select(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, sizes: Tensor, top_k: int | None = None
    ) -> Proposals:
        """Clip the candidates, and keep the best that no better one of the same level overlaps.

        `top_k` of each image, or as many as in inference. No gradient flows into the boxes, as in Detectron2.
        """
        return self.rank(boxes, scores, levels, sizes, top_k)[0]

    def rank(
        self, boxes: Tensor, scores: Tensor, levels: Tensor, sizes: Tensor, top_k: int | None = None
    ) -> tuple[Proposals, Tensor]:
        """Do what `select` does, and return the scores [B,P] of the proposals too, -inf where not valid."""
        top_k = self.config.post_nms_top_k if top_k is None else top_k
        boxes = clip_boxes(boxes.detach(), sizes)
        is_large = (boxes[..., 2:] - boxes[..., :2] > self.config.min_size).all(-1)
        scores = torch.where(is_large, scores.detach(), -torch.inf)
        num_proposals = min(top_k, static_size(boxes)[0])
        keep, _ = ops.nms(boxes, scores, levels, self.config.nms_threshold, -torch.inf, num_proposals)
        valid = keep >= 0
        index = keep.clamp(min=0)
        kept = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        proposals = Proposals(torch.where(valid[..., None], kept, 0), valid)
        return proposals, torch.where(valid, scores.gather(1, index), -torch.inf)
