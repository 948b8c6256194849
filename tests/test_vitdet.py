"""ViTDet: what is read from the weights and from the file beside them. tests/test_parity.py has its results."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from streamd.errors import ModelError
from streamd.models import artifact, vitdet
from streamd.models.vitdet import Architecture

SMALL = Architecture(
    meta_architecture="mask_rcnn_vitdet",
    square_pad=96,
    img_size=64,
    embed_dim=24,
    depth=2,
    num_heads=2,
    window_size=4,
    window_block_indexes=(0,),
    residual_block_indexes=(1,),
    anchor_sizes=((16,), (32,), (64,), (128,), (256,)),
    pre_nms_topk=40,
    post_nms_topk=20,
)


def shapes(architecture: Architecture, *, num_classes: int = 3, num_stages: int = 1) -> dict[str, Tensor]:
    """Make the parameters of a checkpoint that are read for their shapes: 8 channels, 3 convolutions, 5 x 5 pooled."""
    state = {
        "backbone.simfp_2.0.weight": torch.zeros(24, 12, 2, 2),
        "backbone.simfp_3.0.weight": torch.zeros(24, 12, 2, 2),
        "backbone.simfp_4.0.weight": torch.zeros(8, 24, 1, 1),
        "backbone.simfp_4.1.weight": torch.zeros(8, 8, 3, 3),
        "backbone.simfp_4.1.norm.weight": torch.zeros(8),
        "backbone.simfp_5.1.weight": torch.zeros(8, 24, 1, 1),
        "proposal_generator.rpn_head.conv.conv0.weight": torch.zeros(8, 8, 3, 3),
        "proposal_generator.rpn_head.conv.conv1.weight": torch.zeros(8, 8, 3, 3),
        "roi_heads.mask_head.mask_fcn1.weight": torch.zeros(16, 8, 3, 3),
        "roi_heads.mask_head.mask_fcn1.norm.weight": torch.zeros(16),
        "roi_heads.mask_head.predictor.weight": torch.zeros(num_classes, 16, 1, 1),
    }
    for stage in range(num_stages):
        suffix = f".{stage}" if num_stages > 1 else ""
        for index in (1, 2, 3):
            state[f"roi_heads.box_head{suffix}.conv{index}.weight"] = torch.zeros(8, 8, 3, 3)
            state[f"roi_heads.box_head{suffix}.conv{index}.norm.weight"] = torch.zeros(8)
        state[f"roi_heads.box_head{suffix}.fc1.weight"] = torch.zeros(32, 8 * 25)
        state[f"roi_heads.box_predictor{suffix}.cls_score.weight"] = torch.zeros(num_classes + 1, 32)
        num_boxes = 1 if num_stages > 1 else num_classes
        state[f"roi_heads.box_predictor{suffix}.bbox_pred.weight"] = torch.zeros(num_boxes * 4, 32)
    return state


def test_widths_and_counts_of_the_heads_are_read_from_the_weights() -> None:
    network, spec = vitdet.build(SMALL, shapes(SMALL))
    own = network.state_dict()
    for name, tensor in shapes(SMALL).items():
        assert own[name].shape == tensor.shape, name
    assert "roi_heads.box_head.conv4.weight" not in own
    assert "roi_heads.mask_head.mask_fcn2.weight" not in own
    assert "proposal_generator.rpn_head.conv.conv2.weight" not in own
    assert own["backbone.net.blocks.1.attn.rel_pos_h"].shape == (2 * 4 - 1, 12)
    assert (spec.task, spec.labels, spec.input_size) == ("segment", ("class_0", "class_1", "class_2"), (96, 96))


def test_a_cascade_has_as_many_stages_as_the_weights_and_the_boxes_of_one_class() -> None:
    architecture = msgspec.structs.replace(SMALL, meta_architecture="cascade_mask_rcnn_vitdet")
    network, spec = vitdet.build(architecture, shapes(architecture, num_stages=3))
    own = network.state_dict()
    for name, tensor in shapes(architecture, num_stages=3).items():
        assert own[name].shape == tensor.shape, name
    assert network.roi_heads.config.box_weights == vitdet.BOX_WEIGHTS
    assert spec.name == "cascade_mask_rcnn_vitdet"


def test_weights_without_a_mask_head_make_a_detector() -> None:
    state = {name: tensor for name, tensor in shapes(SMALL).items() if "mask_head" not in name}
    _, spec = vitdet.build(SMALL, state)
    assert (spec.task, spec.masks) == ("detect", None)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("backbone.simfp", "no backbone.simfp_2: not a checkpoint of ViTDet"),
        ("roi_heads.box_head.fc1", "no roi_heads.box_head.fc1.weight: not a checkpoint of ViTDet"),
        ("proposal_generator", "no proposal_generator.rpn_head.conv.weight"),
    ],
)
def test_weights_of_another_network_are_refused_by_what_they_lack(lost: str, message: str) -> None:
    state = {name: tensor for name, tensor in shapes(SMALL).items() if not name.startswith(lost)}
    with pytest.raises(ModelError, match=message):
        vitdet.build(SMALL, state)


def test_labels_must_be_as_many_as_the_classes_of_the_weights() -> None:
    architecture = msgspec.structs.replace(SMALL, labels=("cat", "dog"))
    with pytest.raises(ModelError, match="2 labels for weights of 3 classes"):
        vitdet.build(architecture, shapes(architecture))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_sise": 14}, "window_sise"),
        ({"depth": "four"}, r"Expected `int`, got `str` - at `\$.depth`"),
        ({"meta_architecture": "mask_rcnn_swin"}, "mask_rcnn_swin"),
    ],
)
def test_a_description_with_a_wrong_key_or_value_is_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "arch.json"
    path.write_text(json.dumps(json.loads(msgspec.json.encode(SMALL)) | change))
    with pytest.raises(ModelError, match=rf"arch.json: not a description of ViTDet: .*{message}"):
        vitdet.read(path)


def test_a_description_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.json: cannot be read"):
        vitdet.read(tmp_path / "none.json")


def test_an_input_that_is_no_multiple_of_the_patch_is_refused() -> None:
    architecture = msgspec.structs.replace(SMALL, square_pad=100)
    with pytest.raises(ModelError, match=r"these numbers make no network: .*multiples of the patch, 16"):
        vitdet.build(architecture, shapes(architecture))


def test_the_artifact_of_a_network_of_another_size_than_it_was_trained_for_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, spec = vitdet.build(SMALL, shapes(SMALL))  # export compares network and artifact at two batch sizes
    artifact.export(network, spec, tmp_path / "vitdet.pt")
    module, read = artifact.load(tmp_path / "vitdet.pt", optimized=True)
    assert read == spec
    images, sizes = torch.randn(5, 3, 96, 96), torch.full((5, 2), 96.0)
    with torch.inference_mode():
        together = module(images, sizes)["features.0"]
        alone = [module(images[i : i + 1], sizes[i : i + 1])["features.0"] for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
