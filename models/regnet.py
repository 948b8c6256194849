"""RegNet (arXiv:2003.13678): stages of bottlenecks whose widths follow a quantised line.

    images -> stem (stride 2) -> s1 (4) -> s2 (8) -> s3 (16) -> s4 (32)

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import Backbone, make_norm

STAGES = ("s1", "s2", "s3", "s4")
_WIDTH_STEP = 8  # channels; widths are multiples of it


@dataclass(frozen=True, slots=True)
class RegnetConfig:
    """The numbers of a network, named as in the paper."""

    depth: int  # blocks of all stages together
    slope: float  # w_a: channels that each block adds, before quantisation
    first_width: float  # w_0
    width_ratio: float  # w_m, of a stage to the one before
    group_width: int  # channels of a group of the 3x3 convolutions
    se_ratio: float = 0.0  # hidden channels of squeeze and excitation by those that enter the block; 0: has none
    num_stem_channels: int = 32
    norm: str = "FrozenBN"
    out_features: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        if unknown := set(self.out_features) - set(STAGES):
            raise ValueError(f"RegNet has no output {', '.join(sorted(unknown))}: there are {', '.join(STAGES)}")
        if len(self.stages()) != len(STAGES):
            raise ValueError(f"RegNet: these numbers give {len(self.stages())} stages instead of {len(STAGES)}")

    def stages(self) -> list[tuple[int, int, int]]:
        """Return number of blocks, channels, and channels of a group of each stage (section 3.3 of the paper)."""
        widths = []
        for block in range(self.depth):
            wanted = self.first_width + self.slope * block
            step = round(math.log(wanted / self.first_width) / math.log(self.width_ratio))
            widths.append(round(self.first_width * self.width_ratio**step / _WIDTH_STEP) * _WIDTH_STEP)
        stages = []
        for width, blocks in itertools.groupby(widths):
            group_width = min(self.group_width, width)
            stages.append((len(list(blocks)), max(1, round(width / group_width)) * group_width, group_width))
        return stages


class Stem(nn.Module):
    def __init__(self, num_out: int, norm: str) -> None:
        super().__init__()
        self.conv = _conv(3, num_out, 3, stride=2)
        self.norm = make_norm(norm, num_out) or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return F.relu_(self.norm(self.conv(images)))


class SqueezeExcite(nn.Module):
    """Weigh the channels by what the whole picture says (arXiv:1709.01507)."""

    def __init__(self, num_channels: int, num_hidden: int) -> None:
        super().__init__()
        self.f_ex = nn.Sequential(
            nn.Conv2d(num_channels, num_hidden, 1), nn.ReLU(), nn.Conv2d(num_hidden, num_channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.f_ex(F.adaptive_avg_pool2d(x, 1))
        return y


class Transform(nn.Module):
    """Mix channels, convolve 3x3 in groups, weigh channels, mix channels; all of one width."""

    def __init__(self, num_in: int, num_out: int, stride: int, group_width: int, config: RegnetConfig) -> None:
        super().__init__()
        self.a = _conv(num_in, num_out, 1)
        self.a_norm = make_norm(config.norm, num_out) or nn.Identity()
        self.b = _conv(num_out, num_out, 3, stride=stride, groups=num_out // group_width)
        self.b_norm = make_norm(config.norm, num_out) or nn.Identity()
        num_hidden = round(num_in * config.se_ratio)
        self.se = SqueezeExcite(num_out, num_hidden) if num_hidden else nn.Identity()
        self.c = _conv(num_out, num_out, 1)
        self.c_norm = make_norm(config.norm, num_out) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.a_norm(self.a(x)))
        x = F.relu_(self.b_norm(self.b(x)))
        y: Tensor = self.c_norm(self.c(self.se(x)))
        return y


class Block(nn.Module):
    """Add a transformation to the input, which is projected where the shapes differ."""

    def __init__(self, num_in: int, num_out: int, stride: int, group_width: int, config: RegnetConfig) -> None:
        super().__init__()
        self.has_projection = num_in != num_out or stride != 1
        if self.has_projection:
            self.proj = _conv(num_in, num_out, 1, stride=stride)
            self.proj_norm = make_norm(config.norm, num_out) or nn.Identity()
        self.f = Transform(num_in, num_out, stride, group_width, config)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.proj_norm(self.proj(x)) if self.has_projection else x
        return F.relu_(self.f(x) + residual)


class Regnet(Backbone):
    """Turn images [B,3,H,W] into the maps `config.out_features`; stages above the last of them are left out."""

    def __init__(self, config: RegnetConfig) -> None:
        super().__init__()
        num_in, stride = config.num_stem_channels, 2
        self.stem = Stem(num_in, config.norm)
        self.stages = STAGES[: max(STAGES.index(name) + 1 for name in config.out_features)]
        self.num_channels, self.strides = {}, {}
        for name, (num_blocks, num_out, group_width) in zip(self.stages, config.stages(), strict=False):
            blocks = nn.Sequential()
            for index in range(num_blocks):
                blocks.add_module(f"b{index + 1}", Block(num_in, num_out, 1 if index else 2, group_width, config))
                num_in = num_out
            self.add_module(name, blocks)
            stride *= 2
            if name in config.out_features:
                self.num_channels[name], self.strides[name] = num_out, stride

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        features = {}
        for name in self.stages:
            x = self.get_submodule(name)(x)
            features[name] = x
        return {name: features[name] for name in self.num_channels}


def _conv(num_in: int, num_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def regnetx_4gf(norm: str = "FrozenBN", out_features: tuple[str, ...] = STAGES) -> Regnet:
    """20.8 M parameters, 4 GFLOPs at 224x224; Detectron2 has it as regnetx_4gf_dds."""
    return Regnet(
        RegnetConfig(
            depth=23,
            slope=38.65,
            first_width=96,
            width_ratio=2.43,
            group_width=40,
            norm=norm,
            out_features=out_features,
        )
    )


def regnety_4gf(norm: str = "FrozenBN", out_features: tuple[str, ...] = STAGES) -> Regnet:
    """19.6 M parameters, 4 GFLOPs at 224x224; Detectron2 has it as regnety_4gf_dds."""
    return Regnet(
        RegnetConfig(
            depth=22,
            slope=31.41,
            first_width=96,
            width_ratio=2.24,
            group_width=64,
            se_ratio=0.25,
            norm=norm,
            out_features=out_features,
        )
    )
