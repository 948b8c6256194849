"""Whole models of Detectron2: configuration and weights together."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from streamd.errors import ModelError
from streamd.models import coco
from streamd.models.importers import detectron2
from streamd.models.retinanet import Retinanet

SMALL = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16}
  RETINANET: {NUM_CLASSES: 3, NUM_CONVS: 1}
"""


def small_model(folder: Path, config: str = SMALL) -> tuple[Path, Path]:
    """Write the configuration and random weights of a small network."""
    config_path, weights_path = folder / "config.yaml", folder / "model_final.pkl"
    config_path.write_text(config)
    state = detectron2.build(config_path)[0].state_dict()
    weights_path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}))
    return config_path, weights_path


@pytest.mark.parametrize(
    ("folder", "name", "task"),
    [
        ("cascade_mask_rcnn_R_50_FPN", "cascade_mask_rcnn", "segment"),
        ("faster_rcnn_R_50_FPN", "faster_rcnn", "detect"),
        ("keypoint_rcnn_R_50_FPN", "keypoint_rcnn", "keypoints"),
        ("mask_rcnn_R_50_FPN", "mask_rcnn", "segment"),
        ("panoptic_fpn_R_50", "panoptic_fpn", "panoptic"),
        ("retinanet_R_50_FPN", "retinanet", "detect"),
    ],
)
def test_every_family_is_built_with_all_of_its_weights(shared: Path, folder: str, name: str, task: str) -> None:
    weights = shared / "parity" / folder / "model_final.pkl"
    network, spec = detectron2.load(weights.with_name("config.yaml"), weights)
    assert (spec.name, spec.task, spec.colour, spec.mean) == (name, task, "bgr", (103.53, 116.28, 123.675))
    assert spec.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not network.training
    given = pickle.loads(weights.read_bytes())["model"]
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in given.items()
    }
    for key, value in network.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), given[key])


def test_a_vitdet_is_built_from_its_json_file(shared: Path) -> None:
    folder = shared / "parity" / "vitdet"
    network, spec = detectron2.load(folder / "arch.json", folder / "model_final.pkl")
    assert (spec.task, spec.colour, spec.input_size) == ("segment", "rgb", (256, 256))
    assert "backbone.net.blocks.3.attn.qkv.weight" in network.state_dict()


def test_numbers_come_from_the_configuration(tmp_path: Path) -> None:
    text = yaml.safe_load(SMALL)
    text["MODEL"]["RETINANET"] |= {"TOPK_CANDIDATES_TEST": 7, "SCORE_THRESH_TEST": 0.2, "NMS_THRESH_TEST": 0.6}
    text["MODEL"]["ANCHOR_GENERATOR"] = {"SIZES": [[16.0]], "ASPECT_RATIOS": [[1.0]]}
    text |= {"TEST": {"DETECTIONS_PER_IMAGE": 9}, "INPUT": {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 90}}
    network, spec = detectron2.load(*small_model(tmp_path, yaml.safe_dump(text)))
    assert isinstance(network, Retinanet)
    assert (network.config.num_candidates, network.config.num_classes) == (7, 3)
    assert network.config.anchors.num_anchors == (1,) * 5
    assert spec.nms.score_threshold == pytest.approx(0.2) and spec.nms.score_threshold > np.float32(0.2)
    assert (spec.nms.iou_threshold, spec.nms.max_detections, spec.input_size) == (0.6, 9, (64, 96))
    assert spec.labels == ("class_0", "class_1", "class_2")


def test_a_pth_gives_the_same_network_as_a_pkl(tmp_path: Path) -> None:
    config, weights = small_model(tmp_path)
    state = detectron2.load(config, weights)[0].state_dict()
    torch.save({"model": state, "iteration": 3}, tmp_path / "model_final.pth")
    copy = detectron2.load(config, tmp_path / "model_final.pth")[0].state_dict()
    assert all(copy[name].equal(value) for name, value in state.items())


def test_labels_are_the_users_the_data_sets_or_numbers(tmp_path: Path) -> None:
    config, weights = small_model(tmp_path)
    assert detectron2.load(config, weights, ["car", "bus", "tram"])[1].labels == ("car", "bus", "tram")
    with pytest.raises(ModelError, match=r"model_final.pkl: has 3 classes, so it needs as many labels, got 2"):
        detectron2.load(config, weights, ["car", "bus"])
    config.write_text(SMALL.replace("NUM_CLASSES: 3", "NUM_CLASSES: 80") + "DATASETS: {TRAIN: [coco_2017_train]}")
    assert detectron2.build(config)[1].labels == coco.LABELS


def test_weights_of_another_network_are_listed_by_what_does_not_fit(tmp_path: Path) -> None:
    config, weights = small_model(tmp_path)
    config.write_text(SMALL.replace("NUM_CONVS: 1", "NUM_CONVS: 2").replace("OUT_CHANNELS: 16}", "OUT_CHANNELS: 8}"))
    with pytest.raises(ModelError, match=r"model_final.pkl: .* 4 missing .* of another shape"):
        detectron2.load(config, weights)


def test_a_hostile_checkpoint_is_refused(tmp_path: Path) -> None:
    config, weights = small_model(tmp_path)
    weights.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"model_final.pkl: refused: it names os.system"):
        detectron2.load(config, weights)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("RetinaNet", "MaskFormer", "META_ARCHITECTURE is 'MaskFormer'; streamd builds GeneralizedRCNN"),
        ("DEPTH: 18", "DEPTH: 19", "depth 19"),
        ("IN_FEATURES: [res3,", "IN_FEATURES: [res2,", "res2"),
        ("build_retinanet_resnet_fpn_backbone", "build_swin", "build_swin"),
        ("NUM_CONVS: 1", "BBOX_REG_WEIGHTS: [1.0, 1.0]", "want four"),
        ("NUM_CONVS: 1", "IN_FEATURES: [p3, p9]", "nothing in it is called 'p9'"),
    ],
)
def test_numbers_that_make_no_network_are_an_error_that_names_the_file(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ModelError, match=rf"config.yaml: .*{message}"):
        detectron2.build(path)
