"""What the kernels of masks compute, in plain torch and numpy: paste.cu and rle.cu's oracle, and the path on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.gpu.rle import Bits, EncodedMasks, join, pack, run_ends

_NO_RUNS = np.empty(0, dtype=np.int64)


class _Taps(NamedTuple):
    """Where to read along one axis: two neighbours, and how far the sample lies from the first towards the second."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    def part(self, start: int, stop: int) -> _Taps:
        return _Taps(self.lower[start:stop], self.upper[start:stop], self.fraction[start:stop])


def _taps(position: Tensor, size: int) -> _Taps:
    """Clamp positions, in elements (0 is the centre of the first), to an axis of `size` elements."""
    position = position.clamp(0, size - 1)
    lower = position.long()
    return _Taps(lower, (lower + 1).clamp_(max=size - 1), position - lower)


def _sample(plane: Tensor, rows: _Taps, columns: _Taps) -> Tensor:
    """Read `plane` bilinearly at every pair of a row and a column.

    In steps that are rounded one by one, which the kernel repeats; torch.lerp rounds as its vector unit likes.
    """
    left, right = plane.index_select(1, columns.lower), plane.index_select(1, columns.upper)
    lines = left + (right - left) * columns.fraction
    above, below = lines.index_select(0, rows.lower), lines.index_select(0, rows.upper)
    return below.sub_(above).mul_(rows.fraction[:, None]).add_(above)


def encode_prototype_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    valid: Tensor,
    placements: Tensor,
    *,
    input_size: tuple[int, int],
    threshold: float,
    capacity: int,
) -> EncodedMasks:
    """Encode the masks of a batch, B images with N objects each, as COCO run lengths at source size.

    `prototypes` [B, P, h, w], `coefficients` [B, N, P]; the mask of an object is cut at its box, as `paste_prototypes`
    says. `boxes` [B, N, 4] float32 x1 y1 x2 y2 in source pixels; objects that are not `valid` [B, N] bool have no mask.
    `placements` [B, 6 or more] float32: scale_x, scale_y, left, top of each letterbox, width and height of each frame,
    which has fewer than 2^31 pixels and 2^16 rows. `capacity` is for how many runs there is room.
    """
    masks = (
        paste_prototypes(prototypes[i], coefficients[i, kept], boxes[i, kept], placements[i], input_size, threshold)
        for i, kept in enumerate(valid)
    )
    return _encode(masks, valid, placements, capacity)


def encode_box_masks(
    masks: Tensor, boxes: Tensor, valid: Tensor, placements: Tensor, *, threshold: float, capacity: int
) -> EncodedMasks:
    """Encode mask probabilities [B, N, S, S] over their boxes, as `paste_boxes` stretches them.

    The other arguments are those of `encode_prototype_masks`; only width and height count of `placements`.
    """
    sizes = placements[:, 4:6].int().tolist()
    pasted = (
        paste_boxes(masks[i, kept], boxes[i, kept], width, height, threshold)
        for i, (kept, (width, height)) in enumerate(zip(valid, sizes, strict=True))
    )
    return _encode(pasted, valid, placements, capacity)


def _encode(masks: Iterable[list[Bits]], valid: Tensor, placements: Tensor, capacity: int) -> EncodedMasks:
    """Encode the masks of each image's valid objects; nothing where they have more than `capacity` runs."""
    ends = []
    for pasted, (width, height), kept in zip(masks, placements[:, 4:6].int().tolist(), valid.tolist(), strict=True):
        bits = iter(pasted)
        ends += [run_ends(next(bits), height, width) if is_valid else _NO_RUNS for is_valid in kept]
    runs, offsets = join(ends)
    num_runs = torch.tensor(len(runs))
    if num_runs > capacity:
        runs, offsets = runs[:0], np.zeros_like(offsets)
    characters, offsets = pack(runs, offsets)
    encoded = (torch.from_numpy(characters), torch.from_numpy(offsets), num_runs)
    return EncodedMasks(*(tensor.to(valid.device) for tensor in encoded))


def paste_prototypes(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    placement: Tensor,
    input_size: tuple[int, int],
    threshold: float,
) -> list[Bits]:
    """Mix `prototypes` [P, h, w] by `coefficients` [N, P] and cut each mask at its box [N, 4], in source pixels.

    A pixel is set if its centre lies in the box (x1 <= x + 0.5 < x2) and the logit sampled there is above
    logit(threshold). The sample is bilinear between the prototypes' half-pixel centres, clamped at their border:
    input = source * (scale_x, scale_y) + (left, top), prototype = input * (w / input width). `placement` holds these
    four and the width and height of the frame, `input_size` is (height, width).
    """
    width, height = placement[4:6].int().tolist()
    grid_height, grid_width = prototypes.shape[-2:]
    logits = (coefficients @ prototypes.flatten(1)).float().unflatten(1, (grid_height, grid_width))
    limit = logit(threshold)
    scale_x, scale_y, left, top = placement[:4]
    rows = _taps((_centres(0, height, boxes) * scale_y + top) * (grid_height / input_size[0]) - 0.5, grid_height)
    columns = _taps((_centres(0, width, boxes) * scale_x + left) * (grid_width / input_size[1]) - 0.5, grid_width)
    first, last = (boxes[:, :2] - 0.5).ceil(), (boxes[:, 2:] - 0.5).ceil()
    return [
        Bits(x0, y0, _sample(plane, rows.part(y0, y1), columns.part(x0, x1)) > limit)
        for plane, (x0, y0, x1, y1) in zip(logits, _regions(boxes, first, last, width, height), strict=True)
    ]


def paste_boxes(masks: Tensor, boxes: Tensor, width: int, height: int, threshold: float) -> list[Bits]:
    """Stretch mask probabilities [N, S, S] over their boxes [N, 4], in source pixels: set where >= threshold.

    As Detectron2's `paste_masks_in_image` does: pixel centre x + 0.5 reads the mask at (x + 0.5 - x1) / (x2 - x1) * S
    between half-pixel centres, with zeros around the mask, so that thresholds under 0.5 also set pixels outside the
    box; the region is the box and one pixel more, as on its CPU path.
    """
    size = masks.shape[-1]
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    regions = _regions(boxes, boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1, width, height)
    pasted = []
    for mask, (x1, y1, x2, y2), (left, top, right, bottom) in zip(padded, boxes, regions, strict=True):
        # +0.5: -0.5 from the first half-pixel centre, and +1 for the ring of zeros.
        columns = _taps((_centres(left, right, boxes) - x1) / (x2 - x1) * size + 0.5, size + 2)
        rows = _taps((_centres(top, bottom, boxes) - y1) / (y2 - y1) * size + 0.5, size + 2)
        pasted.append(Bits(left, top, _sample(mask, rows, columns) >= threshold))
    return pasted


def logit(probability: float) -> float:
    """Return what the sigmoid makes `probability` of: -inf for 0, inf for 1."""
    if 0 < probability < 1:
        return math.log(probability / (1 - probability))
    return math.copysign(math.inf, probability - 0.5)


def _centres(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last, device=like.device) + 0.5


def _regions(boxes: Tensor, first: Tensor, last: Tensor, width: int, height: int) -> list[list[int]]:
    """Clip the pixel ranges [first, last) to the frame; a box without area or with a NaN or infinity gets none."""
    limit = torch.tensor([width, height], dtype=boxes.dtype, device=boxes.device)
    corners = torch.cat((first.clamp(min=0).minimum(limit), last.clamp(min=0).minimum(limit)), dim=-1)
    valid = boxes.isfinite().all(-1) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
    corners = torch.where(valid[:, None], corners, 0)
    return corners.int().tolist()
