"""Cut squares of features out of maps, one for each box (RoIAlign, arXiv:1703.06870)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor, nn

from streamd.gpu import ops  # noqa: F401  registers torch.ops.streamd
from streamd.gpu.pooling import pool_levels

CANONICAL_SIZE = 224  # a box of this side in input pixels ...
CANONICAL_LEVEL = 4  # ... is pooled from the map of stride 2^4 (FPN, arXiv:1612.03144, equation 1)


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
        config, scales = self.config, [1 / stride for stride in self.strides]
        boxes = boxes.float()
        # A trace holds the operator, which picks the boxes of each level where that does not cost a wait.
        pool = torch.ops.streamd.pool_levels if torch.jit.is_tracing() else pool_levels  # type: ignore[attr-defined]
        pooled: Tensor = pool(
            list(features), boxes, self.levels(boxes), scales, config.resolution, config.sampling_ratio, config.kind
        )
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """Say from which map each box [...,4] is pooled, as an index into `strides`, float32."""
        sizes = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
        levels = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_SIZE + 1e-8))
        return (levels - self.min_level).clamp(0, len(self.strides) - 1)
