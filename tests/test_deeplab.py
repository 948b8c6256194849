"""DeepLabV3 against torchvision's own module, and its independence of the padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import segmentation

from streamd.errors import ModelError
from streamd.models import artifact, deeplab
from streamd.models.deeplab import DeepLab
from streamd.models.importers.checkpoint import Checkpoint

SIZE = (96, 128)


@pytest.fixture(scope="module")
def torchvision_network() -> segmentation.DeepLabV3:
    """Give torchvision's smallest, with statistics of batch norm that are not the identity."""
    torch.manual_seed(0)
    network = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def weights(torchvision_network: segmentation.DeepLabV3) -> Checkpoint:
    return Checkpoint(Path("deeplab.pth"), "1234", torchvision_network.state_dict())


@pytest.fixture(scope="module")
def network(weights: Checkpoint) -> DeepLab:
    return deeplab.load("deeplabv3_mobilenet_v3_large", weights, "abcde")[0]


class NoBackbone(torch.nn.Module):
    """Take features for images: a backbone sees the padding at the picture's border, and is left out."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"out": features}


def sizes_of(images: Tensor) -> Tensor:
    return torch.tensor([images.shape[-2:]] * len(images)).float()


@torch.inference_mode()
def test_stretched_logits_equal_torchvisions_where_there_is_no_padding(
    network: DeepLab, torchvision_network: segmentation.DeepLabV3
) -> None:
    images = torch.randn(2, 3, *SIZE)
    logits = network(images, sizes_of(images))["semantic"]
    stretched = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(stretched, torchvision_network(images)["out"], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_cells_within_the_picture_do_not_depend_on_how_much_padding_there_is(network: DeepLab) -> None:
    head = DeepLab(segmentation.DeepLabV3(NoBackbone(), network.classifier)).eval()
    features = torch.randn(1, 960, 5, 6)
    padded = F.pad(features, (0, 3, 0, 4), value=7.0)
    sizes = torch.tensor([[5.0, 6.0]])
    whole, part = head(features, sizes)["semantic"], head(padded, sizes)["semantic"]
    # The head ends with a 3x3 convolution, which reaches one cell beyond the border.
    torch.testing.assert_close(part[..., :4, :5], whole[..., :4, :5], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_cell_that_the_picture_covers_in_part_is_inside() -> None:
    inside = deeplab._cells_inside(torch.zeros(2, 9, 4, 6), (64, 96), torch.tensor([[33.0, 64.0], [32.0, 65.0]]))
    assert inside.shape == (2, 1, 4, 6)
    assert [(int(row.sum(0).max()), int(row.sum(1).max())) for row in inside[:, 0]] == [(3, 4), (2, 5)]


def test_the_artifact_gives_what_the_network_gives(network: DeepLab, tmp_path: Path) -> None:
    _, spec = deeplab.build("deeplabv3_mobilenet_v3_large", "abcde", SIZE)
    artifact.export(network, spec, tmp_path / "deeplab.pt")
    module, read = artifact.load(tmp_path / "deeplab.pt", optimized=True)
    assert read.semantic_labels == tuple("abcde")
    images, sizes = torch.randn(5, 3, *SIZE), torch.tensor([[96.0, 128.0], [96, 50], [20, 128], [7, 5], [96, 100]])
    with torch.inference_mode():
        expected, got = network(images, sizes), module(images, sizes)
    torch.testing.assert_close(got["semantic"], expected["semantic"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", deeplab.VARIANTS)
def test_each_variant_has_the_published_number_of_parameters(variant: str) -> None:
    published = {
        "deeplabv3_mobilenet_v3_large": segmentation.DeepLabV3_MobileNet_V3_Large_Weights,
        "deeplabv3_resnet50": segmentation.DeepLabV3_ResNet50_Weights,
        "deeplabv3_resnet101": segmentation.DeepLabV3_ResNet101_Weights,
    }[variant].DEFAULT.meta["num_params"]
    with torch.device("meta"):
        network, spec = deeplab.build(variant)
        auxiliary = deeplab.VARIANTS[variant](weights=None, weights_backbone=None, aux_loss=True).aux_classifier
    num_auxiliary = sum(parameter.numel() for parameter in auxiliary.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) + num_auxiliary == published
    assert spec.labels[0] == "__background__" and len(spec.labels) == 21


def test_an_unknown_variant_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ModelError, match=r"deeplabv4: no such network; those of DeepLabV3 are .*deeplabv3_resnet50"):
        deeplab.build("deeplabv4")


def test_a_checkpoint_names_its_classes_and_another_one_is_refused(weights: Checkpoint) -> None:
    variant = "deeplabv3_mobilenet_v3_large"
    _, spec = deeplab.load(variant, weights)
    assert (spec.labels[:2], spec.weights_sha256) == (("background", "class_1"), "1234")
    with pytest.raises(ModelError, match=r"deeplab.pth: has 5 classes with the background, .* got 2"):
        deeplab.load(variant, weights, ["a", "b"])
    with pytest.raises(ModelError, match=r"x.pth: has no classifier.4.bias: not a checkpoint of torchvision's"):
        deeplab.load(variant, Checkpoint(Path("x.pth"), "", {}))
    with pytest.raises(ModelError, match=r"deeplab.pth: the parameters do not fit the network"):
        deeplab.load("deeplabv3_resnet50", weights)
