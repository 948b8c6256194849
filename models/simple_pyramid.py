"""The feature pyramid of ViTDet: every level is made from the backbone's one map (arXiv:2203.16527, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import Backbone, ConvNorm, make_norm
from streamd.models.vit import Vit

SCALES = (4.0, 2.0, 1.0, 0.5)  # cells of a level per cell of the backbone's map, along each side


class SimpleFeaturePyramid(Backbone):
    """Turn images into maps p2, p3, ...: level n has 2^n input pixels a cell.

    `net` gives one map. With `extra_level` there is one more, every second cell of the coarsest. Attribute names follow
    Detectron2's checkpoints: `net`, `simfp_2`, `simfp_3`, ...
    """

    def __init__(
        self,
        net: Vit,
        num_out: int = 256,
        *,
        scales: Sequence[float] = SCALES,
        norm: str = "LN",
        extra_level: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.levels = tuple(int(math.log2(net.stride / scale)) for scale in scales)
        for level, scale in zip(self.levels, scales, strict=True):
            self.add_module(f"simfp_{level}", _stage(net.num_channels, num_out, scale, norm))
        self.strides = {f"p{level}": 2**level for level in self.levels}
        self.extra_level = f"p{self.levels[-1] + 1}" if extra_level else None
        if self.extra_level:
            self.strides[self.extra_level] = 2 ** (self.levels[-1] + 1)
        self.num_channels = dict.fromkeys(self.strides, num_out)
        self.size_divisor = max(net.stride, 2 ** self.levels[-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps by name, fine to coarse."""
        x = self.net(images)
        features = {f"p{level}": self.get_submodule(f"simfp_{level}")(x) for level in self.levels}
        if self.extra_level:
            features[self.extra_level] = F.max_pool2d(features[f"p{self.levels[-1]}"], kernel_size=1, stride=2)
        return features


def _stage(num_in: int, num_out: int, scale: float, norm: str) -> nn.Sequential:
    """Build the path from the backbone's map to one level. Raises ValueError for a scale that there is no path for."""
    resample: list[nn.Module]
    match scale:
        case 4.0:
            first_norm = make_norm(norm, num_in // 2) or nn.Identity()
            resample = [_double(num_in), first_norm, nn.GELU(), _double(num_in // 2)]
        case 2.0:
            resample = [_double(num_in)]
        case 1.0:
            resample = []
        case 0.5:
            resample = [nn.MaxPool2d(kernel_size=2, stride=2)]
        case _:
            raise ValueError(f"a feature pyramid has no level of scale {scale}: there are {SCALES}")
    num_hidden = num_in // max(1, int(scale))
    return nn.Sequential(
        *resample, ConvNorm(num_hidden, num_out, 1, norm=norm), ConvNorm(num_out, num_out, 3, norm=norm)
    )


def _double(num_in: int) -> nn.ConvTranspose2d:
    """Double both sides and halve the channels."""
    return nn.ConvTranspose2d(num_in, num_in // 2, kernel_size=2, stride=2)
