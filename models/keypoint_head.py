"""The keypoint head of Mask R-CNN (arXiv:1703.06870, section 5): a heat map of each keypoint for each box.

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import ConvNorm
from streamd.models.roi_pooler import PoolerConfig

COCO_KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)


def keypoint_names(num_keypoints: int) -> tuple[str, ...]:
    """Name the keypoints of a network: COCO's where it has as many, else keypoint_0, keypoint_1, ..."""
    if num_keypoints == len(COCO_KEYPOINTS):
        return COCO_KEYPOINTS
    return tuple(f"keypoint_{index}" for index in range(num_keypoints))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeypointHeadConfig:
    """The numbers of a keypoint head."""

    num_keypoints: int = 17
    conv_dims: tuple[int, ...] = (512,) * 8  # channels of the convolutions
    pooler: PoolerConfig = field(default_factory=lambda: PoolerConfig(14))


class KeypointHead(nn.Module):
    """Turn pooled features [N,C,S,S] into logits [N, keypoints, 4 S, 4 S]."""

    def __init__(self, num_in: int, config: KeypointHeadConfig) -> None:
        super().__init__()
        self.convs: list[str] = []
        for index, num_out in enumerate(config.conv_dims):
            name = f"conv_fcn{index + 1}"
            self.add_module(name, ConvNorm(num_in, num_out, 3, relu=True))
            self.convs.append(name)
            num_in = num_out
        self.score_lowres = nn.ConvTranspose2d(num_in, config.num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.score_lowres.weight, mode="fan_out", nonlinearity="relu")
        assert self.score_lowres.bias is not None
        nn.init.zeros_(self.score_lowres.bias)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.convs:
            x = self.get_submodule(name)(x)
        return F.interpolate(self.score_lowres(x), scale_factor=2.0, mode="bilinear", align_corners=False)
