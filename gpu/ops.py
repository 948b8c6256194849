"""The operators that the stages call; each runs where its tensors are. Importing this registers `streamd::nms`.

`torch.ops.streamd.nms` is a dispatcher operator, so that a TorchScript model can call it: import this module before
such a model is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamd.gpu import reference
from streamd.gpu.reference import paste_boxes, paste_prototypes, preprocess, rle
from streamd.gpu.rle import Bits, pack_counts

__all__ = ["Bits", "nms", "pack_counts", "paste_boxes", "paste_prototypes", "preprocess", "rle"]


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
    """Declare the operator to torch once a process; a reload of this module finds it there."""
    if hasattr(torch.ops.streamd, "nms"):
        return
    torch.library.define(
        "streamd::nms",
        "(Tensor boxes, Tensor scores, Tensor labels, float iou_threshold, float score_threshold, int max_detections)"
        " -> (Tensor keep, Tensor count)",
    )
    torch.library.impl("streamd::nms", "CPU", reference.nms)
    torch.library.register_fake("streamd::nms", _nms_shapes)


_register()
