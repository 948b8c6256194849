"""The pyramid that is made of one map: its levels, and their names in checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.models.simple_pyramid import SimpleFeaturePyramid
from streamd.models.vit import Vit, VitConfig

CONFIG = VitConfig(input_size=(64, 128), trained_size=128, width=16, depth=1, num_heads=2, window_size=0)


def pyramid(norm: str = "LN") -> SimpleFeaturePyramid:
    network = SimpleFeaturePyramid(Vit(CONFIG), 8, norm=norm).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@torch.inference_mode()
def test_levels_have_twice_the_stride_of_the_one_before_and_the_names_say_it() -> None:
    network = pyramid()
    features = network(torch.randn(2, 3, 64, 128))
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    for name, x in features.items():
        stride = 2 ** int(name[1])
        assert network.strides[name] == stride
        assert x.shape == (2, network.num_channels[name], 64 // stride, 128 // stride)
    assert torch.equal(features["p6"], features["p5"][:, :, ::2, ::2])
    assert network.size_divisor == 32


@torch.inference_mode()
def test_the_finest_level_doubles_normalises_activates_doubles_and_projects() -> None:
    network = pyramid()
    images = torch.randn(1, 3, 64, 128)
    weights = {name.removeprefix("simfp_2."): tensor for name, tensor in network.state_dict().items()}
    x = F.conv_transpose2d(network.net(images), weights["0.weight"], weights["0.bias"], stride=2)
    x = F.gelu(layer_norm(x, weights, "1"))
    x = F.conv_transpose2d(x, weights["3.weight"], weights["3.bias"], stride=2)
    x = layer_norm(F.conv2d(x, weights["4.weight"]), weights, "4.norm")
    x = layer_norm(F.conv2d(x, weights["5.weight"], padding=1), weights, "5.norm")
    torch.testing.assert_close(network(images)["p2"], x, rtol=1e-4, atol=1e-4)


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def test_convolutions_have_a_bias_only_without_a_norm() -> None:
    assert "simfp_4.0.bias" not in pyramid("LN").state_dict()
    assert "simfp_4.0.norm.weight" not in pyramid("").state_dict()
    assert "simfp_4.0.bias" in pyramid("").state_dict()


def test_a_scale_that_there_is_no_path_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no level of scale 8"):
        SimpleFeaturePyramid(Vit(CONFIG), 8, scales=(8.0, 1.0))
