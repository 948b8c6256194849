"""Panoptic FPN and the semantic head: the arithmetic written out, and what is read from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.errors import ModelError
from streamd.gpu.panoptic import classify_pixels
from streamd.messages import Letterbox
from streamd.models import artifact, panoptic, parity, semantic
from streamd.models.importers import detectron2
from streamd.models.importers.config import Config
from streamd.models.importers.defaults import DEFAULTS
from streamd.models.layers import Backbone
from streamd.models.panoptic import PanopticFpn
from streamd.models.semantic import SemanticHead, SemanticHeadConfig


class FakePyramid(Backbone):
    """Give the maps that a test wants."""

    def __init__(self, num_channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        super().__init__()
        self.num_channels, self.strides = dict(num_channels), dict(strides)


def small_config() -> Config:
    """Return Detectron2's defaults made small, with a pyramid and heads."""
    config = copy.deepcopy(DEFAULTS)
    model = config["MODEL"]
    model["MASK_ON"] = True
    model["BACKBONE"]["NAME"] = "build_resnet_fpn_backbone"
    model["RESNETS"] |= {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "STEM_OUT_CHANNELS": 32, "NORM": "BN"}
    model["RESNETS"]["OUT_FEATURES"] = ["res2", "res3", "res4", "res5"]
    model["FPN"] |= {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 32}
    model["ANCHOR_GENERATOR"]["SIZES"] = [[16], [32], [64], [128], [256]]
    model["RPN"] |= {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "POST_NMS_TOPK_TEST": 20, "PRE_NMS_TOPK_TEST": 50}
    model["ROI_HEADS"] |= {"NAME": "StandardROIHeads", "NUM_CLASSES": 3, "IN_FEATURES": ["p2", "p3", "p4", "p5"]}
    model["ROI_BOX_HEAD"] |= {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 32, "POOLER_RESOLUTION": 3}
    model["ROI_MASK_HEAD"] |= {"NUM_CONV": 1, "CONV_DIM": 16, "POOLER_RESOLUTION": 4}
    model["SEM_SEG_HEAD"] |= {"NUM_CLASSES": 6, "CONVS_DIM": 32}
    config["INPUT"] |= {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96}
    return config


def test_the_semantic_head_convolves_doubles_and_adds_as_its_paper_says() -> None:
    pyramid = FakePyramid({"p2": 5, "p4": 7}, {"p2": 4, "p4": 16})
    config = SemanticHeadConfig(in_features=("p4", "p2"), num_classes=3, conv_dim=32, norm="GN")
    head = SemanticHead(pyramid, config).eval()
    weights = head.state_dict()
    assert [name for name in weights if name.endswith("norm.weight")] == [
        "p2.0.norm.weight",
        "p4.0.norm.weight",
        "p4.2.norm.weight",
    ]
    features = {"p2": torch.randn(2, 5, 16, 24), "p4": torch.randn(2, 7, 4, 6)}

    def convolve(x: Tensor, name: str) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.weight"], padding=1)
        return F.relu(F.group_norm(x, 32, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]))

    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    coarse = double(convolve(double(convolve(features["p4"], "p4.0")), "p4.2"))
    total = convolve(features["p2"], "p2.0") + coarse
    expected = F.conv2d(total, weights["predictor.weight"], weights["predictor.bias"])
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


def test_a_level_that_doublings_do_not_bring_to_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 12 cannot be doubled to the stride 4"):
        SemanticHead(FakePyramid({"p2": 5}, {"p2": 12}), SemanticHeadConfig(in_features=("p2",)))


def test_the_spec_holds_the_numbers_of_the_configuration() -> None:
    config = small_config()
    config["MODEL"]["PANOPTIC_FPN"]["COMBINE"] |= {"OVERLAP_THRESH": 0.4, "STUFF_AREA_LIMIT": 7}
    _, spec = panoptic.build(config)
    assert (spec.name, spec.task, spec.sized) == ("panoptic_fpn", "panoptic", True)
    assert spec.panoptic is not None
    assert (spec.panoptic.overlap_threshold, spec.panoptic.stuff_area_limit) == (0.4, 7)
    assert spec.semantic_labels == ("things", "stuff_1", "stuff_2", "stuff_3", "stuff_4", "stuff_5")


def test_stuff_has_its_names_where_the_data_set_is_cocos() -> None:
    names = panoptic.stuff_labels(["coco_2017_train_panoptic_separated"], 54)
    assert (names[0], names[1], names[46], len(set(names))) == ("things", "banner", "grass-merged", 54)
    assert panoptic.stuff_labels(["mine"], 54)[1] == "stuff_1"


def test_a_panoptic_network_without_masks_or_with_another_head_is_refused() -> None:
    config = small_config()
    config["MODEL"]["MASK_ON"] = False
    with pytest.raises(ModelError, match="MASK_ON is false"):
        panoptic.build(config)
    config = small_config()
    config["MODEL"]["SEM_SEG_HEAD"]["NAME"] = "PointRendSemSegHead"
    with pytest.raises(ModelError, match="'PointRendSemSegHead'; streamd builds SemSegFPNHead"):
        panoptic.build(config)


@pytest.mark.parametrize("build", [panoptic.build, semantic.build])
def test_the_artifact_of_a_small_network_is_written(build: Any, tmp_path: Path) -> None:
    network, spec = build(small_config())  # export compares network and artifact at two batch sizes
    artifact.export(network, spec, tmp_path / "model.pt")
    module, read = artifact.load(tmp_path / "model.pt", optimized=True)
    assert read == spec
    inputs = (torch.randn(5, 3, *spec.input_size), torch.full((5, 2), 64.0))[: 1 + spec.sized]
    with torch.inference_mode():
        logits = module(*inputs)["semantic"]
        single = [module(*(x[i : i + 1] for x in inputs))["semantic"] for i in range(5)]
    assert logits.shape == (5, 6, spec.input_size[0] // 4, spec.input_size[1] // 4)
    torch.testing.assert_close(logits, torch.cat(single), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_each_pixel_gets_the_class_that_detectron2_gives_it(shared: Path) -> None:
    folder = shared / "parity/panoptic_fpn_R_50"
    network, spec = detectron2.load(folder / "config.yaml", folder / "model_final.pkl")
    assert isinstance(network, PanopticFpn)
    with np.load(folder / "io.npz") as file:
        arrays = dict(file)
    pictures = [torch.from_numpy(arrays[f"resized{i}"]).float() for i in range(2)]
    height, width = parity.common_size([arrays[f"resized{i}"] for i in range(2)], spec.size_multiple)
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    images = [F.pad((x - mean) / std, (0, width - x.shape[2], 0, height - x.shape[1])) for x in pictures]
    logits = network.sem_seg_head(network.backbone(torch.stack(images)))
    for i, picture in enumerate(pictures):
        place = Letterbox(scale_x=1, scale_y=1, left=0, top=0, width=picture.shape[2], height=picture.shape[1])
        expected = arrays[f"out{i}_sem_seg"]
        classes = classify_pixels(logits[i], place, expected.shape[1], expected.shape[0], (height, width))
        assert (classes.numpy() == expected).mean() > 0.999
