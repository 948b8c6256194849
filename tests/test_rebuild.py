"""Tests of models/rebuild.py: a network that is built again computes what it did, and keeps what it knows by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import artifact, rebuild
from streamd.models.importers import detectron2
from streamd.models.importers import torchvision as importer
from streamd.models.rebuild import Names
from streamd.models.spec import Blueprint, ModelSpec
from streamd.models.weights import yolox_spec
from streamd.models.yolox import yolox_nano

FAMILIES = [
    "cascade_mask_rcnn_R_50_FPN",
    "faster_rcnn_R_50_FPN",
    "keypoint_rcnn_R_50_FPN",
    "mask_rcnn_R_50_FPN",
    "panoptic_fpn_R_50",
    "retinanet_R_50_FPN",
    "vitdet",
]


@pytest.fixture
def imported(shared: Path) -> Callable[[str], tuple[nn.Module, ModelSpec]]:
    def load(family: str) -> tuple[nn.Module, ModelSpec]:
        folder = shared / "parity" / family
        config = next(path for path in (folder / "config.yaml", folder / "arch.json") if path.exists())
        return detectron2.load(config, folder / "model_final.pkl")

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_network_of_detectron2_is_built_again_from_its_spec(
    imported: Callable[[str], tuple[nn.Module, ModelSpec]], family: str
) -> None:
    network, spec = imported(family)
    assert spec.blueprint is not None
    again, _ = rebuild.build(spec.blueprint, network.state_dict())
    again.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, *(spec.input_size if family == "vitdet" else (128, 160)))
    sizes = torch.tensor([[float(side) for side in images.shape[-2:]]])
    with torch.no_grad():
        expected, got = (one.eval()(images, sizes) if spec.sized else one.eval()(images) for one in (network, again))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_that_both_know_keep_their_rows(
    imported: Callable[[str], tuple[nn.Module, ModelSpec]], family: str
) -> None:
    network, spec = imported(family)
    assert spec.blueprint is not None
    known = spec.labels[-1]
    old, new = Names.of(spec), Names(("unheard of", known), Names.of(spec).keypoints, Names.of(spec).stuff)
    state = network.state_dict()
    changed, built = rebuild.build(rebuild.rename(spec.blueprint, new), rebuild.shapes_for(state, old, new))
    fresh = changed.state_dict()
    carried = rebuild.carry_over(state, old, new, fresh)
    changed.load_state_dict(carried)
    assert len(built.labels) == 2
    assert rebuild.rename_spec(spec, new).labels == ("unheard of", known)
    others = [name for name in state if state[name].shape == fresh[name].shape]
    assert all(torch.equal(carried[name], state[name]) for name in others)
    rows = [name for name in state if state[name].shape != fresh[name].shape]
    assert rows, "no parameter has rows for each class"
    for name in rows:
        before, after = _rows(name, state[name], len(spec.labels)), _rows(name, carried[name], 2)
        torch.testing.assert_close(after[:, 1], before[:, len(spec.labels) - 1], rtol=0, atol=0)
        torch.testing.assert_close(after[:, 0], _rows(name, fresh[name], 2)[:, 0], rtol=0, atol=0)
        if after.shape[1] > 2:  # the background
            torch.testing.assert_close(after[:, -1], before[:, -1], rtol=0, atol=0)


def _rows(name: str, tensor: Tensor, num_classes: int) -> Tensor:
    """View a parameter as [anchors, classes (and the background), ...], by another way than the code's."""
    if "bbox_pred" in name:
        return tensor.unflatten(0, (num_classes, 4))[None]
    if name.startswith("head.cls_score"):
        return tensor.unflatten(0, (-1, num_classes))
    return tensor[None]


def test_keypoints_that_both_know_keep_their_maps(imported: Callable[[str], tuple[nn.Module, ModelSpec]]) -> None:
    network, spec = imported("keypoint_rcnn_R_50_FPN")
    assert spec.blueprint is not None
    old = Names.of(spec)
    new = Names(spec.labels, ("tail", old.keypoints[3]))
    changed, built = rebuild.build(rebuild.rename(spec.blueprint, new))
    assert built.keypoints is not None and len(built.keypoints.names) == 2
    fresh = changed.state_dict()
    carried = rebuild.carry_over(network.state_dict(), old, new, fresh)
    name = "roi_heads.keypoint_head.score_lowres.weight"
    assert torch.equal(carried[name][:, 1], network.state_dict()[name][:, 3])
    assert torch.equal(carried[name][:, 0], fresh[name][:, 0])


def test_yolox_artifact_gives_its_network_back(tmp_path: Path) -> None:
    network = yolox_nano(num_classes=3, num_prototypes=4, input_size=(64, 96)).eval()
    path = tmp_path / "nano.pt"
    artifact.export(network, yolox_spec("yolox_nano", network, ("a", "b", "c")), path)
    spec = artifact.read_spec(path)
    assert spec.blueprint is not None
    again, built = rebuild.build(spec.blueprint)
    state = artifact.read_state(path)
    again.load_state_dict({name: state[name] for name in again.state_dict()})
    assert built.input_size == (64, 96)
    images = 255 * torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, got = network(images), again.eval()(images)
    assert set(got) == {"boxes", "scores", "prototypes", "coefficients"}
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_network_of_torchvision_is_built_again_for_other_classes(name: str) -> None:
    network, spec = importer.load(name)
    assert spec.blueprint is not None
    again, _ = rebuild.build(spec.blueprint)
    again.load_state_dict(network.state_dict())
    _, built = rebuild.build(rebuild.rename(spec.blueprint, Names(("a", "b"))))
    assert len(built.labels) == 2


def test_epsilon_that_torchvision_left_out_stays_left_out() -> None:
    numbers = {"num_classes": 2, "norm_eps": 0.0}
    network, _ = rebuild.build(Blueprint(kind="torchvision", variant="retinanet_resnet50_fpn", numbers=numbers))
    assert {module.eps for module in network.modules() if hasattr(module, "running_mean")} == {0.0}


@pytest.mark.parametrize(
    "blueprint",
    [
        Blueprint(kind="yolox", variant="yolox_nano", numbers={}),
        Blueprint(kind="yolox", variant="yolox_giant", numbers={"input_size": [64, 64]}),
        Blueprint(kind="detectron2", numbers={"MODEL": {}}),
        Blueprint(kind="vitdet", numbers={"depth": 1}),
        Blueprint(kind="torchvision", variant="no_such_net", numbers={"num_classes": 2}),
    ],
)
def test_foreign_blueprint_is_refused(blueprint: Blueprint) -> None:
    with pytest.raises(ModelError):
        rebuild.build(blueprint, {"x": torch.zeros(1)})
