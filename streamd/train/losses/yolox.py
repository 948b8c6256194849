"""The losses of YOLOX (arXiv:2107.08430), and of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.models.yolox import STRIDES, YOLOX, cell_grid, decode_cells
from streamd.train.losses.boxes import iou
from streamd.train.losses.config import LossConfig
from streamd.train.losses.matching import draw
from streamd.train.losses.normalize import mean, sum_by_image
from streamd.train.losses.prototype_masks import prototype_mask_losses
from streamd.train.losses.simota import Assignment, Cells, assign
from streamd.train.targets import Targets, TrainBatch

MAX_LOG_SIZE = 10.0  # of a predicted side, in cells: of much larger ones, float32 holds no area


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What the network says of the K cells of each image, float32."""

    raw_boxes: Tensor  # [B,K,4]
    boxes: Tensor  # [B,K,4] x1 y1 x2 y2 in input pixels
    objectness: Tensor  # [B,K,1] logits
    classes: Tensor  # [B,K,C] logits


def compute(
    network: YOLOX, batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Return the losses `box`, `objectness`, `class`, and, where they are trained, `l1` and `mask`.

    The images may be of any size that is a multiple of 32.
    """
    height, width = batch.images.shape[-2:]
    if height % STRIDES[-1] or width % STRIDES[-1]:
        raise ValueError(f"YOLOX: images of {height} x {width} pixels, want multiples of {STRIDES[-1]}")
    levels = network.backbone(batch.images)
    raw_boxes, objectness, classes, box_features = network.head(levels)
    masks = network.masks(levels[0], box_features) if network.masks is not None else ()
    return _compare((raw_boxes, objectness, classes, *masks), batch, config, generators)


@torch.compiler.disable
def _compare(
    outputs: tuple[Tensor, ...], batch: TrainBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> dict[str, Tensor]:
    """Compare raw boxes, objectness, classes and, where there are, prototypes and coefficients with the targets."""
    with torch.autocast(batch.images.device.type, enabled=False):
        height, width = batch.images.shape[-2:]
        cells = _cells((height, width), batch.images.device)
        raw_boxes, objectness, classes, *masks = (x.float() for x in outputs)
        raw_boxes = torch.cat((raw_boxes[..., :2], raw_boxes[..., 2:].clamp(max=MAX_LOG_SIZE)), dim=-1)
        boxes = decode_cells(raw_boxes, cells.grid, cells.strides)
        found = Predictions(raw_boxes, boxes, objectness, classes)
        assigned = [
            assign(boxes[i], objectness[i], classes[i], cells, target, config.yolox)
            for i, target in enumerate(batch.targets)
        ]
        losses = _losses(found, batch.targets, assigned, cells, config)
        if masks:
            prototypes, coefficients = masks
            losses["mask"] = _mask_loss(prototypes, coefficients, batch.targets, assigned, config, generators)
        return losses


def _losses(
    found: Predictions, targets: Sequence[Targets], assigned: Sequence[Assignment], cells: Cells, config: LossConfig
) -> dict[str, Tensor]:
    counts = [len(one.cells) for one in assigned]
    image = torch.cat([torch.full_like(one.cells, i) for i, one in enumerate(assigned)])
    cell, ious = torch.cat([one.cells for one in assigned]), torch.cat([one.ious for one in assigned])
    boxes = torch.cat([target.boxes[one.objects] for target, one in zip(targets, assigned, strict=True)])
    labels = torch.cat([target.labels[one.objects] for target, one in zip(targets, assigned, strict=True)])

    def average(sums: Tensor) -> Tensor:
        return mean(sums, counts, config.normalization, config.yolox.min_cells)

    classes = found.classes[image, cell]
    # Not 1 for the object's class but its overlap, so that the score says how well the box fits.
    scores = torch.zeros_like(classes).scatter_(1, labels[:, None], ious[:, None])
    class_losses = F.binary_cross_entropy_with_logits(classes, scores, reduction="none")
    box_losses = 1 - iou(found.boxes[image, cell], boxes).square()
    losses = {
        "box": config.yolox.box_weight * average(sum_by_image(box_losses, counts)),
        "objectness": average(_objectness_losses(found.objectness[..., 0], image, cell, targets, cells)),
        "class": average(sum_by_image(class_losses, counts)),
    }
    if config.yolox.l1_weight:
        expected = _encode_cells(boxes, cells.grid[cell], cells.strides[cell])
        l1_losses = (found.raw_boxes[image, cell] - expected).abs()
        losses["l1"] = config.yolox.l1_weight * average(sum_by_image(l1_losses, counts))
    return losses


def _objectness_losses(logits: Tensor, image: Tensor, cell: Tensor, targets: Sequence[Targets], cells: Cells) -> Tensor:
    """Add up the losses of each image [B]: cells of objects are 1, all others 0 but those in crowds, which are free."""
    expected = torch.zeros_like(logits)
    expected[image, cell] = 1
    each = F.binary_cross_entropy_with_logits(logits, expected, reduction="none")
    free = torch.zeros_like(logits, dtype=torch.bool)
    for i, target in enumerate(targets):
        if len(target.crowds):
            after = cells.centres[:, None] >= target.crowds[:, :2]
            before = cells.centres[:, None] < target.crowds[:, 2:]
            free[i] = (after & before).all(-1).any(1)
    return each.masked_fill(free & (expected == 0), 0).sum(1)


def _encode_cells(boxes: Tensor, grid: Tensor, strides: Tensor) -> Tensor:
    """Return what `decode_cells` turns into `boxes` [P,4], at cells [P,2] of `strides` [P,1]."""
    centres = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    sizes = boxes[:, 2:] - boxes[:, :2]
    return torch.cat((centres / strides - grid, (sizes / strides).log()), dim=1)


def _mask_loss(
    prototypes: Tensor,
    coefficients: Tensor,
    targets: Sequence[Targets],
    assigned: Sequence[Assignment],
    config: LossConfig,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Compare masks of some cells of each image, with `prototypes` [B,P,h,w] and `coefficients` [B,K,P].

    An image without masks counts as one without a loss.
    """
    sums, counts = [], []
    for i, (target, one) in enumerate(zip(targets, assigned, strict=True)):
        num_cells = len(one.cells) if target.masks is not None else 0
        chosen = draw(torch.arange(num_cells, device=one.cells.device), config.yolox.max_masks, generators[i])
        weights, objects = coefficients[i, one.cells[chosen]], one.objects[chosen]
        if target.masks is not None and num_cells:
            sums.append(prototype_mask_losses(prototypes[i], weights, objects, target.masks, target.boxes).sum())
        else:
            # Connected all the same: DDP waits for a gradient of every parameter.
            sums.append(prototypes[i].sum() * 0 + weights.sum())
        counts.append(len(chosen))
    return config.yolox.mask_weight * mean(torch.stack(sums), counts, config.normalization)


@lru_cache(maxsize=64)  # multi-scale training sees some ten sizes
def _cells(input_size: tuple[int, int], device: torch.device) -> Cells:
    with torch.inference_mode(False):  # or cells first made in inference could not serve training
        grid, strides = (x.to(device) for x in cell_grid(input_size))
        return Cells(grid, (grid + 0.5) * strides, strides)
