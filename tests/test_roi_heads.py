"""The second stage against loops that follow Detectron2's FastRCNNOutputLayers and CascadeROIHeads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.anchors import decode_deltas
from streamd.models.box_head import BoxHeadConfig, BoxPredictor
from streamd.models.keypoint_head import KeypointHeadConfig, keypoint_names
from streamd.models.layers import Backbone
from streamd.models.mask_head import MaskHeadConfig
from streamd.models.roi_heads import Res5Config, RoiHeads, RoiHeadsConfig, make_roi_heads
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.rpn import Proposals

CASCADE = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SIZES = torch.tensor([[64.0, 96.0], [50.0, 60.0]])
CONFIG = RoiHeadsConfig(
    num_classes=3,
    in_features=("p2", "p3"),
    box=BoxHeadConfig(fc_dim=16, pooler=PoolerConfig(4)),
)


class FakeBackbone(Backbone):
    """Says what maps it would give."""

    def __init__(self, num_channels: int, **strides: int) -> None:
        super().__init__()
        self.strides = strides
        self.num_channels = dict.fromkeys(strides, num_channels)


PYRAMID = FakeBackbone(6, p2=4, p3=8)


def random_features(backbone: Backbone = PYRAMID) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, backbone.num_channels[name], 64 // stride, 96 // stride, generator=random)
        for name, stride in backbone.strides.items()
    }


def random_proposals(num_proposals: int = 7) -> Proposals:
    """Make proposals of two images; the last of each is padding."""
    random = torch.Generator().manual_seed(1)
    corners = torch.rand(2, num_proposals, 2, 2, generator=random) * torch.tensor([60.0, 50.0])
    boxes = torch.cat((corners.amin(2), corners.amax(2)), dim=-1)
    boxes[:, -1] = 0
    valid = torch.ones(2, num_proposals, dtype=torch.bool)
    valid[:, -1] = False
    return Proposals(boxes, valid)


def make(config: RoiHeadsConfig, backbone: Backbone = PYRAMID) -> RoiHeads:
    """Build heads that score and move boxes at random."""
    torch.manual_seed(2)
    heads = make_roi_heads(backbone, config).eval()
    for name, parameter in heads.named_parameters():
        if "box_predictor" in name or name.startswith(("mask_head.predictor", "keypoint_head.score")):
            nn.init.normal_(parameter, std=0.3)
    return heads


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    height, width = size.tolist()
    limit = torch.tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@torch.inference_mode()
def test_pairs_are_every_proposal_with_every_class(class_agnostic: bool, sigmoid: bool) -> None:
    heads = make(replace(CONFIG, box=replace(CONFIG.box, class_agnostic=class_agnostic, sigmoid=sigmoid)))
    features, proposals = random_features(), random_proposals()
    output = heads(features, proposals, SIZES)
    (head, predictor), *_ = heads.stages()
    logits, deltas = predictor(head(heads.box_pooler(list(features.values()), proposals.boxes)))
    for image, row in itertools.product(range(2), range(6)):
        at = image * 7 + row
        scores = logits[at].sigmoid() if sigmoid else logits[at].softmax(0)
        for label in range(3):
            pair = row * 3 + label
            delta = deltas[at, :4] if class_agnostic else deltas[at, 4 * label : 4 * label + 4]
            box = clip(decode_deltas(delta, proposals.boxes[image, row], CASCADE[0]), SIZES[image])
            torch.testing.assert_close(output["boxes"][image, pair], box)
            torch.testing.assert_close(output["scores"][image, pair], scores[label])
            assert output["labels"][image, pair] == label


@torch.inference_mode()
def test_pairs_of_missing_proposals_take_no_part() -> None:
    output = make(CONFIG)(random_features(), random_proposals(), SIZES)
    assert (output["scores"][:, -3:] == -torch.inf).all()
    assert (output["scores"][:, :-3] > 0).all()
    assert output["boxes"].isfinite().all()


@torch.inference_mode()
def test_a_cascade_hands_clipped_boxes_on_and_averages_the_scores_of_its_stages() -> None:
    heads = make(replace(CONFIG, box=replace(CONFIG.box, class_agnostic=True), box_weights=CASCADE))
    features, proposals = random_features(), random_proposals()
    output = heads(features, proposals, SIZES)
    boxes, scores = proposals.boxes, torch.zeros(2, 7, 3)
    for (head, predictor), weights in zip(heads.stages(), CASCADE, strict=True):
        logits, deltas = predictor(head(heads.box_pooler(list(features.values()), boxes)))
        scores += logits.softmax(-1)[:, :-1].reshape(2, 7, 3) / 3
        moved = decode_deltas(deltas.reshape(2, 7, 4), boxes, weights)
        boxes = torch.stack([clip(moved[image], SIZES[image]) for image in range(2)])
    torch.testing.assert_close(output["scores"][:, :-3], scores[:, :-1].flatten(1))
    torch.testing.assert_close(output["boxes"], boxes.repeat_interleave(3, dim=1))


@torch.inference_mode()
def test_res5_serves_boxes_and_masks_alike() -> None:
    backbone = FakeBackbone(8, res4=16)
    config = RoiHeadsConfig(
        num_classes=3,
        in_features=("res4",),
        box=BoxHeadConfig(pooler=PoolerConfig(6)),
        mask=MaskHeadConfig(num_convs=0, conv_dim=5),
        res5=Res5Config(num_hidden=4, num_out=16),
    )
    heads = make(config, backbone)
    assert {name.split(".")[0] for name in heads.state_dict()} == {"res5", "box_predictor", "mask_head"}
    features, proposals = random_features(backbone), random_proposals()
    output = heads(features, proposals, SIZES)
    described = heads.mask_features([features["res4"]], proposals.boxes)
    assert described.shape == (14, 16, 3, 3)
    assert isinstance(heads.box_predictor, BoxPredictor)
    logits, _ = heads.box_predictor(described.mean((2, 3)))
    torch.testing.assert_close(output["scores"][:, :-3], logits.softmax(-1)[:, :-1].reshape(2, 21)[:, :-3])
    labels = torch.zeros(2, 7, dtype=torch.int64)
    assert heads.masks([output["features.0"]], proposals.boxes, labels).shape == (2, 7, 6, 6)


@torch.inference_mode()
def test_each_box_gets_the_mask_of_its_class() -> None:
    heads = make(replace(CONFIG, mask=MaskHeadConfig(num_convs=1, conv_dim=5, pooler=PoolerConfig(6))))
    features, boxes = list(random_features().values()), random_proposals().boxes
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [2, 2, 1, 1, 0, 0, 0]])
    masks = heads.masks(features, boxes, labels)
    assert heads.mask_head is not None
    of_all_classes = heads.mask_head(heads.mask_features(features, boxes)).sigmoid().reshape(2, 7, 3, 12, 12)
    for image in range(2):
        for row in range(7):
            torch.testing.assert_close(masks[image, row], of_all_classes[image, row, labels[image, row]])


@torch.inference_mode()
def test_a_class_agnostic_mask_serves_all_classes() -> None:
    heads = make(replace(CONFIG, mask=MaskHeadConfig(conv_dim=5, class_agnostic=True)))
    features, boxes = list(random_features().values()), random_proposals().boxes
    labels = torch.zeros(2, 7, dtype=torch.int64)
    assert torch.equal(heads.masks(features, boxes, labels), heads.masks(features, boxes, labels + 2))


@torch.inference_mode()
def test_heat_maps_have_four_times_the_cells_of_what_is_pooled() -> None:
    keypoints = KeypointHeadConfig(num_keypoints=4, conv_dims=(6, 5), pooler=PoolerConfig(3))
    heads = make(replace(CONFIG, keypoints=keypoints))
    features, boxes = list(random_features().values()), random_proposals().boxes
    heat = heads.keypoints(features, boxes)
    assert heat.shape == (2, 7, 4, 12, 12)
    low = heads.get_submodule("keypoint_pooler")(features, boxes)
    for name in ("conv_fcn1", "conv_fcn2", "score_lowres"):
        low = heads.get_submodule(f"keypoint_head.{name}")(low)
    assert low.shape == (14, 4, 6, 6)
    stretched = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(heat, stretched.reshape(2, 7, 4, 12, 12))


def test_features_are_given_where_a_method_needs_them() -> None:
    features, proposals = random_features(), random_proposals()
    assert set(make(CONFIG)(features, proposals, SIZES)) == {"boxes", "scores", "labels"}
    output = make(replace(CONFIG, mask=MaskHeadConfig(conv_dim=5)))(features, proposals, SIZES)
    assert output["features.0"] is features["p2"]
    assert output["features.1"] is features["p3"]


@torch.inference_mode()
def test_half_precision_weights_still_give_boxes_and_scores_in_single_precision() -> None:
    config = replace(CONFIG, mask=MaskHeadConfig(conv_dim=5), keypoints=KeypointHeadConfig(conv_dims=(4,)))
    heads = make(config).half()
    features = {name: x.half() for name, x in random_features().items()}
    output = heads(features, random_proposals(), SIZES)
    assert output["boxes"].dtype == output["scores"].dtype == torch.float32
    levels, boxes = list(features.values()), random_proposals().boxes
    assert heads.masks(levels, boxes, torch.zeros(2, 7, dtype=torch.int64)).dtype == torch.float32
    assert heads.keypoints(levels, boxes).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (CONFIG, "box_head.fc1 box_head.fc2 box_predictor.cls_score box_predictor.bbox_pred"),
        (
            replace(CONFIG, box=replace(CONFIG.box, num_convs=2, conv_dim=32, num_fcs=1, norm="GN")),
            "box_head.conv1 box_head.conv1.norm box_head.conv2 box_head.conv2.norm box_head.fc1 "
            "box_predictor.cls_score box_predictor.bbox_pred",
        ),
        (
            replace(CONFIG, box=replace(CONFIG.box, num_fcs=1, class_agnostic=True), box_weights=CASCADE[:2]),
            "box_head.0.fc1 box_head.1.fc1 box_predictor.0.cls_score box_predictor.0.bbox_pred "
            "box_predictor.1.cls_score box_predictor.1.bbox_pred",
        ),
        (
            replace(CONFIG, box=replace(CONFIG.box, num_fcs=1, class_agnostic=True), cascade=True),
            "box_head.0.fc1 box_predictor.0.cls_score box_predictor.0.bbox_pred",
        ),
        (
            replace(
                CONFIG,
                mask=MaskHeadConfig(num_convs=2, conv_dim=32, norm="GN"),
                keypoints=KeypointHeadConfig(conv_dims=(4, 4)),
            ),
            "box_head.fc1 box_head.fc2 box_predictor.cls_score box_predictor.bbox_pred "
            "mask_head.mask_fcn1 mask_head.mask_fcn1.norm mask_head.mask_fcn2 mask_head.mask_fcn2.norm "
            "mask_head.deconv mask_head.predictor "
            "keypoint_head.conv_fcn1 keypoint_head.conv_fcn2 keypoint_head.score_lowres",
        ),
    ],
)
def test_parameters_are_named_as_in_detectron2(config: RoiHeadsConfig, names: str) -> None:
    found = dict.fromkeys(name.rpartition(".")[0] for name in make_roi_heads(PYRAMID, config).state_dict())
    assert sorted(found) == sorted(names.split())


@torch.inference_mode()
def test_a_cascade_of_one_stage_finds_what_its_stage_does_alone() -> None:
    config = replace(CONFIG, box=replace(CONFIG.box, class_agnostic=True))
    cascade, plain = make(replace(config, cascade=True)), make(config)
    state = {
        name.replace("box_head.0", "box_head").replace("predictor.0", "predictor"): value
        for name, value in cascade.state_dict().items()
    }
    plain.load_state_dict(state)
    expected = plain(random_features(), random_proposals(), SIZES)
    torch.testing.assert_close(cascade(random_features(), random_proposals(), SIZES), expected)


def test_a_box_head_without_layers_reads_what_is_pooled() -> None:
    heads = make(replace(CONFIG, box=replace(CONFIG.box, num_fcs=0)))
    assert heads.get_submodule("box_predictor.cls_score").in_features == 6 * 4 * 4
    assert heads(random_features(), random_proposals(), SIZES)["boxes"].shape == (2, 21, 4)


def test_every_parameter_gets_a_gradient() -> None:
    mask, keypoints = MaskHeadConfig(conv_dim=5), KeypointHeadConfig(conv_dims=(4,))
    heads = make(replace(CONFIG, mask=mask, keypoints=keypoints)).train()
    features, proposals = random_features(), random_proposals()
    output = heads(features, proposals, SIZES)
    levels = list(features.values())
    masks = heads.masks(levels, proposals.boxes, torch.randint(3, (2, 7)))
    heat = heads.keypoints(levels, proposals.boxes)
    (output["boxes"].sum() + output["scores"][:, :-3].sum() + masks.sum() + heat.sum()).backward()
    assert [name for name, parameter in heads.named_parameters() if parameter.grad is None] == []


def test_a_cascade_of_boxes_by_class_is_refused() -> None:
    with pytest.raises(ValueError, match="class-agnostic"):
        replace(CONFIG, box_weights=CASCADE)
    with pytest.raises(ValueError, match="class-agnostic"):
        replace(CONFIG, cascade=True)


def test_res5_on_several_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="one level"):
        replace(CONFIG, res5=Res5Config())


def test_levels_of_different_widths_are_refused() -> None:
    backbone = FakeBackbone(6, p2=4, p3=8)
    backbone.num_channels["p3"] = 7
    with pytest.raises(ValueError, match=r"\[6, 7\] channels"):
        make_roi_heads(backbone, CONFIG)


def test_keypoints_have_the_names_of_coco_where_there_are_as_many() -> None:
    assert keypoint_names(17)[:2] == ("nose", "left_eye")
    assert keypoint_names(2) == ("keypoint_0", "keypoint_1")
