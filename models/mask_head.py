"""The mask head of Mask R-CNN (arXiv:1703.06870): a small mask of each class for each box.

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import ConvNorm
from streamd.models.roi_pooler import PoolerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskHeadConfig:
    """The numbers of a mask head."""

    num_convs: int = 4
    conv_dim: int = 256  # channels of the convolutions, and of what they are scaled up to
    norm: str = ""
    class_agnostic: bool = False  # one mask serves all classes
    pooler: PoolerConfig = field(default_factory=lambda: PoolerConfig(14))


class MaskHead(nn.Module):
    """Turn pooled features [N,C,S,S] into mask logits [N, classes, 2 S, 2 S]."""

    def __init__(self, num_in: int, num_classes: int, config: MaskHeadConfig) -> None:
        super().__init__()
        self.convs: list[str] = []
        for index in range(config.num_convs):
            name = f"mask_fcn{index + 1}"
            self.add_module(name, ConvNorm(num_in, config.conv_dim, 3, norm=config.norm, relu=True))
            self.convs.append(name)
            num_in = config.conv_dim
        self.deconv = nn.ConvTranspose2d(num_in, config.conv_dim, 2, stride=2)
        self.predictor = nn.Conv2d(config.conv_dim, 1 if config.class_agnostic else num_classes, 1)
        self.class_agnostic = config.class_agnostic
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for bias in (self.deconv.bias, self.predictor.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.convs:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.predictor(F.relu_(self.deconv(x)))
        return logits

    def probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the masks [B,N,2 S,2 S] of `labels` [B,N], of logits [B * N, classes, 2 S, 2 S]."""
        if not self.class_agnostic:
            index = labels.flatten()[:, None, None, None].expand(-1, -1, *logits.shape[2:])
            logits = logits.gather(1, index)
        chosen = logits[:, 0].float().sigmoid()
        return chosen.reshape(*labels.shape, *chosen.shape[1:])
