"""Backbones of Detectron2's configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from streamd.errors import ModelError
from streamd.models import backbones
from streamd.models.fpn import Fpn
from streamd.models.importers.config import Config
from streamd.models.importers.defaults import DEFAULTS

PYRAMID = {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 32}
OUT_FEATURES = {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]}


def config_of(name: str, resnets: dict[str, Any] | None = None, **others: dict[str, Any]) -> Config:
    """Complete the keys of MODEL with the defaults; widths are small."""
    config = copy.deepcopy(DEFAULTS)
    model = config["MODEL"]
    model["BACKBONE"]["NAME"] = name
    small = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8, "DEPTH": 50}
    model["RESNETS"] |= small | (resnets or {})
    for section, values in others.items():
        model[section] |= values
    return config


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Build and run a backbone; its own word on channels and strides must be true."""
    network = backbones.build(config).eval()
    with torch.inference_mode():
        maps = network(torch.zeros(1, 3, 64, 96))
    for name, x in maps.items():
        assert x.shape[1] == network.num_channels[name]
        assert x.shape[3] == -(-96 // network.strides[name])
    return {name: tuple(x.shape[1:]) for name, x in maps.items()}


def test_c4_gives_the_map_of_the_fourth_stage_alone() -> None:
    assert shapes_of(config_of("build_resnet_backbone")) == {"res4": (128, 4, 6)}


def test_dc5_gives_the_fifth_stage_at_the_stride_of_the_fourth() -> None:
    dilated = {"OUT_FEATURES": ["res5"], "RES5_DILATION": 2}
    assert shapes_of(config_of("build_resnet_backbone", dilated)) == {"res5": (256, 4, 6)}


def test_a_pyramid_adds_a_pooled_level() -> None:
    shapes = shapes_of(config_of("build_resnet_fpn_backbone", OUT_FEATURES, FPN=PYRAMID | {"NORM": "GN"}))
    assert shapes == {"p3": (32, 8, 12), "p4": (32, 4, 6), "p5": (32, 2, 3), "p6": (32, 1, 2)}


def test_retinanets_pyramid_adds_two_convolved_levels() -> None:
    network = backbones.build(config_of("build_retinanet_resnet_fpn_backbone", OUT_FEATURES, FPN=PYRAMID))
    assert isinstance(network, Fpn)
    assert network.strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    assert network.get_parameter("top_block.p6.weight").shape == (32, 256, 3, 3)


def test_a_regnet_has_a_pyramid_too() -> None:
    numbers = {"DEPTH": 8, "W_A": 8.0, "W_0": 8.0, "W_M": 2.0, "GROUP_WIDTH": 8}
    pyramid = {"IN_FEATURES": ["s1", "s2", "s3", "s4"], "OUT_CHANNELS": 16}
    shapes = shapes_of(config_of("build_regnet_fpn_backbone", REGNETS=numbers, FPN=pyramid))
    assert shapes == {"p2": (16, 16, 24), "p3": (16, 8, 12), "p4": (16, 4, 6), "p5": (16, 2, 3), "p6": (16, 1, 2)}


@pytest.mark.parametrize(
    "resnets",
    [
        {"DEPTH": 18, "WIDTH_PER_GROUP": 64},
        {"NUM_GROUPS": 4},
        {"NORM": "BN", "STRIDE_IN_1X1": False},
        {"NORM": "GN", "WIDTH_PER_GROUP": 32},
        {"DEFORM_ON_PER_STAGE": [False, True, True, True], "DEFORM_MODULATED": True, "DEFORM_NUM_GROUPS": 2},
    ],
)
def test_every_kind_of_resnet_is_built(resnets: dict[str, Any]) -> None:
    assert shapes_of(config_of("build_resnet_backbone", resnets)) == {"res4": (128, 4, 6)}


def test_a_backbone_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"'build_vovnet'; streamd builds build_resnet_backbone"):
        backbones.build(config_of("build_vovnet"))


def test_a_normalisation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'IN': no such normalisation"):
        backbones.build(config_of("build_resnet_backbone", {"NORM": "IN"}))
