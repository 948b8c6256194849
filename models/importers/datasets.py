"""The class names of the data sets that Detectron2 knows by name."""

from __future__ import annotations

from collections.abc import Sequence

from streamd.models import coco

CITYSCAPES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
PASCAL_VOC = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# By how Detectron2's names begin; the first that fits counts.
LABELS: dict[str, tuple[str, ...]] = {
    "keypoints_coco": ("person",),
    "densepose_coco": ("person",),
    "coco": coco.LABELS,
    "cityscapes_fine_instance": CITYSCAPES,
    "voc": PASCAL_VOC,
}


def labels_of(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the labels of the first known data set if it has as many classes, else class_0, class_1, ..."""
    for name in names:
        for start, labels in LABELS.items():
            if name.startswith(start) and len(labels) == num_classes:
                return labels
    return tuple(f"class_{index}" for index in range(num_classes))
