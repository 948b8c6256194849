"""What a network should find in a batch of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What one image of a batch shows; N objects, in input pixels of that image."""

    boxes: Tensor  # [N,4] float32 x1 y1 x2 y2, not empty, within the picture
    labels: Tensor  # [N] int64
    crowds: Tensor  # [M,4] float32: regions that teach neither object nor background
    masks: Tensor | None = None  # [N,H,W] bool over the whole image; None: not annotated, teaches nothing
    keypoints: Tensor | None = None  # [N,J,3] float32 x, y, visibility (0: teaches nothing); None: not annotated
    semantic: Tensor | None = None  # [H,W] int64, channel of `semantic`; 255: teaches nothing

    def to(self, device: torch.device) -> Targets:
        """Move all tensors to `device`, without waiting for the copies."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items() if x is not None})


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """Images as the daemon would hand them to the network, and what they show."""

    images: Tensor  # [B,3,H,W] float32, normalised, in the order of the spec's colour
    sizes: Tensor  # [B,2] float32 height, width of each picture within its image
    targets: tuple[Targets, ...]  # B

    def to(self, device: torch.device) -> TrainBatch:
        """Move all tensors to `device`, without waiting for the copies."""
        return TrainBatch(
            self.images.to(device, non_blocking=True),
            self.sizes.to(device, non_blocking=True),
            tuple(target.to(device) for target in self.targets),
        )
