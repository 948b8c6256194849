"""The numbers of the losses: thresholds, sample sizes and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

Normalization = Literal["image", "batch"]

_STRICT = {"extra": "forbid"}  # for recipes, where a slip must not be silent


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloxLossConfig:
    """YOLOX's numbers; the defaults are those of its authors and YOLACT's."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    centre_radius: float = 1.5  # cells: an object may have those whose centre is so near to its own
    num_candidates: int = 10  # an object gets as many cells as the IoUs of its best ones add up to
    iou_cost: float = 3.0  # weight of the IoU against the class where cells are assigned
    box_weight: float = 5.0
    l1_weight: float = 0.0  # 1 in the authors' last epochs, those without mosaic
    mask_weight: float = 6.125
    max_masks: int = 64  # cells of an image whose masks are compared
    min_cells: int = 10  # by which an image's losses are divided at least, where each is divided by its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RpnLossConfig:
    """The first stage's numbers; the defaults are Detectron2's for a pyramid."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    iou_thresholds: tuple[float, float] = (0.3, 0.7)  # below the first is background, from the second on an object
    num_samples: int = 256  # anchors of an image that are trained on
    positive_fraction: float = 0.5  # of them, at most
    smooth_l1_beta: float = 0.0  # where the square becomes a line; 0: the absolute difference
    box_weight: float = 1.0
    pre_nms_top_k: int = 2000  # proposals of each level
    post_nms_top_k: int = 1000  # proposals of each image


@dataclass(frozen=True, slots=True, kw_only=True)
class RoiHeadsLossConfig:
    """The second stage's numbers; the defaults are Detectron2's."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    iou_thresholds: tuple[float, ...] = (0.5, 0.6, 0.7)  # of each stage; those beyond have the last
    num_samples: int = 512  # proposals of an image that are trained on
    positive_fraction: float = 0.25  # of them, at most
    smooth_l1_beta: float = 0.0
    box_weight: float = 1.0
    mask_weight: float = 1.0
    keypoint_weight: float = 1.0
    masks_aligned: bool = True  # objects' masks are pooled at half-pixel centres; torchvision's are not
    masks_binary: bool = True  # and then cut at one half; torchvision leaves them soft


@dataclass(frozen=True, slots=True, kw_only=True)
class RetinanetLossConfig:
    """RetinaNet's numbers; the defaults are Detectron2's."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    iou_thresholds: tuple[float, float] = (0.4, 0.5)
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    smooth_l1_beta: float = 0.1
    box_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FcosLossConfig:
    """FCOS's numbers; the defaults are Detectron2's and torchvision's alike."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    centre_radius: float = 1.5  # cells: an object may have those whose centre is so near to its own
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_weight: float = 1.0
    centreness_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdLossConfig:
    """SSD's numbers; the defaults are torchvision's."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    iou_threshold: float = 0.5
    num_negatives: int = 3  # anchors of background for each anchor of an object, the worst of them
    box_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """All of them, and what each sum over a batch is divided by.

    - image: each image's loss by its own count, then the mean over the images. Two batches of 4 then give what one of
      8 does, however a step is divided among processes or done piece by piece.
    - batch: the whole batch's loss by its count, as the authors of most networks do
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    normalization: Normalization = "image"
    yolox: YoloxLossConfig = field(default_factory=YoloxLossConfig)
    rpn: RpnLossConfig = field(default_factory=RpnLossConfig)
    roi_heads: RoiHeadsLossConfig = field(default_factory=RoiHeadsLossConfig)
    retinanet: RetinanetLossConfig = field(default_factory=RetinanetLossConfig)
    fcos: FcosLossConfig = field(default_factory=FcosLossConfig)
    ssd: SsdLossConfig = field(default_factory=SsdLossConfig)
    semantic_weight: float = 1.0
    panoptic_semantic_weight: float = 0.5  # beside the losses of objects


def as_torchvision(*, normalization: Normalization = "batch") -> LossConfig:
    """Return the numbers with which R-CNN, RetinaNet, FCOS and SSD are trained by torchvision.

    Its RetinaNet alone has the normalization `image`.
    """
    return LossConfig(
        normalization=normalization,
        rpn=RpnLossConfig(smooth_l1_beta=1 / 9, post_nms_top_k=2000),
        roi_heads=RoiHeadsLossConfig(smooth_l1_beta=1 / 9, masks_aligned=False, masks_binary=False),
        retinanet=RetinanetLossConfig(smooth_l1_beta=0.0),
    )
