"""The chart head of DensePose R-CNN (arXiv:1802.00434): which point of a body's surface each cell of a box shows.

    feature maps -> (decoder: one map of all levels) -> pool -> head -> predictor
                 -> background or body, part, and for each part the coordinates U and V on its chart

Attribute names follow the checkpoints of Detectron2's DensePose project.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import NUM_GROUPS as NUM_NORM_GROUPS
from streamd.models.layers import ConvNorm, GroupNorm
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.semantic import SemanticHeadConfig
from streamd.models.spec import DensePoseRule

DILATIONS = (6, 12, 56)  # of the pyramid's 3x3 convolutions


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePoseHeadConfig:
    """The numbers of a DensePose head; the defaults are those of densepose_rcnn_R_50_FPN_s1x."""

    kind: Literal["convolutions", "deeplab"] = "convolutions"
    num_convs: int = 8
    conv_dim: int = 512
    conv_kernel: int = 3
    deconv_kernel: int = 4
    norm: str = ""  # or GN: of the kind deeplab alone; its pyramid has GN in any case
    rule: DensePoseRule = field(default_factory=DensePoseRule)
    decoder: SemanticHeadConfig | None = None  # None: each box is pooled from the level that suits its size
    pooler: PoolerConfig = field(default_factory=lambda: PoolerConfig(28, 2, "align_unshifted"))

    def __post_init__(self) -> None:
        if self.conv_kernel % 2 != 1 or self.deconv_kernel % 2 != 0 or self.deconv_kernel < 2:
            raise ValueError(
                f"a convolution of {self.conv_kernel} and a deconvolution of {self.deconv_kernel} cells do not keep "
                "and double the size of a map: the first must be odd, the second even"
            )
        if self.norm and self.kind == "convolutions":
            raise ValueError(f"a head of plain convolutions has no normalisation, and {self.norm} is asked for")


class ConvolutionHead(nn.Module):
    """Turn pooled features [N,C,S,S] into [N,D,S,S] by convolutions: DensePoseV1ConvXHead."""

    def __init__(self, num_in: int, config: DensePoseHeadConfig) -> None:
        super().__init__()
        self.convs: list[str] = []
        for index in range(config.num_convs):
            name = f"body_conv_fcn{index + 1}"
            conv = ConvNorm(num_in, config.conv_dim, config.conv_kernel, norm=config.norm, relu=True)
            self.add_module(name, conv)
            self.convs.append(name)
            num_in = config.conv_dim
        self.num_out = num_in

    def forward(self, x: Tensor) -> Tensor:
        for name in self.convs:
            x = self.get_submodule(name)(x)
        return x


class DeepLabHead(ConvolutionHead):
    """Look at the pooled features at several scales first (arXiv:1706.05587): DensePoseDeepLabHead."""

    def __init__(self, num_in: int, config: DensePoseHeadConfig) -> None:
        super().__init__(num_in, config)
        self.ASPP = DilatedPyramid(num_in)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.ASPP(x))


class DilatedPyramid(nn.Module):
    """Convolve maps [N,C,S,S] with several dilations, add what they show on the mean, and mix it into C channels."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        convs = [_pyramid_path(num_channels, 1)]
        convs += [_pyramid_path(num_channels, 3, dilation) for dilation in DILATIONS]
        convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *_pyramid_path(num_channels, 1)))
        self.convs = nn.ModuleList(convs)
        self.project = nn.Sequential(nn.Conv2d(len(convs) * num_channels, num_channels, 1, bias=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        mix = self.project[0]
        assert isinstance(mix, nn.Conv2d)
        # Each path is mixed on its own, since all of them at once take five times the memory; the last is one cell.
        mixed: Tensor | None = None
        for path, weight in zip(self.convs, mix.weight.chunk(len(self.convs), dim=1), strict=True):
            part = F.conv2d(path(x), weight)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return F.relu_(mixed)


def _pyramid_path(num_channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(num_channels, num_channels, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, GroupNorm(NUM_NORM_GROUPS, num_channels), nn.ReLU())


class ChartPredictor(nn.Module):
    """Turn [N,D,S,S] into the maps of a `DensePoseRule` [N, rule.num_channels, 2 S, 2 S]: DensePoseChartPredictor.

    They come before the last, bilinear enlargement by `rule.up_scale`, which would only take memory here: it goes into
    the resampling to the box.
    """

    def __init__(self, num_in: int, config: DensePoseHeadConfig) -> None:
        super().__init__()
        rule, kernel = config.rule, config.deconv_kernel

        def deconv(num_out: int) -> nn.ConvTranspose2d:
            layer = nn.ConvTranspose2d(num_in, num_out, kernel, stride=2, padding=kernel // 2 - 1)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            return layer

        self.ann_index_lowres = deconv(rule.num_coarse)
        self.index_uv_lowres = deconv(rule.num_parts + 1)
        self.u_lowres = deconv(rule.num_parts + 1)
        self.v_lowres = deconv(rule.num_parts + 1)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.ann_index_lowres, self.index_uv_lowres, self.u_lowres, self.v_lowres)
        return torch.cat([layer(x) for layer in layers], dim=1)


def make_densepose_head(num_in: int, config: DensePoseHeadConfig) -> ConvolutionHead:
    """Build the head that `config` describes, for pooled features of `num_in` channels."""
    return (DeepLabHead if config.kind == "deeplab" else ConvolutionHead)(num_in, config)
