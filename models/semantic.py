"""Semantic segmentation on a feature pyramid (Panoptic FPN, arXiv:1901.02446, section 3.1).

    images -> backbone -> p2 ... p5 -> each stretched to one stride -> sum -> logits of each cell

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import backbones
from streamd.models.importers.config import Config, base_spec
from streamd.models.layers import Backbone, ConvNorm
from streamd.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticHeadConfig:
    """The numbers of a semantic head."""

    in_features: tuple[str, ...] = ("p2", "p3", "p4", "p5")
    num_classes: int = 54
    conv_dim: int = 128
    norm: str = "GN"
    stride: int = 4  # input pixels per cell of the logits


class SemanticHead(nn.Module):
    """Bring each level to one stride by convolutions and doublings, add them up, and predict."""

    def __init__(self, backbone: Backbone, config: SemanticHeadConfig) -> None:
        super().__init__()
        self.in_features = sorted(config.in_features, key=backbone.strides.__getitem__)
        for name in self.in_features:
            self.add_module(name, _path(backbone.num_channels[name], backbone.strides[name], config))
        self.predictor = nn.Conv2d(config.conv_dim, config.num_classes, 1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, classes, H / stride, W / stride]."""
        first, *others = (self.get_submodule(name)(features[name]) for name in self.in_features)
        for x in others:
            first = first + x
        logits: Tensor = self.predictor(first)
        return logits


def _path(num_in: int, stride: int, config: SemanticHeadConfig) -> nn.Sequential:
    """Build a convolution and a doubling for each halving of the stride, and at least one convolution.

    Raises ValueError where doublings do not lead from `stride` to the head's.
    """
    ratio = stride // config.stride
    if ratio * config.stride != stride or ratio & (ratio - 1):
        raise ValueError(f"a level of stride {stride} cannot be doubled to the stride {config.stride} of the head")
    layers: list[nn.Module] = []
    for index in range(max(1, ratio.bit_length() - 1)):
        num_channels = config.conv_dim if index else num_in
        layers.append(ConvNorm(num_channels, config.conv_dim, 3, norm=config.norm, relu=True))
        if ratio > 1:
            layers.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


class SemanticSegmenter(nn.Module):
    """A backbone and a semantic head alone: Detectron2's SemanticSegmentor."""

    def __init__(self, backbone: Backbone, config: SemanticHeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = SemanticHead(backbone, config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return `semantic`, logits [B, classes, H / stride, W / stride] of images [B,3,H,W]."""
        return {"semantic": self.sem_seg_head(self.backbone(images))}


def build(config: Config) -> tuple[SemanticSegmenter, ModelSpec]:
    """Build the network of a Detectron2 configuration of a SemanticSegmentor, untrained, and its description.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    backbone = backbones.build(config)
    head = head_config(config)
    spec = base_spec(
        config,
        name="semantic_fpn",
        task="semantic",
        num_classes=head.num_classes,
        size_multiple=backbone.size_divisor,
    )
    return SemanticSegmenter(backbone, head), spec


def head_config(config: Config) -> SemanticHeadConfig:
    """Read MODEL.SEM_SEG_HEAD. Raises ModelError."""
    given = config["MODEL"]["SEM_SEG_HEAD"]
    if given["NAME"] != "SemSegFPNHead":
        raise ModelError(f"MODEL.SEM_SEG_HEAD.NAME is {given['NAME']!r}; streamd builds SemSegFPNHead")
    return SemanticHeadConfig(
        in_features=tuple(given["IN_FEATURES"]),
        num_classes=given["NUM_CLASSES"],
        conv_dim=given["CONVS_DIM"],
        norm=given["NORM"],
        stride=given["COMMON_STRIDE"],
    )
