"""The box head of Fast R-CNN (arXiv:1504.08083): what a proposal shows, and where exactly.

Attribute names follow Detectron2's checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from streamd.models.anchors import decode_deltas
from streamd.models.layers import ConvNorm
from streamd.models.roi_pooler import PoolerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxHeadConfig:
    """The numbers of a box head and its predictor."""

    num_convs: int = 0
    conv_dim: int = 256
    num_fcs: int = 2
    fc_dim: int = 1024
    norm: str = ""  # of the convolutions
    class_agnostic: bool = False  # one box serves all classes
    sigmoid: bool = False  # classes are scored one by one instead of against each other
    pooler: PoolerConfig = field(default_factory=lambda: PoolerConfig(7))

    def num_out(self, num_in: int) -> int:
        """Return how many features the head makes of pooled features of `num_in` channels."""
        if self.num_fcs:
            return self.fc_dim
        return (self.conv_dim if self.num_convs else num_in) * self.pooler.resolution**2


def make_box_head(num_in: int, config: BoxHeadConfig) -> nn.Sequential:
    """Build what turns pooled features [N,C,S,S] into [N,D]: convolutions, then fully connected layers."""
    layers = OrderedDict[str, nn.Module]()
    for index in range(config.num_convs):
        layers[f"conv{index + 1}"] = ConvNorm(num_in, config.conv_dim, 3, norm=config.norm, relu=True)
        num_in = config.conv_dim
    layers["flatten"] = nn.Flatten()
    num_features = num_in * config.pooler.resolution**2
    for index in range(config.num_fcs):
        layer = nn.Linear(num_features, config.fc_dim)
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
        layers[f"fc{index + 1}"] = layer
        layers[f"fc_relu{index + 1}"] = nn.ReLU(inplace=True)
        num_features = config.fc_dim
    return nn.Sequential(layers)


class BoxPredictor(nn.Module):
    """Score the classes of each box, the background last, and say how to move its sides for each."""

    def __init__(self, num_in: int, num_classes: int, box_weights: Sequence[float], config: BoxHeadConfig) -> None:
        super().__init__()
        self.box_weights = tuple(box_weights)
        self.sigmoid = config.sigmoid
        self.num_boxes = 1 if config.class_agnostic else num_classes
        self.cls_score = nn.Linear(num_in, num_classes + 1)
        self.bbox_pred = nn.Linear(num_in, self.num_boxes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [N, classes + 1] and deltas [N, boxes * 4] of features [N,D]."""
        return self.cls_score(x), self.bbox_pred(x)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return how likely each class is [N, classes]; the background is left out."""
        logits = logits.float()
        return (logits.sigmoid() if self.sigmoid else logits.softmax(-1))[:, :-1]

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Move `boxes` [B,P,4] by deltas [B * P, boxes * 4]: [B, P, boxes, 4], float32."""
        each = deltas.reshape(*boxes.shape[:2], self.num_boxes, 4)
        return decode_deltas(each, boxes[:, :, None], self.box_weights)
