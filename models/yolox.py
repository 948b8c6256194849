"""YOLOX (Ge et al., 2021, arXiv:2107.08430): anchor-free detectors from nano to x, with an optional mask branch.

    images -> CSPDarknet -> PAFPN -> decoupled head -> boxes, scores
                              `---> protonet        -> prototypes, coefficients   (YOLACT, arXiv:1904.02689)

Attribute names follow the official checkpoints, so that their state-dict keys load as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)  # input pixels per cell of the three levels
PRIOR = 0.01  # probability that an untrained head gives to each class, as in focal loss (arXiv:1708.02002)


class ConvBlock(nn.Module):
    """Convolve, normalise, activate."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class SeparableConvBlock(nn.Module):
    """Convolve each channel by itself, then mix the channels."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = ConvBlock(num_in, num_in, kernel, stride, groups=num_in)
        self.pconv = ConvBlock(num_in, num_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pconv(self.dconv(x))
        return y


def spatial_conv(num_in: int, num_out: int, stride: int = 1, *, depthwise: bool) -> nn.Module:
    """Build a 3x3 block, separable where the variant asks for it."""
    block = SeparableConvBlock if depthwise else ConvBlock
    return block(num_in, num_out, 3, stride)


class Focus(nn.Module):
    """Fold each 2x2 patch of pixels into channels, then convolve."""

    def __init__(self, num_out: int) -> None:
        super().__init__()
        self.conv = ConvBlock(12, num_out, 3)

    def forward(self, images: Tensor) -> Tensor:
        even, odd = images[..., ::2, :], images[..., 1::2, :]
        # Column by column: top left, bottom left, top right, bottom right. pixel_unshuffle has another order.
        patches = (even[..., ::2], odd[..., ::2], even[..., 1::2], odd[..., 1::2])
        y: Tensor = self.conv(torch.cat(patches, dim=1))
        return y


class Bottleneck(nn.Module):
    def __init__(self, num_channels: int, *, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(num_channels, num_channels, 1)
        self.conv2 = spatial_conv(num_channels, num_channels, depthwise=depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.shortcut else y


class CspLayer(nn.Module):
    """Send half of the channels through bottlenecks and join them with the other half (CSPNet, arXiv:1911.11929)."""

    def __init__(
        self, num_in: int, num_out: int, num_bottlenecks: int, *, shortcut: bool = False, depthwise: bool
    ) -> None:
        super().__init__()
        num_hidden = num_out // 2
        self.conv1 = ConvBlock(num_in, num_hidden, 1)
        self.conv2 = ConvBlock(num_in, num_hidden, 1)
        self.conv3 = ConvBlock(2 * num_hidden, num_out, 1)
        self.m = nn.Sequential(
            *(Bottleneck(num_hidden, shortcut=shortcut, depthwise=depthwise) for _ in range(num_bottlenecks))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
        return y


class SpatialPyramidPooling(nn.Module):
    """Join the maxima over 5x5, 9x9 and 13x13 windows."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(num_in, num_in // 2, 1)
        self.conv2 = ConvBlock(num_in * 2, num_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        # Maxima nest: 5x5 twice is 9x9, three times 13x13, for a fraction of the comparisons.
        over_5 = F.max_pool2d(x, 5, stride=1, padding=2)
        over_9 = F.max_pool2d(over_5, 5, stride=1, padding=2)
        over_13 = F.max_pool2d(over_9, 5, stride=1, padding=2)
        y: Tensor = self.conv2(torch.cat((x, over_5, over_9, over_13), dim=1))
        return y


class CspDarknet(nn.Module):
    """Turn images into features at strides 8, 16 and 32, of 4, 8 and 16 times `width` channels."""

    def __init__(self, width: int, depth: int, *, depthwise: bool) -> None:
        super().__init__()

        def stage(num_in: int, num_bottlenecks: int) -> nn.Sequential:
            return nn.Sequential(
                spatial_conv(num_in, 2 * num_in, stride=2, depthwise=depthwise),
                CspLayer(2 * num_in, 2 * num_in, num_bottlenecks, shortcut=True, depthwise=depthwise),
            )

        self.stem = Focus(width)
        self.dark2 = stage(width, depth)
        self.dark3 = stage(2 * width, 3 * depth)
        self.dark4 = stage(4 * width, 3 * depth)
        self.dark5 = nn.Sequential(
            spatial_conv(8 * width, 16 * width, stride=2, depthwise=depthwise),
            SpatialPyramidPooling(16 * width, 16 * width),
            CspLayer(16 * width, 16 * width, depth, depthwise=depthwise),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride_8 = self.dark3(self.dark2(self.stem(images)))
        stride_16 = self.dark4(stride_8)
        return stride_8, stride_16, self.dark5(stride_16)


class Pafpn(nn.Module):
    """Mix the levels downwards, then upwards (PANet, arXiv:1803.01534)."""

    def __init__(self, width: int, depth: int, *, depthwise: bool) -> None:
        super().__init__()
        c3, c4, c5 = 4 * width, 8 * width, 16 * width
        self.backbone = CspDarknet(width, depth, depthwise=depthwise)
        self.lateral_conv0 = ConvBlock(c5, c4, 1)
        self.C3_p4 = CspLayer(2 * c4, c4, depth, depthwise=depthwise)
        self.reduce_conv1 = ConvBlock(c4, c3, 1)
        self.C3_p3 = CspLayer(2 * c3, c3, depth, depthwise=depthwise)
        self.bu_conv2 = spatial_conv(c3, c3, stride=2, depthwise=depthwise)
        self.C3_n3 = CspLayer(2 * c3, c4, depth, depthwise=depthwise)
        self.bu_conv1 = spatial_conv(c4, c4, stride=2, depthwise=depthwise)
        self.C3_n4 = CspLayer(2 * c4, c5, depth, depthwise=depthwise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dark3, dark4, dark5 = self.backbone(images)
        top = self.lateral_conv0(dark5)
        middle = self.reduce_conv1(self.C3_p4(torch.cat((F.interpolate(top, scale_factor=2.0), dark4), dim=1)))
        p3 = self.C3_p3(torch.cat((F.interpolate(middle, scale_factor=2.0), dark3), dim=1))
        p4 = self.C3_n3(torch.cat((self.bu_conv2(p3), middle), dim=1))
        p5 = self.C3_n4(torch.cat((self.bu_conv1(p4), top), dim=1))
        return p3, p4, p5


class Head(nn.Module):
    """Predict class, box and objectness of each cell, with separate branches for class and box."""

    def __init__(self, width: int, num_classes: int, *, depthwise: bool) -> None:
        super().__init__()
        num_hidden = 4 * width

        def branch() -> nn.Sequential:
            return nn.Sequential(*(spatial_conv(num_hidden, num_hidden, depthwise=depthwise) for _ in range(2)))

        def predictions(num_out: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(num_hidden, num_out, 1) for _ in STRIDES)

        self.cls_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.reg_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.cls_preds = predictions(num_classes)
        self.reg_preds = predictions(4)
        self.obj_preds = predictions(1)
        self.stems = nn.ModuleList(ConvBlock(factor * width, num_hidden, 1) for factor in (4, 8, 16))
        for prediction in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(prediction.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return raw boxes [B,K,4], objectness logits [B,K,1], class logits [B,K,C], and the box features by level."""
        stems = [stem(level) for stem, level in zip(self.stems, levels, strict=True)]
        class_features = [branch(x) for branch, x in zip(self.cls_convs, stems, strict=True)]
        box_features = [branch(x) for branch, x in zip(self.reg_convs, stems, strict=True)]
        return (
            predict_cells(self.reg_preds, box_features),
            predict_cells(self.obj_preds, box_features),
            predict_cells(self.cls_preds, class_features),
            box_features,
        )


def predict_cells(predictions: nn.ModuleList, features: list[Tensor]) -> Tensor:
    """Apply one convolution a level and list the cells of all levels, row by row: [B, K, channels]."""
    # In channels_last memory permute + flatten is a view, so the only copy is the concatenation.
    cells = [predict(x).permute(0, 2, 3, 1).flatten(1, 2) for predict, x in zip(predictions, features, strict=True)]
    return torch.cat(cells, dim=1)


class MaskBranch(nn.Module):
    """Predict a basis of masks for the image, and for each cell the weights that combine it."""

    def __init__(self, width: int, num_prototypes: int, *, depthwise: bool) -> None:
        super().__init__()
        num_hidden = 4 * width
        self.protonet = nn.Sequential(
            *(spatial_conv(num_hidden, num_hidden, depthwise=depthwise) for _ in range(3)),
            nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False),
            spatial_conv(num_hidden, num_hidden, depthwise=depthwise),
            nn.Conv2d(num_hidden, num_prototypes, 1),
            nn.ReLU(inplace=True),
        )
        self.coefficient_preds = nn.ModuleList(nn.Conv2d(num_hidden, num_prototypes, 1) for _ in STRIDES)

    def forward(self, p3: Tensor, box_features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return prototypes [B,P,H/4,W/4] and coefficients [B,K,P]."""
        return self.protonet(p3), predict_cells(self.coefficient_preds, box_features).tanh()


class YOLOX(nn.Module):
    """Detect objects in letterboxed BGR images of 0..255.

    `width` is the number of channels after the stem, `depth` the number of bottlenecks in a short stage.
    """

    cells: Tensor
    strides: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        num_classes: int,
        num_prototypes: int,
        input_size: tuple[int, int],
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        if any(side <= 0 or side % STRIDES[-1] for side in input_size):
            raise ValueError(f"input_size is {input_size}: both sides must be multiples of {STRIDES[-1]}")
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.input_size = input_size
        self.backbone = Pafpn(width, depth, depthwise=depthwise)
        self.head = Head(width, num_classes, depthwise=depthwise)
        self.masks = MaskBranch(width, num_prototypes, depthwise=depthwise) if num_prototypes else None
        # Constants for the fixed input size, so that a trace holds no batch size; not part of the state dict.
        cells, strides = cell_grid(input_size)
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("strides", strides, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return boxes [B,K,4] (x1 y1 x2 y2, input pixels) and scores [B,K,C] = objectness x class probability.

        `images` is [B,3,H,W]. With a mask branch also prototypes [B,P,H/4,W/4] and coefficients [B,K,P].
        """
        levels = self.backbone(images)
        raw_boxes, objectness, classes, box_features = self.head(levels)
        output = {"boxes": self.decode(raw_boxes), "scores": classes.sigmoid() * objectness.sigmoid()}
        if self.masks is not None:
            output["prototypes"], output["coefficients"] = self.masks(levels[0], box_features)
        return output

    def raw(self, images: Tensor) -> Tensor:
        """Return the head before decoding, [B,K,5+C]: four raw box values, objectness and class probabilities."""
        raw_boxes, objectness, classes, _ = self.head(self.backbone(images))
        return torch.cat((raw_boxes, objectness.sigmoid(), classes.sigmoid()), dim=-1)

    def decode(self, raw_boxes: Tensor) -> Tensor:
        """Turn cell offsets and log sizes into corners in input pixels."""
        return decode_cells(raw_boxes, self.cells, self.strides)


def decode_cells(raw_boxes: Tensor, cells: Tensor, strides: Tensor) -> Tensor:
    """Turn offsets and log sizes [...,K,4] of the cells of `cell_grid` into corners in input pixels, float32."""
    raw_boxes = raw_boxes.float()  # float16 has steps of half a pixel beyond 512
    centre = (raw_boxes[..., :2] + cells) * strides
    half_size = raw_boxes[..., 2:].exp() * (strides * 0.5)
    return torch.cat((centre - half_size, centre + half_size), dim=-1)


def cell_grid(input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """List the cells of all levels, row by row: x y in cells [K,2], and input pixels per cell [K,1]."""
    cells, strides = [], []
    for stride in STRIDES:
        rows, columns = input_size[0] // stride, input_size[1] // stride
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        cells.append(torch.stack((x, y), dim=-1).reshape(-1, 2))
        strides.append(torch.full((rows * columns, 1), stride))
    return torch.cat(cells).float(), torch.cat(strides).float()


def yolox_nano(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (416, 416)) -> YOLOX:
    """0.9 M parameters, the only variant with separable convolutions."""
    return YOLOX(
        width=16,
        depth=1,
        depthwise=True,
        num_classes=num_classes,
        num_prototypes=num_prototypes,
        input_size=input_size,
    )


def yolox_tiny(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (416, 416)) -> YOLOX:
    """5.1 M parameters."""
    return YOLOX(width=24, depth=1, num_classes=num_classes, num_prototypes=num_prototypes, input_size=input_size)


def yolox_s(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (640, 640)) -> YOLOX:
    """9.0 M parameters."""
    return YOLOX(width=32, depth=1, num_classes=num_classes, num_prototypes=num_prototypes, input_size=input_size)


def yolox_m(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (640, 640)) -> YOLOX:
    """25.3 M parameters."""
    return YOLOX(width=48, depth=2, num_classes=num_classes, num_prototypes=num_prototypes, input_size=input_size)


def yolox_l(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (640, 640)) -> YOLOX:
    """54.2 M parameters."""
    return YOLOX(width=64, depth=3, num_classes=num_classes, num_prototypes=num_prototypes, input_size=input_size)


def yolox_x(num_classes: int = 80, num_prototypes: int = 0, input_size: tuple[int, int] = (640, 640)) -> YOLOX:
    """99.1 M parameters."""
    return YOLOX(width=80, depth=4, num_classes=num_classes, num_prototypes=num_prototypes, input_size=input_size)
