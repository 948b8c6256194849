"""Cut squares of features out of the maps of a pyramid, each box from the one map that suits its size.

torchvision's operators do the cutting; they must be loaded before anything here is called. All of it can be
differentiated, but for the operator `streamd::pool_levels` itself, which a trace of a network holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

OUTSIDE = -1e4  # input pixels: a box so far outside of the picture pools zeros


def pool_levels(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    side: int,
    sampling_ratio: int,
    kind: str,
) -> Tensor:
    """Pool `boxes` [B,N,4] (input pixels, image b from row b of each map) into [B * N, C, side, side].

    `levels` [B,N] are indices into `features`, which have `scales` cells per input pixel. `kind` and `sampling_ratio`
    are those of `PoolerConfig`.
    """
    pool = _Pool(side, sampling_ratio, kind)
    if kind != "max" and not boxes.is_cuda and any(feature.requires_grad for feature in features):
        return _AlignOwn.apply(pool, boxes, levels, scales, *features)
    if len(features) == 1:
        return pool(features[0], _rois(boxes), scales[0])
    return (_pool_all if boxes.is_cuda else _pool_own)(pool, features, boxes, levels, scales)


class _Pool:
    """One of torchvision's operators with its numbers."""

    def __init__(self, side: int, sampling_ratio: int, kind: str) -> None:
        self.side = side
        self.sampling_ratio = sampling_ratio
        self.kind = kind

    def __call__(self, feature: Tensor, rois: Tensor, scale: float) -> Tensor:
        x = feature.float()  # rois must be of the features' type, and float16 has steps of half a pixel beyond 512
        if self.kind == "max":
            pooled, _ = torch.ops.torchvision.roi_pool(x, rois, scale, self.side, self.side)
        else:
            # torchvision.ops.roi_align would check shapes in a way that warns in a trace.
            pooled = torch.ops.torchvision.roi_align(
                x, rois, scale, self.side, self.side, self.sampling_ratio, self.kind == "align"
            )
        return pooled.type_as(feature)

    def backward(self, gradient: Tensor, rois: Tensor, scale: float, shape: torch.Size) -> Tensor:
        """Return the gradient of a map [B,C,H,W] of this shape, from all threads: RoIAlign's own uses one."""
        num_images, _, height, width = shape

        def of_channels(part: Tensor) -> Tensor:
            numbers = (scale, self.side, self.side, num_images, part.shape[1], height, width, self.sampling_ratio)
            return torch.ops.torchvision._roi_align_backward(part, rois, *numbers, self.kind == "align")

        parts = gradient.float().chunk(torch.get_num_threads(), dim=1)
        with ThreadPoolExecutor(len(parts)) as threads:
            return torch.cat(list(threads.map(of_channels, parts)), dim=1).type_as(gradient)


class _AlignOwn(torch.autograd.Function):
    """`_pool_own` of RoIAlign, to be differentiated on a CPU without a filled copy for each level."""

    @staticmethod
    def forward(
        ctx: Any, pool: _Pool, boxes: Tensor, levels: Tensor, scales: Sequence[float], *features: Tensor
    ) -> Tensor:
        ctx.save_for_backward(boxes, levels)
        ctx.pool, ctx.scales, ctx.shapes = pool, scales, [feature.shape for feature in features]
        return _pool_own(pool, features, boxes, levels, scales)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        boxes, levels = ctx.saved_tensors
        gradients = [
            ctx.pool.backward(gradient[own], rois, scale, shape)
            for own, rois, scale, shape in zip(
                *_own_rois(boxes, levels, len(ctx.shapes)), ctx.scales, ctx.shapes, strict=True
            )
        ]
        return None, None, None, None, *gradients


def _pool_own(
    pool: _Pool, features: Sequence[Tensor], boxes: Tensor, levels: Tensor, scales: Sequence[float]
) -> Tensor:
    """Pick the boxes of each level out."""
    pooled = features[0].new_zeros(boxes.shape[0] * boxes.shape[1], features[0].shape[1], pool.side, pool.side)
    for feature, scale, own, rois in zip(features, scales, *_own_rois(boxes, levels, len(features)), strict=True):
        if len(own):
            pooled = pooled.index_put_((own,), pool(feature, rois, scale))
    return pooled


def _own_rois(boxes: Tensor, levels: Tensor, num_levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each level the rows of its boxes, and those boxes as `_rois` gives them."""
    rois, level_of = _rois(boxes), levels.flatten()
    rows = [(level_of == level).nonzero()[:, 0] for level in range(num_levels)]
    return rows, [rois[own] for own in rows]


def _pool_all(
    pool: _Pool, features: Sequence[Tensor], boxes: Tensor, levels: Tensor, scales: Sequence[float]
) -> Tensor:
    """Pool all boxes from every level, those of others from outside of the picture, and add up.

    Shapes do not depend on the data, so that nothing waits for the GPU and a CUDA graph can hold it.
    """
    pooled: Tensor | None = None
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        part = pool(feature, _rois(torch.where((levels == level)[..., None], boxes, OUTSIDE)), scale)
        pooled = part if pooled is None else pooled.add_(part)  # so that no more than two are held at once
    assert pooled is not None
    return pooled


def _rois(boxes: Tensor) -> Tensor:
    """Put the index of the image before each box: [B * N, 5]."""
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    return torch.cat((image.expand(-1, boxes.shape[1], 1), boxes), dim=-1).flatten(0, 1)


def pooled_shapes(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    side: int,
    sampling_ratio: int,
    kind: str,
) -> Tensor:
    """Return an empty tensor of the shape that `pool_levels` gives."""
    num_boxes = boxes.shape[0] * boxes.shape[1]
    return features[0].new_empty((num_boxes, features[0].shape[1], side, side))
