"""Copy torchvision's layers into streamd's, and turn its backbones into streamd's.

Numbers and weights are read from the modules, so that the names in a checkpoint do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from streamd.errors import ModelError
from streamd.models.fpn import ConvLevels, Fpn, MaxPoolLevel
from streamd.models.resnet import NUM_BLOCKS, STAGES, Resnet, ResnetConfig

Theirs = Any  # a module of torchvision's, whose attributes are not typed

_NORMS: dict[type[nn.Module], str] = {FrozenBatchNorm2d: "FrozenBN", nn.BatchNorm2d: "BN", nn.GroupNorm: "GN"}


def convert_backbone(theirs: Theirs) -> Fpn:
    """Convert a ResNet with a pyramid. Raises ModelError for another backbone."""
    if not isinstance(theirs, BackboneWithFPN) or "layer4" not in theirs.body:
        raise ModelError("its backbone is no ResNet with a feature pyramid, and no other is converted")
    pyramid = theirs.fpn
    in_features = STAGES[-len(pyramid.inner_blocks) :]
    fpn = Fpn(
        _convert_resnet(theirs.body, in_features),
        in_features,
        theirs.out_channels,
        norm=norm_name(pyramid.inner_blocks),
        top_block=_top_block(pyramid.extra_blocks, theirs.out_channels),
    )
    for level, lateral, output in zip(fpn.levels, pyramid.inner_blocks, pyramid.layer_blocks, strict=True):
        copy(fpn.get_submodule(f"fpn_lateral{level}"), lateral)
        copy(fpn.get_submodule(f"fpn_output{level}"), output)
    if isinstance(fpn.top_block, ConvLevels):
        copy(fpn.top_block.p6, [pyramid.extra_blocks.p6])
        copy(fpn.top_block.p7, [pyramid.extra_blocks.p7])
    return fpn


def _top_block(theirs: Theirs | None, num_out: int) -> MaxPoolLevel | ConvLevels | None:
    if isinstance(theirs, LastLevelMaxPool):
        return MaxPoolLevel()
    if isinstance(theirs, LastLevelP6P7):
        return ConvLevels(theirs.p6.in_channels, num_out, "p5" if theirs.use_P5 else "res5")
    if theirs is None:
        return None
    raise ModelError(f"its feature pyramid ends with a {type(theirs).__name__}, which is not converted")


def _convert_resnet(body: Theirs, out_features: Sequence[str]) -> Resnet:
    stages = [list(body[f"layer{index}"]) for index in range(1, 5)]
    first, num_blocks = stages[0][0], tuple(map(len, stages))
    is_basic = isinstance(first, BasicBlock)
    depths = [depth for depth, blocks in NUM_BLOCKS.items() if blocks == num_blocks and (depth < 50) == is_basic]
    if not depths or not isinstance(first, (BasicBlock, Bottleneck)) or stages[3][-1].conv2.dilation != (1, 1):
        raise ModelError("its ResNet has a number of blocks or a dilation that is not converted")
    network = Resnet(
        ResnetConfig(
            depth=depths[0],
            num_stem_channels=body["conv1"].out_channels,
            num_res2_channels=(first.conv2 if is_basic else first.conv3).out_channels,
            num_groups=first.conv2.groups,
            width_per_group=first.conv2.out_channels // first.conv2.groups,
            norm=norm_name(body),
            out_features=tuple(out_features),
        )
    )
    copy(network.get_submodule("stem.conv1"), [body["conv1"], body["bn1"]])
    for name, blocks in zip(STAGES, stages, strict=True):
        for ours, block in zip(network.get_submodule(name).children(), blocks, strict=True):
            _copy_block(ours, block)
    return network


def _copy_block(ours: nn.Module, theirs: Theirs) -> None:
    for index in (1, 2) if isinstance(theirs, BasicBlock) else (1, 2, 3):
        copy(ours.get_submodule(f"conv{index}"), [getattr(theirs, f"conv{index}"), getattr(theirs, f"bn{index}")])
    if theirs.downsample is not None:
        copy(ours.get_submodule("shortcut"), theirs.downsample)


def copy(ours: nn.Module, layers: Iterable[Theirs]) -> None:
    """Copy a layer with weights, and the normalisation that may follow it, into a layer of ours; others are skipped."""
    for layer in layers:
        if type(layer) in _NORMS:
            norm: nn.Module = getattr(ours, "norm", ours)
            norm.load_state_dict(layer.state_dict())
            norm.eps = layer.eps
        elif hasattr(layer, "weight"):
            copy_rows(ours, layer, slice(None))


def copy_rows(ours: nn.Module, layer: Theirs, rows: slice | list[int]) -> None:
    """Copy `rows` of a layer's weights and of its bias; where it has no bias, ours becomes 0."""
    with torch.no_grad():
        ours.get_parameter("weight").copy_(layer.get_parameter("weight")[rows])
        if layer.bias is not None:
            ours.get_parameter("bias").copy_(layer.get_parameter("bias")[rows])
        elif ours.bias is not None:
            ours.get_parameter("bias").zero_()


def copy_each(ours: nn.Module, theirs: Theirs) -> None:
    """Copy between modules that have the same layers in the same order, however they are nested."""
    for own, layer in zip(_leaves(ours), _leaves(theirs), strict=True):
        copy(own, [layer])


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if not list(layer.children())]


def norm_name(module: nn.Module) -> str:
    """Name the first normalisation within a module as `layers.make_norm` does; "" if there is none."""
    return next((_NORMS[type(layer)] for layer in module.modules() if type(layer) in _NORMS), "")
