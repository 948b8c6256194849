"""`streamd models`: which networks there are, what they do, and what is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from torchvision.models import get_model_weights

from streamd.errors import ModelError
from streamd.models import BUILDERS, artifact, deeplab, weights
from streamd.models.importers import hf
from streamd.models.importers.torchvision import NAMES

_TASKS = {"maskrcnn": "segment", "keypointrcnn": "keypoints"}
_TORCHVISION_LICENCE = "BSD-3-Clause (torchvision)"
# Families of which one brings the weights: what their artifacts are called, their tasks, and the command.
_OF_DETECTRON2 = (
    ("faster_rcnn", "detect"),
    ("mask_rcnn", "segment"),
    ("keypoint_rcnn", "keypoints"),
    ("cascade_mask_rcnn", "segment"),
    ("densepose_rcnn", "densepose"),
    ("retinanet", "detect"),
    ("panoptic_fpn", "panoptic"),
    ("semantic_fpn", "semantic"),
    ("vitdet", "segment"),
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One line of the list."""

    name: str
    task: str
    input: str
    licence: str
    published: str  # accuracy on COCO val2017, percent
    how: str  # to get it, or where it lies


def known_models() -> Iterator[KnownModel]:
    """List what can be had by name, then the artifacts on this machine."""
    directories = weights.model_directories()
    for name, release in weights.RELEASES.items():
        height, width = BUILDERS[name]().input_size
        here = any((directory / f"{name}{suffix}").is_file() for directory in directories for suffix in (".pt", ".pth"))
        how = "on this machine" if here else "fetched at first use"
        yield KnownModel(name, "detect", f"{width}x{height}", release.licence, f"box {release.coco_ap}", how)
    for name in NAMES:
        task = next((task for part, task in _TASKS.items() if name.startswith(part)), "detect")
        yield KnownModel(name, task, "", _TORCHVISION_LICENCE, _published(name), "streamd import torchvision")
    for name in deeplab.VARIANTS:
        yield KnownModel(name, "semantic", "", _TORCHVISION_LICENCE, _published(name), "streamd import torchvision")
    for name, task in _OF_DETECTRON2:
        yield KnownModel(name, task, "", "its weights' licence", "", "streamd import detectron2")
    for name in hf.FAMILIES:
        yield KnownModel(name, "detect", "", "its weights' licence", "", "streamd import hf")
    for directory in directories:
        for path in sorted(directory.glob("*.pt")):
            yield from _on_disk(path)


def show(console: Console) -> None:
    """Print the list, in groups that are had in the same way."""
    console.print(f"  {'name':30} {'task':10} {'input':8} published accuracy, percent", highlight=False)
    for (how, licence), models in groupby(known_models(), lambda model: (model.how, model.licence)):
        console.print(f"{how}: {licence}", soft_wrap=True, highlight=False)
        for model in models:
            line = f"  {model.name:30} {model.task:10} {model.input:8} {model.published}"
            console.print(line.rstrip(), soft_wrap=True, highlight=False)


def _published(name: str) -> str:
    found = get_model_weights(name)["DEFAULT"].meta["_metrics"]
    metrics: dict[str, float] = next(
        (values for data_set, values in found.items() if data_set.startswith("COCO-val2017")), {}
    )
    words = {"miou": "mIoU"}
    return ", ".join(
        f"{words.get(key, key.removesuffix('_map'))} {value}" for key, value in metrics.items() if key != "pixel_acc"
    )


def _on_disk(path: Path) -> Iterator[KnownModel]:
    try:
        spec = artifact.read_spec(path)
    except ModelError:
        return
    height, width = spec.input_size
    words = {"boxes_ap": "box", "masks_ap": "mask", "keypoints_ap": "kp", "pq": "PQ", "mean_iou": "mIoU"}
    published = ", ".join(f"{words[key]} {100 * spec.metrics[key]:.1f}" for key in words if key in spec.metrics)
    yield KnownModel(spec.name, spec.task, f"{width}x{height}", spec.licence, published, str(path))
