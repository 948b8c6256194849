"""An RPN alone: what the two-stage network's own RPN proposes, as objects of one label."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from streamd.models import artifact, parity
from streamd.models.importers import detectron2
from streamd.models.proposal_network import ProposalNetwork

SMALL = """
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [96], [128]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], PRE_NMS_TOPK_TEST: 100, POST_NMS_TOPK_TEST: 30}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATASETS: {TRAIN: [coco_2017_train]}
"""
C4 = """
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  RESNETS: {DEPTH: 50, RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 4}
  RPN: {POST_NMS_TOPK_TEST: 30}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
"""


@pytest.mark.parametrize("config", [SMALL, C4])
def test_an_imported_rpn_gives_all_of_its_proposals_by_falling_score(tmp_path: Path, config: str) -> None:
    given, weights, model = tmp_path / "config.yaml", tmp_path / "model_final.pkl", tmp_path / "model.pt"
    given.write_text(config)
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in detectron2.build(given)[0].state_dict().items()}
    weights.write_bytes(pickle.dumps({"model": state}))
    network, spec = detectron2.load(given, weights)
    assert isinstance(network, ProposalNetwork)
    assert (spec.name, spec.task, spec.labels, spec.nms.max_detections) == ("rpn", "detect", ("object",), 30)
    artifact.export(network, spec, model)
    resized = np.random.default_rng(0).integers(0, 256, (3, 64, 90), np.uint8)
    (found,) = parity.run(model, [resized], [(128, 180)])

    images = torch.zeros(1, 3, 64, 96)
    images[0, :, :, :90] = torch.from_numpy(resized).float() - torch.tensor(spec.mean)[:, None, None]
    with torch.inference_mode():
        features = network.backbone(images)
        proposals, logits = network.proposal_generator.propose(features, images, torch.tensor([[64.0, 90.0]]))
    boxes = proposals.boxes[0][proposals.valid[0]] * 2
    scores = logits[0][proposals.valid[0]].sigmoid()
    assert len(found) == len(boxes) > 3
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    order = np.lexsort(found.boxes.T), np.lexsort(boxes.numpy().T)  # equal scores may change places
    np.testing.assert_allclose(found.boxes[order[0]], boxes.numpy()[order[1]], atol=1e-3)
