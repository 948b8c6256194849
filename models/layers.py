"""Convolution, normalisation and activation as one module, which the backbones and heads share.

Attribute names follow Detectron2's checkpoints: `weight` and `bias` are the convolution's, `norm.*` follow it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 32  # of GroupNorm, wherever Detectron2 uses it


class Backbone(nn.Module):
    """A network that turns images [B,3,H,W] into feature maps by name."""

    num_channels: dict[str, int]  # of each map that it gives
    strides: dict[str, int]  # input pixels per cell
    size_divisor: int = 1  # H and W of the images must be multiples of it


class LayerNorm2d(nn.Module):
    """Normalise each position of a [B,C,H,W] map over its channels."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last memory both permutations are views.
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics, scale and shift are fixed and not trained."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Not as torchvision multiplies and adds: Detectron2 rounds so, and torch fuses this into the convolution.
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm without the look at the batch size, which a trace would warn of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def make_norm(name: str, num_channels: int) -> nn.Module | None:
    """Build a normalisation by Detectron2's name for it; "" is none. Raises ValueError.

    The synchronised kinds of batch norm differ from BN in training alone, where several processes call
    `nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    match name:
        case "":
            return None
        case "FrozenBN":
            return FrozenBatchNorm2d(num_channels)
        case "BN" | "SyncBN" | "nnSyncBN" | "naiveSyncBN" | "naiveSyncBN_N":
            return nn.BatchNorm2d(num_channels)
        case "GN":
            return GroupNorm(NUM_GROUPS, num_channels)
        case "LN":
            return LayerNorm2d(num_channels)
    raise ValueError(f"{name!r}: no such normalisation; there are FrozenBN, BN, SyncBN, GN, LN and '' for none")


class ConvNorm(nn.Conv2d):
    """Convolve, normalise, activate; the padding keeps the size where the stride is 1.

    `bias` is by default there where no normalisation follows.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: str = "",
        relu: bool = False,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            num_in,
            num_out,
            kernel,
            stride,
            padding=kernel // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=norm == "" if bias is None else bias,
        )
        self.norm = make_norm(norm, num_out)
        self.relu = relu

    def reset_parameters(self) -> None:
        """Draw weights that keep the variance through a ReLU (He et al., 2015, arXiv:1502.01852)."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(super().forward(x))

    def finish(self, x: Tensor) -> Tensor:
        """Normalise and activate what was convolved."""
        if self.norm is not None:
            x = self.norm(x)
        return F.relu_(x) if self.relu else x


def static_size(x: Tensor) -> tuple[int, int]:
    """Return the height and width of a feature map as plain numbers, which a trace keeps as constants.

    An artifact is for one input size, so that they may be constants; the batch size may not.
    """
    if not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return x.shape[-2], x.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return int(x.shape[-2]), int(x.shape[-1])
