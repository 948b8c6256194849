"""Cut squares of features out of maps, one for each box (RoIAlign, arXiv:1703.06870)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor, nn

CANONICAL_SIZE = 224  # a box of this side in input pixels ...
CANONICAL_LEVEL = 4  # ... is pooled from the map of stride 2^4 (FPN, arXiv:1612.03144, equation 1)
OUTSIDE = -1e4  # input pixels: a box so far outside of the picture pools zeros, and touches no feature


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """The numbers of a pooler. Of the kinds, `align` samples at half-pixel centres, `align_unshifted` half a cell
    further to the right and below, and `max` takes the largest feature of each bin."""

    resolution: int  # cells of the square
    sampling_ratio: int = 0  # samples a cell along each axis; 0: as many as there are features
    kind: Literal["align", "align_unshifted", "max"] = "align"


class RoiPooler(nn.Module):
    """Pool each box from the one level that suits its size; it has no parameters."""

    def __init__(self, config: PoolerConfig, strides: Sequence[int]) -> None:
        """`strides` are the input pixels per cell of the maps, from fine to coarse, each twice the one before."""
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.min_level = int(math.log2(strides[0]))
        if self.strides != tuple(1 << (self.min_level + index) for index in range(len(strides))):
            raise ValueError(
                f"cannot pool from strides {self.strides}: each must be a power of 2, twice the one before"
            )

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Pool `boxes` [B,N,4] (input pixels, image b from row b of each map) into [B * N, C, S, S].

        A box of zeros gives zeros, with the kind `align`, or something finite.
        """
        boxes = boxes.float()
        if len(self.strides) == 1:
            return self._pool(features[0], boxes, self.strides[0])
        levels = self.levels(boxes)[..., None]
        # Every level pools all boxes, those of other levels from outside of the picture, which costs next to nothing:
        # to pick them out would make shapes that depend on the data.
        pooled: Tensor | None = None
        for index, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            part = self._pool(feature, torch.where(levels == index, boxes, OUTSIDE), stride)
            pooled = part if pooled is None else pooled.add_(part)  # so that no more than two are held at once
        assert pooled is not None
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """Say from which map each box [...,4] is pooled, as an index into `strides`, float32."""
        sizes = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
        levels = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_SIZE + 1e-8))
        return (levels - self.min_level).clamp(0, len(self.strides) - 1)

    def _pool(self, feature: Tensor, boxes: Tensor, stride: int) -> Tensor:
        # Not arange: a trace would keep the device where it was made.
        image = torch.ones_like(boxes[..., :1]).cumsum(0) - 1
        rois = torch.cat((image, boxes), dim=-1).flatten(0, 1)
        side, scale = self.config.resolution, 1 / stride
        x = feature.float()  # rois must be of the features' type, and float16 has steps of half a pixel beyond 512
        if self.config.kind == "max":
            pooled, _ = torch.ops.torchvision.roi_pool(x, rois, scale, side, side)
        else:
            aligned = self.config.kind == "align"
            # torchvision.ops.roi_align would check shapes in a way that warns in a trace.
            pooled = torch.ops.torchvision.roi_align(x, rois, scale, side, side, self.config.sampling_ratio, aligned)
        return pooled.type_as(feature)  # not .to(dtype), which a trace would keep
