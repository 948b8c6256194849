"""Segments that share the pixels of a frame out among objects and background, on the device where the masks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.gpu.rle import Bits

if TYPE_CHECKING:
    from streamd.messages import Letterbox
    from streamd.models.spec import PanopticRule

# Channels that are stretched to source size at once: 16 of 1080p take 130 MB, all 54 of COCO would take 450 MB.
_CHANNELS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Which segment each pixel of a frame belongs to. Segments are numbered from 1: objects first, by falling score."""

    ids: Tensor  # [H, W] int32 at source size; 0: no segment
    things: Tensor  # [N] int32: the segment of each object, 0 where it became none
    stuff: Tensor  # [S] int32: the segment of each channel of `semantic`, 0 where it became none


def classify_pixels(
    semantic: Tensor, letterbox: Letterbox, width: int, height: int, input_size: tuple[int, int]
) -> Tensor:
    """Name the best channel of each source pixel: [height, width] int64, of logits [S, h, w] over the whole input.

    As Detectron2's `sem_seg_postprocess`: the logits are stretched to `input_size` (height, width), cut to the
    picture inside the padding, and stretched to source size, both times bilinearly with half-pixel centres. The first
    of equal channels wins.
    """
    best = torch.full((height, width), -torch.inf, device=semantic.device)
    classes = torch.zeros((height, width), dtype=torch.int64, device=semantic.device)
    rows = slice(letterbox.top, letterbox.top + letterbox.height)
    columns = slice(letterbox.left, letterbox.left + letterbox.width)
    for first in range(0, len(semantic), _CHANNELS_AT_ONCE):
        logits = semantic[first : first + _CHANNELS_AT_ONCE].float()
        picture = _stretch(logits, input_size)[:, rows, columns]
        value, channel = _stretch(picture, (height, width)).max(dim=0)
        classes = torch.where(value > best, channel + first, classes)
        best = torch.maximum(best, value)
    return classes


def _stretch(planes: Tensor, size: tuple[int, int]) -> Tensor:
    if planes.shape[1:] == size:
        return planes
    return F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]


def merge(masks: Sequence[Bits], scores: Sequence[float], classes: Tensor, rule: PanopticRule) -> Segments:
    """Give each pixel to the best object that covers it, and the rest to stuff (arXiv:1801.00868, section 4.1).

    `masks` are N objects by falling score with their `scores`; `classes` [H, W] int64 are channels of `semantic`. An
    object that better ones cover too much is left out, as is a stuff region that is too small; `rule` holds the limits.
    Nothing waits for the device.
    """
    device = classes.device
    ids = torch.zeros(classes.shape, dtype=torch.int32, device=device)
    things = torch.zeros(len(masks), dtype=torch.int32, device=device)
    last = torch.zeros((), dtype=torch.int32, device=device)
    for index, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        if score < rule.score_threshold:
            break
        rows, columns = mask.bits.shape
        region = ids[mask.y0 : mask.y0 + rows, mask.x0 : mask.x0 + columns]
        free = mask.bits & (region == 0)
        area = mask.bits.sum()
        # For a mask without pixels this is NaN, which no limit accepts.
        accepted = (area - free.sum()).double() / area <= rule.overlap_threshold
        last += accepted
        things[index] = last * accepted
        region.copy_(torch.where(free & accepted, last, region))
    stuff = _number_stuff(ids, classes, last, rule)
    return Segments(torch.where(ids == 0, stuff[classes], ids), things, stuff)


def _number_stuff(ids: Tensor, classes: Tensor, last: Tensor, rule: PanopticRule) -> Tensor:
    """Return the segment [S] of each stuff channel, by the pixels that no object took; numbers go on after `last`."""
    num_channels = len(rule.stuff_labels)
    # Not bincount, which waits for the device. Channel 0 stands for all things, so pixels of objects go there too.
    channel = torch.where(ids == 0, classes, 0).flatten()
    areas = torch.zeros(num_channels, dtype=torch.int64, device=ids.device)
    areas.scatter_add_(0, channel, torch.ones_like(channel))
    accepted = areas >= max(rule.stuff_area_limit, 1)
    accepted[0] = False
    return torch.where(accepted, last + accepted.cumsum(0), 0).int()
