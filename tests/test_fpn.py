"""Feature pyramids against torchvision's, with the same weights."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from streamd.models.fpn import ConvLevels, Fpn, MaxPoolLevel
from streamd.models.layers import Backbone

CHANNELS = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class FixedMaps(Backbone):
    """Give the same maps whatever the images are."""

    def __init__(self, size: tuple[int, int] = (64, 96), strides: dict[str, int] | None = None) -> None:
        super().__init__()
        self.num_channels, self.strides = CHANNELS, strides or STRIDES
        self.maps = {
            name: torch.randn(2, CHANNELS[name], size[0] // stride, size[1] // stride)
            for name, stride in self.strides.items()
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.maps


def torchvision_twin(fpn: Fpn, extra: ExtraFPNBlock | None) -> FeaturePyramidNetwork:
    """Build torchvision's pyramid with the weights of ours."""
    theirs = FeaturePyramidNetwork([CHANNELS[name] for name in fpn.in_features], 6, extra)
    for index, level in enumerate(fpn.levels):
        for block, ours in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
            conv = fpn.get_submodule(f"{ours}{level}")
            theirs.get_submodule(f"{block}.{index}.0").load_state_dict(conv.state_dict())
    if extra is not None and fpn.top_block is not None:
        extra.load_state_dict(fpn.top_block.state_dict())
    return theirs


@pytest.mark.parametrize(
    ("top_block", "extra", "names"),
    [
        (None, None, "p2 p3 p4 p5"),
        (MaxPoolLevel(), LastLevelMaxPool(), "p2 p3 p4 p5 p6"),
        (ConvLevels(32, 6, "res5"), LastLevelP6P7(32, 6), "p2 p3 p4 p5 p6 p7"),
        (ConvLevels(6, 6, "p5"), LastLevelP6P7(6, 6), "p2 p3 p4 p5 p6 p7"),
    ],
)
@torch.inference_mode()
def test_every_level_equals_that_of_torchvision(
    top_block: MaxPoolLevel | ConvLevels | None, extra: ExtraFPNBlock | None, names: str
) -> None:
    bottom_up = FixedMaps()
    fpn = Fpn(bottom_up, tuple(CHANNELS), 6, top_block=top_block)
    expected = torchvision_twin(fpn, extra)(OrderedDict(bottom_up.maps))
    levels = fpn(torch.empty(0))
    assert list(levels) == list(fpn.strides) == list(fpn.num_channels) == names.split()
    for ours, theirs in zip(levels.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [64 // stride for stride in list(fpn.strides.values())[:5]] == [x.shape[2] for x in levels.values()][:5]


@torch.inference_mode()
def test_a_pyramid_may_begin_at_any_stage() -> None:
    fpn = Fpn(FixedMaps(), ("res3", "res4", "res5"), 6, top_block=ConvLevels(32, 6))
    assert fpn.strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    assert fpn.size_divisor == 32
    assert list(fpn(torch.empty(0))) == ["p3", "p4", "p5", "p6", "p7"]


@torch.inference_mode()
def test_the_average_halves_what_the_sum_adds() -> None:
    maps = FixedMaps()
    summed, averaged = (Fpn(maps, ("res4", "res5"), 6, fuse=fuse) for fuse in ("sum", "avg"))
    averaged.load_state_dict(summed.state_dict())
    torch.testing.assert_close(averaged(torch.empty(0))["p5"], summed(torch.empty(0))["p5"])
    for bias in (summed.get_parameter("fpn_output4.bias"), averaged.get_parameter("fpn_output4.bias")):
        nn.init.zeros_(bias)
    torch.testing.assert_close(averaged(torch.empty(0))["p4"] * 2, summed(torch.empty(0))["p4"])


def test_a_normalisation_takes_the_place_of_the_bias() -> None:
    fpn = Fpn(FixedMaps(), ("res5",), 32, norm="GN")
    assert set(fpn.state_dict()) == {
        f"fpn_{kind}5.{name}" for kind in ("lateral", "output") for name in ("weight", "norm.weight", "norm.bias")
    }


def test_stages_of_one_stride_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strides of res4, res5 are \[16, 16\]"):
        Fpn(FixedMaps(strides=STRIDES | {"res5": 16}), ("res4", "res5"), 6)
