"""The operators that the stages call; each runs where its tensors are. Importing this registers `streamd::nms`
and `streamd::pool_levels`.

They are dispatcher operators, so that a TorchScript model can call them: import this module before such a model is
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from streamd.gpu import mask_reference, pooling, reference
from streamd.gpu.mask_reference import paste_boxes
from streamd.gpu.rle import Bits, EncodedMasks
from streamd.messages import Letterbox, Picture

__all__ = [
    "Bits",
    "EncodedMasks",
    "encode_box_masks",
    "encode_prototype_masks",
    "locate_keypoints",
    "nms",
    "paste_boxes",
    "preprocess",
]


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
    """Letterbox and normalise pictures, which lie where `out` does; see `reference.preprocess`."""
    options: dict[str, Any] = {"colour": colour, "mean": mean, "std": std, "pad": pad, "antialias": antialias}
    if out.is_cuda:
        from streamd.gpu import preprocess as kernels

        return kernels.preprocess(pictures, letterboxes, out, **options)
    return reference.preprocess(pictures, letterboxes, out, **options)


def nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """Keep the best candidates of each image and label; see `reference.nms`."""
    keep, count = torch.ops.streamd.nms(boxes, scores, labels, iou_threshold, score_threshold, max_detections)
    return keep, count


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
    """Encode masks that are mixtures of prototypes; see `mask_reference.encode_prototype_masks`."""
    objects = (boxes, valid, placements)
    options: dict[str, Any] = {"input_size": input_size, "threshold": threshold, "capacity": capacity}
    if boxes.is_cuda:
        from streamd.gpu import paste

        return paste.encode_prototype_masks(prototypes, coefficients, *objects, **options)
    return mask_reference.encode_prototype_masks(prototypes, coefficients, *objects, **options)


def encode_box_masks(
    masks: Tensor, boxes: Tensor, valid: Tensor, placements: Tensor, *, threshold: float, capacity: int
) -> EncodedMasks:
    """Encode mask probabilities over their boxes; see `mask_reference.encode_box_masks`."""
    if boxes.is_cuda:
        from streamd.gpu import paste

        return paste.encode_box_masks(masks, boxes, valid, placements, threshold=threshold, capacity=capacity)
    return mask_reference.encode_box_masks(masks, boxes, valid, placements, threshold=threshold, capacity=capacity)


def locate_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """Find the point of each heat map over its box; see `reference.locate_keypoints`."""
    if boxes.is_cuda:
        from streamd.gpu import keypoints

        return keypoints.locate_keypoints(heatmaps, boxes)
    return reference.locate_keypoints(heatmaps, boxes)


def _nms_on_gpu(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    from streamd.gpu import nms as kernels

    return kernels.nms(boxes, scores, labels, iou_threshold, score_threshold, max_detections)


def _nms_shapes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    num_images = boxes.shape[0]
    return (
        boxes.new_empty((num_images, max_detections), dtype=torch.int64),
        boxes.new_empty(num_images, dtype=torch.int64),
    )


def _register() -> None:
    """Declare the operators to torch once a process; a reload of this module finds them there."""
    if hasattr(torch.ops.streamd, "nms"):
        return
    torch.library.define(
        "streamd::nms",
        "(Tensor boxes, Tensor scores, Tensor labels, float iou_threshold, float score_threshold, int max_detections)"
        " -> (Tensor keep, Tensor count)",
    )
    torch.library.impl("streamd::nms", "CPU", reference.nms)
    torch.library.impl("streamd::nms", "CUDA", _nms_on_gpu)
    torch.library.register_fake("streamd::nms", _nms_shapes)
    torch.library.define(
        "streamd::pool_levels",
        "(Tensor[] features, Tensor boxes, Tensor levels, float[] scales, int side, int sampling_ratio, str kind)"
        " -> Tensor",
    )
    torch.library.impl("streamd::pool_levels", ("CPU", "CUDA"), pooling.pool_levels)
    torch.library.register_fake("streamd::pool_levels", pooling.pooled_shapes)


_register()
