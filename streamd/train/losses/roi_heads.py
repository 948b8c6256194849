"""The losses of a second stage: boxes (Fast R-CNN, arXiv:1504.08083), also in a cascade, masks and keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from streamd.models.anchors import clip_boxes
from streamd.models.box_head import BoxPredictor
from streamd.models.roi_heads import RoiHeads, StandardRoiHeads
from streamd.models.rpn import Proposals
from streamd.train.losses.boxes import encode_deltas
from streamd.train.losses.config import LossConfig, RoiHeadsLossConfig
from streamd.train.losses.matching import IGNORED, match, sample
from streamd.train.losses.normalize import mean, sum_by_image
from streamd.train.losses.roi_targets import keypoint_targets, mask_targets
from streamd.train.targets import Targets, TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Boxes of each image that are trained on, filled up with IGNORED ones of zeros."""

    boxes: Tensor  # [B,S,4] x1 y1 x2 y2 in input pixels
    matches: Tensor  # [B,S] index of the object, BACKGROUND or IGNORED

    @classmethod
    def join(cls, boxes: Sequence[Tensor], matches: Sequence[Tensor]) -> Samples:
        return cls(
            pad_sequence(list(boxes), batch_first=True),
            pad_sequence(list(matches), batch_first=True, padding_value=IGNORED),
        )


def roi_heads_losses(
    heads: RoiHeads,
    features: Mapping[str, Tensor],
    proposals: Proposals,
    batch: TrainBatch,
    config: LossConfig,
    generators: Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Return the losses `class` and `box` (in a cascade `class_0`, ...), and `mask` and `keypoint` where there are."""
    levels = [features[name].contiguous() for name in heads.config.in_features]  # as pooling wants them
    samples = sample_proposals(proposals, batch.targets, config.roi_heads, generators)
    losses = _box_losses(heads, levels, samples, batch, config)
    if heads.mask_head is not None:
        losses["mask"] = config.roi_heads.mask_weight * _mask_loss(heads, levels, samples, batch.targets, config)
    if heads.keypoint_head is not None:
        assert isinstance(heads, StandardRoiHeads)
        loss = _keypoint_loss(heads, levels, samples, batch.targets, config)
        losses["keypoint"] = config.roi_heads.keypoint_weight * loss
    return losses


def sample_proposals(
    proposals: Proposals,
    targets: Sequence[Targets],
    config: RoiHeadsLossConfig,
    generators: Sequence[torch.Generator],
) -> Samples:
    """Draw the boxes that the first stage of the heads is trained on; the objects' own boxes are proposals too."""
    threshold = config.iou_thresholds[0]
    boxes, matches = [], []
    for i, target in enumerate(targets):
        candidates = torch.cat((proposals.boxes[i][proposals.valid[i]], target.boxes))
        found = match(candidates, target, (threshold, threshold))
        rows = torch.cat(sample(found, config.num_samples, config.positive_fraction, generators[i]))
        boxes.append(candidates[rows])
        matches.append(found[rows])
    return Samples.join(boxes, matches)


def _box_losses(
    heads: RoiHeads, levels: Sequence[Tensor], samples: Samples, batch: TrainBatch, config: LossConfig
) -> dict[str, Tensor]:
    stages = heads.stages()
    losses: dict[str, Tensor] = {}
    for index, (head, predictor) in enumerate(stages):
        suffix = f"_{index}" if len(stages) > 1 else ""
        if index > 0:
            thresholds = config.roi_heads.iou_thresholds
            samples = _match_again(samples, batch.targets, thresholds[min(index, len(thresholds) - 1)])
        pooled = heads.box_pooler(levels, samples.boxes)
        if len(stages) > 1:
            # Every stage adds to the gradient of the features (Cascade R-CNN, as Detectron2 trains it).
            share = 1 / len(stages)
            pooled = pooled * share + pooled.detach() * (1 - share)
        logits, deltas = (x.float() for x in predictor(head(pooled)))
        with torch.autocast(pooled.device.type, enabled=False):
            of_stage = _losses_of_stage(logits, deltas, predictor, samples, batch.targets, config)
            losses |= {f"{name}{suffix}": loss for name, loss in of_stage.items()}
            if index + 1 < len(stages):
                moved = predictor.decode(deltas.detach(), samples.boxes)[:, :, 0]
                samples = replace(samples, boxes=clip_boxes(moved, batch.sizes))
    return losses


def _match_again(samples: Samples, targets: Sequence[Targets], threshold: float) -> Samples:
    """Compare moved boxes with the objects anew; those that lost their area are ignored from now on."""
    boxes = samples.boxes
    found = torch.stack(
        [match(row, target, (threshold, threshold)) for row, target in zip(boxes, targets, strict=True)]
    )
    lost = (samples.matches == IGNORED) | (boxes[..., 2:] <= boxes[..., :2]).any(-1)
    return Samples(boxes.masked_fill(lost[..., None], 0), found.masked_fill(lost, IGNORED))


def _losses_of_stage(
    logits: Tensor,
    deltas: Tensor,
    predictor: BoxPredictor,
    samples: Samples,
    targets: Sequence[Targets],
    config: LossConfig,
) -> dict[str, Tensor]:
    """Compare logits [B * S, classes + 1] and deltas [B * S, boxes * 4] with what `samples` show."""
    background = logits.shape[1] - 1
    used = samples.matches != IGNORED
    counts = used.sum(1).tolist()
    # BACKGROUND is -1, which picks the last.
    labels = torch.stack(
        [
            F.pad(target.labels, (0, 1), value=background)[matches.clamp(min=-1)]
            for target, matches in zip(targets, samples.matches, strict=True)
        ]
    )
    if predictor.sigmoid:
        expected = F.one_hot(labels[used], background + 1)[:, :-1].float()
        class_rows = F.binary_cross_entropy_with_logits(logits[used.flatten(), :-1], expected, reduction="none")
    else:
        class_rows = F.cross_entropy(logits[used.flatten()], labels[used], reduction="none")

    positive = samples.matches >= 0
    boxes = torch.cat([target.boxes[row[row >= 0]] for target, row in zip(targets, samples.matches, strict=True)])
    expected = encode_deltas(boxes, samples.boxes[positive], predictor.box_weights)
    rows = deltas.unflatten(1, (-1, 4))[positive.flatten()]
    index = labels[positive] if predictor.num_boxes > 1 else torch.zeros_like(labels[positive])
    found = rows[torch.arange(len(rows), device=rows.device), index]
    box_rows = F.smooth_l1_loss(found, expected, reduction="none", beta=config.roi_heads.smooth_l1_beta)
    box_sums = sum_by_image(box_rows, positive.sum(1).tolist())
    return {
        "class": mean(sum_by_image(class_rows, counts), counts, config.normalization),
        "box": config.roi_heads.box_weight * mean(box_sums, counts, config.normalization),
    }


def _positives(samples: Samples, taught: Sequence[bool]) -> tuple[Samples, list[int]]:
    """Return the boxes of objects in images that are `taught`, row by row, and how many each image has."""
    positive = (samples.matches >= 0) & torch.tensor(taught, device=samples.matches.device)[:, None]
    rows = [row.nonzero()[:, 0] for row in positive]
    boxes = [samples.boxes[i, row] for i, row in enumerate(rows)]
    matches = [samples.matches[i, row] for i, row in enumerate(rows)]
    return Samples.join(boxes, matches), [len(row) for row in rows]


def _mask_loss(
    heads: RoiHeads, levels: Sequence[Tensor], samples: Samples, targets: Sequence[Targets], config: LossConfig
) -> Tensor:
    assert heads.mask_head is not None
    objects, counts = _positives(samples, [target.masks is not None for target in targets])
    valid = objects.matches >= 0
    x = heads.mask_head(heads.mask_features(levels, objects.boxes)[valid.flatten()])
    with torch.autocast(x.device.type, enabled=False):
        parts, labels = [x.new_zeros(0, *x.shape[2:], dtype=torch.float32)], [objects.matches.new_zeros(0)]
        for i, target in enumerate(targets):
            if target.masks is not None and counts[i]:
                index, boxes = objects.matches[i][valid[i]], objects.boxes[i][valid[i]]
                parts.append(mask_targets(target.masks, index, boxes, x.shape[-1], config.roi_heads))
                labels.append(target.labels[index])
        channel = torch.zeros_like(torch.cat(labels)) if heads.mask_head.class_agnostic else torch.cat(labels)
        logits = x.float()[torch.arange(len(x), device=x.device), channel]
        losses = F.binary_cross_entropy_with_logits(logits, torch.cat(parts), reduction="none").mean((1, 2))
        return mean(sum_by_image(losses, counts), counts, config.normalization)


def _keypoint_loss(
    heads: StandardRoiHeads, levels: Sequence[Tensor], samples: Samples, targets: Sequence[Targets], config: LossConfig
) -> Tensor:
    assert heads.keypoint_head is not None
    objects, counts = _positives(samples, [target.keypoints is not None for target in targets])
    valid = objects.matches >= 0
    x = heads.keypoint_head(heads.keypoint_pooler(levels, objects.boxes)[valid.flatten()])
    with torch.autocast(x.device.type, enabled=False):
        sums, num_keypoints = [], []
        for i, (target, logits) in enumerate(zip(targets, x.float().split(counts), strict=True)):
            if target.keypoints is None:
                sums.append(logits.sum())
                num_keypoints.append(0)
                continue
            points = target.keypoints[objects.matches[i][valid[i]]]
            cells, taught = keypoint_targets(points, objects.boxes[i][valid[i]], x.shape[-1])
            sums.append(F.cross_entropy(logits.flatten(2)[taught], cells[taught], reduction="sum"))
            num_keypoints.append(int(taught.sum()))
        return mean(torch.stack(sums), num_keypoints, config.normalization)
