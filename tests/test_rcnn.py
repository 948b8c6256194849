"""Networks of two stages, against Detectron2's outputs and through their artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from streamd.errors import ModelError
from streamd.models import artifact, rcnn
from streamd.models.importers import config as detectron2_config
from streamd.models.importers import detectron2
from streamd.models.importers.config import Config
from streamd.models.importers.defaults import DEFAULTS
from streamd.models.rcnn import Rcnn
from streamd.models.spec import ModelSpec

FAMILIES = ("faster_rcnn_R_50_FPN", "mask_rcnn_R_50_FPN", "keypoint_rcnn_R_50_FPN", "cascade_mask_rcnn_R_50_FPN")
INPUT_SIZE = (96, 128)  # of the small networks
PYRAMID = {
    "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
    "RESNETS": {"DEPTH": 18, "OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
    "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
    "ANCHOR_GENERATOR": {"SIZES": [[16], [32], [64], [96], [128]]},
    "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "PRE_NMS_TOPK_TEST": 100},
    "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
    "ROI_MASK_HEAD": {"NUM_CONV": 2},
}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "faster_fpn": (PYRAMID,),
    "mask_fpn": (PYRAMID, {"MASK_ON": True}),
    "keypoint_fpn": (PYRAMID, {"KEYPOINT_ON": True, "MASK_ON": True}),
    "cascade_mask_fpn": (
        PYRAMID,
        {
            "MASK_ON": True,
            "ROI_HEADS": {"NAME": "CascadeROIHeads"},
            "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True, "NUM_CONV": 1, "CONV_DIM": 32, "NORM": "GN"},
        },
    ),
    "cascade_of_one": (
        PYRAMID,
        {
            "ROI_HEADS": {"NAME": "CascadeROIHeads"},
            "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True},
            "ROI_BOX_CASCADE_HEAD": {"BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0]], "IOUS": [0.5]},
        },
    ),
    "mask_c4": ({"MASK_ON": True},),
    "mask_dc5": (
        {
            "MASK_ON": True,
            "RESNETS": {"OUT_FEATURES": ["res5"], "RES5_DILATION": 2},
            "RPN": {"IN_FEATURES": ["res5"]},
            "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["res5"]},
            "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "POOLER_RESOLUTION": 7},
            "ROI_MASK_HEAD": {"NUM_CONV": 1},
        },
    ),
}
SMALL = {
    "RESNETS": {"RES2_OUT_CHANNELS": 16, "STEM_OUT_CHANNELS": 8, "WIDTH_PER_GROUP": 4},
    "RPN": {"POST_NMS_TOPK_TEST": 20, "PRE_NMS_TOPK_TEST": 200},
    "ROI_HEADS": {"NUM_CLASSES": 3},
    "ROI_BOX_HEAD": {"FC_DIM": 24, "POOLER_TYPE": "ROIAlign"},
    "ROI_MASK_HEAD": {"CONV_DIM": 8},
    "ROI_KEYPOINT_HEAD": {"CONV_DIMS": [8, 8], "NUM_KEYPOINTS": 5},
}


def small_config(variant: str, **changes: dict[str, Any] | bool) -> Config:
    """Lay the variant over Detectron2's defaults, with few channels."""
    config = DEFAULTS
    for given in (*VARIANTS[variant], SMALL, changes):
        config = merge(config, {"MODEL": given})
    return merge(config, {"INPUT": {"MIN_SIZE_TEST": INPUT_SIZE[0], "MAX_SIZE_TEST": INPUT_SIZE[1]}})


def merge(base: Config, own: Config) -> Config:
    changed = {key: merge(base[key], value) if isinstance(base.get(key), dict) else value for key, value in own.items()}
    return base | changed


def small(variant: str) -> tuple[Rcnn, ModelSpec]:
    """Build a network whose scores, boxes and masks are spread out, as those of a trained one."""
    torch.manual_seed(0)
    network, spec = rcnn.build(small_config(variant))
    for name, tensor in network.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.fill_(0.8)  # else each block would double the variance
        elif name.endswith(("anchor_deltas.weight", "bbox_pred.weight", "predictor.weight")):
            torch.nn.init.normal_(tensor, std=0.1)
        elif name.endswith(("objectness_logits.weight", "cls_score.weight")):
            torch.nn.init.normal_(tensor, std=1.0)
    return network.eval(), spec


def random_inputs(num_images: int) -> tuple[Tensor, Tensor]:
    """Make images that fill their padding more or less."""
    random = torch.Generator().manual_seed(3)
    images = torch.randn(num_images, 3, *INPUT_SIZE, generator=random)
    sizes = (torch.rand(num_images, 2, generator=random) / 2 + 0.5) * torch.tensor(INPUT_SIZE)
    return images, sizes.round()


def run_all(model: Any, spec: ModelSpec, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """Run forward, and the methods on the ten best boxes of each image."""
    output = dict(model(images, sizes))
    best = output["scores"].topk(10, dim=1).indices
    boxes = output["boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    features = [output.pop(f"features.{i}") for i in range(4) if f"features.{i}" in output]
    if "masks" in spec.methods:
        output["masks"] = model.masks(features, boxes, output["labels"].gather(1, best))
    if "keypoints" in spec.methods:
        output["keypoints"] = model.keypoints(features, boxes)
    return output


class Reference:
    """One folder of reference outputs, and how close ours come."""

    def __init__(self, folder: Path) -> None:
        self.network, self.spec = detectron2.load(folder / "config.yaml", folder / "model_final.pkl")
        with np.load(folder / "io.npz") as arrays:
            self.arrays = dict(arrays)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Normalise the resized images and pad them to a common size."""
        resized = [torch.from_numpy(self.arrays[f"resized{i}"]).float() for i in range(2)]
        multiple = self.spec.size_multiple
        height, width = (-(-max(x.shape[side] for x in resized) // multiple) * multiple for side in (1, 2))
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.spec.mean, self.spec.std))
        images = torch.zeros(2, 3, height, width)
        for i, x in enumerate(resized):
            images[i, :, : x.shape[1], : x.shape[2]] = (x - mean) / std
        return images, torch.tensor([x.shape[1:] for x in resized]).float()

    def detections(self, output: dict[str, Tensor], i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Suppress as Detectron2 does: boxes in input pixels, scores and labels of image i."""
        boxes, scores, labels = (output[name][i] for name in ("boxes", "scores", "labels"))
        rows = (scores >= self.spec.nms.score_threshold).nonzero()[:, 0]
        rows = rows[batched_nms(boxes[rows], scores[rows], labels[rows], self.spec.nms.iou_threshold)]
        rows = rows[: self.spec.nms.max_detections]
        return boxes[rows].numpy(), scores[rows].numpy(), labels[rows].numpy()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_detections_equal_those_of_detectron2(family: str, shared: Path) -> None:
    """Rows are matched by their boxes: rounding lets neighbours swap whose scores are nearly equal, and in one image of
    a hundred objects decides whether two overlap enough."""
    reference = Reference(shared / "parity" / family)
    # As in an optimised artifact; it is also where convolutions round most like the reference.
    network = reference.network.to(memory_format=torch.channels_last)
    images, sizes = reference.inputs()
    output = network(images, sizes)
    for i in range(2):
        boxes, scores, labels = reference.detections(output, i)
        height, width = reference.arrays[f"image{i}"].shape[:2]
        boxes = boxes * np.tile(np.array([width, height]) / sizes[i].flip(0).numpy(), 2)
        wanted, wanted_scores = reference.arrays[f"out{i}_boxes"], reference.arrays[f"out{i}_scores"]
        wanted_labels = reference.arrays[f"out{i}_classes"]
        distance = np.abs(boxes[:, None] - wanted).max(-1)
        distance[labels[:, None] != wanted_labels] = np.inf
        twin = distance.argmin(1)
        assert len(boxes) == len(wanted) == len(set(twin))
        assert distance.min(1).max() < 0.1
        np.testing.assert_allclose(scores, wanted_scores[twin], rtol=0, atol=1e-3)


@dataclass(frozen=True, slots=True)
class Exported:
    """A small network and its artifact."""

    network: Rcnn
    spec: ModelSpec
    path: Path


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    network, spec = small(request.param)
    path = tmp_path_factory.mktemp("rcnn") / f"{request.param}.pt"
    artifact.export(network, spec, path)
    return Exported(network, spec, path)


@torch.inference_mode()
def test_an_artifact_gives_what_the_network_gives(exported: Exported) -> None:
    module, _ = artifact.load(exported.path)
    images, sizes = random_inputs(2)
    expected = run_all(exported.network, exported.spec, images, sizes)
    assert_same(run_all(module, exported.spec, images, sizes), expected)


@torch.inference_mode()
def test_a_batch_of_five_equals_smaller_ones_in_an_optimised_artifact(exported: Exported) -> None:
    module, _ = artifact.load(exported.path, optimized=True)
    images, sizes = random_inputs(5)
    together = run_all(module, exported.spec, images, sizes)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = run_all(module, exported.spec, images[rows], sizes[rows])
        assert_same(part, {name: tensor[rows] for name, tensor in together.items()})


def test_an_artifact_names_no_device(exported: Exported) -> None:
    """A trace keeps the device that an operator was told, and would then fail on another."""
    module, spec = artifact.load(exported.path)
    for graph in (module.inlined_graph, *(getattr(module, name).graph for name in spec.methods)):
        constants = [node.output().type().str() for node in graph.findAllNodes("prim::Constant")]
        assert "Device" not in constants
        assert "int" in constants


def assert_same(output: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(output) == set(expected)
    assert output["scores"].isfinite().any(dim=1).all()
    for name, tensor in expected.items():
        # A trace pools in another order than the network, and a cascade multiplies what rounding leaves.
        torch.testing.assert_close({name: output[name]}, {name: tensor}, rtol=1e-4, atol=artifact.TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_boxes_lie_within_the_picture_and_not_in_its_padding(variant: str) -> None:
    network, _ = small(variant)
    images, sizes = random_inputs(3)
    boxes = network(images, sizes)["boxes"]
    limit = sizes.flip(1).repeat(1, 2)[:, None]
    assert (boxes >= 0).all()
    assert (boxes <= limit).all()
    assert (boxes == limit).any()  # else nothing was clipped


def test_a_spec_says_what_the_configuration_says() -> None:
    config = merge(
        small_config("keypoint_fpn", ROI_HEADS={"SCORE_THRESH_TEST": 0.25, "NMS_THRESH_TEST": 0.4}),
        {"TEST": {"DETECTIONS_PER_IMAGE": 33}},
    )
    _, spec = rcnn.build(config)
    assert spec.task == "keypoints"
    assert spec.sized
    assert spec.methods == ("masks", "keypoints")
    assert spec.nms.score_threshold > 0.25
    assert spec.nms.score_threshold == pytest.approx(0.25)
    assert (spec.nms.iou_threshold, spec.nms.max_detections) == (0.4, 33)
    assert spec.keypoints is not None
    assert len(spec.keypoints.names) == 5
    assert spec.labels == ("class_0", "class_1", "class_2")
    assert spec.input_size == INPUT_SIZE
    assert spec.size_multiple == 32


@pytest.mark.parametrize(
    ("variant", "name", "task"),
    [
        ("faster_fpn", "faster_rcnn", "detect"),
        ("mask_c4", "mask_rcnn", "segment"),
        ("keypoint_fpn", "keypoint_rcnn", "keypoints"),
        ("cascade_mask_fpn", "cascade_mask_rcnn", "segment"),
    ],
)
def test_a_network_is_named_after_its_family(variant: str, name: str, task: str) -> None:
    _, spec = rcnn.build(small_config(variant))
    assert (spec.name, spec.task) == (name, task)


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        (
            "faster_fpn",
            {"PROPOSAL_GENERATOR": {"NAME": "RRPN"}},
            r"PROPOSAL_GENERATOR.NAME is 'RRPN'; streamd builds RPN",
        ),
        ("faster_fpn", {"RPN": {"HEAD_NAME": "Own"}}, "RPN.HEAD_NAME is 'Own'"),
        ("faster_fpn", {"ROI_HEADS": {"NAME": "Own"}}, "ROI_HEADS.NAME is 'Own'.*CascadeROIHeads, Res5ROIHeads"),
        ("faster_fpn", {"ROI_BOX_HEAD": {"NAME": "Own"}}, "ROI_BOX_HEAD.NAME is 'Own'"),
        ("faster_fpn", {"ROI_BOX_HEAD": {"POOLER_TYPE": "ROIAlignRotated"}}, "ROI_BOX_HEAD.POOLER_TYPE.*ROIAlignV2"),
        ("mask_fpn", {"ROI_MASK_HEAD": {"NAME": "PointRendMaskHead"}}, "ROI_MASK_HEAD.NAME is 'PointRendMaskHead'"),
        ("keypoint_fpn", {"ROI_KEYPOINT_HEAD": {"NAME": "Own"}}, "ROI_KEYPOINT_HEAD.NAME is 'Own'"),
        ("mask_c4", {"RESNETS": {"DEPTH": 18}}, "needs a ResNet-50 or deeper"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(variant: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        rcnn.build(small_config(variant, **changes))


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (rcnn.faster_rcnn_resnet50_fpn, 41.70),
        (rcnn.mask_rcnn_resnet50_fpn, 44.34),
        (rcnn.keypoint_rcnn_resnet50_fpn, 59.13),
        (rcnn.cascade_mask_rcnn_resnet50_fpn, 71.98),
    ],
)
def test_each_builder_has_the_number_of_parameters_that_it_says(build: Any, millions: float) -> None:
    with torch.device("meta"):
        network = build()
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert f"{millions:.1f} M parameters" in build.__doc__


def test_every_parameter_gets_a_gradient() -> None:
    network, _ = small("mask_fpn")
    images, sizes = random_inputs(2)
    output = network.train()(images, sizes)
    features = [output[f"features.{i}"] for i in range(4)]
    masks = network.masks(features, output["boxes"][:, :5].detach(), output["labels"][:, :5])
    proposals = network.proposal_generator.rpn_head(features)
    losses = [x.sum() for x in (output["boxes"], masks, *proposals[0], *proposals[1])]
    scores = output["scores"]
    (sum(losses) + scores[scores.isfinite()].sum()).backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []


def test_levels_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="share one RPN head"):
        rcnn.build(
            small_config(
                "mask_c4",
                RESNETS={"OUT_FEATURES": ["res3", "res4"]},
                RPN={"IN_FEATURES": ["res3", "res4"]},
            )
        )


def test_a_spec_and_its_network_are_those_that_the_importer_gives(shared: Path) -> None:
    folder = shared / "parity" / FAMILIES[1]
    network, spec = detectron2.load(folder / "config.yaml", folder / "model_final.pkl")
    assert isinstance(network, Rcnn)
    assert spec.blueprint is not None and spec.blueprint.kind == "detectron2"
    assert (
        msgspec.structs.replace(spec, weights_sha256="", blueprint=None)
        == rcnn.build(detectron2_config.read(folder / "config.yaml"))[1]
    )
