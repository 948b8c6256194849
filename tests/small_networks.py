"""Small networks of every family that is trained, and made-up pictures for them to learn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from streamd.models import deeplab
from streamd.models.anchors import AnchorGrid
from streamd.models.box_head import BoxHeadConfig
from streamd.models.fcos import Fcos, FcosConfig
from streamd.models.fpn import ConvLevels, Fpn, MaxPoolLevel
from streamd.models.keypoint_head import KeypointHeadConfig
from streamd.models.layers import Backbone, ConvNorm
from streamd.models.mask_head import MaskHeadConfig
from streamd.models.panoptic import PanopticFpn
from streamd.models.rcnn import CASCADE_WEIGHTS, Rcnn, RcnnConfig
from streamd.models.resnet import BlockConfig
from streamd.models.retinanet import Retinanet, RetinanetConfig
from streamd.models.roi_heads import Res5Config, RoiHeadsConfig
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.rpn import RpnConfig
from streamd.models.semantic import SemanticHeadConfig, SemanticSegmenter
from streamd.models.ssd import Ssd
from streamd.models.yolox import YOLOX
from streamd.train.targets import Targets, TrainBatch

NUM_CLASSES = 3
NUM_KEYPOINTS = 2
NUM_STUFF = 2  # channels of `semantic`: things, and the rest
INPUT_SIZE = (64, 96)
WIDTH = 32

BOX = BoxHeadConfig(num_fcs=1, fc_dim=32, pooler=PoolerConfig(5))
MASK = MaskHeadConfig(num_convs=1, conv_dim=16, pooler=PoolerConfig(7))
KEYPOINTS = KeypointHeadConfig(num_keypoints=NUM_KEYPOINTS, conv_dims=(16,), pooler=PoolerConfig(7))
SEMANTIC = SemanticHeadConfig(num_classes=NUM_STUFF, conv_dim=WIDTH)


class Body(Backbone):
    """Halve images five times, by one convolution each; there is no batch norm, so images do not meet."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 16, 24, 32, 32)
        names = ("stem", "res2", "res3", "res4", "res5")
        for name, num_in, num_out in zip(names, (3, *widths), widths, strict=False):
            self.add_module(name, ConvNorm(num_in, num_out, 3, stride=2, relu=True))
        self.num_channels = dict(zip(names[1:], widths[1:], strict=True))
        self.strides = {name: 4 << index for index, name in enumerate(self.num_channels)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, features = self.get_submodule("stem")(images), {}
        for name in self.num_channels:
            x = features[name] = self.get_submodule(name)(x)
        return features


def yolox(num_prototypes: int = 0) -> YOLOX:
    return YOLOX(8, 1, num_classes=NUM_CLASSES, num_prototypes=num_prototypes, input_size=INPUT_SIZE)


def rcnn(
    *,
    box: BoxHeadConfig = BOX,
    weights: tuple[tuple[float, ...], ...] = CASCADE_WEIGHTS[:1],
    mask: MaskHeadConfig | None = None,
    keypoints: KeypointHeadConfig | None = None,
    semantic: SemanticHeadConfig | None = None,
) -> Rcnn:
    backbone = Fpn(Body(), ("res2", "res3", "res4", "res5"), WIDTH, top_block=MaxPoolLevel())
    anchors = AnchorGrid(tuple(backbone.strides.values()), ((8.0,), (16.0,), (32.0,), (48.0,), (64.0,)), ((0.5, 1, 2),))
    heads = RoiHeadsConfig(num_classes=NUM_CLASSES, box=box, box_weights=weights, mask=mask, keypoints=keypoints)
    config = RcnnConfig(RpnConfig(anchors), heads)
    return PanopticFpn(backbone, config, semantic) if semantic else Rcnn(backbone, config)


def mask_rcnn_c4() -> Rcnn:
    body = Body()
    del body.res5, body.num_channels["res5"], body.strides["res5"]
    anchors = AnchorGrid((16,), ((8.0, 16.0, 32.0, 64.0),), ((0.5, 1, 2),))
    res5 = Res5Config(num_hidden=8, num_out=16, block=BlockConfig(norm="FrozenBN"))
    heads = RoiHeadsConfig(num_classes=NUM_CLASSES, in_features=("res4",), box=BOX, mask=MASK, res5=res5)
    return Rcnn(body, RcnnConfig(RpnConfig(anchors, in_features=("res4",)), heads))


def retinanet() -> Retinanet:
    sizes = tuple((side, 1.4 * side) for side in (12.0, 24.0, 48.0, 64.0, 96.0))
    backbone = Fpn(Body(), ("res3", "res4", "res5"), WIDTH, top_block=ConvLevels(32, WIDTH))
    anchors = AnchorGrid(tuple(backbone.strides.values()), sizes, ((0.5, 1.0, 2.0),))
    return Retinanet(backbone, RetinanetConfig(NUM_CLASSES, anchors, num_convs=1))


def fcos() -> Fcos:
    backbone = Fpn(Body(), ("res3", "res4", "res5"), WIDTH, top_block=ConvLevels(WIDTH, WIDTH, "p5"))
    strides = tuple(backbone.strides.values())
    anchors = AnchorGrid(strides, tuple((float(stride),) for stride in strides), ((1.0,),))
    return Fcos(backbone, FcosConfig(NUM_CLASSES, anchors, num_convs=1))


class SsdBody(nn.Module):
    """Give the maps of stride 16 and 32, as SSD's backbones do."""

    out_channels = (32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        features = self.body(images)
        return OrderedDict((name, features[name]) for name in ("res4", "res5"))


def ssd() -> Ssd:
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9], steps=[16, 32])
    return Ssd(SSD(SsdBody(), boxes, INPUT_SIZE, NUM_CLASSES + 1), INPUT_SIZE)


def segmenter() -> SemanticSegmenter:
    return SemanticSegmenter(Fpn(Body(), ("res2", "res3", "res4", "res5"), WIDTH), SEMANTIC)


def deeplab_mobilenet() -> nn.Module:
    return deeplab.build("deeplabv3_mobilenet_v3_large", ("rest", "thing"), INPUT_SIZE)[0]


CASCADE_BOX = BoxHeadConfig(num_fcs=1, fc_dim=32, pooler=PoolerConfig(5), class_agnostic=True)
SIGMOID_BOX = BoxHeadConfig(num_fcs=1, fc_dim=32, pooler=PoolerConfig(5), class_agnostic=True, sigmoid=True)

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "yolox": yolox,
    "yolox_masks": lambda: yolox(8),
    "faster_rcnn": rcnn,
    "faster_rcnn_sigmoid": lambda: rcnn(box=SIGMOID_BOX),
    "mask_rcnn": lambda: rcnn(mask=MASK),
    "mask_rcnn_c4": mask_rcnn_c4,
    "cascade_mask_rcnn": lambda: rcnn(box=CASCADE_BOX, weights=CASCADE_WEIGHTS, mask=MASK),
    "keypoint_rcnn": lambda: rcnn(keypoints=KEYPOINTS),
    "panoptic_fpn": lambda: rcnn(mask=MASK, semantic=SEMANTIC),
    "retinanet": retinanet,
    "fcos": fcos,
    "ssd": ssd,
    "semantic_fpn": segmenter,
    "deeplab": deeplab_mobilenet,
}


def make(name: str) -> nn.Module:
    """Build a network of NETWORKS, always with the same weights."""
    torch.manual_seed(0)
    return NETWORKS[name]()


def picture(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> tuple[Tensor, Targets]:
    """Draw ellipses within boxes, each in the colour of its label, and say what they are: [3,H,W] and targets."""
    height, width = INPUT_SIZE
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    index = torch.tensor(labels, dtype=torch.int64)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centres = 0.5 * (corners[:, :2] + corners[:, 2:])
    radii = (0.5 * (corners[:, 2:] - corners[:, :2]))[:, :, None, None]
    distance = ((torch.stack((x, y)) - centres[:, :, None, None]) / radii).square().sum(1)
    masks = distance <= 1
    image = 0.1 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    for mask, label in zip(masks, labels, strict=True):
        image = torch.where(mask, 2 * F.one_hot(torch.tensor(label), 3).float()[:, None, None], image)
    ends = torch.stack((corners[:, :2] + 1, corners[:, 2:] - 1), dim=1).reshape(-1, NUM_KEYPOINTS, 2)
    keypoints = torch.cat((ends, torch.full_like(ends[..., :1], 2)), dim=-1)
    return image, Targets(corners, index, torch.zeros(0, 4), masks, keypoints, masks.any(0).long())


def batch_of(*pictures: tuple[Tensor, Targets]) -> TrainBatch:
    images, targets = zip(*pictures, strict=True)
    sizes = torch.tensor([INPUT_SIZE] * len(images), dtype=torch.float32)
    return TrainBatch(torch.stack(images), sizes, tuple(targets))


def some_batch() -> TrainBatch:
    """Return four pictures with different numbers of objects."""
    return batch_of(
        picture([(8, 10, 40, 50), (50, 6, 70, 30)], [0, 1]),
        picture([(20, 20, 80, 60)], [2]),
        picture([(4, 4, 20, 20), (30, 8, 60, 24), (62, 30, 90, 60)], [1, 1, 0]),
        picture([(10, 30, 34, 60), (40, 10, 90, 50)], [2, 1]),
    )
