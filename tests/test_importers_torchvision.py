"""Networks of torchvision against torchvision itself, with random weights in the same process."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import batched_nms

from streamd.errors import ModelError
from streamd.models import artifact
from streamd.models.importers import torchvision as importer
from streamd.models.layers import FrozenBatchNorm2d
from streamd.models.rcnn import Rcnn
from streamd.models.spec import ModelSpec

TWO_STAGES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
)
DENSE = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")
SSD = ("ssdlite320_mobilenet_v3_large", "ssd300_vgg16")
NUM_CLASSES = 4  # beside the background
SIZE = (128, 160)


def random_network(name: str) -> Any:
    """Build torchvision's network so that it finds something: its norms suit its input, its scores are spread out."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": NUM_CLASSES + 1}
    if name not in SSD:
        options |= {"min_size": SIZE[0], "max_size": SIZE[1]}
    if name in TWO_STAGES:
        options |= {"rpn_post_nms_top_n_test": 60, "box_detections_per_img": 20}
    return liven(get_model(name, weights=None, weights_backbone=None, **options))


def random_pictures(theirs: Any, seed: int) -> list[Tensor]:
    """Make two pictures [3,h,w] that need no resizing, the second with padding where the network takes any shape."""
    random = torch.Generator().manual_seed(seed)
    fixed = theirs.transform.fixed_size
    sizes = (fixed, fixed) if fixed else (SIZE, (SIZE[0], SIZE[0]))
    return [torch.rand(3, *size, generator=random) for size in sizes]


def liven(theirs: Any) -> Any:
    """Give norms the statistics of noise, and predictors weights that say different things of different places."""
    # Of the very kind and sizes of the pictures to come, or deep layers would give something far larger for them.
    noise = random_pictures(theirs, seed=1)
    norms = [layer for layer in theirs.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
        norm.momentum = 1.0
    theirs.train().backbone(theirs.transform(noise)[0].tensors)
    for norm in norms:
        norm.momentum = 0.1
    predictors: list[tuple[Any, Any]] = [
        (layer, layer.register_forward_hook(Spread(deviation)))
        for name, layer in theirs.named_modules()
        for pattern, deviation in SPREADS.items()
        if re.search(pattern, name) and isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    for layer, _ in predictors:
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        theirs.eval()(noise)
    for layer, hook in predictors:
        nn.init.normal_(layer.bias, std=0.2)
        hook.remove()
    return theirs


# Of what layers of such names give. Not more, or sigmoids of the largest would be equal, and their order by chance.
SPREADS = {
    r"(cls_logits|cls_score|mask_fcn_logits|score_lowres|classification_head\.module_list\.\d)(\.1)?$": 1.5,
    r"bbox_(reg|ctrness)$": 1.0,
    r"(bbox_pred|regression_head\.module_list\.\d)(\.1)?$": 0.3,
}


@dataclass(slots=True)
class Spread:
    """Scales a layer's weights, so that no level of a pyramid gives outputs of more than a deviation."""

    deviation: float
    is_first: bool = True

    def __call__(self, layer: Any, inputs: object, output: Tensor) -> Tensor:
        factor = self.deviation / output.std()
        if not self.is_first:
            factor.clamp_(max=1)
        self.is_first = False
        layer.weight.mul_(factor)
        return output * factor


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Two pictures in one batch, as torchvision takes them and as streamd does."""

    theirs: list[Tensor]  # [3,h,w] in 0..1
    images: Tensor  # normalised, at the top left of zeros
    sizes: Tensor

    @classmethod
    def random(cls, theirs: Any, spec: ModelSpec) -> Pictures:
        pictures = random_pictures(theirs, seed=2)
        mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        images = torch.zeros(2, 3, *spec.input_size)
        for image, picture in zip(images, pictures, strict=True):
            image[:, : picture.shape[1], : picture.shape[2]] = (picture * 255 - mean) / std
        # Theirs are equal but for rounding, of which a network with random weights makes much.
        exact, _ = theirs.transform(pictures)
        torch.testing.assert_close(images, exact.tensors, rtol=1e-5, atol=1e-5)
        sizes = torch.tensor([picture.shape[1:] for picture in pictures], dtype=torch.float32)
        return cls(pictures, exact.tensors, sizes)


def suppress(output: dict[str, Tensor], spec: ModelSpec, i: int) -> dict[str, Tensor]:
    """Return what the daemon would keep of image i, in input pixels."""
    boxes, scores, labels = (output[name][i] for name in ("boxes", "scores", "labels"))
    rows = (scores >= spec.nms.score_threshold).nonzero()[:, 0]
    # Labels as torchvision counts them, since it moves boxes by them before it compares, and rounds.
    rows = rows[batched_nms(boxes[rows], scores[rows], labels[rows] + 1, spec.nms.iou_threshold)]
    rows = rows[: spec.nms.max_detections]
    return {"boxes": boxes[rows], "scores": scores[rows], "labels": labels[rows]}


def assert_same_detections(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare the detections, of which neighbours may swap where their scores are nearly equal."""
    assert len(found["scores"]) == len(expected["scores"]) > 5
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)
    distance = (found["boxes"][:, None] - expected["boxes"]).abs().amax(-1)
    distance[found["labels"][:, None] + 1 != expected["labels"]] = torch.inf
    nearest, twins = distance.min(1)
    assert nearest.max() < 1e-2
    assert distance.amin(0).max() < 1e-2
    assert (twins == torch.arange(len(twins))).float().mean() > 0.8


@dataclass(slots=True)
class Listener:
    """Keeps what a layer of torchvision's gave last."""

    heard: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self.heard = [output]


@pytest.mark.parametrize("name", TWO_STAGES)
@torch.inference_mode()
def test_networks_of_two_stages_find_what_torchvision_finds(name: str) -> None:
    theirs = random_network(name)
    network, spec = importer.convert(theirs, name)
    assert isinstance(network, Rcnn)
    network.eval()
    pictures = Pictures.random(theirs, spec)
    masks, keypoints = Listener(), Listener()
    if theirs.roi_heads.has_mask():
        theirs.roi_heads.mask_predictor.register_forward_hook(masks)
    if theirs.roi_heads.has_keypoint():
        theirs.roi_heads.keypoint_predictor.register_forward_hook(keypoints)
    expected = theirs(pictures.theirs)
    output = network(pictures.images, pictures.sizes)
    counts = [len(one["boxes"]) for one in expected]
    for i in range(2):
        found = suppress(output, spec, i)
        assert_same_detections(found, expected[i])
        features = [output[key][i : i + 1] for key in output if key.startswith("features.")]
        if masks.heard:
            of_all = masks.heard[0].split(counts)[i].sigmoid()
            wanted = of_all[torch.arange(counts[i]), expected[i]["labels"]]
            ours = network.masks(features, found["boxes"][None], found["labels"][None])
            torch.testing.assert_close(ours[0], wanted, rtol=0, atol=1e-3)
        if keypoints.heard:
            ours = network.keypoints(features, found["boxes"][None])
            torch.testing.assert_close(ours[0], keypoints.heard[0].split(counts)[i], rtol=1e-3, atol=1e-3)
    assert spec.methods == (("masks",) if masks.heard else ("keypoints",) if keypoints.heard else ())


@pytest.mark.parametrize("name", DENSE)
@torch.inference_mode()
def test_networks_of_one_stage_find_what_torchvision_finds(name: str) -> None:
    theirs = random_network(name)
    logits = theirs.head.classification_head.cls_logits
    logits.bias[:: NUM_CLASSES + 1] = -100  # class 0 is never trained, and is left out here
    network, spec = importer.convert(theirs, name)
    pictures = Pictures.random(theirs, spec)
    output = network.eval()(pictures.images, pictures.sizes)
    for i, expected in enumerate(theirs(pictures.theirs)):
        assert_same_detections(suppress(output, spec, i), expected)


@pytest.mark.parametrize("name", SSD)
@torch.inference_mode()
def test_ssd_finds_what_torchvision_finds(name: str) -> None:
    theirs = random_network(name)
    network, spec = importer.convert(theirs, name)
    pictures = Pictures.random(theirs, spec)
    assert not spec.sized
    output = network.eval()(pictures.images)
    for i, expected in enumerate(theirs(pictures.theirs)):
        assert_same_detections(suppress(output, spec, i), expected)


@torch.inference_mode()
def test_the_artifact_of_ssdlite_gives_what_the_network_gives(tmp_path: Path) -> None:
    theirs = random_network(SSD[0])
    network, spec = importer.convert(theirs, SSD[0])
    artifact.export(network, spec, tmp_path / "model.pt")
    module, _ = artifact.load(tmp_path / "model.pt")
    images = Pictures.random(theirs, spec).images
    torch.testing.assert_close(module(images), network.eval()(images), rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_a_mask_rcnn_of_another_depth_is_converted_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    theirs = liven(MaskRCNN(backbone, NUM_CLASSES + 1, min_size=SIZE[0], max_size=SIZE[1], rpn_post_nms_top_n_test=20))
    network, spec = importer.convert(theirs, "own")
    pictures = Pictures.random(theirs, spec)
    artifact.export(network, spec, tmp_path / "model.pt")
    module, _ = artifact.load(tmp_path / "model.pt")
    output = module(pictures.images, pictures.sizes)
    for i, expected in enumerate(theirs(pictures.theirs)):
        assert_same_detections(suppress(output, spec, i), expected)


def test_a_checkpoint_says_how_many_classes_it_has(tmp_path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    theirs = random_network(name)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    network, spec = importer.load(name, tmp_path / "own.pth", labels=("a", "b", "c", "d"))
    assert spec.labels == ("a", "b", "c", "d")
    assert len(spec.weights_sha256) == 64
    assert spec.metrics == {}
    assert not network.training
    expected = {key: value for key, value in theirs.state_dict().items()}
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_published_weights_bring_their_accuracy_and_their_epsilon(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = {key: x for key, x in random_network(name).state_dict().items() if "num_batches" not in key}
    torch.save(frozen, tmp_path / "own.pth")
    network, spec = importer.load(name, tmp_path / "own.pth")
    assert epsilons(network) == {1e-5}
    monkeypatch.setattr(importer, "_hash_prefix", lambda url: spec.weights_sha256[:8])
    network, spec = importer.load(name, tmp_path / "own.pth")
    assert epsilons(network) == {0.0}
    assert 30 < spec.metrics["coco_ap_published"] < 50


def epsilons(network: nn.Module) -> set[float]:
    return {layer.eps for layer in network.modules() if isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d))}


def test_frozen_norms_stay_frozen_and_keep_their_epsilon() -> None:
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 3)
    norms = [layer for layer in theirs.modules() if "FrozenBatchNorm2d" in type(layer).__name__]
    for norm in norms:
        norm.eps = 0.25
    network, _ = importer.convert(theirs, "own")
    ours = [layer for layer in network.modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert len(ours) == len(norms) == 20
    assert {layer.eps for layer in ours} == {0.25}


def test_coco_names_stand_without_the_background() -> None:
    _, spec = importer.load("fasterrcnn_resnet50_fpn")
    assert len(spec.labels) == 90
    assert spec.labels[0] == "person"
    assert spec.input_size == (800, 1344)
    assert spec.nms.max_detections == 100
    assert spec.resize.kind == "shortest_edge"
    assert spec.mean[0] == pytest.approx(123.675)
    assert spec.colour == "rgb"


def test_a_keypoint_network_names_its_keypoints() -> None:
    _, spec = importer.load("keypointrcnn_resnet50_fpn")
    assert spec.labels == ("person",)
    assert spec.task == "keypoints"
    assert spec.keypoints is not None
    assert len(spec.keypoints.names) == 17


def test_ssd_stretches_its_pictures() -> None:
    _, spec = importer.load("ssdlite320_mobilenet_v3_large")
    assert spec.input_size == (320, 320)
    placed = spec.letterbox(1280, 720)
    assert (placed.width, placed.height, placed.scale_x, placed.scale_y) == (320, 320, 0.25, 320 / 720)


def test_deeplab_is_imported_by_its_name_too(tmp_path: Path) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    network, spec = importer.load(name, labels=("background", "road"))
    assert (spec.task, spec.labels) == ("semantic", ("background", "road"))
    torch.save(network.state_dict(), tmp_path / "own.pth")
    again, spec = importer.load(name, tmp_path / "own.pth")
    assert spec.labels == ("background", "class_1")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def test_an_unknown_network_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"'resnet50'.*maskrcnn_resnet50_fpn_v2"):
        importer.load("resnet50")


def test_missing_weights_are_refused_with_those_that_are_published() -> None:
    with pytest.raises(ModelError, match=r"no\.pth: no such file.*COCO_V1"):
        importer.load("fcos_resnet50_fpn", "no.pth")


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth: not a checkpoint of torchvision's fcos_\w+: it lacks head"):
        importer.load("fcos_resnet50_fpn", tmp_path / "other.pth")
    torch.save({"head.classification_head.cls_logits.bias": torch.zeros(5)}, tmp_path / "part.pth")
    with pytest.raises(
        ModelError,
        match=r"part\.pth: not a checkpoint .*: it lacks 3\d\d \(backbone\.body.*, backbone\.body\.layer1\.\* \(\d+\)",
    ):
        importer.load("fcos_resnet50_fpn", tmp_path / "part.pth")


def test_as_many_labels_as_classes_are_needed() -> None:
    with pytest.raises(ModelError, match="has 90 classes beside the background, so not 1 labels"):
        importer.load("ssdlite320_mobilenet_v3_large", labels=("a",))


def test_a_backbone_that_is_no_resnet_is_refused() -> None:
    theirs = FasterRCNN(mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True), 3)
    with pytest.raises(ModelError, match="its backbone is no ResNet"):
        importer.convert(theirs, "own")
