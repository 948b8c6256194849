"""Tests of streamd/train/networks.py: what a run begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from streamd.datasets.records import DataSet, Objects, Record
from streamd.errors import ConfigError, ModelError
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.weights import yolox_spec
from streamd.models.yolox import yolox_nano
from streamd.train import networks
from streamd.train.recipe import ModelRecipe

SIZE = (64, 64)


def data_set(labels: tuple[str, ...], keypoints: tuple[str, ...] = ()) -> DataSet:
    none = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    return DataSet("made up", labels, (Record(Path("a.jpg"), 1, 10, 10, none),), keypoint_names=keypoints)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = yolox_nano(num_classes=3, input_size=SIZE).eval()
    path = tmp_path_factory.mktemp("models") / "cats.pt"
    artifact.export(network, yolox_spec("yolox_nano", network, ("cat", "dog", "cow")), path)
    return path


def test_class_that_the_artifact_knows_keeps_what_it_learnt(detector: Path) -> None:
    start = networks.start(ModelRecipe(start=str(detector)), data_set(("horse", "dog")))
    state, old = start.network.state_dict(), artifact.read_state(detector)
    assert torch.equal(state["head.cls_preds.1.weight"][1], old["head.cls_preds.1.weight"][1])
    assert torch.equal(state["backbone.backbone.stem.conv.conv.weight"], old["backbone.backbone.stem.conv.conv.weight"])
    assert start.spec.labels == ("horse", "dog")
    assert start.fresh == ()


def test_mask_branch_makes_a_segmenter_of_a_detector(detector: Path, tmp_path: Path) -> None:
    recipe = ModelRecipe(start=str(detector), prototypes=8, input_size=(96, 64))
    start = networks.start(recipe, data_set(("cat",)))
    assert start.spec.task == "segment" and start.spec.input_size == (96, 64)
    assert start.fresh and all(name.startswith("masks.") for name in start.fresh)
    artifact.export(start.network, start.spec, tmp_path / "segmenter.pt")
    again = networks.start(ModelRecipe(start=str(tmp_path / "segmenter.pt")), data_set(("cat",)))
    assert again.fresh == () and again.spec.task == "segment"


def test_none_begins_with_random_weights(detector: Path) -> None:
    start = networks.start(ModelRecipe(start=str(detector), weights="none"), data_set(("cat", "dog", "cow")))
    assert start.num_carried == 0
    old = artifact.read_state(detector)["head.stems.0.conv.weight"]
    assert not torch.equal(start.network.state_dict()["head.stems.0.conv.weight"], old)


def test_network_of_torchvision_begins_from_its_name() -> None:
    start = networks.start(ModelRecipe(start="fcos_resnet50_fpn", input_size=(256, 320)), data_set(("cell", "dust")))
    assert start.spec.labels == ("cell", "dust") and start.num_carried == 0
    assert (start.spec.resize.min_size, start.spec.resize.max_size) == (256, 320)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": "other.pth"}, "brings its own"),
        ({"input_size": (70, 64)}, "multiples of 32"),
    ],
)
def test_options_that_do_not_fit_are_refused(detector: Path, options: dict[str, object], sentence: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=sentence):
        networks.start(ModelRecipe.model_validate({"start": str(detector), **options}), data_set(("cat",)))


def test_artifact_without_a_blueprint_says_what_to_do(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = images.flatten(1)[:, :4]
            return {"boxes": rows[:, None], "scores": rows[:, :1, None].sigmoid()}

    spec = ModelSpec(name="foreign", task="detect", labels=("thing",), input_size=(32, 32), colour="rgb")
    artifact.export(Foreign(), spec, tmp_path / "foreign.pt")
    with pytest.raises(ModelError, match="cannot be trained"):
        networks.start(ModelRecipe(start=str(tmp_path / "foreign.pt")), data_set(("thing",)))


@pytest.mark.parametrize("variance", [1.0, 1 - 1e-3])
def test_recalibrated_norms_change_nothing_but_their_statistics(variance: float) -> None:
    torch.manual_seed(0)
    network = yolox_nano(num_classes=2, input_size=SIZE).eval()
    for norm in networks.norms(network):
        nn.init.normal_(norm.bias)
        assert norm.running_var is not None
        nn.init.constant_(norm.running_var, variance)
    images = 255 * torch.rand(4, 3, *SIZE)
    with torch.no_grad():
        before = network(images)
    assert networks.recalibrate(network, network, [images[:2], images[2:]]) == len(networks.norms(network))
    with torch.no_grad():
        after = network(images)
        network.train()
        in_training = network(images)
    scale = before["boxes"].abs().max()
    torch.testing.assert_close(after["boxes"], before["boxes"], rtol=1e-3, atol=1e-4 * float(scale))
    torch.testing.assert_close(after["scores"], before["scores"], rtol=1e-3, atol=1e-5)
    # The batch's own statistics are those of the data, so that training begins where the network was.
    torch.testing.assert_close(in_training["scores"], before["scores"], rtol=0.05, atol=1e-3)


def test_norms_with_statistics_are_not_touched() -> None:
    norm = nn.BatchNorm2d(4)
    assert norm.running_mean is not None
    nn.init.constant_(norm.running_mean, 0.5)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    assert networks.recalibrate(network, network, [torch.rand(2, 3, 4, 4)]) == 0


def test_frozen_parts_get_no_gradient_and_keep_their_statistics() -> None:
    network = yolox_nano(num_classes=2, input_size=SIZE)
    recipe = ModelRecipe(start="yolox_nano", freeze=["backbone.backbone.stem"])
    stem = network.backbone.backbone.stem
    assert networks.freeze(network, recipe) == [stem.conv.bn]
    assert not any(parameter.requires_grad for parameter in stem.parameters())
    assert all(parameter.requires_grad for parameter in network.head.parameters())


def test_norms_that_are_new_are_trained_where_the_others_are_frozen() -> None:
    network = yolox_nano(num_classes=2, num_prototypes=4, input_size=SIZE)
    fresh = [name for name in network.state_dict() if name.startswith("masks.")]
    frozen = networks.freeze(network, ModelRecipe(start="yolox_nano", norms="freeze"), fresh)
    assert network.masks is not None
    assert len(frozen) == len(networks.norms(network)) - len(networks.norms(network.masks))
    assert all(parameter.requires_grad for parameter in network.masks.parameters())
    assert not any(parameter.requires_grad for norm in frozen for parameter in norm.parameters())


def test_unknown_name_to_freeze_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'backbon\.x'.*backbone, head"):
        networks.freeze(yolox_nano(input_size=SIZE), ModelRecipe(start="x", freeze=["backbon.x"]))
