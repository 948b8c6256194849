"""From what the model says to what is in each frame.

`reduce` works on the model's device, with shapes fixed by the batch and without waiting for it: suppression, source
pixels, and masks as run lengths. What it gives is small, and once it is on the host `describe` makes Detections of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from streamd.gpu import densepose, ops
from streamd.gpu.rle import EncodedMasks
from streamd.messages import Batch, Detections, Frame, Letterbox, RawOutput, Rle, Segment
from streamd.segments import Things, panoptic_segments, semantic_segments

if TYPE_CHECKING:
    from streamd.models.spec import ModelSpec, NmsRule

NUM_PLACEMENT_COLUMNS = 8

# Columns of `Found.table` after the four of the box. float32 holds them exactly up to 2^24.
_SCORE, _LABEL, _CANDIDATE, _VALID = 4, 5, 6, 7

# Room for the runs of one image's masks, two for each column that a mask covers: a hundred masks of 330 columns. Where
# there are more, `encode_masks` is called again.
_RUNS_PER_IMAGE = 1 << 16


class Heads(Protocol):
    """What a two-stage model computes for the boxes that are kept, [B, N, 4] in input pixels; no object is all zero."""

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return mask probabilities [B, N, S, S], each for its label [B, N]."""
        ...

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return logits of heat maps [B, N, J, S, S]."""
        ...

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the maps [B, N, C, S, S] of a `DensePoseRule`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What is in a batch, of shapes that depend on its size alone: N is the rule's `max_detections`.

    On a CPU, where shapes are free, N is the most objects that one image has; no head works for the others' padding.
    """

    table: Tensor  # [B, N, 8] float32: box in source pixels, score, label, candidate, and whether the row is an object
    sane: Tensor  # [B] bool: whether the model said anything but NaN and infinity
    masks: EncodedMasks | None = None  # of B * N rows
    keypoints: Tensor | None = None  # [B, N, J, 3] float32: x, y in source pixels, score
    probabilities: Tensor | None = None  # [B, N, S, S] masks over the boxes; kept where segments are made of them
    charts: Tensor | None = None  # [B, N, 3, S, S] uint8, see `make_charts`; those of objects alone leave the device


@dataclass(frozen=True, slots=True, eq=False)
class Postprocessor:
    """The rules by which a model's output is read.

    Candidates suppress each other in input pixels, before their boxes are clipped. A box that has no area left
    within its frame is dropped; so is a candidate whose box or best score is not finite.
    """

    spec: ModelSpec
    rule: NmsRule
    wanted: Tensor | None = None  # [C] bool on the model's device: which labels come out, after they have suppressed
    heads: Heads | None = None

    def reduce(self, raw: RawOutput, placements: Tensor) -> Found:
        """Keep the best objects of each image, by falling score.

        `placements` [B, 8] are those of `place`, on the model's device; an image whose frame is 0 pixels wide has no
        objects.
        """
        rule = self.rule
        boxes, scores, labels, candidates_of = _candidates(raw, rule)
        keep, count = ops.nms(boxes, scores, labels, rule.iou_threshold, rule.score_threshold, rule.max_detections)
        if keep.device.type == "cpu":
            keep = keep[:, : int(count.max()) if len(count) else 0]  # no work for rows that are no objects
        elif boxes.shape[1] == 0:
            keep = keep[:, :0]  # as there is no candidate that the padding could read

        index = keep.clamp(min=0)  # the padding reads candidate 0, and its row is not valid
        kept = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
        kept_labels = labels.gather(1, index)
        corners = _to_source(kept, placements)
        valid = (corners[..., 2:] > corners[..., :2]).all(-1)
        valid &= torch.arange(keep.shape[1], device=keep.device) < count[:, None]
        if self.wanted is not None:
            valid &= self.wanted[kept_labels]
        columns = (scores.gather(1, index), kept_labels, index // candidates_of, valid)
        table = torch.cat((corners, torch.stack([column.float() for column in columns], dim=-1)), dim=-1)
        shown = torch.where(valid[..., None], kept, 0)
        probabilities = self._box_masks(raw, shown, kept_labels)
        return Found(
            table,
            _is_sane(raw, boxes, scores),
            self._encode_masks(raw, table, placements, probabilities, len(table) * _RUNS_PER_IMAGE),
            self._keypoints(raw, shown, placements),
            probabilities if self.spec.panoptic else None,
            self._charts(raw, shown, table),
        )

    def encode_masks(self, raw: RawOutput, table: Tensor, placements: Tensor, num_runs: int) -> EncodedMasks | None:
        """Encode the masks of the objects in the table, with room for so many runs; None where the model has none."""
        boxes = _to_input(table[..., :4], table[..., _VALID] > 0, placements)
        probabilities = self._box_masks(raw, boxes, table[..., _LABEL].long())
        return self._encode_masks(raw, table, placements, probabilities, num_runs)

    def _encode_masks(
        self, raw: RawOutput, table: Tensor, placements: Tensor, probabilities: Tensor | None, capacity: int
    ) -> EncodedMasks | None:
        rule = self.spec.masks
        if rule is None:
            return None
        boxes, valid = table[..., :4].contiguous(), table[..., _VALID] > 0
        objects = (boxes, valid, placements)
        if probabilities is not None:
            return ops.encode_box_masks(probabilities, *objects, threshold=rule.threshold, capacity=capacity)
        if raw.prototypes is None or raw.coefficients is None:
            return None
        candidate = table[..., _CANDIDATE].long()
        coefficients = raw.coefficients.gather(1, candidate[..., None].expand(-1, -1, raw.coefficients.shape[-1]))
        return ops.encode_prototype_masks(
            raw.prototypes,
            coefficients,
            *objects,
            input_size=self.spec.input_size,
            threshold=rule.threshold,
            capacity=capacity,
        )

    def _box_masks(self, raw: RawOutput, boxes: Tensor, labels: Tensor) -> Tensor | None:
        """Return the mask probabilities [B, N, S, S] of boxes in input pixels, where the model has such."""
        if self.spec.masks is None or self.spec.masks.kind != "box":
            return None
        if boxes.shape[1] == 0:  # the methods of a model take at least one box
            return boxes.new_zeros(len(boxes), 0, 1, 1)
        assert self.heads is not None
        return _look_closer(self.heads.masks, raw.features, boxes, labels)

    def _keypoints(self, raw: RawOutput, boxes: Tensor, placements: Tensor) -> Tensor | None:
        """Return the points [B, N, J, 3] in source pixels of boxes in input pixels, where the model has such."""
        if self.spec.keypoints is None:
            return None
        if boxes.shape[1] == 0:
            return boxes.new_zeros(len(boxes), 0, len(self.spec.keypoints.names), 3)
        assert self.heads is not None
        points = ops.locate_keypoints(_look_closer(self.heads.keypoints, raw.features, boxes), boxes)
        scale, origin = (placements[:, None, None, column : column + 2] for column in (0, 2))
        scores = points[..., 2:].nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)  # JSON knows no NaN and no infinity
        return torch.cat(((points[..., :2] - origin) / scale, scores), dim=-1)

    def _charts(self, raw: RawOutput, boxes: Tensor, table: Tensor) -> Tensor | None:
        """Return the charts of boxes in input pixels, where the model has such."""
        rule = self.spec.densepose
        if rule is None:
            return None
        in_source = torch.where(table[..., _VALID:] > 0, table[..., :4], 0)
        if boxes.shape[1] == 0:
            return densepose.make_charts(boxes.new_zeros(len(boxes), 0, rule.num_channels, 1, 1), in_source, rule)
        assert self.heads is not None
        return densepose.make_charts(_look_closer(self.heads.densepose, raw.features, boxes), in_source, rule)

    def segments(self, raw: RawOutput, found: Found, batch: Batch) -> list[tuple[Segment, ...]] | None:
        """Make the segments of each frame, None where the model has none; waits for the device.

        `raw` and `found` are on the model's device, and `reduce` has come to its end.
        """
        if raw.semantic is None:
            return None
        labels = None if self.wanted is None else set(self.wanted.nonzero()[:, 0].tolist())
        segments = []
        for index, (frame, letterbox) in enumerate(zip(batch.frames, batch.letterboxes, strict=True)):
            logits = raw.semantic[index]
            if self.spec.panoptic is None:
                segments.append(semantic_segments(logits, frame, letterbox, self.spec, labels))
            else:
                segments.append(panoptic_segments(logits, _things(found, index), frame, letterbox, self.spec))
        return segments

    def describe(
        self,
        found: Found,
        batch: Batch,
        segments: Sequence[tuple[Segment, ...]] | None = None,
        charts: Tensor | None = None,
    ) -> list[Detections]:
        """Make Detections of what `reduce` gave, once it is on the host and the masks had room enough.

        `segments` are those of the method of this name, `charts` [objects, 3, S, S] those of the `object_rows` alone.
        """
        num_described = 0
        masks = found.masks.strings() if found.masks is not None else None
        detections = []
        for index, frame in enumerate(batch.frames):
            table = found.table[index].numpy(force=True)
            rows = np.flatnonzero(table[:, _VALID])
            objects = table[rows]
            first = index * len(table)
            detections.append(
                Detections(
                    boxes=np.ascontiguousarray(objects[:, :4]),
                    scores=np.ascontiguousarray(objects[:, _SCORE]),
                    labels=objects[:, _LABEL].astype(np.int64),
                    masks=None
                    if masks is None
                    else tuple(Rle(frame.height, frame.width, masks[first + row]) for row in rows),
                    keypoints=None if found.keypoints is None else found.keypoints[index].numpy(force=True)[rows],
                    charts=None if charts is None else densepose.cut_charts(charts[num_described:], objects[:, :4]),
                    segments=None if segments is None else segments[index],
                )
            )
            num_described += len(rows)
        return detections


def postprocess(
    raw: RawOutput,
    batch: Batch,
    spec: ModelSpec,
    rule: NmsRule,
    labels: Collection[int] | None = None,
    heads: Heads | None = None,
) -> list[Detections]:
    """Say what is in each frame of a batch, in one go; with `labels`, objects of other labels are left out."""
    device = raw.boxes.device
    wanted = None if labels is None else wanted_labels(labels, len(spec.labels)).to(device)
    processor = Postprocessor(spec, rule, wanted, heads)
    placements = place(batch.frames, batch.letterboxes).to(device)
    found = processor.reduce(raw, placements)
    if found.masks is not None and not has_room(found.masks, len(found.table)):
        num_runs = int(found.masks.num_runs)
        found = replace(found, masks=processor.encode_masks(raw, found.table, placements, num_runs))
    charts = None if found.charts is None else found.charts.flatten(0, 1)[object_rows(found.table)]
    return processor.describe(found, batch, processor.segments(raw, found, batch), charts)


def object_rows(table: Tensor) -> Tensor:
    """Count the B * N rows of a table [B, N, 8] through, and return the numbers of those that are objects."""
    return (table[..., _VALID] > 0).flatten().nonzero()[:, 0]


def _things(found: Found, index: int) -> Things:
    """Take the objects of one image out of what `reduce` gave."""
    assert found.probabilities is not None
    table = found.table[index].numpy(force=True)
    rows = np.flatnonzero(table[:, _VALID])
    return Things(
        found.probabilities[index, rows],
        found.table[index, rows, :4],
        table[rows, _SCORE],
        table[rows, _LABEL].astype(np.int64),
    )


def has_room(masks: EncodedMasks, num_images: int) -> bool:
    """Tell whether the masks of so many images had no more runs than `reduce` has room for."""
    return int(masks.num_runs) <= num_images * _RUNS_PER_IMAGE


def place(frames: Sequence[Frame], letterboxes: Sequence[Letterbox]) -> Tensor:
    """Say in numbers where each frame lies in the input: [B, 8] float32 on the host.

    Columns: scale_x, scale_y, left, top of the letterbox; width, height of the frame in source pixels; height, width
    of the letterbox in input pixels.
    """
    rows = [
        (box.scale_x, box.scale_y, box.left, box.top, frame.width, frame.height, box.height, box.width)
        for box, frame in zip(letterboxes, frames, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, NUM_PLACEMENT_COLUMNS)


def wanted_labels(labels: Collection[int], num_labels: int) -> Tensor:
    """Return which labels come out, bool [C]."""
    wanted = torch.zeros(num_labels, dtype=torch.bool)
    wanted[list(labels)] = True
    return wanted


def _look_closer(head: Callable[..., Tensor], features: Sequence[Tensor], boxes: Tensor, *labels: Tensor) -> Tensor:
    """Call one of the `Heads`; on a CPU image by image, for its objects alone: the most that one has may be many."""
    if boxes.device.type != "cpu":
        return head(features, boxes, *labels)
    is_object = boxes.any(-1)
    is_object[0, 0] |= not is_object.any()  # one at least says what shape the others have
    found = boxes.new_empty(0)
    for image, rows in enumerate(is_object):
        if rows.any():
            chosen = (each[image, rows][None] for each in (boxes, *labels))
            seen = head([level[image : image + 1] for level in features], *chosen)
            if not len(found):
                found = seen.new_zeros(*boxes.shape[:2], *seen.shape[2:])
            found[image, rows] = seen[0]
    return found


def _candidates(raw: RawOutput, rule: NmsRule) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return boxes [B, K, 4], scores and labels [B, K] for suppression, and how many of them come of each candidate."""
    num_images, num_candidates = raw.boxes.shape[:2]
    if raw.labels is not None:
        return raw.boxes, raw.scores, raw.labels, 1
    if not rule.multi_label:
        return raw.boxes, *_best_label(raw.scores, rule.score_threshold), 1
    num_labels = raw.scores.shape[-1]
    labels = torch.arange(num_labels, device=raw.scores.device).expand(num_images, num_candidates, -1).flatten(1)
    return raw.boxes.repeat_interleave(num_labels, dim=1), raw.scores.flatten(1), labels, num_labels


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


def _is_sane(raw: RawOutput, boxes: Tensor, scores: Tensor) -> Tensor:
    """Tell of each image whether one candidate at least, or one pixel's scores, are numbers; no candidates are."""
    sane = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    if boxes.shape[1]:
        sane = (boxes.isfinite().all(-1) & ~scores.isnan()).any(-1)  # -inf stands for a candidate that takes no part
    if raw.semantic is not None:
        sane = sane & raw.semantic[..., ::8, ::8].isfinite().flatten(1).any(-1)  # what is throughout is in a part too
    return sane


def _to_source(boxes: Tensor, placements: Tensor) -> Tensor:
    """Take boxes [B, N, 4] from input pixels to source pixels, and clip each to its frame."""
    scale, origin, limit = (placements[:, None, column : column + 2].repeat(1, 1, 2) for column in (0, 2, 4))
    return ((boxes - origin) / scale).clamp(min=0).minimum(limit)


def _to_input(boxes: Tensor, valid: Tensor, placements: Tensor) -> Tensor:
    """Take boxes [B, N, 4] from source pixels to input pixels; those that are no objects become zero."""
    scale, origin = (placements[:, None, column : column + 2].repeat(1, 1, 2) for column in (0, 2))
    return (boxes * scale + origin) * valid[..., None]
