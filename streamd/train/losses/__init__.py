"""What training minimises, for each family of networks.

A loss is the mean over the images of a batch of each image's own mean. The literature divides most losses by a count
over the whole batch; where an image has a fixed number of samples (R-CNN) or a dense loss is focal (RetinaNet, as
torchvision trains it), that is the same or nearly so. The mean over images is exact where a step is done in pieces or
by several processes, without asking the others for counts that are known only after their forward pass: two batches
of 4 give what one of 8 does. `LossConfig.normalization` "batch" divides as the authors do. Where they differ: an image
with few objects weighs as much as one with many, and one that nobody drew masks in counts as one whose masks are right.

Samples of anchors, proposals and masks are drawn for each image by a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamd.datasets.records import DataSet
from streamd.errors import ConfigError
from streamd.models.deeplab import DeepLab
from streamd.models.fcos import Fcos
from streamd.models.panoptic import PanopticFpn
from streamd.models.rcnn import Rcnn
from streamd.models.retinanet import Retinanet
from streamd.models.semantic import SemanticSegmenter
from streamd.models.spec import ModelSpec
from streamd.models.ssd import Ssd
from streamd.models.yolox import YOLOX
from streamd.train.losses import fcos, rcnn, retinanet, semantic, ssd, yolox
from streamd.train.losses.config import LossConfig, as_torchvision
from streamd.train.targets import Targets, TrainBatch

__all__ = ["FAMILIES", "LossConfig", "Training", "as_torchvision", "check", "compute"]

Family = Callable[[Any, TrainBatch, LossConfig, Sequence[torch.Generator]], dict[str, Tensor]]

FAMILIES: Mapping[type[nn.Module], Family] = {
    YOLOX: yolox.compute,
    Rcnn: rcnn.compute,
    PanopticFpn: rcnn.compute,
    Retinanet: retinanet.compute,
    Fcos: fcos.compute,
    Ssd: ssd.compute,
    SemanticSegmenter: semantic.compute,
    DeepLab: semantic.compute,
}


def compute(
    network: nn.Module, batch: TrainBatch, config: LossConfig | None = None, seeds: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return the losses of a batch by name, weighted, so that their sum is what is minimised; float32 under autocast.

    `seeds`, one for each image, decide what is sampled; without them they are drawn from torch's CPU generator, one
    after the other, so that two batches of 4 get those of one of 8. Every parameter that is trained gets a gradient,
    be it of zeros, whatever the images show.
    """
    generators = _generators(batch, seeds)
    return FAMILIES[type(network)](network, batch, config or LossConfig(), generators)


@torch.compiler.disable
def _generators(batch: TrainBatch, seeds: Sequence[int] | None) -> list[torch.Generator]:
    if seeds is None:
        seeds = torch.randint(2**62, (len(batch.targets),)).tolist()
    return [torch.Generator(batch.images.device).manual_seed(seed) for seed in seeds]


class Training(nn.Module):
    """A network whose `forward` returns its losses, as DistributedDataParallel needs it."""

    def __init__(self, network: nn.Module, config: LossConfig | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = config or LossConfig()

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Targets], seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Do what `compute` does; the arguments are the fields of a TrainBatch."""
        return compute(self.network, TrainBatch(images, sizes, tuple(targets)), self.config, seeds)


def check(network: nn.Module, spec: ModelSpec, dataset: DataSet) -> None:
    """Raise ConfigError if `dataset` does not hold what this network is to learn.

    `network` and `spec` are those that will be trained, which have the labels of the data set.
    """
    if type(network) not in FAMILIES:
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise ConfigError(f"{spec.name}: a {type(network).__name__} cannot be trained here; those that can are {known}")
    if spec.task == "densepose":
        raise ConfigError(f"{spec.name}: the charts of DensePose cannot be trained here")
    if wrong := _missing(spec, dataset):
        raise ConfigError(f"{spec.name} cannot be trained with {dataset.name}: {wrong}")


def _missing(spec: ModelSpec, dataset: DataSet) -> str | None:
    """Say what a data set lacks; None if nothing."""
    records = dataset.records
    if not records:
        return "it has no pictures"
    if spec.task != "semantic":
        if not any((~record.objects.is_crowd).any() for record in records):
            return "it has no objects"
        if len(spec.labels) != len(dataset.labels):
            return f"it has {len(dataset.labels)} labels, the network {len(spec.labels)} classes"
    if spec.masks and not any(record.objects.masks is not None for record in records):
        return "the network has masks, and none of its pictures has any; take a network for boxes alone"
    if spec.keypoints:
        num_names, num_points = len(dataset.keypoint_names), len(spec.keypoints.names)
        if num_names != num_points:
            return f"the network finds {num_points} keypoints, and its objects have {num_names}"
        if not any(record.objects.keypoints is not None for record in records):
            return "the network finds keypoints, and none of its pictures has any"
    if spec.semantic_labels:
        if not any(record.segments_file for record in records):
            return "the network classifies pixels, and none of its pictures has segments; give a panoptic data set"
        if len(spec.semantic_labels) != len(dataset.stuff_labels):
            return f"it has {len(dataset.stuff_labels)} stuff labels, the network {len(spec.semantic_labels)}"
    return None
