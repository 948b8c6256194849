"""Anchor boxes, and the deltas that networks predict from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from streamd.models.layers import static_size

MAX_LOG_SCALE = math.log(1000 / 16)  # a delta may scale a box of 16 px to 1000 px and no further


@dataclass(frozen=True)
class AnchorGrid:
    """Boxes of several sizes and shapes around each cell of each level.

    `sizes` [level][i] are sides in input pixels of the square of the same area, `aspect_ratios` [level][j] height by
    width; a single row serves all levels. The conventions differ:
    - detectron2: a cell's anchors go size by size, and within a size ratio by ratio
    - torchvision: they go ratio by ratio, are rounded to whole pixels around the cell's centre, and the distance of
      cells is input side // map side, which is not the stride where it leaves a rest
    """

    strides: tuple[int, ...]  # input pixels per cell of each level
    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[tuple[float, ...], ...]
    offset: float = 0.0  # of the first cell's centre from the corner of the image, in cells
    convention: Literal["detectron2", "torchvision"] = "detectron2"

    def __post_init__(self) -> None:
        for name, rows in (("sizes", self.sizes), ("aspect ratios", self.aspect_ratios)):
            if len(rows) not in (1, len(self.strides)):
                raise ValueError(
                    f"anchors: {len(rows)} rows of {name} for {len(self.strides)} levels; give 1 or as many"
                )

    @property
    def num_anchors(self) -> tuple[int, ...]:
        """Say how many anchors a cell of each level has."""
        return tuple(len(self.cell(level)) for level in range(len(self.strides)))

    def cell(self, level: int) -> np.ndarray:
        """Return the anchors of a level around the origin: [A,4] float32 x1 y1 x2 y2, input pixels."""
        size, ratio = np.meshgrid(
            self.sizes[level % len(self.sizes)],
            self.aspect_ratios[level % len(self.aspect_ratios)],
            indexing="ij" if self.convention == "detectron2" else "xy",
        )
        width = np.sqrt(size**2 / ratio).ravel()
        height = ratio.ravel() * width
        boxes = np.stack((-width, -height, width, height), axis=-1) / 2
        return (boxes.round() if self.convention == "torchvision" else boxes).astype(np.float32)

    def __call__(self, features: Sequence[Tensor], images: Tensor | None = None) -> list[Tensor]:
        """Return the anchors of each level's map [B,C,h,w]: [h*w*A,4] float32, cells row by row, on its device.

        `images` [B,3,H,W], which the maps were made from, may be left out in Detectron2's convention. A trace keeps
        the anchors as constants.
        """
        if images is None and self.convention == "torchvision":
            raise ValueError("anchors: torchvision's convention needs the images, whose size gives the step of cells")
        input_size = (0, 0) if images is None else static_size(images)
        return [_level_anchors(self, level, static_size(x), input_size, x.device) for level, x in enumerate(features)]


@lru_cache(maxsize=64)  # an artifact needs few; training sees many sizes, and each may be megabytes
def _level_anchors(
    grid: AnchorGrid, level: int, size: tuple[int, int], input_size: tuple[int, int], device: torch.device
) -> Tensor:
    # numpy, because a trace would record how torch makes them, and on which device.
    centres = []
    for num_cells, side in zip(size, input_size, strict=True):
        step = grid.strides[level] if grid.convention == "detectron2" else side // num_cells
        centres.append(np.float32(grid.offset * step) + np.arange(num_cells, dtype=np.float32) * step)
    x, y = np.meshgrid(centres[1], centres[0])
    around = np.stack((x, y, x, y), axis=-1).reshape(-1, 1, 4)
    with torch.inference_mode(False):  # or anchors first made in inference could not serve training
        anchors = torch.from_numpy((around + grid.cell(level)).reshape(-1, 4))
        return anchors if device.type == "cpu" else anchors.to(device)


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Move and scale `anchors` [...,4] by `deltas` [...,4] (dx dy dw dh, each times its weight): x1 y1 x2 y2, float32.

    dx and dy are in sizes of the anchor, dw and dh logarithms of scales (R-CNN, arXiv:1311.2524, appendix C).
    """
    deltas, anchors = deltas.float(), anchors.float()  # float16 has steps of half a pixel beyond 512
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    anchor_centres = anchors[..., :2] + 0.5 * anchor_sizes
    steps = [delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)]
    centres = torch.stack(steps[:2], dim=-1) * anchor_sizes + anchor_centres
    sizes = torch.stack(steps[2:], dim=-1).clamp(max=MAX_LOG_SCALE).exp() * anchor_sizes
    return torch.cat((centres - 0.5 * sizes, centres + 0.5 * sizes), dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip `boxes` [B,K,4] to pictures of `sizes` [B,2] (height, width), in input pixels."""
    limits = sizes.type_as(boxes).flip(-1).repeat(1, 2)[:, None]
    return boxes.clamp(min=0).minimum(limits)
