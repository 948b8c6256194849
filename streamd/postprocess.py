"""From what the model says to what is in each frame: suppression, source pixels, masks, the copy to the host."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import ops
from streamd.messages import Batch, Detections, RawOutput, Rle

if TYPE_CHECKING:
    from streamd.models.spec import ModelSpec, NmsRule

# Columns of the table that crosses to the host, after the four of the box. float32 holds them exactly up to 2^24.
_SCORE, _LABEL, _CANDIDATE, _VALID = 4, 5, 6, 7


def postprocess(
    raw: RawOutput, batch: Batch, spec: ModelSpec, rule: NmsRule, labels: Collection[int] | None = None
) -> list[Detections]:
    """Say what is in each frame of the batch: at most `rule.max_detections` objects, by falling score.

    With `labels` objects of other labels are left out, after they have suppressed their like.

    Candidates suppress each other in input pixels, before their boxes are clipped. A box that has no area left
    within its frame is dropped; so is a candidate whose box or best score is not finite.
    """
    table = _select(raw, batch, rule).cpu().numpy()
    detections = []
    for index, rows in enumerate(table):
        rows = rows[rows[:, _VALID] > 0]
        if labels is not None:
            rows = rows[np.isin(rows[:, _LABEL], list(labels))]
        masks = None
        if raw.prototypes is not None and spec.masks is not None:
            masks = _masks(raw, batch, spec, index, rows)
        detections.append(
            Detections(
                boxes=np.ascontiguousarray(rows[:, :4]),
                scores=np.ascontiguousarray(rows[:, _SCORE]),
                labels=rows[:, _LABEL].astype(np.int64),
                masks=masks,
            )
        )
    return detections


def _select(raw: RawOutput, batch: Batch, rule: NmsRule) -> Tensor:
    """Return one table [B, max_detections, 8] float32 on the model's device: box in source pixels and the columns."""
    num_images, num_candidates, num_labels = raw.scores.shape
    if num_candidates == 0:
        return torch.zeros(num_images, rule.max_detections, _VALID + 1, device=raw.scores.device)
    if rule.multi_label:
        scores = raw.scores.flatten(1)
        labels = torch.arange(num_labels, device=scores.device).expand(num_images, num_candidates, -1).flatten(1)
        boxes = raw.boxes.repeat_interleave(num_labels, dim=1)
    else:
        scores, labels = _best_label(raw.scores, rule.score_threshold)
        boxes = raw.boxes
    keep, count = ops.nms(boxes, scores, labels, rule.iou_threshold, rule.score_threshold, rule.max_detections)

    index = keep.clamp(min=0)  # the padding reads candidate 0, and its row is not valid
    kept_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
    corners = _to_source(kept_boxes, batch)
    has_area = (corners[..., 2:] > corners[..., :2]).all(-1)
    valid = has_area & (torch.arange(rule.max_detections, device=keep.device) < count[:, None])
    candidate = index // num_labels if rule.multi_label else index
    columns = (scores.gather(1, index), labels.gather(1, index), candidate, valid)
    return torch.cat((corners, torch.stack([column.float() for column in columns], dim=-1)), dim=-1)


def _best_label(scores: Tensor, score_threshold: float) -> tuple[Tensor, Tensor]:
    """Return the best score [B, K] of each candidate and its label, of scores [B, K, C]."""
    if scores.device.type != "cpu":
        best, labels = scores.max(-1)
        return best, labels
    # On a CPU finding the label costs three times as much as finding the score, and few candidates need one.
    best = scores.amax(-1)
    labels = torch.zeros(best.shape, dtype=torch.int64)
    contenders = best >= score_threshold
    labels[contenders] = scores[contenders].argmax(-1)
    return best, labels


def _to_source(boxes: Tensor, batch: Batch) -> Tensor:
    """Take boxes [B, N, 4] from input pixels to source pixels, and clip each to its frame."""
    placements = [
        (letterbox.scale_x, letterbox.scale_y, letterbox.left, letterbox.top, frame.width, frame.height)
        for letterbox, frame in zip(batch.letterboxes, batch.frames, strict=True)
    ]
    placement = torch.tensor(placements, dtype=torch.float32, device=boxes.device)
    scale, origin, limit = (placement[:, None, i : i + 2].repeat(1, 1, 2) for i in (0, 2, 4))
    return ((boxes - origin) / scale).clamp(min=0).minimum(limit)


def _masks(raw: RawOutput, batch: Batch, spec: ModelSpec, index: int, rows: np.ndarray) -> tuple[Rle, ...]:
    """Cut the masks of one image's valid rows [N, 8] out of its prototypes."""
    assert raw.prototypes is not None and raw.coefficients is not None and spec.masks is not None
    frame = batch.frames[index]
    candidate = torch.from_numpy(rows[:, _CANDIDATE].astype(np.int64)).to(raw.coefficients.device)
    masks = ops.paste_prototypes(
        raw.prototypes[index],
        raw.coefficients[index, candidate],
        torch.from_numpy(rows[:, :4]).to(raw.coefficients.device),
        batch.letterboxes[index],
        frame.width,
        frame.height,
        spec.input_size,
        spec.masks.threshold,
    )
    return tuple(
        Rle(frame.height, frame.width, ops.pack_counts(ops.rle(bits, frame.height, frame.width))) for bits in masks
    )
