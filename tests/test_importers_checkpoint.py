"""Weights of other projects' files: read, renamed, and copied whole or not at all."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models.fpn import Fpn, MaxPoolLevel
from streamd.models.importers import caffe2, checkpoint
from streamd.models.layers import ConvNorm, FrozenBatchNorm2d
from streamd.models.resnet import STAGES, Resnet, ResnetConfig

TINY = ResnetConfig(num_stem_channels=8, num_res2_channels=8, width_per_group=4)
BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}


def randomised(network: nn.Module) -> dict[str, Tensor]:
    """Give every weight and statistic a value of its own."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return network.state_dict()


def msra(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Call a ResNet's weights as MSRA's R-50.pkl does, in which the statistics are part of scale and shift."""
    arrays = {"fc1000_w": np.ones((3, 4)), "fc1000_b": np.ones(3), "conv1_b": np.zeros(TINY.num_stem_channels)}
    for name, value in state.items():
        parts = name.split(".")
        if parts[-1].startswith("running"):
            continue
        kind = {"weight": "w", "bias": "b"}[parts[-1]]
        if parts[-2] == "norm":
            kind = {"w": "bn_s", "b": "bn_b"}[kind]
        if parts[0] == "stem":
            arrays["res_conv1_" + kind if "bn" in kind else "conv1_" + kind] = value.numpy()
        else:
            arrays[f"{parts[0]}_{parts[1]}_{BRANCHES[parts[2]]}_{kind}"] = value.numpy()
    return arrays


def written(path: Path, content: object) -> checkpoint.Checkpoint:
    path.write_bytes(pickle.dumps(content))
    return checkpoint.read(path)


def without_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)


def test_a_backbone_starts_from_imagenet_weights_with_caffe2s_names(tmp_path: Path) -> None:
    source = Resnet(TINY)
    randomised(source)
    without_statistics(source)
    weights = written(tmp_path / "R-50.pkl", msra(source.state_dict()))
    assert weights.is_partial
    detector = nn.ModuleDict(
        {"backbone": Fpn(Resnet(TINY), STAGES, 16, top_block=MaxPoolLevel()), "head": nn.Linear(2, 2)}
    )
    head = detector["head"].state_dict()["weight"].clone()
    checkpoint.load_pretrained(detector, weights)
    for name, value in source.state_dict().items():
        torch.testing.assert_close(detector.state_dict()[f"backbone.bottom_up.{name}"], value, rtol=0, atol=0)
    assert detector["head"].state_dict()["weight"].equal(head)


def test_imagenet_weights_that_find_no_place_are_an_error(tmp_path: Path) -> None:
    source = Resnet(TINY)
    weights = written(tmp_path / "R-50.pkl", msra(randomised(source)) | {"conv1_b": np.ones(8)})
    with pytest.raises(ModelError, match=r"R-50.pkl: .* 1 unknown \(stem\.conv1\.bias\)"):
        checkpoint.load_pretrained(source, weights)


def test_names_without_what_comes_before_the_part_are_lengthened(tmp_path: Path) -> None:
    source = Resnet(TINY)
    arrays = {name: value.numpy() for name, value in randomised(source).items()}
    weights = written(tmp_path / "R-50.pkl", {"model": arrays, "matching_heuristics": True})
    copy = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": Resnet(TINY)})})
    checkpoint.load(copy, weights)
    assert all(
        copy.state_dict()[f"backbone.bottom_up.{name}"].equal(value) for name, value in source.state_dict().items()
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("conv1_w", "stem.conv1.weight"),
        ("res_conv1_bn_riv", "stem.conv1.norm.running_var"),
        ("res_conv1_bn_rm", "stem.conv1.norm.running_mean"),
        ("res4_22_branch2b_gn_s", "res4.22.conv2.norm.weight"),
        ("fpn_inner_res5_2_sum_w", "fpn_lateral5.weight"),
        ("fpn_inner_res4_5_sum_lateral_b", "fpn_lateral4.bias"),
        ("fpn_inner_res4_5_sum_lateral_gn_s", "fpn_lateral4.norm.weight"),
        ("fpn_res3_3_sum_w", "fpn_output3.weight"),
        ("conv_rpn_fpn2_w", "rpn_head.conv.weight"),
        ("conv_rpn_b", "rpn_head.conv.bias"),
        ("rpn_bbox_pred_fpn2_w", "rpn_head.anchor_deltas.weight"),
        ("rpn_cls_logits_w", "rpn_head.objectness_logits.weight"),
        ("fc6_w", "box_head.fc1.weight"),
        ("fc7_b", "box_head.fc2.bias"),
        ("head_conv1_gn_s", "box_head.conv1.norm.weight"),
        ("_[mask]_fcn1_w", "mask_head.mask_fcn1.weight"),
        ("conv5_mask_w", "mask_head.deconv.weight"),
        ("conv_fcn8_w", "keypoint_head.conv_fcn8.weight"),
        ("kps_score_lowres_w", "keypoint_head.score_lowres.weight"),
    ],
)
def test_caffe2s_names_are_turned_into_detectron2s(theirs: str, ours: str) -> None:
    assert list(caffe2.rename({theirs: torch.zeros(2)})) == [ours]


def test_caffe2s_background_moves_from_the_first_class_to_the_last_or_out() -> None:
    classes = torch.arange(4.0)
    renamed = caffe2.rename(
        {"cls_score_b": classes, "bbox_pred_b": classes.repeat_interleave(4), "mask_fcn_logits_b": classes}
    )
    assert renamed["box_predictor.cls_score.bias"].tolist() == [1, 2, 3, 0]
    assert renamed["box_predictor.bbox_pred.bias"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert renamed["mask_head.predictor.bias"].tolist() == [1, 2, 3]


def test_what_training_alone_needs_is_left_out() -> None:
    assert (
        caffe2.rename({"fc1000_w": torch.ones(1), "conv1_w_momentum": torch.ones(1), "conv1_b": torch.zeros(1)}) == {}
    )


def layer(norm: str) -> nn.Module:
    return nn.Sequential(ConvNorm(2, 2, 1, norm=norm))


def test_a_pth_that_detectron2_trained_is_read_with_its_optimiser(tmp_path: Path) -> None:
    source = layer("BN")
    path = tmp_path / "model_final.pth"
    torch.save({"model": randomised(source), "optimizer": {"state": {0: {"step": 3}}}, "iteration": 9}, path)
    weights = checkpoint.read(path)
    assert not weights.is_partial
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    copy = layer("BN")
    checkpoint.load(copy, weights)
    assert all(value.equal(source.state_dict()[name]) for name, value in copy.state_dict().items())


def test_constants_that_older_versions_kept_are_left_out(tmp_path: Path) -> None:
    source = layer("FrozenBN")
    arrays = {name: value.numpy() for name, value in randomised(source).items()}
    constants = (
        "pixel_mean",
        "pixel_std",
        "proposal_generator.anchor_generator.cell_anchors.0",
        "anchor_generator.cell_anchors.4",
        "0.norm.num_batches_tracked",
    )
    weights = written(tmp_path / "old.pkl", {"model": arrays | {name: np.ones(3) for name in constants}})
    checkpoint.load(layer("FrozenBN"), weights)


def test_batch_norms_need_no_count_of_training_steps(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in randomised(layer("BN")).items() if "tracked" not in name}
    network = layer("BN")
    checkpoint.load(network, written(tmp_path / "model.pkl", {"model": arrays}))
    assert network.state_dict()["0.norm.num_batches_tracked"] == 0


def test_weights_that_do_not_fit_are_listed_and_nothing_is_copied(tmp_path: Path) -> None:
    network = layer("FrozenBN")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    arrays = {name: value.numpy() for name, value in randomised(layer("FrozenBN")).items()}
    del arrays["0.norm.running_mean"]
    arrays |= {"0.weight": np.ones((2, 3, 1, 1)), "1.weight": np.ones(2)}
    with pytest.raises(ModelError) as err:
        checkpoint.load(network, written(tmp_path / "model.pkl", {"model": arrays}))
    for part in (
        "model.pkl",
        "1 missing (0.norm.running_mean)",
        "1 unknown (1.weight)",
        "0.weight is [2, 3, 1, 1] instead of [2, 2, 1, 1]",
    ):
        assert part in str(err.value)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        checkpoint.read(tmp_path / name)


def test_a_zip_that_is_called_pkl_is_read_as_what_it_is(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "model.pkl")
    assert checkpoint.read(tmp_path / "model.pkl").state["a"].tolist() == [1, 1]
