"""The plain vision transformer of ViTDet (Li et al., 2022, arXiv:2203.16527): one scale, attention in windows.

    images -> patches + positions -> blocks (windows, or the whole picture) -> one map of `patch_size` pixels a cell

Attribute names follow Detectron2's checkpoints, so that their state-dict keys load as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.models.layers import LayerNorm2d

EPS = 1e-6  # of the normalisations over tokens, as ViTDet's configurations have it

Grid = tuple[int, int]  # rows, columns of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """The numbers of a plain ViT; the defaults are those of ViTDet-B."""

    input_size: tuple[int, int] = (1024, 1024)  # height, width in pixels of the padded images
    trained_size: int = 1024  # side in pixels for which the relative positions of the global blocks were learned
    pretrained_size: int = 224  # side in pixels for which the absolute positions were learned
    class_token: bool = True  # the absolute positions begin with one of a class token, which takes no part
    absolute_positions: bool = True
    relative_positions: bool = True
    patch_size: int = 16
    width: int = 768  # channels of a token
    depth: int = 12  # blocks
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    window_size: int = 14  # tokens; 0: every block sees the whole picture
    window_blocks: frozenset[int] = frozenset((0, 1, 3, 4, 6, 7, 9, 10))
    residual_blocks: frozenset[int] = frozenset()  # blocks that end with convolutions

    @property
    def grid(self) -> Grid:
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def pretrained_side(self) -> int:
        return self.pretrained_size // self.patch_size


class PatchEmbedding(nn.Module):
    """Turn each patch of pixels into a token: [B, rows, columns, width]."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images)
        return tokens.permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Attend over a grid of tokens, with a bias for how far two tokens lie apart along each axis.

    The bias is q . R_h[rows apart] + q . R_w[columns apart] (MViTv2, arXiv:2112.01526, equation 4). `trained_grid` is
    the grid that the learned R were made for; they are stretched to another one. None: no bias.
    """

    rows_apart: Tensor
    columns_apart: Tensor

    def __init__(self, width: int, num_heads: int, grid: Grid, trained_grid: Grid | None, *, qkv_bias: bool) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{width} channels cannot be split over {num_heads} heads")
        self.num_heads = num_heads
        self.grid = grid
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.trained_grid = trained_grid
        if trained_grid is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * trained_grid[0] - 1, width // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * trained_grid[1] - 1, width // num_heads))
            # Buffers, because a trace would keep the device where it made them; not part of the state dict.
            self.register_buffer("rows_apart", distances(grid[0]), persistent=False)
            self.register_buffer("columns_apart", distances(grid[1]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return tokens [B, rows, columns, width]."""
        heads = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.trained_grid is None else self.position_bias(query)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        y: Tensor = self.proj(attended.transpose(1, 2).flatten(2).unflatten(1, self.grid))
        return y

    def position_bias(self, query: Tensor) -> Tensor:
        """Return what the distance of two tokens adds to their logit [B, heads, N, N], of queries [B, heads, N, c]."""
        assert self.trained_grid is not None
        by_cell = query.unflatten(2, self.grid)
        by_row, by_column = (
            stretch_table(table, trained, size)[apart]
            for table, trained, size, apart in zip(
                (self.rel_pos_h, self.rel_pos_w),
                self.trained_grid,
                self.grid,
                (self.rows_apart, self.columns_apart),
                strict=True,
            )
        )
        of_row = torch.einsum("bnhwc,hkc->bnhwk", by_cell, by_row)
        of_column = torch.einsum("bnhwc,wkc->bnhwk", by_cell, by_column)
        return (of_row[..., :, None] + of_column[..., None, :]).flatten(4).flatten(2, 3)


def distances(size: int) -> Tensor:
    """Return how far each query lies from each key, as the row of a table whose middle is no distance: [size, size]."""
    index = torch.arange(size)
    return index[:, None] - index + size - 1


def stretch_table(table: Tensor, trained: int, size: int) -> Tensor:
    """Stretch a table [2 trained - 1, c], of distances 1 - trained to trained - 1, linearly to another size."""
    if trained == size:
        return table
    return F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T


class Mlp(nn.Module):
    def __init__(self, width: int, num_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, num_hidden)
        self.fc2 = nn.Linear(num_hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class ConvBottleneck(nn.Module):
    """Let neighbouring tokens of different windows see each other: 1x1, 3x3, 1x1, and the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width // 2, 1, bias=False)
        self.norm1 = LayerNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 1, bias=False)
        self.norm3 = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm1(self.conv1(x)))
        y = F.gelu(self.norm2(self.conv2(y)))
        return x + self.norm3(self.conv3(y))


class Block(nn.Module):
    """Attend, in windows or over the whole grid, then mix channels; both add to what came in."""

    def __init__(self, config: VitConfig, index: int) -> None:
        super().__init__()
        self.grid = config.grid
        self.window = config.window_size if index in config.window_blocks else 0
        side = self.window or config.trained_size // config.patch_size
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(
            config.width,
            config.num_heads,
            grid=(self.window, self.window) if self.window else config.grid,
            trained_grid=(side, side) if config.relative_positions else None,
            qkv_bias=config.qkv_bias,
        )
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.residual = ConvBottleneck(config.width) if index in config.residual_blocks else None

    def forward(self, x: Tensor) -> Tensor:
        """Take and return tokens [B, rows, columns, width]."""
        y = self.norm1(x)
        if self.window:
            y = join_windows(self.attn(split_windows(y, self.grid, self.window)), self.grid, self.window)
        else:
            y = self.attn(y)
        x = x + y
        x = x + self.mlp(self.norm2(x))
        if self.residual is not None:
            x = self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x


def split_windows(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Cut tokens [B, rows, columns, c] into squares [B * windows, side, side, c].

    Zeros are added at the bottom and at the right until squares fit; they take part in the attention, as in training.
    """
    rows, columns = (math.ceil(length / side) for length in grid)
    padded = F.pad(x, (0, 0, 0, columns * side - grid[1], 0, rows * side - grid[0]))
    squares = padded.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
    return squares.flatten(0, 2)


def join_windows(windows: Tensor, grid: Grid, side: int) -> Tensor:
    """Undo `split_windows`."""
    rows, columns = (math.ceil(length / side) for length in grid)
    squares = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return squares.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


class Vit(nn.Module):
    """Turn images [B,3,H,W] of the configuration's size into one feature map [B, width, H / patch, W / patch]."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        if any(side <= 0 or side % config.patch_size for side in config.input_size):
            raise ValueError(
                f"input_size is {config.input_size}: both sides must be multiples of the patch, {config.patch_size}"
            )
        self.config = config
        self.num_channels = config.width
        self.stride = config.patch_size
        self.patch_embed = PatchEmbedding(config.width, config.patch_size)
        if config.absolute_positions:
            num_positions = config.pretrained_side**2 + config.class_token
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, config.width))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        if self.config.absolute_positions:
            table = self.pos_embed[:, 1:] if self.config.class_token else self.pos_embed
            x = x + stretch_positions(table, self.config.pretrained_side, self.config.grid)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def stretch_positions(table: Tensor, side: int, grid: Grid) -> Tensor:
    """Lay a table [1, side * side, c] out over a grid, [1, rows, columns, c], bicubically where that is another one."""
    square = table.unflatten(1, (side, side))
    if grid == (side, side):
        return square
    return F.interpolate(square.permute(0, 3, 1, 2), grid, mode="bicubic").permute(0, 2, 3, 1)
