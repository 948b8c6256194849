"""Feature pyramids (arXiv:1612.03144): from the maps of a backbone to maps of one width, coarse mixed into fine.

Attribute names follow Detectron2's checkpoints: `bottom_up`, `fpn_lateral3`, `fpn_output3`, `top_block`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import Backbone, ConvNorm

Conv = TypeVar("Conv", bound=nn.Conv2d)


class MaxPoolLevel(nn.Module):
    """Add one level by taking every second cell of the coarsest, as Faster R-CNN does."""

    num_levels = 1

    def __init__(self, in_feature: str = "p5") -> None:
        super().__init__()
        self.in_feature = in_feature

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class ConvLevels(nn.Module):
    """Add two levels by convolutions of stride 2, as RetinaNet (from res5) and FCOS (from p5) do."""

    num_levels = 2

    def __init__(self, num_in: int, num_out: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.in_feature = in_feature
        self.p6 = _xavier(nn.Conv2d(num_in, num_out, 3, stride=2, padding=1))
        self.p7 = _xavier(nn.Conv2d(num_out, num_out, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))]


class Fpn(Backbone):
    """Turn images [B,3,H,W] into maps p2, p3, ... of one width: level n has 2^n input pixels a cell.

    `in_features` go from fine to coarse, each at twice the stride of the one before.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        num_out: int = 256,
        *,
        norm: str = "",
        fuse: Literal["sum", "avg"] = "sum",
        top_block: MaxPoolLevel | ConvLevels | None = None,
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.fuse = fuse
        strides = [bottom_up.strides[name] for name in in_features]
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"the strides of {', '.join(in_features)} are {strides}: each must be twice the one before"
            )
        self.levels = [stride.bit_length() - 1 for stride in strides]
        for level, name in zip(self.levels, in_features, strict=True):
            num_in = bottom_up.num_channels[name]
            self.add_module(f"fpn_lateral{level}", _xavier(ConvNorm(num_in, num_out, 1, norm=norm)))
            self.add_module(f"fpn_output{level}", _xavier(ConvNorm(num_out, num_out, 3, norm=norm)))
        self.top_block = top_block
        num_levels = len(strides) + (top_block.num_levels if top_block else 0)
        names = [f"p{self.levels[0] + index}" for index in range(num_levels)]
        self.num_channels = dict.fromkeys(names, num_out)
        self.strides = {name: strides[0] << index for index, name in enumerate(names)}
        self.size_divisor = max(strides[-1], bottom_up.size_divisor)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(images)
        pyramid: dict[str, Tensor] = {}
        coarser: Tensor | None = None
        for level, name in zip(reversed(self.levels), reversed(self.in_features), strict=True):
            x = self.get_submodule(f"fpn_lateral{level}")(features[name])
            if coarser is not None:
                x = x.add_(F.interpolate(coarser, scale_factor=2.0, mode="nearest"))
                x = x / 2 if self.fuse == "avg" else x
            pyramid[f"p{level}"] = self.get_submodule(f"fpn_output{level}")(x)
            coarser = x
        if self.top_block is not None:
            source = self.top_block.in_feature
            added = self.top_block(pyramid[source] if source in pyramid else features[source])
            pyramid |= {f"p{self.levels[-1] + 1 + index}": x for index, x in enumerate(added)}
        return {name: pyramid[name] for name in self.num_channels}


def _xavier(conv: Conv) -> Conv:
    """Draw weights that keep the variance without an activation (Glorot and Bengio, 2010)."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
