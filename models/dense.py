"""What detectors share that predict at every cell of a pyramid (RetinaNet, FCOS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamd.models.layers import make_norm, static_size


class LevelNorm(nn.Module):
    """Batch norm with statistics for each level and one scale and shift for all (Detectron2's CycleBatchNormList)."""

    def __init__(self, num_levels: int, num_channels: int) -> None:
        super().__init__()
        for level in range(num_levels):
            self.add_module(str(level), nn.BatchNorm2d(num_channels, affine=False))
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        y: Tensor = self.get_submodule(str(level))(x)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Subnet(nn.Sequential):
    """3x3 convolutions of one width, each with a normalisation by choice and a ReLU, shared by all levels."""

    def __init__(self, num_channels: int, num_convs: int, norm: str, num_levels: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            layers.append(predictor(num_channels, num_channels))
            if norm in ("BN", "SyncBN"):
                layers.append(LevelNorm(num_levels, num_channels))
            elif (shared := make_norm(norm, num_channels)) is not None:
                layers.append(shared)
            layers.append(nn.ReLU())
        super().__init__(*layers)

    def forward(self, x: Tensor, level: int) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, level) if isinstance(layer, LevelNorm) else layer(x)
        return x


def predictor(num_in: int, num_out: int, prior: float | None = None) -> nn.Conv2d:
    """Build a 3x3 convolution whose outputs begin near 0, or near the logit of the probability `prior`."""
    conv = nn.Conv2d(num_in, num_out, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, 0.0 if prior is None else -math.log((1 - prior) / prior))
    return conv


def list_cells(x: Tensor, num_values: int) -> Tensor:
    """List the predictions of a map [B,A*V,h,w] as [B,h*w*A,V]: cells row by row, and the anchors of each."""
    # In channels_last memory both steps are views.
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, num_values))


def best_pairs(scores: Tensor, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return score, index into N and class of the `num_pairs` best (candidate, class) pairs of `scores` [B,N,C].

    Each is [B,K] by falling score, with K = min(num_pairs, N*C).
    """
    num_candidates, num_classes = static_size(scores)
    # No pair among the best belongs to a candidate whose best class is not: so few of the N*C scores need sorting.
    candidates = scores.amax(dim=-1).topk(min(num_pairs, num_candidates), dim=1).indices
    rows = scores.gather(1, candidates[..., None].expand(-1, -1, num_classes)).flatten(1)
    best, index = rows.topk(min(num_pairs, static_size(rows)[1]), dim=1)
    return best, candidates.gather(1, index // num_classes), index % num_classes


def take(boxes: Tensor, index: Tensor) -> Tensor:
    """Pick the rows `index` [B,K] of `boxes` [B,N,4], or of [N,4] for all images."""
    return boxes[index] if boxes.ndim == 2 else boxes.gather(1, index[..., None].expand(-1, -1, 4))


def join_levels(levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Join boxes [B,K,4], scores [B,K] and labels [B,K] of all levels into the output of `forward`."""
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    return {"boxes": boxes, "scores": scores, "labels": labels}
