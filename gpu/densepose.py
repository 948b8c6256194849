"""Lay what a DensePose head says over its boxes: plain torch, on the device where its tensors are.

Shapes depend on the number of boxes alone and nothing waits for the device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamd.messages import Chart

if TYPE_CHECKING:
    from streamd.models.spec import DensePoseRule

# Cells along the longer side of a box; those of a smaller box are its pixels. More would only enlarge the files: the
# head's own maps have 56 cells a side, enlarged to 112.
MAX_SIDE = 128
_CHUNK = 8  # boxes at once: 77 maps of 128 x 128 cells take 40 MB


def whole_boxes(boxes: Tensor) -> Tensor:
    """Return x, y, width, height in whole pixels [..., 4] int64 of boxes x1 y1 x2 y2, as DensePose rounds them.

    All four are rounded down, and no side is shorter than a pixel.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).long().clamp(min=1)
    return torch.cat((boxes[..., :2].long(), sides), dim=-1)


def chart_sizes(whole: Tensor) -> Tensor:
    """Return how many cells, height and width [..., 2] int64, the charts of boxes x, y, width, height have."""
    sides = whole[..., 2:].flip(-1)
    longest = sides.amax(-1, keepdim=True)
    scaled = ((sides * MAX_SIDE + longest // 2) // longest).clamp(min=1)
    return torch.where(longest <= MAX_SIDE, sides, scaled)


def make_charts(maps: Tensor, boxes: Tensor, rule: DensePoseRule) -> Tensor:
    """Say which part each cell of a box shows, and where on the part's chart: [B, N, 3, MAX_SIDE, MAX_SIDE] uint8.

    `maps` [B, N, rule.num_channels, S, S] belong to `boxes` [B, N, 4], in source pixels. Of the three planes the first
    is the part, 0 for the background; the others are U and V of that part, clamped to 0..1, in units of 1/255. The
    chart is at the top left, of as many cells as `chart_sizes` says, and the rest is 0.

    As DensePose's ToChartResult: all maps are enlarged to the size of the box, bilinearly, before their best is taken.
    """
    sizes = chart_sizes(whole_boxes(boxes)).flatten(0, 1)
    chunks = zip(maps.flatten(0, 1).split(_CHUNK), sizes.split(_CHUNK), strict=True)
    charts = [_read_maps(_enlarge(part.float(), size, rule.up_scale), size, rule) for part, size in chunks]
    return torch.cat(charts).reshape(*maps.shape[:2], *charts[0].shape[1:])


def cut_charts(charts: Tensor, boxes: np.ndarray) -> tuple[Chart, ...]:
    """Cut the first N charts [..., 3, MAX_SIDE, MAX_SIDE], on the host, to the sizes of boxes [N, 4]."""
    whole = whole_boxes(torch.from_numpy(boxes))
    placed = zip(charts.numpy(force=True), whole.tolist(), chart_sizes(whole).tolist(), strict=False)
    return tuple(
        Chart((x, y, width, height), np.ascontiguousarray(planes[:, :rows, :columns]))
        for planes, (x, y, width, height), (rows, columns) in placed
    )


def _read_maps(values: Tensor, sizes: Tensor, rule: DensePoseRule) -> Tensor:
    """Choose the part of each cell and its U and V, of maps [M, C, MAX_SIDE, MAX_SIDE]."""
    coarse, fine, u, v = values.split((rule.num_coarse, *(rule.num_parts + 1,) * 3), dim=1)
    part = fine.argmax(1, keepdim=True) * (coarse.argmax(1, keepdim=True) > 0)
    cells = torch.arange(MAX_SIDE, device=values.device)
    inside = (cells[:, None] < sizes[:, :1, None]) & (cells < sizes[:, 1:, None])
    part = part * inside[:, None]
    at = torch.cat((u.gather(1, part), v.gather(1, part)), dim=1).clamp(0, 1)
    return torch.cat((part, (at * 255).round() * (part > 0)), dim=1).to(torch.uint8)


def _enlarge(maps: Tensor, sizes: Tensor, up_scale: int) -> Tensor:
    """Enlarge maps [M, C, S, S] by `up_scale` and then to so many cells, sizes [M, 2]: [M, C, MAX_SIDE, MAX_SIDE].

    Each enlargement is linear along each axis, so that both are one matrix for the rows and one for the columns.
    """
    num_maps, num_channels, side, _ = maps.shape
    larger = torch.full_like(sizes[:1, 0], side * up_scale)
    first = _bilinear(side, larger, side * up_scale)
    rows, columns = (_bilinear(side * up_scale, sizes[:, axis], MAX_SIDE) @ first for axis in (0, 1))
    wide = maps.flatten(1, 2) @ columns.mT
    wide = wide.reshape(num_maps, num_channels, side, MAX_SIDE).transpose(1, 2).flatten(2)
    return (rows @ wide).reshape(num_maps, MAX_SIDE, num_channels, MAX_SIDE).transpose(1, 2)


def _bilinear(num_from: int, num_to: Tensor, num_rows: int) -> Tensor:
    """Return matrices [M, num_rows, num_from] that stretch `num_from` cells to `num_to` [M], with half-pixel centres.

    Rows from `num_to` on are repetitions of the last.
    """
    row = torch.arange(num_rows, device=num_to.device)
    scale = num_from / num_to[:, None].float()
    centre = ((row + 0.5) * scale - 0.5).clamp(0, num_from - 1)
    distance = centre[..., None] - torch.arange(num_from, device=num_to.device)
    return (1 - distance.abs()).clamp(min=0)
