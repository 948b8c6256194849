"""The backbone that a configuration of Detectron2 names."""

from __future__ import annotations

from streamd.errors import ModelError
from streamd.models.fpn import ConvLevels, Fpn, MaxPoolLevel
from streamd.models.importers.config import Config
from streamd.models.layers import Backbone
from streamd.models.regnet import Regnet, RegnetConfig
from streamd.models.resnet import Resnet, ResnetConfig


def build(config: Config) -> Backbone:
    """Build MODEL.BACKBONE with its pyramid, untrained.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    name = config["MODEL"]["BACKBONE"]["NAME"]
    match name:
        case "build_resnet_backbone":
            return Resnet(resnet_config(config))
        case "build_resnet_fpn_backbone":
            return _pyramid(config, Resnet(resnet_config(config)), MaxPoolLevel())
        case "build_retinanet_resnet_fpn_backbone":
            bottom_up = Resnet(resnet_config(config))
            levels = ConvLevels(bottom_up.num_channels["res5"], config["MODEL"]["FPN"]["OUT_CHANNELS"])
            return _pyramid(config, bottom_up, levels)
        case "build_regnet_fpn_backbone":
            return _pyramid(config, Regnet(regnet_config(config)), MaxPoolLevel())
    raise ModelError(
        f"MODEL.BACKBONE.NAME is {name!r}; streamd builds build_resnet_backbone, build_resnet_fpn_backbone, "
        "build_retinanet_resnet_fpn_backbone and build_regnet_fpn_backbone"
    )


def resnet_config(config: Config) -> ResnetConfig:
    """Read MODEL.RESNETS."""
    given = config["MODEL"]["RESNETS"]
    return ResnetConfig(
        depth=given["DEPTH"],
        num_stem_channels=given["STEM_OUT_CHANNELS"],
        num_res2_channels=given["RES2_OUT_CHANNELS"],
        num_groups=given["NUM_GROUPS"],
        width_per_group=given["WIDTH_PER_GROUP"],
        stride_in_1x1=given["STRIDE_IN_1X1"],
        norm=given["NORM"],
        res5_dilation=given["RES5_DILATION"],
        deform_on_per_stage=tuple(given["DEFORM_ON_PER_STAGE"]),
        deform_modulated=given["DEFORM_MODULATED"],
        num_deform_groups=given["DEFORM_NUM_GROUPS"],
        out_features=tuple(given["OUT_FEATURES"]),
    )


def regnet_config(config: Config) -> RegnetConfig:
    """Read MODEL.REGNETS."""
    given = config["MODEL"]["REGNETS"]
    return RegnetConfig(
        depth=given["DEPTH"],
        slope=given["W_A"],
        first_width=given["W_0"],
        width_ratio=given["W_M"],
        group_width=given["GROUP_WIDTH"],
        se_ratio=given["SE_RATIO"],
        num_stem_channels=given["STEM_WIDTH"],
        norm=given["NORM"],
        out_features=tuple(given["OUT_FEATURES"]),
    )


def _pyramid(config: Config, bottom_up: Backbone, top_block: MaxPoolLevel | ConvLevels) -> Fpn:
    given = config["MODEL"]["FPN"]
    return Fpn(
        bottom_up,
        given["IN_FEATURES"],
        given["OUT_CHANNELS"],
        norm=given["NORM"],
        fuse=given["FUSE_TYPE"],
        top_block=top_block,
    )
