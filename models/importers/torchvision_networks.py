"""Turn torchvision's detectors into streamd's networks.

torchvision counts the background as class 0, and gives it rows in layers that streamd has for objects alone.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from streamd.errors import ModelError
from streamd.models.anchors import AnchorGrid
from streamd.models.box_head import BoxHeadConfig
from streamd.models.fcos import Fcos, FcosConfig, FcosHead
from streamd.models.fpn import Fpn
from streamd.models.importers.torchvision_layers import Theirs, convert_backbone, copy, copy_each, copy_rows, norm_name
from streamd.models.keypoint_head import KeypointHeadConfig
from streamd.models.mask_head import MaskHeadConfig
from streamd.models.rcnn import Rcnn, RcnnConfig
from streamd.models.retinanet import Retinanet, RetinanetConfig, RetinanetHead
from streamd.models.roi_heads import RoiHeads, RoiHeadsConfig
from streamd.models.roi_pooler import CANONICAL_LEVEL, CANONICAL_SIZE, PoolerConfig
from streamd.models.rpn import RpnConfig, RpnHead

Layer = TypeVar("Layer", bound=nn.Module)

# Input pixels, of torchvision's first and second stage.
MIN_PROPOSAL_SIZE = 1e-3
MIN_BOX_SIZE = 1e-2


def convert_rcnn(theirs: FasterRCNN) -> Rcnn:
    """Convert a Faster, Mask or Keypoint R-CNN. Raises ModelError where a part of it is not torchvision's own."""
    backbone = convert_backbone(theirs.backbone)
    network = Rcnn(backbone, RcnnConfig(_rpn_config(theirs, backbone), _roi_heads_config(theirs, backbone)))
    _copy_rpn_head(network.proposal_generator.rpn_head, theirs.rpn.head)
    _copy_roi_heads(network.roi_heads, theirs.roi_heads)
    return network


def convert_retinanet(theirs: RetinaNet) -> Retinanet:
    """Convert a RetinaNet. Raises ModelError where a part of it is not torchvision's own."""
    backbone = convert_backbone(theirs.backbone)
    classes = theirs.head.classification_head
    config = RetinanetConfig(
        num_classes=classes.num_classes - 1,
        anchors=_anchor_grid(theirs.anchor_generator, backbone),
        in_features=tuple(backbone.strides),
        num_convs=len(_layers(classes.conv, nn.Conv2d)),
        norm=norm_name(classes.conv),
        box_weights=tuple(theirs.box_coder.weights),
        num_candidates=theirs.topk_candidates,
        clipped=True,
    )
    network = Retinanet(backbone, config)
    _copy_dense_head(network.head, theirs.head)
    return network


def convert_fcos(theirs: FCOS) -> Fcos:
    """Convert an FCOS. Raises ModelError where a part of it is not torchvision's own."""
    backbone = convert_backbone(theirs.backbone)
    classes = theirs.head.classification_head
    config = FcosConfig(
        num_classes=classes.num_classes - 1,
        anchors=_anchor_grid(theirs.anchor_generator, backbone),
        in_features=tuple(backbone.strides),
        num_convs=len(_layers(classes.conv, nn.Conv2d)),
        norm=norm_name(classes.conv),
        num_candidates=theirs.topk_candidates,
        clipped=True,
    )
    network = Fcos(backbone, config)
    _copy_dense_head(network.head, theirs.head)
    copy(network.head.ctrness, [theirs.head.regression_head.bbox_ctrness])
    return network


def _copy_dense_head(ours: RetinanetHead | FcosHead, theirs: Theirs) -> None:
    """Copy all but the layers that only one of the two networks has."""
    classes, boxes = theirs.classification_head, theirs.regression_head
    copy_each(ours.cls_subnet, classes.conv)
    copy_each(ours.bbox_subnet, boxes.conv)
    rows = range(classes.cls_logits.out_channels)  # anchor by anchor
    copy_rows(ours.cls_score, classes.cls_logits, [row for row in rows if row % classes.num_classes])
    copy(ours.bbox_pred, [boxes.bbox_reg])


def _rpn_config(theirs: FasterRCNN, backbone: Fpn) -> RpnConfig:
    rpn = theirs.rpn
    return RpnConfig(
        anchors=_anchor_grid(rpn.anchor_generator, backbone),
        in_features=tuple(backbone.strides),
        conv_dims=tuple(layers[0].out_channels for layers in rpn.head.conv),
        box_weights=tuple(rpn.box_coder.weights),
        pre_nms_top_k=rpn._pre_nms_top_n["testing"],
        post_nms_top_k=rpn._post_nms_top_n["testing"],
        nms_threshold=rpn.nms_thresh,
        min_size=MIN_PROPOSAL_SIZE,
    )


def _roi_heads_config(theirs: FasterRCNN, backbone: Fpn) -> RoiHeadsConfig:
    heads, names = theirs.roi_heads, tuple(backbone.strides)
    convs, linears = _layers(heads.box_head, nn.Conv2d), _layers(heads.box_head, nn.Linear)
    return RoiHeadsConfig(
        num_classes=heads.box_predictor.cls_score.out_features - 1,
        in_features=tuple(names[int(name)] for name in heads.box_roi_pool.featmap_names),
        box=BoxHeadConfig(
            num_convs=len(convs),
            conv_dim=convs[0].out_channels if convs else 0,
            num_fcs=len(linears),
            fc_dim=linears[0].out_features,
            norm=norm_name(heads.box_head),
            pooler=_pooler_config(heads.box_roi_pool),
        ),
        box_weights=(tuple(heads.box_coder.weights),),
        mask=_mask_head_config(heads) if heads.has_mask() else None,
        keypoints=_keypoint_head_config(heads) if heads.has_keypoint() else None,
        min_size=MIN_BOX_SIZE,
    )


def _mask_head_config(theirs: Theirs) -> MaskHeadConfig:
    return MaskHeadConfig(
        num_convs=len(theirs.mask_head),
        conv_dim=theirs.mask_predictor.conv5_mask.out_channels,
        norm=norm_name(theirs.mask_head),
        pooler=_pooler_config(theirs.mask_roi_pool),
    )


def _keypoint_head_config(theirs: Theirs) -> KeypointHeadConfig:
    return KeypointHeadConfig(
        num_keypoints=theirs.keypoint_predictor.kps_score_lowres.out_channels,
        conv_dims=tuple(layer.out_channels for layer in _layers(theirs.keypoint_head, nn.Conv2d)),
        pooler=_pooler_config(theirs.keypoint_roi_pool),
    )


def _pooler_config(theirs: MultiScaleRoIAlign) -> PoolerConfig:
    height, width = theirs.output_size
    if height != width or (theirs.canonical_scale, theirs.canonical_level) != (CANONICAL_SIZE, CANONICAL_LEVEL):
        raise ModelError(
            f"its regions are pooled by {theirs}, of which streamd has square ones at the usual scale alone"
        )
    return PoolerConfig(height, theirs.sampling_ratio, "align_unshifted")


def _anchor_grid(theirs: AnchorGenerator, backbone: Fpn) -> AnchorGrid:
    sizes, ratios = (tuple(map(tuple, rows)) for rows in (theirs.sizes, theirs.aspect_ratios))
    return AnchorGrid(tuple(backbone.strides.values()), sizes, ratios, convention="torchvision")


def _copy_rpn_head(ours: RpnHead, theirs: Theirs) -> None:
    for index, layers in enumerate(theirs.conv):
        copy(ours.conv if len(theirs.conv) == 1 else ours.get_submodule(f"conv.conv{index}"), layers)
    copy(ours.objectness_logits, [theirs.cls_logits])
    copy(ours.anchor_deltas, [theirs.bbox_pred])


def _copy_roi_heads(ours: RoiHeads, theirs: Theirs) -> None:
    blocks = [block for block in theirs.box_head.children() if isinstance(block, nn.Sequential)]
    for index, block in enumerate(blocks):
        copy(ours.get_submodule(f"box_head.conv{index + 1}"), block)
    for index, layer in enumerate(_layers(theirs.box_head, nn.Linear)):
        copy(ours.get_submodule(f"box_head.fc{index + 1}"), [layer])
    predictor, num_classes = ours.get_submodule("box_predictor"), ours.config.num_classes
    objects_first = [*range(1, num_classes + 1), 0]
    copy_rows(predictor.get_submodule("cls_score"), theirs.box_predictor.cls_score, objects_first)
    copy_rows(predictor.get_submodule("bbox_pred"), theirs.box_predictor.bbox_pred, slice(4, None))
    if ours.mask_head is not None:
        for name, block in zip(ours.mask_head.convs, theirs.mask_head, strict=True):
            copy(ours.mask_head.get_submodule(name), block)
        copy(ours.mask_head.deconv, [theirs.mask_predictor.conv5_mask])
        copy_rows(ours.mask_head.predictor, theirs.mask_predictor.mask_fcn_logits, slice(1, None))
    if ours.keypoint_head is not None:
        for name, conv in zip(ours.keypoint_head.convs, _layers(theirs.keypoint_head, nn.Conv2d), strict=True):
            copy(ours.keypoint_head.get_submodule(name), [conv])
        copy(ours.keypoint_head.score_lowres, [theirs.keypoint_predictor.kps_score_lowres])


def _layers(module: Theirs, kind: type[Layer]) -> list[Layer]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]
