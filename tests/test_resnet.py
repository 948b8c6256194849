"""ResNets against torchvision's, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from streamd.models.resnet import STAGES, BlockConfig, Bottleneck, DeformableConv, Resnet, ResnetConfig

RENAMES = (
    ("layer1.", "res2."),
    ("layer2.", "res3."),
    ("layer3.", "res4."),
    ("layer4.", "res5."),
    ("downsample.0.", "shortcut."),
    ("downsample.1.", "shortcut.norm."),
    ("bn1.", "conv1.norm."),
    ("bn2.", "conv2.norm."),
    ("bn3.", "conv3.norm."),
)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call torchvision's parameters as Detectron2 does; the classifier is left out."""
    ours = {}
    for name, value in state.items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        if not name.startswith("fc."):
            ours[name if name.startswith("res") else f"stem.{name}"] = value
    return ours


def randomise_norms(network: nn.Module) -> None:
    """Give batch norms statistics that would show if they were mixed up."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.uniform_(tensor, -0.5, 0.5)


def maps_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the maps of torchvision's classifier before it averages them."""
    x = network.get_submodule("relu")(network.get_submodule("bn1")(network.get_submodule("conv1")(images)))
    maps = {"stem": network.get_submodule("maxpool")(x)}
    for stage, name in zip(("stem", *STAGES), STAGES, strict=False):
        maps[name] = network.get_submodule(f"layer{STAGES.index(name) + 1}")(maps[stage])
    return maps


@pytest.mark.parametrize(
    ("theirs", "config"),
    [
        (torchvision.models.resnet18, ResnetConfig(depth=18, num_res2_channels=64, norm="BN")),
        (torchvision.models.resnet50, ResnetConfig(depth=50)),
        (torchvision.models.resnext50_32x4d, ResnetConfig(depth=50, num_groups=32, width_per_group=4)),
    ],
)
@torch.inference_mode()
def test_every_map_equals_that_of_torchvision(theirs: Callable[..., nn.Module], config: ResnetConfig) -> None:
    torch.manual_seed(0)
    reference = theirs(weights=None).eval()
    randomise_norms(reference)
    state = renamed(reference.state_dict())
    if config.norm == "FrozenBN":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    network = Resnet(replace(config, out_features=("stem", *STAGES))).eval()
    network.load_state_dict(state)
    images = torch.randn(1, 3, 64, 32)
    maps = network(images)
    assert list(maps) == ["stem", *STAGES]
    for name, expected in maps_of(reference, images).items():
        torch.testing.assert_close(maps[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert maps[name].shape[1] == network.num_channels[name]
        assert maps[name].shape[-1] * network.strides[name] == images.shape[-1]


def strides_of(network: Resnet) -> list[tuple[int, int]]:
    """Return the strides of the 1x1 and the 3x3 convolution of each stage's first block."""
    blocks = [network.get_submodule(f"{name}.0") for name in network.stages]
    return [(conv_of(block, "conv1").stride[0], conv_of(block, "conv2").stride[0]) for block in blocks]


def conv_of(block: nn.Module, name: str) -> nn.Conv2d:
    conv = block.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def test_the_stride_is_in_the_1x1_convolution_for_msra_and_in_the_3x3_for_others() -> None:
    assert strides_of(Resnet(ResnetConfig(stride_in_1x1=True))) == [(1, 1), (2, 1), (2, 1), (2, 1)]
    assert strides_of(Resnet(ResnetConfig(stride_in_1x1=False))) == [(1, 1), (1, 2), (1, 2), (1, 2)]


@torch.inference_mode()
def test_a_dilated_last_stage_keeps_the_stride_of_the_one_before_and_dilates_each_block() -> None:
    network = Resnet(ResnetConfig(res5_dilation=2, num_res2_channels=32, num_stem_channels=8, width_per_group=8)).eval()
    assert network.strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 16}
    assert network(torch.rand(1, 3, 64, 96))["res5"].shape == (1, 256, 4, 6)
    convs = [conv_of(block, "conv2") for block in network.get_submodule("res5").children()]
    assert [(conv.dilation, conv.padding) for conv in convs] == [((2, 2), (2, 2))] * 3


def test_stages_above_the_last_output_are_left_out() -> None:
    network = Resnet(ResnetConfig(out_features=("res4",)))
    assert not any(name.startswith("res5") for name in network.state_dict())
    assert network.num_channels == {"res4": 1024}


@pytest.mark.parametrize("modulated", [False, True])
@torch.inference_mode()
def test_a_deformable_block_without_offsets_convolves_as_a_plain_one(modulated: bool) -> None:
    plain = Bottleneck(8, 4, 8, 1, BlockConfig(norm=""))
    deformable = Bottleneck(
        8, 4, 8, 1, BlockConfig(norm="", deformable=True, deform_modulated=modulated, num_deform_groups=2)
    )
    assert deformable.conv2_offset is not None
    own = deformable.conv2_offset.named_parameters(prefix="conv2_offset")
    deformable.load_state_dict(plain.state_dict() | dict(own))
    if modulated:
        deformable.conv2.weight.mul_(2)  # each sample weighs sigmoid(0)
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(deformable(x), plain(x))


@torch.inference_mode()
def test_offsets_are_y_before_x_in_cells() -> None:
    config = BlockConfig(norm="", deformable=True)
    moved, still = (Bottleneck(8, 4, 8, 1, config) for _ in range(2))
    still.load_state_dict(moved.state_dict())
    assert moved.conv2_offset is not None and moved.conv2_offset.bias is not None
    moved.conv2_offset.bias[0::2] = 1  # y of each of the nine samples
    x = torch.randn(1, 8, 6, 7)
    below = torch.cat((x[:, :, 1:], torch.zeros(1, 8, 1, 7)), dim=2)
    ours, expected = moved._spatial(x[:, :4]), still._spatial(below[:, :4])
    # Not the first row: `below` has padding above it, `x` a row.
    torch.testing.assert_close(ours[:, :, 1:], expected[:, :, 1:])


@torch.inference_mode()
def test_a_deformable_convolution_equals_torchvisions() -> None:
    config = BlockConfig(norm="", num_groups=2, dilation=2, deformable=True, deform_modulated=True, num_deform_groups=2)
    block = Bottleneck(8, 4, 8, 2, config)
    assert isinstance(block.conv2, DeformableConv)
    x, offsets, weights = torch.randn(2, 4, 6, 8), torch.randn(2, 36, 3, 4), torch.rand(2, 18, 3, 4)
    expected = deform_conv2d(x, offsets, block.conv2.weight, None, 2, 2, 2, weights).relu()
    torch.testing.assert_close(block.conv2(x, offsets, weights), expected)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_every_parameter_gets_a_gradient(norm: str) -> None:
    config = ResnetConfig(norm=norm, num_stem_channels=32, num_res2_channels=64, width_per_group=32)
    network = Resnet(replace(config, deform_on_per_stage=(False, False, True, True), deform_modulated=True))
    sum(x.sum() for x in network.train()(torch.rand(2, 3, 32, 32)).values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 51}, "depth 51"),
        ({"out_features": ("res6",)}, "no output res6"),
        ({"depth": 18, "res5_dilation": 2}, "depth 18 has no groups"),
    ],
)
def test_numbers_that_make_no_network_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResnetConfig(**config)  # type: ignore[arg-type]
