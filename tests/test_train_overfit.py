"""Small networks of each kind learn ten pictures by heart, measured through the daemon's own code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from streamd.train import recipe as recipes
from streamd.train.loop import train
from tests.coco_folder import write_coco

SMALL_RCNN = {
    "VERSION": 2,
    "INPUT": {"MIN_SIZE_TEST": 96, "MAX_SIZE_TEST": 128},
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "PIXEL_STD": [58.0, 58.0, 58.0],
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {
            "DEPTH": 18,
            "NORM": "BN",
            "STEM_OUT_CHANNELS": 32,
            "RES2_OUT_CHANNELS": 32,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 32},
        "ANCHOR_GENERATOR": {"SIZES": [[12], [24], [32], [48], [64]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]},
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "POST_NMS_TOPK_TEST": 100, "PRE_NMS_TOPK_TEST": 200},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "FC_DIM": 128, "POOLER_RESOLUTION": 7},
        "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 2, "CONV_DIM": 32, "POOLER_RESOLUTION": 14},
        "ROI_KEYPOINT_HEAD": {"CONV_DIMS": [32, 32, 32], "POOLER_RESOLUTION": 14, "NUM_KEYPOINTS": 2},
    },
}
RECIPE = {
    "name": "by-heart",
    "data": {
        "train": {"path": "data/instances.json"},
        "val": {"path": "data/instances.json"},
        "workers": 0,
        "cache": True,
    },
    "augment": {"flip": 0.0, "hue": 0.0, "saturation": 0.0, "value": 0.0},
    "optimizer": {"kind": "adamw", "lr": 0.002, "warmup_epochs": 4.0, "clip_norm": 10.0},
    "batch_size": 5,
    "ema": 0.9,
}


def scores_of(folder: Path, model: dict[str, object], epochs: int) -> dict[str, float]:
    """Train on ten pictures and return what the artifact reaches on them."""
    torch.set_num_threads(2)
    write_coco(folder / "data", 10, size=(96, 128))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": model, "epochs": epochs, "evaluate_every": epochs}))
    assert train(recipes.load(path), folder / "run", Console(file=io.StringIO())) == 0
    scores = json.loads((folder / "run/scores.json").read_text())
    return {kind: scores[kind]["ap50"] for kind in ("boxes", "masks", "keypoints") if scores.get(kind)}


def write_config(folder: Path, **switches: bool) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_RCNN, "MODEL": {**SMALL_RCNN["MODEL"], **switches}}))  # type: ignore[dict-item]
    return str(path)


@pytest.mark.slow
def test_mask_rcnn_learns_boxes_and_masks_by_heart(tmp_path: Path) -> None:
    scores = scores_of(tmp_path, {"start": write_config(tmp_path, MASK_ON=True)}, epochs=60)
    assert scores["boxes"] > 0.95 and scores["masks"] > 0.95


@pytest.mark.slow
def test_keypoint_rcnn_learns_points_by_heart(tmp_path: Path) -> None:
    scores = scores_of(tmp_path, {"start": write_config(tmp_path, KEYPOINT_ON=True)}, epochs=60)
    assert scores["boxes"] > 0.95 and scores["keypoints"] > 0.95


@pytest.mark.slow
def test_yolox_learns_boxes_and_masks_by_heart(tmp_path: Path) -> None:
    model = {"start": "yolox_nano", "weights": "none", "input_size": [96, 128], "prototypes": 8}
    scores = scores_of(tmp_path, model, epochs=180)
    assert scores["boxes"] > 0.95 and scores["masks"] > 0.95
