"""DeepLabV3 (Chen et al., 2017, arXiv:1706.05587) of torchvision, for pictures that lie in padding.

Attribute names are torchvision's, so that its checkpoints load once their auxiliary classifier, which only training
needs, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights
from torchvision.models.segmentation.deeplabv3 import ASPP

from streamd.errors import ModelError
from streamd.models.importers import checkpoint
from streamd.models.importers.checkpoint import Checkpoint
from streamd.models.layers import static_size
from streamd.models.spec import Blueprint, ModelSpec, ResizeRule

VARIANTS = {
    "deeplabv3_mobilenet_v3_large": segmentation.deeplabv3_mobilenet_v3_large,
    "deeplabv3_resnet50": segmentation.deeplabv3_resnet50,
    "deeplabv3_resnet101": segmentation.deeplabv3_resnet101,
}
AUXILIARY_PREFIX = "aux_classifier."  # of the parameters of torchvision's checkpoints that are not needed
_LAST_BIAS = "classifier.4.bias"
VOC_LABELS: tuple[str, ...] = tuple(DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"])

# torchvision's preset: the shorter side of a picture has 520 pixels, and ImageNet's mean and deviation.
SHORTEST_EDGE_PX = 520
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class DeepLab(nn.Module):
    """Turn RGB images into logits of their cells, 8 input pixels wide (16 for the variant with MobileNet)."""

    def __init__(self, network: segmentation.DeepLabV3) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.classifier = network.classifier

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return `semantic` [B, classes, h, w] of images [B,3,H,W] with pictures of `sizes` [B,2], in input pixels.

        torchvision stretches these logits to the size of the input, bilinearly.
        """
        x = self.backbone(images)["out"]
        # Cells of the padding are zero, as they are outside a picture without padding: dilated convolutions reach far,
        # and the mean over the picture must not depend on how much padding there is.
        inside = _cells_inside(x, static_size(images), sizes)
        pyramid, *head = self.classifier
        x = _pool_pyramid(pyramid, x, inside)
        for layer in head:
            x = layer(x)
        return {"semantic": x}


def _cells_inside(x: Tensor, input_size: tuple[int, int], sizes: Tensor) -> Tensor:
    """Say which cells of a map [B,C,rows,columns] hold any of the picture: bool [B, 1, rows, columns]."""
    rows, columns = static_size(x)
    # Not arange: a trace would keep the device where it was made.
    cells = torch.ones_like(x[:, :1], dtype=torch.float32)
    top = (cells.cumsum(2) - 1) * (input_size[0] / rows)
    left = (cells.cumsum(3) - 1) * (input_size[1] / columns)
    height, width = sizes[:, :, None, None, None].unbind(1)
    return (top < height) & (left < width)


def _pool_pyramid(pyramid: ASPP, x: Tensor, inside: Tensor) -> Tensor:
    """Do what torchvision's ASPP does, as if there were no cells but those `inside`."""
    x = x * inside
    *convolutions, pooling = pyramid.convs
    branches = [convolution(x) for convolution in convolutions]
    total = x.sum((2, 3), keepdim=True, dtype=torch.float32)  # float16 ends at 65504
    mean = (total / inside.sum((2, 3), keepdim=True)).type_as(x)  # a trace would keep what `to(x.dtype)` was
    _, *layers = pooling  # the first is the mean over all cells
    for layer in layers:
        mean = layer(mean)
    y: Tensor = pyramid.project(torch.cat((*branches, mean.expand_as(branches[0])), dim=1))
    return y


def load(variant: str, weights: Checkpoint, labels: Sequence[str] | None = None) -> tuple[DeepLab, ModelSpec]:
    """Build a network with the weights of torchvision's network of the same name, ready for inference.

    Without `labels` they are Pascal VOC's, which torchvision's own weights have, if they are as many, else background,
    class_1, class_2, ... Raises ModelError.
    """
    biases = weights.state.get(_LAST_BIAS)
    if biases is None:
        raise ModelError(f"{weights.path}: has no {_LAST_BIAS}: not a checkpoint of torchvision's {variant}")
    num_classes = len(biases)
    if labels is None:
        is_voc = num_classes == len(VOC_LABELS)
        labels = VOC_LABELS if is_voc else ("background", *(f"class_{index}" for index in range(1, num_classes)))
    if len(labels) != num_classes:
        raise ModelError(
            f"{weights.path}: has {num_classes} classes with the background, so it needs as many labels, "
            f"got {len(labels)}"
        )
    network, spec = build(variant, labels)
    needed = {name: value for name, value in weights.state.items() if not name.startswith(AUXILIARY_PREFIX)}
    checkpoint.load(network, replace(weights, state=needed))
    return network.eval(), msgspec.structs.replace(spec, weights_sha256=weights.sha256)


def build(
    variant: str, labels: Sequence[str] = VOC_LABELS, input_size: tuple[int, int] = (SHORTEST_EDGE_PX, 928)
) -> tuple[DeepLab, ModelSpec]:
    """Build a network with random weights for a name in VARIANTS, and its spec. Raises ModelError.

    `labels` begin with the background. `input_size` is (height, width): 928 holds frames of 16:9.
    """
    if variant not in VARIANTS:
        raise ModelError(f"{variant}: no such network; those of DeepLabV3 are {', '.join(VARIANTS)}")
    network = VARIANTS[variant](weights=None, weights_backbone=None, num_classes=len(labels), aux_loss=False)
    spec = ModelSpec(
        name=variant,
        blueprint=Blueprint(kind="torchvision", variant=variant, numbers={"num_classes": len(labels)}),
        task="semantic",
        labels=tuple(labels),
        input_size=input_size,
        sized=True,
        colour="rgb",
        mean=MEAN,
        std=STD,
        resize=ResizeRule(
            kind="shortest_edge",
            min_size=SHORTEST_EDGE_PX,
            max_size=max(SHORTEST_EDGE_PX, *input_size),
            pad=None,
            antialias=True,
        ),
    )
    return DeepLab(network), spec
