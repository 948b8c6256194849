"""Build a network again from what its artifact says of it, also for other classes, and give it its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from streamd.errors import ModelError
from streamd.models import BUILDERS, deeplab, vitdet
from streamd.models.importers import detectron2
from streamd.models.importers import torchvision as importer
from streamd.models.layers import FrozenBatchNorm2d
from streamd.models.spec import Blueprint, ModelSpec
from streamd.models.weights import yolox_spec

# The parameters with rows for each class: what precedes the classes and follows each in the first dimension, and rows
# beside the classes (the background's, which comes last). -1: as many as there are.
_CLASS_ROWS: tuple[tuple[str, int, int, int], ...] = (
    (r"head\.cls_preds\.\d+\.", 1, 0, 1),  # YOLOX
    (r"roi_heads\.box_predictor(\.\d+)?\.cls_score\.", 1, 1, 1),
    (r"roi_heads\.box_predictor(\.\d+)?\.bbox_pred\.", 1, 0, 4),
    (r"roi_heads\.mask_head\.predictor\.", 1, 0, 1),
    (r"head\.cls_score\.", -1, 0, 1),  # RetinaNet and FCOS: anchors of a cell, and the classes of each
)
_STUFF_ROWS = r"sem_seg_head\.predictor\."
_KEYPOINT_ROWS = r"roi_heads\.keypoint_head\.score_lowres\."


@dataclass(frozen=True, slots=True)
class Names:
    """What the outputs of a network stand for."""

    labels: tuple[str, ...]
    keypoints: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()  # channels of `semantic` beside objects

    @classmethod
    def of(cls, spec: ModelSpec) -> Names:
        """Read them from a spec."""
        return cls(
            spec.labels,
            spec.keypoints.names if spec.keypoints else (),
            spec.panoptic.stuff_labels if spec.panoptic else (),
        )


def build(blueprint: Blueprint, state: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, ModelSpec]:
    """Build the network, untrained, and its spec. A ViTDet needs the shapes of its weights, `state`.

    Raises ModelError.
    """
    try:
        network, spec = _KINDS[blueprint.kind](blueprint, state or {})
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as err:
        raise ModelError(f"no network can be made of what the model file says of it: {err!r}") from err
    return network, msgspec.structs.replace(spec, blueprint=blueprint)


def _yolox(blueprint: Blueprint, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelSpec]:
    numbers = {**blueprint.numbers, "input_size": tuple(blueprint.numbers["input_size"])}
    network = BUILDERS[blueprint.variant](**numbers)
    labels = tuple(f"class_{index}" for index in range(network.num_classes))
    return network, yolox_spec(blueprint.variant, network, labels)


def _detectron2(blueprint: Blueprint, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelSpec]:
    config = copy.deepcopy(blueprint.numbers)
    return detectron2.FAMILIES[config["MODEL"]["META_ARCHITECTURE"]](config)


def _vitdet(blueprint: Blueprint, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelSpec]:
    if not state:
        raise ModelError("a ViTDet cannot be built without weights, whose shapes say how wide it is")
    return vitdet.build(msgspec.convert(blueprint.numbers, vitdet.Architecture), state)


def _torchvision(blueprint: Blueprint, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelSpec]:
    numbers = dict(blueprint.numbers)
    epsilon = numbers.pop("norm_eps", None)
    if blueprint.variant in deeplab.VARIANTS:
        return deeplab.build(blueprint.variant, [f"class_{i}" for i in range(numbers["num_classes"])])
    # torchvision counts the background as a class.
    numbers["num_classes"] += 1
    theirs = get_model(blueprint.variant, weights=None, weights_backbone=None, **numbers)
    network, spec = importer.convert(theirs, blueprint.variant)
    for module in network.modules():
        if epsilon is not None and isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.eps = epsilon
    return network, spec


_KINDS: dict[str, Callable[[Blueprint, Mapping[str, Tensor]], tuple[nn.Module, ModelSpec]]] = {
    "yolox": _yolox,
    "detectron2": _detectron2,
    "vitdet": _vitdet,
    "torchvision": _torchvision,
}


def rename(blueprint: Blueprint, names: Names) -> Blueprint:
    """Say how the same network is built for other classes."""
    numbers: dict[str, Any] = copy.deepcopy(blueprint.numbers)
    num_classes = len(names.labels)
    if blueprint.kind == "detectron2":
        model = numbers["MODEL"]
        model["ROI_HEADS"]["NUM_CLASSES"] = model["RETINANET"]["NUM_CLASSES"] = num_classes
        is_semantic = model["META_ARCHITECTURE"] == "SemanticSegmentor"
        if is_semantic or names.stuff:
            model["SEM_SEG_HEAD"]["NUM_CLASSES"] = num_classes if is_semantic else len(names.stuff)
        if names.keypoints:
            model["ROI_KEYPOINT_HEAD"]["NUM_KEYPOINTS"] = len(names.keypoints)
        numbers["DATASETS"]["TRAIN"] = numbers["DATASETS"]["TEST"] = []
    elif blueprint.kind == "vitdet":
        numbers["labels"] = list(names.labels)
    else:
        numbers["num_classes"] = num_classes
        if names.keypoints:
            numbers["num_keypoints"] = len(names.keypoints)
    return msgspec.structs.replace(blueprint, numbers=numbers)


def rename_spec(spec: ModelSpec, names: Names) -> ModelSpec:
    """Return the spec of the same network for other classes."""
    return msgspec.structs.replace(
        spec,
        labels=names.labels,
        keypoints=spec.keypoints and msgspec.structs.replace(spec.keypoints, names=names.keypoints),
        panoptic=spec.panoptic and msgspec.structs.replace(spec.panoptic, stuff_labels=names.stuff),
    )


def carry_over(state: Mapping[str, Tensor], old: Names, new: Names, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `fresh`, the state of an untrained network for `new` names, with all that `state` can give it.

    Rows of classes and keypoints that both know by name are kept, rows of others are as `fresh` has them. Parameters of
    another shape, and those that `state` lacks, stay fresh.
    """
    result = {}
    for name, tensor in fresh.items():
        given = state.get(name)
        result[name] = tensor if given is None else _carry_tensor(name, given.to(tensor.dtype), tensor, old, new)
    return result


def _carry_tensor(name: str, given: Tensor, fresh: Tensor, old: Names, new: Names) -> Tensor:
    if re.match(_STUFF_ROWS, name):
        # A semantic network's labels are those of its pixels.
        return _carry_rows(given, fresh, old.stuff or old.labels, new.stuff or new.labels)
    if re.match(_KEYPOINT_ROWS, name):
        dim = 1 if given.ndim > 1 else 0  # a transposed convolution has its outputs second
        moved = _carry_rows(given.movedim(dim, 0), fresh.movedim(dim, 0), old.keypoints, new.keypoints)
        return moved.movedim(0, dim)
    for pattern, before, extra, after in _CLASS_ROWS:
        if re.match(pattern, name):
            return _carry_rows(given, fresh, old.labels, new.labels, before, extra, after)
    return given if given.shape == fresh.shape else fresh


def _carry_rows(
    given: Tensor,
    fresh: Tensor,
    old: Sequence[str],
    new: Sequence[str],
    before: int = 1,
    extra: int = 0,
    after: int = 1,
) -> Tensor:
    """Copy the rows of names that both know. Rows are [before, names + extra, after] in the first dimension."""
    if before == -1:
        before = len(given) // (len(old) * after)
    is_per_class = len(given) == before * (len(old) + extra) * after
    if given.shape[1:] != fresh.shape[1:] or (not is_per_class and given.shape != fresh.shape):
        return fresh
    if not is_per_class or tuple(old) == tuple(new):  # one row serves all classes, or nothing changes
        return given if given.shape == fresh.shape else fresh
    if len(fresh) != before * (len(new) + extra) * after:
        return fresh
    source = given.reshape(before, len(old) + extra, after, *given.shape[1:])
    target = fresh.clone().reshape(before, len(new) + extra, after, *fresh.shape[1:])
    for row, label in enumerate(new):
        if label in old:
            target[:, row] = source[:, list(old).index(label)]
    if extra:
        target[:, -extra:] = source[:, -extra:]
    return target.reshape(fresh.shape)


def shapes_for(state: Mapping[str, Tensor], old: Names, new: Names) -> dict[str, Tensor]:
    """Return tensors without data, of the shapes that the parameters of `state` have for `new` names."""
    shapes = {}
    for name, tensor in state.items():
        sizes = list(tensor.shape)
        for pattern, before, extra, after in _CLASS_ROWS:
            if re.match(pattern, name) and before != -1 and sizes[0] == before * (len(old.labels) + extra) * after:
                sizes[0] = before * (len(new.labels) + extra) * after
        shapes[name] = torch.empty(sizes, device="meta", dtype=tensor.dtype)
    return shapes
