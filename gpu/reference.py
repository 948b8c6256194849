"""What each kernel computes, in plain torch and numpy: the kernels' oracle, and the daemon's path on a CPU.

Those of the masks are in mask_reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.messages import Letterbox, Picture

# Candidates that are compared with each other at once: one square of overlaps that stays in the cache.
_SWEEP_BLOCK = 256

MAX_BOX_SIDE_PX = 8192  # of what heat maps are stretched over
_PIXELS_AT_ONCE = 1 << 20  # of stretched heat maps: 4 MB

# Weights of red and blue in luma: ITU-R BT.601-7, section 2.5.1, and ITU-R BT.709-6, section 3.2.
_LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def preprocess(
    pictures: Sequence[Picture],
    letterboxes: Sequence[Letterbox],
    out: Tensor,
    *,
    colour: Literal["bgr", "rgb"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    pad: tuple[float, float, float],
    antialias: bool = False,
) -> None:
    """Fill each slot of `out` with one picture: upright, letterboxed, in `colour` order, (value - mean) / std.

    `out` [B, 3, H, W] is float32 or float16, contiguous or channels_last; what it held before does not matter.
    `mean`, `std` and `pad` are in the order of `colour` and in 0..255.

    Every plane is stretched to the letterbox, bilinearly with half-pixel centres; only then are the planes mixed to
    R'G'B' and clamped. Chroma is thereby taken as centred between its luma samples. With `antialias` the filter
    grows with the reduction, as PIL's does: a triangle of n elements to either side where n elements become one,
    which is the bilinear one where nothing shrinks.
    """
    centre, spread, outside = (torch.tensor(values, device=out.device)[:, None, None] for values in (mean, std, pad))
    padding = (outside - centre) / spread
    is_plain = not centre.any() and bool((spread == 1).all())
    for slot, picture, letterbox in zip(out, pictures, letterboxes, strict=True):
        channels = _resized(picture, letterbox, colour, antialias)
        _place(channels if is_plain else channels.sub_(centre).div_(spread), slot, letterbox, padding)


def _place(channels: Tensor, slot: Tensor, letterbox: Letterbox, padding: Tensor) -> None:
    """Write `channels` where the letterbox says and `padding` everywhere else, each element of `slot` once."""
    top, bottom = letterbox.top, letterbox.top + letterbox.height
    left, right = letterbox.left, letterbox.left + letterbox.width
    slot[:, top:bottom, left:right] = channels
    slot[:, :top] = padding
    slot[:, bottom:] = padding
    slot[:, top:bottom, :left] = padding
    slot[:, top:bottom, right:] = padding


def _resized(picture: Picture, letterbox: Letterbox, colour: Literal["bgr", "rgb"], antialias: bool) -> Tensor:
    """Turn, stretch and mix a picture: float32 [3, height, width] in `colour` order and 0..255."""
    planes = picture.planes
    height, width = letterbox.height, letterbox.width
    if picture.rotation:
        planes = tuple(torch.rot90(plane, picture.rotation // 90, (0, 1)) for plane in planes)
    if picture.layout == "rgb":
        rgb = _resize(planes[0].permute(2, 0, 1)[None].float(), height, width, antialias)[0]
        return rgb if colour == "rgb" else rgb.flip(0)
    luma = planes[0].float()[None, None]
    chroma = torch.stack(planes[1:]) if picture.layout == "yuv" else planes[1].permute(2, 0, 1)
    # The chroma planes are a batch of two pictures: for two channels of one, interpolate is no faster, for three
    # contiguous ones it is nearly three times slower per plane.
    chroma = chroma.to(torch.float32, memory_format=torch.contiguous_format)[:, None]
    stretched = torch.cat([_resize(plane, height, width, antialias) for plane in (luma, chroma)])
    weights, offset = from_ycbcr(picture.matrix, picture.full_range, colour, luma.device)
    return torch.addmm(offset, weights, stretched.view(3, -1)).clamp_(0, 255).view(3, height, width)


def _resize(planes: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    is_smaller = height < planes.shape[-2] or width < planes.shape[-1]
    if antialias and width == 1 < height:  # for one column torch 2.14 repeats the first row
        return _resize(planes.mT, width, height, antialias).mT
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=antialias and is_smaller)


@cache
def from_ycbcr(
    matrix: Literal["bt601", "bt709"], full_range: bool, colour: Literal["bgr", "rgb"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `weights` [3, 3] and `offset` [3, 1] of colour = weights @ ycbcr + offset, all in 0..255.

    From Kr and Kb by ITU-R BT.709-6, sections 3.3 to 3.5: limited range has 219 steps of luma above 16 and
    224 of chroma; full range (JPEG, ITU-T T.871) has 255 of each. Chroma is zero at 128.
    """
    red, blue = _LUMA_WEIGHTS[matrix]
    green = 1 - red - blue
    luma_step, chroma_step, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    from_cb, from_cr = 2 * (1 - blue) * chroma_step, 2 * (1 - red) * chroma_step
    weights = torch.tensor(
        [
            [luma_step, 0.0, from_cr],
            [luma_step, -from_cb * blue / green, -from_cr * red / green],
            [luma_step, from_cb, 0.0],
        ],
        dtype=torch.float64,
    )
    if colour == "bgr":
        weights = weights.flip(0)
    offset = -weights @ torch.tensor([[black], [128.0], [128.0]], dtype=torch.float64)
    return weights.to(device, torch.float32), offset.to(device, torch.float32)


def nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """Keep, per image, the best candidates of each label that no better one of the same label overlaps.

    `boxes` [B, K, 4] x1 y1 x2 y2, `scores` [B, K], `labels` [B, K] int64. Returns `keep` [B, max_detections] int64,
    indices into K by falling score (the lower index first where scores are equal), padded with -1, and `count` [B].

    A candidate takes part if its score >= `score_threshold` (rounded to float32) and score and box are finite.
    IoU > `iou_threshold` suppresses. The arithmetic is that of torchvision's `nms` for each label, so the result is
    too: the IoU of two empty boxes is NaN and suppresses nothing.
    """
    # numpy, because there are few candidates as a rule, and then the time goes into calling some sixty operators.
    images = zip(_on_host(boxes.float()), _on_host(scores.float()), _on_host(labels), strict=True)
    keep = np.full((len(boxes), max_detections), -1, dtype=np.int64)
    count = np.zeros(len(boxes), dtype=np.int64)
    limit, floor = round_down_to_float32(iou_threshold), np.float32(score_threshold)
    for row, (image_boxes, image_scores, image_labels) in enumerate(images):
        ranking = _rank_candidates(image_boxes, image_scores, floor)
        kept = ranking[_sweep(image_boxes[ranking], image_labels[ranking], limit, max_detections)]
        keep[row, : len(kept)] = kept
        count[row] = len(kept)
    return torch.from_numpy(keep).to(boxes.device), torch.from_numpy(count).to(boxes.device)


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def round_down_to_float32(threshold: float) -> np.float32:
    """Return the largest float32 that is not above `threshold`.

    torchvision compares a float32 IoU with a double. Against this value a float32 comparison decides the same.
    """
    rounded = np.float32(threshold)
    return rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32("-inf"))


def _rank_candidates(boxes: np.ndarray, scores: np.ndarray, floor: np.float32) -> np.ndarray:
    """Return the indices of the candidates that take part, by falling score, stable."""
    index = np.flatnonzero(scores >= floor)
    index = index[np.isfinite(boxes[index]).all(axis=1) & np.isfinite(scores[index])]
    return index[np.argsort(-scores[index], kind="stable")]


def _sweep(boxes: np.ndarray, labels: np.ndarray, limit: np.float32, max_detections: int) -> np.ndarray:
    """Return the positions that survive among candidates that are already ranked, at most `max_detections`.

    Works in blocks, so that memory does not grow with the square of the candidates: the survivors of a block clear
    the rest of the queue, and the sweep ends once enough have survived.
    """
    queue = np.arange(len(boxes))
    kept = [queue[:0]]
    missing = max_detections
    while len(queue) and missing > 0:
        block, queue = queue[:_SWEEP_BLOCK], queue[_SWEEP_BLOCK:]
        survivors = block[_survivors(_suppresses(boxes, labels, block, block, limit), missing)]
        kept.append(survivors)
        missing -= len(survivors)
        if len(queue) and missing > 0:
            queue = queue[~_suppresses(boxes, labels, survivors, queue, limit).any(axis=0)]
    return np.concatenate(kept)


def _survivors(suppresses: np.ndarray, max_detections: int) -> list[int]:
    """Sweep a square [N, N] greedily: a row that is still alive ends every column that it suppresses."""
    ended = np.zeros(len(suppresses), dtype=bool)
    survivors: list[int] = []
    for row in range(len(suppresses)):
        if len(survivors) == max_detections:
            break
        if not ended[row]:
            survivors.append(row)
            ended |= suppresses[row]
    return survivors


def _suppresses(
    boxes: np.ndarray, labels: np.ndarray, winners: np.ndarray, others: np.ndarray, limit: np.float32
) -> np.ndarray:
    """Say which winner suppresses which other [N, M]: same label, IoU above the limit.

    float32, and the operations in torchvision's order. Sides beyond float32's range give infinities and NaN, which
    suppress nothing, as there.
    """
    x1, y1, x2, y2 = boxes[winners].T[:, :, None]
    other_x1, other_y1, other_x2, other_y2 = boxes[others].T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        width = np.maximum(np.minimum(x2, other_x2) - np.maximum(x1, other_x1), 0)
        height = np.maximum(np.minimum(y2, other_y2) - np.maximum(y1, other_y1), 0)
        intersection = width * height
        union = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1) - intersection
        overlap = intersection / union > limit
    return overlap & (labels[winners, None] == labels[others])


def locate_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """Find the point of each heat map [B, N, J, S, S] over its box [B, N, 4]: x, y and score, [B, N, J, 3] float32.

    As Detectron2's `heatmaps_to_keypoints`: the logits are stretched to the box's size, rounded up to whole pixels, and
    the centre of the best one counts, the first of equals. Its score is exp(best) / sum(exp(logits)), of the logits
    before they were stretched. x and y are in the pixels of the boxes. A box without area, with a side above
    MAX_BOX_SIDE_PX, or with a NaN gets zeros.
    """
    points = torch.zeros((*heatmaps.shape[:3], 3), device=heatmaps.device)
    sides = boxes[..., 2:] - boxes[..., :2]
    taken = ((sides > 0) & (sides <= MAX_BOX_SIDE_PX)).all(-1)
    for image, index in taken.nonzero().tolist():
        side = sides[image, index].float().clamp(min=1)
        width, height = side.ceil().int().tolist()
        logits = heatmaps[image, index].float()
        pixel, best = _peaks(logits, height, width)
        at = torch.stack((pixel % width, pixel // width), dim=-1) + 0.5
        points[image, index, :, :2] = at * (side / side.ceil()) + boxes[image, index, :2]
        points[image, index, :, 2] = 1 / (logits - best[:, None, None]).exp().sum((1, 2))
    return points


def _peaks(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Stretch maps [J, S, S], a few at a time, and return the best pixel of each, row by row, and its value."""
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    peaks = []
    for part in logits.split(at_once):
        stretched = F.interpolate(part[None], (height, width), mode="bicubic", align_corners=False)[0].flatten(1)
        peaks.append((stretched.argmax(1), stretched.amax(1)))
    pixels, values = zip(*peaks, strict=True)
    return torch.cat(pixels), torch.cat(values)
