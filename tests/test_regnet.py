"""RegNets against torchvision's, with the same weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from streamd.models.regnet import STAGES, Regnet, RegnetConfig, regnetx_4gf, regnety_4gf
from tests.test_resnet import randomise_norms

Y_400MF = RegnetConfig(depth=16, slope=27.89, first_width=48, width_ratio=2.09, group_width=8, se_ratio=0.25, norm="BN")
RENAMES = (
    ("stem.0.", "stem.conv."),
    ("stem.1.", "stem.norm."),
    ("proj.0.", "proj."),
    ("proj.1.", "proj_norm."),
    *((f"f.{name}.0.", f"f.{name}.") for name in "abc"),
    *((f"f.{name}.1.", f"f.{name}_norm.") for name in "abc"),
    ("f.se.fc1.", "f.se.f_ex.0."),
    ("f.se.fc2.", "f.se.f_ex.2."),
)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call torchvision's parameters as Detectron2 does; the classifier is left out."""
    ours = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "trunk_output":  # trunk_output.block2.block2-0.f.a.0.weight
            parts[:3] = [f"s{parts[1][5:]}", f"b{int(parts[2].split('-')[1]) + 1}"]
        name = ".".join(parts)
        for old, new in RENAMES:
            name = name.replace(old, new)
        if parts[0] != "fc":
            ours[name] = value
    return ours


@torch.inference_mode()
def test_every_map_equals_that_of_torchvision() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.regnet_y_400mf(weights=None).eval()
    randomise_norms(theirs)
    ours = Regnet(Y_400MF).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    maps = ours(images)
    x = theirs.stem(images)
    for index, name in enumerate(STAGES):
        x = theirs.trunk_output.get_submodule(f"block{index + 1}")(x)
        torch.testing.assert_close(maps[name], x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
        assert ours.num_channels[name] == x.shape[1]
        assert ours.strides[name] * x.shape[-1] == 96


@pytest.mark.parametrize(
    ("network", "millions", "widths", "depths"),
    [  # table 7 of the paper and its model zoo
        (regnetx_4gf, 22.1, (80, 240, 560, 1360), (2, 5, 14, 2)),
        (regnety_4gf, 20.6, (128, 192, 512, 1088), (2, 6, 12, 2)),
    ],
)
def test_the_variants_have_the_published_widths_depths_and_parameters(
    network: type[Regnet], millions: float, widths: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        built = network("BN")  # type: ignore[arg-type]
    assert tuple(built.num_channels.values()) == widths
    assert tuple(len(list(built.get_submodule(name).children())) for name in STAGES) == depths
    classifier = widths[-1] * 1000 + 1000
    assert (sum(p.numel() for p in built.parameters()) + classifier) / 1e6 == pytest.approx(millions, abs=0.1)


def test_stages_above_the_last_output_are_left_out() -> None:
    network = regnety_4gf(out_features=("s2", "s3"))
    assert network.strides == {"s2": 8, "s3": 16}
    assert not any(name.startswith("s4") for name in network.state_dict())


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_every_parameter_gets_a_gradient(norm: str) -> None:
    network: nn.Module = Regnet(RegnetConfig(8, 8.0, 8, 2.0, 8, se_ratio=0.25, norm=norm))
    sum(x.sum() for x in network.train()(torch.rand(2, 3, 64, 64)).values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_numbers_that_do_not_make_four_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="1 stages instead of 4"):
        RegnetConfig(depth=4, slope=0.0, first_width=48, width_ratio=2.0, group_width=8)
