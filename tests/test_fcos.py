"""FCOS against torchvision's network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.ops import batched_nms

from streamd.models.anchors import AnchorGrid
from streamd.models.fcos import Fcos, FcosConfig, decode_distances, fcos_resnet50_fpn
from streamd.models.fpn import ConvLevels, Fpn
from streamd.models.resnet import Resnet, ResnetConfig, resnet50
from tests.test_retinanet import spread, torchvision_detector, torchvision_names

STRIDES = (8, 16, 32, 64, 128)
CELLS = tuple((float(stride),) for stride in STRIDES)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the parameters of torchvision's FCOS as Detectron2 does."""
    branches = {
        "classification_head.conv": "cls_subnet",
        "classification_head.cls_logits": "cls_score",
        "regression_head.conv": "bbox_subnet",
        "regression_head.bbox_reg": "bbox_pred",
        "regression_head.bbox_ctrness": "ctrness",
    }
    ours = torchvision_names({name: x for name, x in state.items() if name.startswith("backbone.")})
    for name, value in state.items():
        for theirs, branch in branches.items():
            if name.startswith(f"head.{theirs}."):
                ours[name.replace(theirs, branch)] = value
    return ours


@torch.inference_mode()
def test_it_finds_what_torchvision_finds_with_the_same_weights() -> None:
    size, num_classes = (64, 96), 4
    theirs, image = torchvision_detector(detection.fcos_resnet50_fpn, size, num_classes)
    backbone = Fpn(
        resnet50("BN", ("res3", "res4", "res5")), ("res3", "res4", "res5"), 256, top_block=ConvLevels(256, 256, "p5")
    )
    anchors = AnchorGrid(STRIDES, CELLS, ((1.0,),), convention="torchvision")
    ours = Fcos(backbone, FcosConfig(num_classes, anchors, clipped=True)).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))

    (expected,) = theirs([image])
    output = ours(image[None], torch.tensor([size], dtype=torch.float32))
    boxes, scores, labels = (output[name][0] for name in ("boxes", "scores", "labels"))
    kept = (scores > 0.2).nonzero()[:, 0]
    kept = kept[batched_nms(boxes[kept], scores[kept], labels[kept], 0.6)[:100]]
    assert len(expected["scores"]) > 20
    torch.testing.assert_close(scores[kept], expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes[kept], expected["boxes"], rtol=0, atol=1e-2)
    assert labels[kept].tolist() == expected["labels"].tolist()


def test_distances_are_in_sides_of_the_cell_and_negative_ones_count_as_zero() -> None:
    cell = torch.tensor([12.0, 20.0, 20.0, 28.0])  # its centre is (16, 24), its side 8
    box = decode_distances(torch.tensor([1.0, 0.5, -3.0, 2.0]), cell)
    assert box.tolist() == [8, 20, 16, 40]


@torch.inference_mode()
def test_a_batch_of_three_equals_three_batches_of_one_and_nothing_is_clipped() -> None:
    torch.manual_seed(0)
    bottom_up = Resnet(ResnetConfig(depth=18, num_stem_channels=8, num_res2_channels=8))
    backbone = Fpn(bottom_up, ("res3", "res4", "res5"), 64, top_block=ConvLevels(64, 64, "p5"))
    network = Fcos(backbone, FcosConfig(3, AnchorGrid(STRIDES, CELLS, ((1.0,),)), num_candidates=40)).eval()
    images = torch.randn(3, 3, 64, 96)
    spread(network.head, list(backbone(images).values()), network.head.cls_score, network.head.bbox_pred)
    together = network(images)
    assert together["scores"].shape == together["labels"].shape == (3, 40 + 40 + 6 * 3 + 2 * 3 + 3)
    for name, tensor in together.items():
        alone = torch.cat([network(image[None])[name] for image in images])
        torch.testing.assert_close(tensor, alone, rtol=1e-5, atol=1e-4)
    assert together["boxes"].amin() < 0


def test_more_than_one_anchor_a_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="one anchor a cell"):
        Fcos(fcos_resnet50_fpn().backbone, FcosConfig(3, AnchorGrid(STRIDES, CELLS, ((0.5, 1.0),))))


def test_the_full_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = fcos_resnet50_fpn()
    # torchvision counts 32.27 M with the 91 classes and the batch norms' parameters, 53,120, which are frozen here.
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(32.2, abs=0.1)
