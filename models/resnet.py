"""ResNet and ResNeXt (arXiv:1512.03385, arXiv:1611.05431), as Detectron2 and torchvision build them.

    images -> stem (stride 4) -> res2 (4) -> res3 (8) -> res4 (16) -> res5 (32)

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch
import torchvision  # noqa: F401  it registers torch.ops.torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import Backbone, ConvNorm

NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STAGES = ("res2", "res3", "res4", "res5")


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """What the blocks of a stage share."""

    num_groups: int = 1
    stride_in_1x1: bool = False  # as the MSRA checkpoints have it; torchvision's and Torch7's have it in the 3x3
    norm: str = "FrozenBN"
    dilation: int = 1
    deformable: bool = False  # the 3x3 convolution
    deform_modulated: bool = False  # with a weight for each sample (DCNv2, arXiv:1811.11168)
    num_deform_groups: int = 1


@dataclass(frozen=True, slots=True)
class ResnetConfig:
    """The numbers of a network."""

    depth: int = 50
    num_stem_channels: int = 64
    num_res2_channels: int = 256
    num_groups: int = 1
    width_per_group: int = 64  # channels of the 3x3 convolutions of res2, per group
    stride_in_1x1: bool = False
    norm: str = "FrozenBN"
    res5_dilation: int = 1  # 2 keeps res5 at stride 16 (DC5)
    deform_on_per_stage: tuple[bool, ...] = (False, False, False, False)
    deform_modulated: bool = False
    num_deform_groups: int = 1
    out_features: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        if self.depth not in NUM_BLOCKS:
            raise ValueError(f"ResNet of depth {self.depth}: there are {', '.join(map(str, NUM_BLOCKS))}")
        if unknown := set(self.out_features) - {"stem", *STAGES}:
            raise ValueError(f"ResNet has no output {', '.join(sorted(unknown))}: there are stem, {', '.join(STAGES)}")
        if self.is_basic and (any(self.deform_on_per_stage) or self.res5_dilation != 1 or self.num_groups != 1):
            raise ValueError(f"ResNet of depth {self.depth} has no groups, dilation or deformable convolution")

    @property
    def is_basic(self) -> bool:
        """Whether blocks are two 3x3 convolutions instead of a bottleneck."""
        return self.depth in (18, 34)

    def block(self, index: int) -> BlockConfig:
        """Return what the blocks of stage `index` share, where 0 is res2."""
        return BlockConfig(
            num_groups=self.num_groups,
            stride_in_1x1=self.stride_in_1x1,
            norm=self.norm,
            dilation=self.res5_dilation if index == 3 else 1,
            deformable=self.deform_on_per_stage[index],
            deform_modulated=self.deform_modulated,
            num_deform_groups=self.num_deform_groups,
        )


class DeformableConv(ConvNorm):
    """Convolve where offsets say; normalise and activate. There is no bias."""

    num_offset_groups = 1

    def forward(self, x: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Sample at `offsets` [B, groups * 2 * k * k, H, W] in cells, y before x, and weigh the samples.

        `weights` are [B, groups * k * k, H, W].
        """
        # The operator itself: torchvision's function around it compares shapes, which a trace would warn of.
        y = torch.ops.torchvision.deform_conv2d(
            x,
            self.weight,
            offsets,
            offsets[:, :1] if weights is None else weights,  # looked at for its batch size alone, if at all
            x.new_zeros(self.out_channels),
            *self.stride,
            *cast("tuple[int, int]", self.padding),
            *self.dilation,
            self.groups,
            self.num_offset_groups,
            weights is not None,
        )
        return self.finish(y)


class Bottleneck(nn.Module):
    """Reduce, convolve 3x3, expand, and add the input."""

    def __init__(self, num_in: int, num_hidden: int, num_out: int, stride: int, config: BlockConfig) -> None:
        super().__init__()
        norm = config.norm
        stride_1x1, stride_3x3 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.shortcut = (
            ConvNorm(num_in, num_out, 1, stride=stride, norm=norm, bias=False) if num_in != num_out else None
        )
        self.conv1 = ConvNorm(num_in, num_hidden, 1, stride=stride_1x1, norm=norm, relu=True, bias=False)
        self.deform_modulated = config.deform_modulated
        self.conv2_offset: nn.Conv2d | None = None
        self.conv2 = (DeformableConv if config.deformable else ConvNorm)(
            num_hidden,
            num_hidden,
            3,
            stride=stride_3x3,
            dilation=config.dilation,
            groups=config.num_groups,
            norm=norm,
            relu=True,
            bias=False,
        )
        if isinstance(self.conv2, DeformableConv):
            self.conv2.num_offset_groups = config.num_deform_groups
            # 9 samples, each with y, x and perhaps a weight; without offsets at first.
            num_offsets = (27 if config.deform_modulated else 18) * config.num_deform_groups
            self.conv2_offset = ConvNorm(num_hidden, num_offsets, 3, stride=stride_3x3, dilation=config.dilation)
            nn.init.zeros_(self.conv2_offset.weight)
        self.conv3 = ConvNorm(num_hidden, num_out, 1, norm=norm, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv3(self._spatial(self.conv1(x))).add_(residual))

    def _spatial(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.conv2_offset is None:
            y = self.conv2(x)
        elif self.deform_modulated:
            first, second, weights = self.conv2_offset(x).chunk(3, dim=1)
            y = self.conv2(x, torch.cat((first, second), dim=1), weights.sigmoid())
        else:
            y = self.conv2(x, self.conv2_offset(x))
        return y


class BasicBlock(nn.Module):
    """Convolve 3x3 twice and add the input."""

    def __init__(self, num_in: int, num_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.shortcut = (
            ConvNorm(num_in, num_out, 1, stride=stride, norm=norm, bias=False) if num_in != num_out else None
        )
        self.conv1 = ConvNorm(num_in, num_out, 3, stride=stride, norm=norm, relu=True, bias=False)
        self.conv2 = ConvNorm(num_out, num_out, 3, norm=norm, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv2(self.conv1(x)).add_(residual))


def bottleneck_stage(
    num_blocks: int, num_in: int, num_hidden: int, num_out: int, *, stride: int, config: BlockConfig
) -> nn.Sequential:
    """Build the blocks of a stage; the first has the stride."""
    blocks = [Bottleneck(num_in, num_hidden, num_out, stride, config)]
    blocks += [Bottleneck(num_out, num_hidden, num_out, 1, config) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def basic_stage(num_blocks: int, num_in: int, num_out: int, *, stride: int, norm: str) -> nn.Sequential:
    """Build the blocks of a stage of ResNet-18 or -34; the first has the stride."""
    blocks = [BasicBlock(num_in, num_out, stride, norm)]
    blocks += [BasicBlock(num_out, num_out, 1, norm) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class Resnet(Backbone):
    """Turn images [B,3,H,W] into the maps `config.out_features`; stages above the last of them are left out."""

    def __init__(self, config: ResnetConfig) -> None:
        super().__init__()
        num_channels, stride = config.num_stem_channels, 4
        stem_conv = ConvNorm(3, num_channels, 7, stride=2, norm=config.norm, relu=True, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv1=stem_conv, pool=nn.MaxPool2d(3, stride=2, padding=1)))
        self.stages = STAGES[
            : max((STAGES.index(name) + 1 for name in config.out_features if name != "stem"), default=0)
        ]
        channels, strides = {"stem": num_channels}, {"stem": stride}
        for index, name in enumerate(self.stages):
            step = 1 if index == 0 or config.block(index).dilation > 1 else 2
            self.add_module(name, _stage(config, index, num_channels, step))
            num_channels, stride = config.num_res2_channels << index, stride * step
            channels[name], strides[name] = num_channels, stride
        self.num_channels = {name: channels[name] for name in config.out_features}
        self.strides = {name: strides[name] for name in config.out_features}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        features = {"stem": x}
        for name in self.stages:
            x = self.get_submodule(name)(x)
            features[name] = x
        return {name: features[name] for name in self.num_channels}


def _stage(config: ResnetConfig, index: int, num_in: int, stride: int) -> nn.Sequential:
    num_blocks, num_out = NUM_BLOCKS[config.depth][index], config.num_res2_channels << index
    if config.is_basic:
        return basic_stage(num_blocks, num_in, num_out, stride=stride, norm=config.norm)
    num_hidden = config.num_groups * config.width_per_group << index
    return bottleneck_stage(num_blocks, num_in, num_hidden, num_out, stride=stride, config=config.block(index))


def resnet50(norm: str = "FrozenBN", out_features: tuple[str, ...] = STAGES) -> Resnet:
    """23.5 M parameters, torchvision's stride in the 3x3."""
    return Resnet(ResnetConfig(depth=50, norm=norm, out_features=out_features))


def resnet101(norm: str = "FrozenBN", out_features: tuple[str, ...] = STAGES) -> Resnet:
    """42.5 M parameters, torchvision's stride in the 3x3."""
    return Resnet(ResnetConfig(depth=101, norm=norm, out_features=out_features))


def resnext101_32x8d(norm: str = "FrozenBN", out_features: tuple[str, ...] = STAGES) -> Resnet:
    """86.7 M parameters: Detectron2's X101."""
    return Resnet(ResnetConfig(depth=101, num_groups=32, width_per_group=8, norm=norm, out_features=out_features))
