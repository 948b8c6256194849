"""ViTDet (arXiv:2203.16527): R-CNN on a plain vision transformer, from Detectron2's checkpoints.

    images -> Vit -> SimpleFeaturePyramid -> Rcnn, with a cascade where the checkpoint has one

Detectron2 configures it in Python, which is not run here. What the shapes of the weights do not say stands in a JSON
file beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
from torch import Tensor

from streamd.bounded import read_bytes
from streamd.errors import ModelError
from streamd.models.anchors import AnchorGrid
from streamd.models.box_head import BoxHeadConfig
from streamd.models.importers.datasets import labels_of
from streamd.models.mask_head import MaskHeadConfig
from streamd.models.rcnn import Rcnn, RcnnConfig
from streamd.models.roi_heads import RoiHeadsConfig
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.rpn import RpnConfig
from streamd.models.simple_pyramid import SimpleFeaturePyramid
from streamd.models.spec import MaskRule, ModelSpec, NmsRule, ResizeRule, just_above
from streamd.models.vit import Vit, VitConfig

# Of the stages of a cascade; a single stage has the first.
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_MAX_BYTES = 1 << 20  # of a description
_BOX_HEAD = "roi_heads.box_head"
_MASK_HEAD = "roi_heads.mask_head"


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the JSON file holds: names and defaults are those of Detectron2's constructors and ViTDet configurations."""

    meta_architecture: Literal["mask_rcnn_vitdet", "cascade_mask_rcnn_vitdet"]
    square_pad: int  # side of the padded images, input pixels
    input_format: Literal["RGB", "BGR"] = "RGB"
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # in the order of `input_format`
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    labels: tuple[str, ...] | None = None  # None: COCO's, if there are 80

    img_size: int
    patch_size: int = 16
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    window_size: int = 14
    window_block_indexes: tuple[int, ...]
    residual_block_indexes: tuple[int, ...] = ()
    pretrain_img_size: int = 224
    pretrain_use_cls_token: bool = True
    drop_path_rate: float = 0.0  # of training alone

    anchor_sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    anchor_aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    pre_nms_topk: int = 1000
    post_nms_topk: int = 1000
    rpn_nms_thresh: float = 0.7
    mask_pooler_resolution: int = 14
    use_sigmoid_ce: bool = False
    test_score_thresh: float = 0.05
    test_nms_thresh: float = 0.5
    test_topk_per_image: int = 100

    @property
    def vit(self) -> VitConfig:
        return VitConfig(
            input_size=(self.square_pad, self.square_pad),
            trained_size=self.img_size,
            pretrained_size=self.pretrain_img_size,
            class_token=self.pretrain_use_cls_token,
            absolute_positions=self.use_abs_pos,
            relative_positions=self.use_rel_pos,
            patch_size=self.patch_size,
            width=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            window_size=self.window_size,
            window_blocks=frozenset(self.window_block_indexes),
            residual_blocks=frozenset(self.residual_block_indexes),
        )


class _Weights:
    """The shapes of a checkpoint, from which the widths of the heads are read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter; raise ModelError if there is none of that name."""
        if name not in self._state:
            raise ModelError(f"the weights have no {name}: not a checkpoint of ViTDet as Detectron2 writes it")
        return tuple(self._state[name].shape)

    def num_out(self, pattern: str, start: int = 0) -> list[int]:
        """Return the output channels of layers whose names count up from `start`."""
        names = (pattern.format(index) for index in itertools.count(start))
        return [self.shape(name)[0] for name in itertools.takewhile(self.__contains__, names)]

    def norm(self, convolution: str) -> str:
        """Name the normalisation that follows a convolution.

        GroupNorm has parameters of the same names and shapes as the layer norm that ViTDet uses.
        """
        if f"{convolution}.norm.running_mean" in self:
            return "BN" if f"{convolution}.norm.num_batches_tracked" in self else "FrozenBN"
        return "LN" if f"{convolution}.norm.weight" in self else ""


def read(path: Path) -> Architecture:
    """Read the JSON file that describes a checkpoint. Raises ModelError."""
    try:
        return msgspec.json.decode(read_bytes(path, _MAX_BYTES), type=Architecture)
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err}") from err
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise ModelError(f"{path}: not a description of ViTDet: {err}") from err


def build(architecture: Architecture, state: Mapping[str, Tensor]) -> tuple[Rcnn, ModelSpec]:
    """Build the untrained network that the weights `state` fit, and its spec. Raises ModelError."""
    weights = _Weights(state)
    try:
        backbone = _backbone(architecture, weights)
        config = RcnnConfig(_rpn(architecture, weights, backbone), _roi_heads(architecture, weights, backbone))
        network = Rcnn(backbone, config)
    except ValueError as err:
        raise ModelError(f"these numbers make no network: {err}") from err
    return network, _spec(architecture, config)


def _backbone(architecture: Architecture, weights: _Weights) -> SimpleFeaturePyramid:
    levels = [level for level in range(8) if any(f"backbone.simfp_{level}.{i}.weight" in weights for i in (0, 1))]
    if not levels:
        raise ModelError("the weights have no backbone.simfp_2: not a checkpoint of ViTDet as Detectron2 writes it")
    # The last layer of a level is at 1 where nothing is doubled or pooled first.
    last = f"backbone.simfp_{int(math.log2(architecture.patch_size))}.1"
    return SimpleFeaturePyramid(
        Vit(architecture.vit),
        weights.shape(f"{last}.weight")[0],
        scales=[architecture.patch_size / 2**level for level in levels],
        norm=weights.norm(last),
    )


def _rpn(architecture: Architecture, weights: _Weights, backbone: SimpleFeaturePyramid) -> RpnConfig:
    head = "proposal_generator.rpn_head.conv"
    conv_dims = weights.num_out(head + ".conv{}.weight") or [weights.shape(f"{head}.weight")[0]]
    return RpnConfig(
        anchors=AnchorGrid(
            strides=tuple(backbone.strides.values()),
            sizes=architecture.anchor_sizes,
            aspect_ratios=(architecture.anchor_aspect_ratios,),
        ),
        in_features=tuple(backbone.strides),
        conv_dims=tuple(conv_dims),
        pre_nms_top_k=architecture.pre_nms_topk,
        post_nms_top_k=architecture.post_nms_topk,
        nms_threshold=architecture.rpn_nms_thresh,
    )


def _roi_heads(architecture: Architecture, weights: _Weights, backbone: SimpleFeaturePyramid) -> RoiHeadsConfig:
    is_cascade = architecture.meta_architecture.startswith("cascade")
    stage = ".0" if is_cascade else ""
    predictor = f"roi_heads.box_predictor{stage}"
    convs = weights.num_out(f"{_BOX_HEAD}{stage}.conv{{}}.weight", start=1)
    fcs = weights.num_out(f"{_BOX_HEAD}{stage}.fc{{}}.weight", start=1)
    num_pooled = convs[-1] if convs else next(iter(backbone.num_channels.values()))
    num_features = weights.shape(f"{_BOX_HEAD}{stage}.fc1.weight")[1]
    num_stages = len(weights.num_out("roi_heads.box_predictor.{}.cls_score.weight")) if is_cascade else 1
    return RoiHeadsConfig(
        num_classes=weights.shape(f"{predictor}.cls_score.weight")[0] - 1,
        in_features=tuple(backbone.strides)[:-1],
        box=BoxHeadConfig(
            num_convs=len(convs),
            conv_dim=num_pooled,
            num_fcs=len(fcs),
            fc_dim=fcs[-1],
            norm=weights.norm(f"{_BOX_HEAD}{stage}.conv1"),
            class_agnostic=weights.shape(f"{predictor}.bbox_pred.weight")[0] == 4,
            sigmoid=architecture.use_sigmoid_ce,
            pooler=PoolerConfig(math.isqrt(num_features // num_pooled)),
        ),
        box_weights=BOX_WEIGHTS[:num_stages],
        mask=_mask_head(architecture, weights),
    )


def _mask_head(architecture: Architecture, weights: _Weights) -> MaskHeadConfig | None:
    if f"{_MASK_HEAD}.predictor.weight" not in weights:
        return None
    num_masks, conv_dim = weights.shape(f"{_MASK_HEAD}.predictor.weight")[:2]
    return MaskHeadConfig(
        num_convs=len(weights.num_out(_MASK_HEAD + ".mask_fcn{}.weight", start=1)),
        conv_dim=conv_dim,
        norm=weights.norm(f"{_MASK_HEAD}.mask_fcn1"),
        class_agnostic=num_masks == 1,
        pooler=PoolerConfig(architecture.mask_pooler_resolution),
    )


def _spec(architecture: Architecture, config: RcnnConfig) -> ModelSpec:
    num_classes = config.roi_heads.num_classes
    labels = architecture.labels or labels_of(["coco"], num_classes)
    if len(labels) != num_classes:
        raise ModelError(f"{len(labels)} labels for weights of {num_classes} classes")
    side = architecture.square_pad
    return ModelSpec(
        name=architecture.meta_architecture,
        task="segment" if config.roi_heads.mask else "detect",
        labels=labels,
        input_size=(side, side),
        sized=True,
        colour="rgb" if architecture.input_format == "RGB" else "bgr",
        mean=architecture.pixel_mean,
        std=architecture.pixel_std,
        resize=ResizeRule(kind="shortest_edge", min_size=side, max_size=side, pad=None, antialias=True),
        nms=NmsRule(
            score_threshold=just_above(architecture.test_score_thresh),
            iou_threshold=architecture.test_nms_thresh,
            max_detections=architecture.test_topk_per_image,
        ),
        masks=MaskRule(kind="box") if config.roi_heads.mask else None,
    )
