"""Losses and gradients against torchvision's own training, with the same weights, pictures and objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from streamd.models.importers import torchvision as importer
from streamd.train import losses
from streamd.train.losses.config import LossConfig, as_torchvision
from streamd.train.targets import Targets, TrainBatch
from tests.test_importers_torchvision import SIZE, Pictures, liven, random_network

NUM_CLASSES = 3  # beside the background
NUM_KEYPOINTS = 4
WIDTH = 32  # channels of the pyramid
NUM_SAMPLES = 10**6  # so many that all are taken and nothing is left to chance
INPUT = {"min_size": SIZE[0], "max_size": SIZE[1]}
OURS = {  # names of torchvision's losses
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
    "classification": "class",
    "bbox_regression": "box",
    "bbox_ctrness": "centreness",
}


def pyramid(extra: nn.Module | None = None) -> BackboneWithFPN:
    """Build a ResNet-18 with a narrow pyramid, of three levels where there is something to come on top."""
    stages = (1, 2, 3, 4) if extra is None else (2, 3, 4)
    body = resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    names = {f"layer{stage}": str(index) for index, stage in enumerate(stages)}
    return BackboneWithFPN(body, names, [32 * 2**stage for stage in stages], WIDTH, extra)


def rcnn(kind: Callable[..., Any] = FasterRCNN, **heads: Any) -> Any:
    options = {
        "rpn_anchor_generator": AnchorGenerator(((8,), (16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 5),
        "rpn_batch_size_per_image": NUM_SAMPLES,
        "box_batch_size_per_image": NUM_SAMPLES,
        "box_head": TwoMLPHead(WIDTH * 7 * 7, 48),
        "box_predictor": FastRCNNPredictor(48, NUM_CLASSES + 1),
    }
    return kind(pyramid(), **INPUT, **options, **heads)


def mask_rcnn() -> Any:
    head = MaskRCNNHeads(WIDTH, (24, 24), 1)
    return rcnn(MaskRCNN, mask_head=head, mask_predictor=MaskRCNNPredictor(24, 24, NUM_CLASSES + 1))


def keypoint_rcnn() -> Any:
    head, predictor = KeypointRCNNHeads(WIDTH, (24, 24)), KeypointRCNNPredictor(24, NUM_KEYPOINTS)
    return rcnn(KeypointRCNN, keypoint_head=head, keypoint_predictor=predictor)


def retinanet() -> Any:
    sizes = tuple((side, 1.5 * side) for side in (12, 24, 48, 80, 100))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return RetinaNet(pyramid(LastLevelP6P7(512, WIDTH)), NUM_CLASSES + 1, anchor_generator=anchors, **INPUT)


def fcos() -> Any:
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    return FCOS(pyramid(LastLevelP6P7(WIDTH, WIDTH)), NUM_CLASSES + 1, anchor_generator=anchors, **INPUT)


def ssd() -> Any:
    return random_network("ssdlite320_mobilenet_v3_large")


def silence_background(theirs: Any) -> None:
    """Let the dense heads of torchvision deny the class that streamd has no row for, at next to no loss."""
    head = theirs.head.classification_head
    rows = torch.arange(head.cls_logits.out_channels) % head.num_classes == 0
    with torch.no_grad():
        head.cls_logits.weight[rows] = 0
        head.cls_logits.bias[rows] = -40


NETWORKS: dict[str, tuple[Callable[[], Any], LossConfig]] = {
    "faster_rcnn": (rcnn, as_torchvision()),
    "mask_rcnn": (mask_rcnn, as_torchvision()),
    "keypoint_rcnn": (keypoint_rcnn, as_torchvision()),
    "retinanet": (retinanet, as_torchvision(normalization="image")),
    "fcos": (fcos, as_torchvision()),
    "ssd": (ssd, as_torchvision()),
}


def targets(sizes: Tensor, input_size: tuple[int, int]) -> tuple[Targets, ...]:
    """Make objects of many sizes in pictures of `sizes` [B,2]; some of their keypoints are unmarked or outside."""
    random = torch.Generator().manual_seed(5)
    made = []
    for num_objects, (height, width) in zip((6, 3), sizes.tolist(), strict=True):
        limits = torch.tensor([width, height])
        sides = 12 + torch.rand(num_objects, 2, generator=random) * limits * 0.6
        corner = torch.rand(num_objects, 2, generator=random) * (limits - sides).clamp(min=0)
        boxes = torch.cat((corner, torch.minimum(corner + sides, limits)), dim=1)
        points = corner[:, None] + torch.rand(num_objects, NUM_KEYPOINTS, 2, generator=random) * sides[:, None] * 1.2
        visible = torch.randint(3, (num_objects, NUM_KEYPOINTS, 1), generator=random)
        # Of few edges: along those, a rounding error in a proposal would show most.
        blotches = torch.rand(1, num_objects, 5, 6, generator=random)
        masks = nn.functional.interpolate(blotches, input_size, mode="bilinear")[0] > 0.4
        labels = torch.randint(NUM_CLASSES, (num_objects,), generator=random)
        made.append(Targets(boxes, labels, torch.zeros(0, 4), masks, torch.cat((points, visible), dim=-1)))
    return tuple(made)


def train_theirs(theirs: Any, pictures: Pictures, batch: TrainBatch) -> tuple[dict[str, Tensor], Any]:
    """Return torchvision's losses, and its network with the gradients in place of the weights."""
    their_targets = []
    for picture, target in zip(pictures.theirs, batch.targets, strict=True):
        height, width = picture.shape[1:]
        assert target.masks is not None
        masks = target.masks[:, :height, :width].to(torch.uint8)
        objects = {"boxes": target.boxes, "labels": target.labels + 1, "masks": masks, "keypoints": target.keypoints}
        their_targets.append(objects)
    found = theirs.train()(pictures.theirs, their_targets)
    sum(found.values()).backward()
    gradients = copy.deepcopy(theirs)
    for to, parameter in zip(gradients.parameters(), theirs.parameters(), strict=True):
        to.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found, gradients


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_are_torchvisions(name: str) -> None:
    make, config = NETWORKS[name]
    torch.manual_seed(0)
    theirs = make() if name == "ssd" else liven(make())
    if name in ("retinanet", "fcos"):
        silence_background(theirs)
    network, spec = importer.convert(copy.deepcopy(theirs), name)
    pictures = Pictures.random(theirs, spec)
    batch = TrainBatch(pictures.images, pictures.sizes, targets(pictures.sizes, spec.input_size))
    expected, gradients = train_theirs(theirs, pictures, batch)

    rpn = replace(config.rpn, num_samples=NUM_SAMPLES)
    config = replace(config, rpn=rpn, roi_heads=replace(config.roi_heads, num_samples=NUM_SAMPLES))
    found = losses.compute(network.train(), batch, config)
    assert {OURS[key] for key in expected} == set(found)
    for key, value in expected.items():
        torch.testing.assert_close(found[OURS[key]], value, rtol=1e-4, atol=1e-6)
        assert value > 1e-3
    torch.stack(list(found.values())).sum().backward()

    by_name = dict(importer.convert(gradients, name)[0].named_parameters())
    # A bias before a norm has a gradient of rounding errors alone, which are of the size of what they come from.
    rounding = 1e-6 * max(float(gradient.detach().abs().max()) for gradient in by_name.values())
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        expected_gradient = by_name[key].detach()
        difference = float((parameter.grad - expected_gradient).abs().max())
        assert difference <= 1e-4 * float(expected_gradient.abs().max()) + rounding, key
