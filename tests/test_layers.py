"""Convolutions with their normalisation and activation."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from streamd.models.layers import ConvNorm, FrozenBatchNorm2d, GroupNorm, LayerNorm2d, make_norm, static_size


@torch.inference_mode()
def test_a_layer_convolves_then_normalises_then_activates() -> None:
    layer = ConvNorm(4, 32, 3, stride=2, groups=2, norm="GN", relu=True)
    x = torch.randn(2, 4, 8, 6)
    convolved = nn.functional.conv2d(x, layer.weight, None, 2, 1, 1, 2)
    expected = nn.functional.group_norm(convolved, 32).relu()
    torch.testing.assert_close(layer(x), expected)


def test_the_padding_keeps_the_size_for_every_kernel_and_dilation() -> None:
    for kernel in (1, 3, 5):
        for dilation in (1, 2):
            assert ConvNorm(2, 2, kernel, dilation=dilation)(torch.zeros(1, 2, 9, 7)).shape == (1, 2, 9, 7)


def test_there_is_a_bias_where_no_normalisation_follows_unless_it_is_said() -> None:
    assert ConvNorm(2, 2, 1).bias is not None
    assert ConvNorm(2, 2, 1, norm="BN").bias is None
    assert ConvNorm(2, 2, 1, bias=False).bias is None
    assert ConvNorm(2, 2, 1, norm="BN", bias=True).bias is not None


@torch.inference_mode()
def test_a_frozen_batch_norm_equals_torchvisions_and_that_of_inference() -> None:
    ours, theirs, batch_norm = FrozenBatchNorm2d(5), torchvision.ops.FrozenBatchNorm2d(5), nn.BatchNorm2d(5).eval()
    for tensor in ours.state_dict().values():
        nn.init.uniform_(tensor, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    batch_norm.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ours.train()(x), theirs(x))
    torch.testing.assert_close(ours(x), batch_norm(x))
    assert list(ours.parameters()) == []


@torch.inference_mode()
def test_layer_norm_is_over_the_channels_of_each_position() -> None:
    norm = LayerNorm2d(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_detectron2s_names_give_its_normalisations() -> None:
    kinds = {
        "FrozenBN": FrozenBatchNorm2d,
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.BatchNorm2d,
        "naiveSyncBN": nn.BatchNorm2d,
    }
    for name, kind in {**kinds, "GN": GroupNorm, "LN": LayerNorm2d}.items():
        assert type(make_norm(name, 64)) is kind
    assert make_norm("", 64) is None
    with pytest.raises(ValueError, match="'IN': no such normalisation"):
        make_norm("IN", 64)


def test_sizes_are_plain_numbers() -> None:
    height, width = static_size(torch.zeros(1, 2, 3, 4))
    assert (type(height), type(width), height, width) == (int, int, 3, 4)
