"""Networks of two stages: Faster, Mask, Keypoint, Cascade and DensePose R-CNN
(arXiv:1506.01497, 1703.06870, 1712.00726, 1802.00434).

    images -> backbone -> proposal generator -> ROI heads -> pairs of a box and a class
                  `------------- feature maps --> masks, keypoints, charts of the boxes that are kept

Attribute names follow Detectron2's checkpoints, so that their state-dict keys load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import backbones
from streamd.models.anchors import AnchorGrid
from streamd.models.box_head import BoxHeadConfig
from streamd.models.densepose_head import DensePoseHeadConfig
from streamd.models.fpn import Fpn, MaxPoolLevel
from streamd.models.importers.config import Config, anchor_grid, base_spec, max_detections
from streamd.models.keypoint_head import KeypointHeadConfig, keypoint_names
from streamd.models.layers import Backbone
from streamd.models.mask_head import MaskHeadConfig
from streamd.models.resnet import STAGES, BlockConfig, resnet50
from streamd.models.roi_heads import Res5Config, RoiHeadsConfig, make_roi_heads
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.rpn import ProposalGenerator, RpnConfig
from streamd.models.semantic import SemanticHeadConfig
from streamd.models.spec import DensePoseRule, KeypointRule, MaskRule, ModelSpec, NmsRule, Task, just_above

CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of the three stages


@dataclass(frozen=True, slots=True)
class RcnnConfig:
    """The numbers of both stages."""

    rpn: RpnConfig
    roi_heads: RoiHeadsConfig


class Rcnn(nn.Module):
    """Detect objects in normalised images that lie at the top left of their padding."""

    def __init__(self, backbone: Backbone, config: RcnnConfig) -> None:
        super().__init__()
        num_channels = {backbone.num_channels[name] for name in config.rpn.in_features}
        if len(num_channels) != 1:
            raise ValueError(
                f"{', '.join(config.rpn.in_features)} have {sorted(num_channels)} channels: they share one RPN head"
            )
        self.backbone = backbone
        self.proposal_generator = ProposalGenerator(num_channels.pop(), config.rpn)
        self.roi_heads = make_roi_heads(backbone, config.roi_heads)

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return pairs of a box and a class in `images` [B,3,H,W], and what the other methods pool from.

        `sizes` [B,2] are the height and width of each picture in its padding, input pixels; boxes are clipped to it.
        Boxes [B,K,4] are x1 y1 x2 y2 in input pixels, scores [B,K] in 0..1 or -inf, labels [B,K].
        """
        return self.detect(self.backbone(images), images, sizes)

    def detect(self, features: Mapping[str, Tensor], images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Do what `forward` does, from the feature maps that the backbone made of `images`."""
        proposals = self.proposal_generator(features, images, sizes)
        output: dict[str, Tensor] = self.roi_heads(features, proposals, sizes)
        return output

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities [B,N,S,S] of boxes [B,N,4] (input pixels) for their `labels` [B,N]."""
        return self.roi_heads.masks(features, boxes, labels)

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the heat maps [B,N,J,S,S], logits, of boxes [B,N,4] (input pixels)."""
        return self.roi_heads.keypoints(features, boxes)

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return the maps [B,N,C,S,S] of a `DensePoseRule` of boxes [B,N,4] (input pixels)."""
        return self.roi_heads.densepose(features, boxes)


def faster_rcnn_resnet50_fpn(num_classes: int = 80) -> Rcnn:
    """41.7 M parameters with 80 classes: Detectron2's faster_rcnn_R_50_FPN with torchvision's stride in the 3x3."""
    return _on_resnet50_fpn(RoiHeadsConfig(num_classes=num_classes))


def mask_rcnn_resnet50_fpn(num_classes: int = 80) -> Rcnn:
    """44.3 M parameters with 80 classes."""
    return _on_resnet50_fpn(RoiHeadsConfig(num_classes=num_classes, mask=MaskHeadConfig()))


def keypoint_rcnn_resnet50_fpn(num_classes: int = 1, num_keypoints: int = 17) -> Rcnn:
    """59.1 M parameters with one class."""
    keypoints = KeypointHeadConfig(num_keypoints=num_keypoints)
    return _on_resnet50_fpn(RoiHeadsConfig(num_classes=num_classes, keypoints=keypoints))


def cascade_mask_rcnn_resnet50_fpn(num_classes: int = 80) -> Rcnn:
    """72.0 M parameters with 80 classes."""
    box = BoxHeadConfig(class_agnostic=True)
    return _on_resnet50_fpn(
        RoiHeadsConfig(num_classes=num_classes, box=box, box_weights=CASCADE_WEIGHTS, mask=MaskHeadConfig())
    )


def _on_resnet50_fpn(roi_heads: RoiHeadsConfig) -> Rcnn:
    backbone = Fpn(resnet50(), STAGES, top_block=MaxPoolLevel())
    sizes = tuple((float(8 * stride),) for stride in backbone.strides.values())
    anchors = AnchorGrid(tuple(backbone.strides.values()), sizes, ((0.5, 1.0, 2.0),))
    return Rcnn(backbone, RcnnConfig(RpnConfig(anchors), roi_heads))


def build(config: Config) -> tuple[Rcnn, ModelSpec]:
    """Build the network of a Detectron2 configuration, untrained, and its description.

    Raises ModelError, and ValueError for numbers that do not fit each other.
    """
    backbone = backbones.build(config)
    network = Rcnn(backbone, RcnnConfig(rpn_config(config, backbone), roi_heads_config(config)))
    return network, describe(config, backbone)


def describe(config: Config, backbone: Backbone) -> ModelSpec:
    """Say what goes into the network of a configuration and what comes out of its second stage."""
    model = config["MODEL"]
    heads, masks, keypoints = model["ROI_HEADS"], model["MASK_ON"], model["KEYPOINT_ON"]
    densepose = _densepose_rule(config) if _has_densepose(config) else None
    task: Task = "densepose" if densepose else "keypoints" if keypoints else "segment" if masks else "detect"
    kinds = {"densepose": "densepose_rcnn", "keypoints": "keypoint_rcnn", "segment": "mask_rcnn"}
    kind = kinds.get(task, "faster_rcnn")
    spec = base_spec(
        config,
        name=f"cascade_{kind}" if heads["NAME"] == "CascadeROIHeads" else kind,
        task=task,
        num_classes=heads["NUM_CLASSES"],
        size_multiple=backbone.size_divisor,
    )
    nms = NmsRule(
        score_threshold=just_above(heads["SCORE_THRESH_TEST"]),
        iou_threshold=heads["NMS_THRESH_TEST"],
        max_detections=max_detections(config),
    )
    num_keypoints = model["ROI_KEYPOINT_HEAD"]["NUM_KEYPOINTS"]
    return msgspec.structs.replace(
        spec,
        sized=True,
        nms=nms,
        masks=MaskRule(kind="box") if masks else None,
        keypoints=KeypointRule(names=keypoint_names(num_keypoints)) if keypoints else None,
        densepose=densepose,
    )


def rpn_config(config: Config, backbone: Backbone) -> RpnConfig:
    """Read MODEL.RPN for the maps of `backbone`. Raises ModelError."""
    model = config["MODEL"]
    given, generator = model["RPN"], model["PROPOSAL_GENERATOR"]
    _need("MODEL.PROPOSAL_GENERATOR.NAME", generator["NAME"], "RPN")
    _need("MODEL.RPN.HEAD_NAME", given["HEAD_NAME"], "StandardRPNHead")
    return RpnConfig(
        anchors=anchor_grid(config, [backbone.strides[name] for name in given["IN_FEATURES"]]),
        in_features=tuple(given["IN_FEATURES"]),
        conv_dims=tuple(given["CONV_DIMS"]),
        box_weights=tuple(given["BBOX_REG_WEIGHTS"]),
        pre_nms_top_k=given["PRE_NMS_TOPK_TEST"],
        post_nms_top_k=given["POST_NMS_TOPK_TEST"],
        nms_threshold=given["NMS_THRESH"],
        min_size=generator["MIN_SIZE"],
    )


def roi_heads_config(config: Config) -> RoiHeadsConfig:
    """Read MODEL.ROI_HEADS and the heads that it uses. Raises ModelError."""
    model = config["MODEL"]
    given, box = model["ROI_HEADS"], model["ROI_BOX_HEAD"]
    kind = given["NAME"]
    _need("MODEL.ROI_HEADS.NAME", kind, "StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads", "DensePoseROIHeads")
    is_cascade, is_c4 = kind == "CascadeROIHeads", kind == "Res5ROIHeads"
    if not is_c4:
        _need("MODEL.ROI_BOX_HEAD.NAME", box["NAME"], "FastRCNNConvFCHead")
    weights = model["ROI_BOX_CASCADE_HEAD"]["BBOX_REG_WEIGHTS"] if is_cascade else [box["BBOX_REG_WEIGHTS"]]
    return RoiHeadsConfig(
        num_classes=given["NUM_CLASSES"],
        in_features=tuple(given["IN_FEATURES"]),
        box=BoxHeadConfig(
            num_convs=box["NUM_CONV"],
            conv_dim=box["CONV_DIM"],
            num_fcs=box["NUM_FC"],
            fc_dim=box["FC_DIM"],
            norm=box["NORM"],
            class_agnostic=box["CLS_AGNOSTIC_BBOX_REG"],
            sigmoid=box["USE_SIGMOID_CE"],
            pooler=_pooler(config, "ROI_BOX_HEAD"),
        ),
        box_weights=tuple(map(tuple, weights)),
        cascade=is_cascade,
        mask=_mask_head(config) if model["MASK_ON"] else None,
        keypoints=_keypoint_head(config) if model["KEYPOINT_ON"] else None,
        densepose=_densepose_head(config) if _has_densepose(config) else None,
        res5=_res5(config) if is_c4 else None,
    )


def _mask_head(config: Config) -> MaskHeadConfig:
    given = config["MODEL"]["ROI_MASK_HEAD"]
    _need("MODEL.ROI_MASK_HEAD.NAME", given["NAME"], "MaskRCNNConvUpsampleHead")
    return MaskHeadConfig(
        num_convs=given["NUM_CONV"],
        conv_dim=given["CONV_DIM"],
        norm=given["NORM"],
        class_agnostic=given["CLS_AGNOSTIC_MASK"],
        pooler=_pooler(config, "ROI_MASK_HEAD"),
    )


def _keypoint_head(config: Config) -> KeypointHeadConfig:
    given = config["MODEL"]["ROI_KEYPOINT_HEAD"]
    _need("MODEL.ROI_KEYPOINT_HEAD.NAME", given["NAME"], "KRCNNConvDeconvUpsampleHead")
    return KeypointHeadConfig(
        num_keypoints=given["NUM_KEYPOINTS"],
        conv_dims=tuple(given["CONV_DIMS"]),
        pooler=_pooler(config, "ROI_KEYPOINT_HEAD"),
    )


def _has_densepose(config: Config) -> bool:
    model = config["MODEL"]
    return bool(model["DENSEPOSE_ON"]) and model["ROI_HEADS"]["NAME"] == "DensePoseROIHeads"


def _densepose_rule(config: Config) -> DensePoseRule:
    given = config["MODEL"]["ROI_DENSEPOSE_HEAD"]
    return DensePoseRule(
        num_parts=given["NUM_PATCHES"],
        num_coarse=given["NUM_COARSE_SEGM_CHANNELS"],
        up_scale=given["UP_SCALE"],
    )


def _densepose_head(config: Config) -> DensePoseHeadConfig:
    place, given = "MODEL.ROI_DENSEPOSE_HEAD", config["MODEL"]["ROI_DENSEPOSE_HEAD"]
    _need(f"{place}.NAME", given["NAME"], "DensePoseV1ConvXHead", "DensePoseDeepLabHead")
    # The second is the first where no confidence is asked for.
    _need(
        f"{place}.PREDICTOR_NAME",
        given["PREDICTOR_NAME"],
        "DensePoseChartPredictor",
        "DensePoseChartWithConfidencePredictor",
    )
    for kind in ("UV_CONFIDENCE", "SEGM_CONFIDENCE"):
        if given[kind]["ENABLED"]:
            raise ModelError(f"{place}.{kind}.ENABLED is true; streamd builds DensePose without confidences alone")
    is_deeplab = given["NAME"] == "DensePoseDeepLabHead"
    if is_deeplab and given["DEEPLAB"]["NONLOCAL_ON"]:
        raise ModelError(f"{place}.DEEPLAB.NONLOCAL_ON is true; streamd builds DensePose's DeepLab head without it")
    norm = given["DEEPLAB"]["NORM"] if is_deeplab else ""
    _need(f"{place}.DEEPLAB.NORM", norm, "GN", "")
    return DensePoseHeadConfig(
        kind="deeplab" if is_deeplab else "convolutions",
        num_convs=given["NUM_STACKED_CONVS"],
        conv_dim=given["CONV_HEAD_DIM"],
        conv_kernel=given["CONV_HEAD_KERNEL"],
        deconv_kernel=given["DECONV_KERNEL"],
        norm=norm,
        rule=_densepose_rule(config),
        decoder=_densepose_decoder(config) if given["DECODER_ON"] else None,
        pooler=_pooler(config, "ROI_DENSEPOSE_HEAD"),
    )


def _densepose_decoder(config: Config) -> SemanticHeadConfig:
    given = config["MODEL"]["ROI_DENSEPOSE_HEAD"]
    return SemanticHeadConfig(
        in_features=tuple(config["MODEL"]["ROI_HEADS"]["IN_FEATURES"]),
        num_classes=given["DECODER_NUM_CLASSES"],
        conv_dim=given["DECODER_CONV_DIMS"],
        norm=given["DECODER_NORM"],
        stride=given["DECODER_COMMON_STRIDE"],
    )


def _res5(config: Config) -> Res5Config:
    resnet = backbones.resnet_config(config)
    if resnet.is_basic or resnet.deform_on_per_stage[-1]:
        raise ModelError(
            "MODEL.ROI_HEADS.NAME is 'Res5ROIHeads', which needs a ResNet-50 or deeper, not deformable in res5"
        )
    return Res5Config(
        num_hidden=resnet.num_groups * resnet.width_per_group * 8,
        num_out=resnet.num_res2_channels * 8,
        block=BlockConfig(num_groups=resnet.num_groups, stride_in_1x1=resnet.stride_in_1x1, norm=resnet.norm),
    )


_POOLERS: Mapping[str, Literal["align", "align_unshifted", "max"]] = {
    "ROIAlignV2": "align",
    "ROIAlign": "align_unshifted",
    "ROIPool": "max",
}


def _pooler(config: Config, head: str) -> PoolerConfig:
    given = config["MODEL"][head]
    _need(f"MODEL.{head}.POOLER_TYPE", given["POOLER_TYPE"], *_POOLERS)
    return PoolerConfig(
        resolution=given["POOLER_RESOLUTION"],
        sampling_ratio=given["POOLER_SAMPLING_RATIO"],
        kind=_POOLERS[given["POOLER_TYPE"]],
    )


def _need(key: str, value: str, *known: str) -> None:
    if value not in known:
        raise ModelError(f"{key} is {value!r}; streamd builds {', '.join(known)}")
