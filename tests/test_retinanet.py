"""RetinaNet against Detectron2's outputs and torchvision's network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import batched_nms

from streamd.messages import Detections
from streamd.models import artifact, parity
from streamd.models.anchors import AnchorGrid, clip_boxes
from streamd.models.fpn import ConvLevels, Fpn
from streamd.models.importers import detectron2
from streamd.models.resnet import Resnet, ResnetConfig, resnet50
from streamd.models.retinanet import Retinanet, RetinanetConfig, retinanet_resnet50_fpn
from streamd.models.spec import ModelSpec
from tests.parity_reference import assert_same, read_reference
from tests.test_resnet import randomise_norms, renamed

PLAIN = ResnetConfig(depth=18, num_stem_channels=8, num_res2_channels=8)
DEFORMABLE = ResnetConfig(
    num_stem_channels=32,
    num_res2_channels=32,
    width_per_group=32,
    norm="GN",
    deform_on_per_stage=(False, False, True, True),
    deform_modulated=True,
)


def tiny(num_classes: int = 3, norm: str = "", bottom_up: ResnetConfig = PLAIN) -> Retinanet:
    """Build a network that is fast and has every part."""
    backbone = Fpn(
        Resnet(bottom_up),
        ("res3", "res4", "res5"),
        32,
        norm="GN" if norm else "",
        top_block=ConvLevels(bottom_up.num_res2_channels * 8, 32),
    )
    anchors = AnchorGrid(tuple(backbone.strides.values()), ((16.0, 20.0),), ((0.5, 1.0, 2.0),))
    network = Retinanet(backbone, RetinanetConfig(num_classes, anchors, norm=norm, num_candidates=50)).eval()
    spread(network.head, network.features(torch.randn(2, 3, 64, 96)), network.head.cls_score, network.head.bbox_pred)
    return network


@torch.no_grad()
def spread(head: nn.Module, features: list[Tensor], classes: nn.Conv2d, boxes: nn.Conv2d) -> None:
    """Draw weights by which logits and deltas differ: an untrained head makes all scores nearly equal."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    outputs: dict[nn.Module, list[Tensor]] = defaultdict(list)
    for predictor in (classes, boxes):
        predictor.register_forward_hook(lambda module, _inputs, output: outputs[module].append(output.flatten()))
    head(features)
    classes.weight *= 2.0 / torch.cat(outputs[classes]).std()
    boxes.weight *= 0.3 / torch.cat(outputs[boxes]).std()


def suppressed(output: dict[str, Tensor], image: int, threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of one image after torchvision's suppression, by falling score."""
    boxes, scores, labels = (output[name][image] for name in ("boxes", "scores", "labels"))
    kept = (scores > threshold).nonzero()[:, 0]
    kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], 0.5)[:limit]]
    return boxes[kept], scores[kept], labels[kept]


@torch.inference_mode()
def test_a_detectron2_checkpoint_finds_what_detectron2_finds(shared: Path) -> None:
    folder = shared / "parity" / "retinanet_R_50_FPN"
    network, spec = detectron2.load(folder / "config.yaml", folder / "model_final.pkl")
    reference = read_reference(folder)
    mean = torch.tensor(spec.mean)[:, None, None]
    images = torch.zeros(2, 3, *parity.common_size(reference.resized, spec.size_multiple))
    for image, resized in zip(images, reference.resized, strict=True):
        image[:, : resized.shape[1], : resized.shape[2]] = torch.from_numpy(resized) - mean
    output = network(images)
    for i, (resized, (height, width)) in enumerate(zip(reference.resized, reference.sizes, strict=True)):
        boxes, scores, labels = suppressed(output, i, threshold=0.05, limit=100)
        boxes = boxes * torch.tensor([width / resized.shape[2], height / resized.shape[1]] * 2)
        boxes = clip_boxes(boxes[None], torch.tensor([[float(height), float(width)]]))[0]
        seen = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        found = Detections(boxes[seen].numpy(), scores[seen].numpy(), labels[seen].numpy())
        assert_same(found, reference.detections[i])


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the parameters of torchvision's RetinaNet as Detectron2 does."""
    body = {name.removeprefix("backbone.body."): x for name, x in state.items() if name.startswith("backbone.body.")}
    ours = {f"backbone.bottom_up.{name}": x for name, x in renamed(body).items()}
    for name, value in state.items():
        match name.split("."):
            case ["backbone", "fpn", "extra_blocks", *rest]:
                ours[".".join(("backbone.top_block", *rest))] = value
            case ["backbone", "fpn", blocks, index, "0", kind]:
                place = {"inner_blocks": "lateral", "layer_blocks": "output"}[blocks]
                ours[f"backbone.fpn_{place}{int(index) + 3}.{kind}"] = value
            case ["head", branch, "conv", index, "0", kind]:
                subnet = {"classification_head": "cls_subnet", "regression_head": "bbox_subnet"}[branch]
                ours[f"head.{subnet}.{2 * int(index)}.{kind}"] = value
            case ["head", _, "cls_logits", kind]:
                ours[f"head.cls_score.{kind}"] = value
            case ["head", _, "bbox_reg", kind]:
                ours[f"head.bbox_pred.{kind}"] = value
    return ours


def torchvision_detector(build: Callable[..., Any], size: tuple[int, int], num_classes: int) -> tuple[Any, Tensor]:
    """Build a dense detector of torchvision whose scores are spread out, and make a picture [3, H, W]."""
    torch.manual_seed(0)
    theirs = build(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=size[0],
        max_size=size[1],
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    ).eval()
    randomise_norms(theirs)
    image, head = torch.rand(3, *size), theirs.head
    features = list(theirs.backbone(image[None]).values())
    spread(head, features, head.classification_head.cls_logits, head.regression_head.bbox_reg)
    return theirs, image


@torch.inference_mode()
def test_it_finds_what_torchvision_finds_with_the_same_weights() -> None:
    size, num_classes = (64, 96), 4
    theirs, image = torchvision_detector(detection.retinanet_resnet50_fpn, size, num_classes)
    bottom_up = resnet50("BN", ("res3", "res4", "res5"))
    backbone = Fpn(bottom_up, ("res3", "res4", "res5"), 256, top_block=ConvLevels(256, 256, "p5"))
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    anchors = AnchorGrid(tuple(backbone.strides.values()), sizes, ((0.5, 1.0, 2.0),), convention="torchvision")
    ours = Retinanet(backbone, RetinanetConfig(num_classes, anchors, clipped=True)).eval()
    ours.load_state_dict(torchvision_names(theirs.state_dict()))

    (expected,) = theirs([image])
    output = ours(image[None], torch.tensor([size], dtype=torch.float32))
    boxes, scores, labels = suppressed(output, 0, threshold=0.05, limit=300)
    assert len(expected["scores"]) > 20
    torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=1e-2)
    assert labels.tolist() == expected["labels"].tolist()


@torch.inference_mode()
def test_a_batch_of_five_equals_five_batches_of_one() -> None:
    network = tiny()
    images = torch.randn(5, 3, 64, 96)
    together = network(images)
    alone = [network(image[None]) for image in images]
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, torch.cat([output[name] for output in alone]), rtol=0, atol=1e-4)


def test_every_kind_of_layer_can_be_exported_and_loaded_in_either_precision(tmp_path: Path) -> None:
    network = tiny(norm="SyncBN", bottom_up=DEFORMABLE)
    spec = ModelSpec(name="tiny", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
    artifact.export(network, spec, tmp_path / "model.pt")
    for dtype in (torch.float32, torch.float16):
        assert artifact.load(tmp_path / "model.pt", dtype=dtype)[1] == spec


@torch.inference_mode()
def test_each_level_gives_its_best_pairs_and_small_levels_all_they_have() -> None:
    output = tiny(num_classes=3)(torch.randn(2, 3, 64, 96))
    num_pairs = [min(50, h * w * 6 * 3) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
    assert {name: list(tensor.shape) for name, tensor in output.items()} == {
        "boxes": [2, sum(num_pairs), 4],
        "scores": [2, sum(num_pairs)],
        "labels": [2, sum(num_pairs)],
    }


@torch.inference_mode()
def test_boxes_leave_the_picture_unless_they_are_clipped() -> None:
    free = tiny()
    assert free.head.bbox_pred.bias is not None
    nn.init.constant_(free.head.bbox_pred.bias, 2.0)
    clipped = Retinanet(free.backbone, replace(free.config, clipped=True)).eval()
    clipped.load_state_dict(free.state_dict())
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 96.0], [40.0, 50.0]])
    assert free(images)["boxes"].amax() > 96
    assert clipped(images, sizes)["boxes"].amax(dim=1)[:, 2:].tolist() == [[96, 64], [50, 40]]


@pytest.mark.parametrize("norm", ["", "GN", "SyncBN"])
def test_every_parameter_gets_a_gradient(norm: str) -> None:
    network = tiny(norm=norm).train()
    features = network.features(torch.randn(2, 3, 64, 96))
    logits, deltas = network.head(features)
    sum(x.sum() for x in (*logits, *deltas)).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_levels_with_different_numbers_of_anchors_are_refused() -> None:
    anchors = AnchorGrid((8, 16), ((8.0,), (8.0, 9.0)), ((1.0,),))
    with pytest.raises(ValueError, match="one head for all levels"):
        Retinanet(tiny().backbone, RetinanetConfig(3, anchors, ("p3", "p4")))


def test_the_full_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = retinanet_resnet50_fpn()
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(37.9, abs=0.1)
