"""Detectors of torchvision, with its published weights or one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

from streamd.errors import ModelError
from streamd.models import deeplab
from streamd.models.importers import checkpoint
from streamd.models.importers.checkpoint import Checkpoint
from streamd.models.importers.torchvision_layers import Theirs
from streamd.models.importers.torchvision_networks import convert_fcos, convert_rcnn, convert_retinanet
from streamd.models.keypoint_head import keypoint_names
from streamd.models.layers import FrozenBatchNorm2d
from streamd.models.misfits import list_names
from streamd.models.roi_heads import RoiHeadsConfig
from streamd.models.spec import Blueprint, KeypointRule, MaskRule, ModelSpec, NmsRule, ResizeRule, Task, just_above
from streamd.models.ssd import Ssd

_OF_ROI_HEADS = ("roi_heads.box_predictor.cls_score.bias", 1)
_CLASS_LOGITS = "head.classification_head.cls_logits.bias"
_FIRST_LEVEL = "head.classification_head.module_list.0"
# A parameter that has a number of rows for each class and for the background, and that number.
NAMES = {
    "fasterrcnn_resnet50_fpn": _OF_ROI_HEADS,
    "fasterrcnn_resnet50_fpn_v2": _OF_ROI_HEADS,
    "maskrcnn_resnet50_fpn": _OF_ROI_HEADS,
    "maskrcnn_resnet50_fpn_v2": _OF_ROI_HEADS,
    "keypointrcnn_resnet50_fpn": _OF_ROI_HEADS,
    "retinanet_resnet50_fpn": (_CLASS_LOGITS, 9),
    "retinanet_resnet50_fpn_v2": (_CLASS_LOGITS, 9),
    "fcos_resnet50_fpn": (_CLASS_LOGITS, 1),
    "ssd300_vgg16": (f"{_FIRST_LEVEL}.bias", 4),
    "ssdlite320_mobilenet_v3_large": (f"{_FIRST_LEVEL}.1.bias", 6),
}
# The names that torchvision and this project give to what was measured on COCO val2017.
_METRICS = {
    "box_map": "coco_ap_published",
    "mask_map": "coco_mask_ap_published",
    "kp_map": "coco_keypoint_ap_published",
}
# Their COCO_V1 was trained by another program, whose frozen batch norms add no epsilon to the variance.
_WITHOUT_EPSILON = (
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)


def load(
    name: str, weights: str | Path | None = None, labels: Sequence[str] | None = None
) -> tuple[nn.Module, ModelSpec]:
    """Build a detector of NAMES, or a segmenter of `deeplab.VARIANTS`, ready for inference.

    `weights` are a checkpoint of torchvision's network, the name of published ones, which are fetched into torch's
    cache ("DEFAULT", "COCO_V1"), or None for random ones. Without `labels` they are those of the published weights
    where there are as many, else class_0, class_1, ...; a detector's background has none. Raises ModelError.
    """
    if name in deeplab.VARIANTS:
        return _load_deeplab(name, weights, labels)
    if name not in NAMES:
        known = ", ".join((*NAMES, *deeplab.VARIANTS))
        raise ModelError(f"{name!r}: streamd imports no such network of torchvision; it imports {known}")
    if weights is None:
        network, spec = convert(get_model(name, weights=None, weights_backbone=None), name)
        return network.eval(), msgspec.structs.replace(spec, labels=_labels(name, len(spec.labels), labels))
    read = checkpoint.read(_find(name, weights))
    network, spec = convert(_fill(name, read), name)
    release = next((one for one in get_model_weights(name) if read.sha256.startswith(_hash_prefix(one.url))), None)
    if release is not None and release.name == "COCO_V1" and name in _WITHOUT_EPSILON:
        for module in network.modules():
            if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
                module.eps = 0.0
        assert spec.blueprint is not None
        numbers = {**spec.blueprint.numbers, "norm_eps": 0.0}
        spec = msgspec.structs.replace(spec, blueprint=msgspec.structs.replace(spec.blueprint, numbers=numbers))
    spec = msgspec.structs.replace(
        spec,
        labels=_labels(name, len(spec.labels), labels),
        weights_sha256=read.sha256,
        metrics=_metrics(release) if release is not None else {},
    )
    return network.eval(), spec


def _load_deeplab(name: str, weights: str | Path | None, labels: Sequence[str] | None) -> tuple[nn.Module, ModelSpec]:
    if weights is None:
        network, spec = deeplab.build(name, labels or deeplab.VOC_LABELS)
        return network.eval(), spec
    return deeplab.load(name, checkpoint.read(_find(name, weights)), labels)


def convert(theirs: Theirs, name: str) -> tuple[nn.Module, ModelSpec]:
    """Turn a detector of torchvision, also one of another depth or width, into a network of streamd.

    Labels are class_0, class_1, ... Raises ModelError.
    """
    network, spec = _convert(theirs, name)
    numbers: dict[str, object] = {"num_classes": len(spec.labels)}
    if spec.keypoints:
        numbers["num_keypoints"] = len(spec.keypoints.names)
    return network, msgspec.structs.replace(
        spec, blueprint=Blueprint(kind="torchvision", variant=name, numbers=numbers)
    )


def _convert(theirs: Theirs, name: str) -> tuple[nn.Module, ModelSpec]:
    if isinstance(theirs, FasterRCNN):
        rcnn = convert_rcnn(theirs)
        return rcnn, _describe_rcnn(rcnn.roi_heads.config, theirs, name)
    if isinstance(theirs, (RetinaNet, FCOS)):
        network = convert_retinanet(theirs) if isinstance(theirs, RetinaNet) else convert_fcos(theirs)
        spec = _describe_input(theirs, name, theirs.head.classification_head.num_classes - 1)
        return network, msgspec.structs.replace(spec, sized=True, nms=_nms_rule(theirs))
    if isinstance(theirs, SSD):
        width, height = theirs.transform.fixed_size
        ssd = Ssd(theirs, (height, width))
        spec = _describe_input(theirs, name, len(ssd.classes), (height, width))
        return ssd, msgspec.structs.replace(spec, nms=_nms_rule(theirs))
    raise ModelError(f"{name}: a {type(theirs).__name__} is not converted")


def _describe_rcnn(heads: RoiHeadsConfig, theirs: FasterRCNN, name: str) -> ModelSpec:
    task: Task = "keypoints" if heads.keypoints else "segment" if heads.mask else "detect"
    spec = _describe_input(theirs, name, heads.num_classes)
    names = keypoint_names(heads.keypoints.num_keypoints) if heads.keypoints else ()
    return msgspec.structs.replace(
        spec,
        task=task,
        sized=True,
        nms=_nms_rule(theirs.roi_heads),
        masks=MaskRule(kind="box") if heads.mask else None,
        keypoints=KeypointRule(names=names) if heads.keypoints else None,
    )


def _describe_input(
    theirs: Theirs, name: str, num_classes: int, fixed_size: tuple[int, int] | None = None
) -> ModelSpec:
    """Describe a detector's input, whose shorter side is scaled to one size unless it has a `fixed_size`."""
    transform = theirs.transform
    multiple = 1 if fixed_size else transform.size_divisible
    min_size, max_size = transform.min_size[-1], transform.max_size
    height, width = fixed_size or (-(-side // multiple) * multiple for side in (min_size, max_size))
    return ModelSpec(
        name=name,
        task="detect",
        labels=tuple(f"class_{index}" for index in range(num_classes)),
        input_size=(height, width),
        size_multiple=multiple,
        colour="rgb",
        mean=tuple(255 * value for value in transform.image_mean),
        std=tuple(255 * value for value in transform.image_std),
        resize=ResizeRule(kind="stretch")
        if fixed_size
        else ResizeRule(kind="shortest_edge", min_size=min_size, max_size=max_size, pad=None),
    )


def _nms_rule(theirs: Theirs) -> NmsRule:
    return NmsRule(
        score_threshold=just_above(theirs.score_thresh),
        iou_threshold=theirs.nms_thresh,
        max_detections=theirs.detections_per_img,
    )


def _find(name: str, weights: str | Path) -> Path:
    """Return the file of a checkpoint; one that is named as torchvision publishes it is fetched once."""
    published = get_model_weights(name).__members__
    if str(weights) not in published:
        if not Path(weights).is_file():
            raise ModelError(f"{weights}: no such file, and {name} has published weights {', '.join(published)} alone")
        return Path(weights)
    url = published[str(weights)].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_prefix(url))
        except (OSError, RuntimeError) as err:
            raise ModelError(f"{url}: cannot be fetched to {path}: {err}") from err
    return path


def _hash_prefix(url: str) -> str:
    """Return how the sha256 of a published file begins, by its name."""
    return url.rpartition("-")[2].removesuffix(".pth")


def _fill(name: str, read: Checkpoint) -> Theirs:
    """Build torchvision's network for as many classes as a checkpoint has, and load it."""
    parameter, rows_per_class = NAMES[name]
    options = {}
    try:
        options["num_classes"] = len(read.state[parameter]) // rows_per_class
        if name.startswith("keypoint"):
            options["num_keypoints"] = len(read.state["roi_heads.keypoint_predictor.kps_score_lowres.bias"])
    except KeyError as err:
        raise ModelError(f"{read.path}: not a checkpoint of torchvision's {name}: it lacks {err.args[0]}") from err
    theirs = get_model(name, weights=None, weights_backbone=None, **options)
    try:
        # Not streamd's load_weights: torchvision renames what its older versions called otherwise.
        missing, unknown = theirs.load_state_dict(dict(read.state), strict=False)
    except RuntimeError as err:
        raise ModelError(f"{read.path}: not a checkpoint of torchvision's {name}: {err}") from err
    for what, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            listed = ", ".join(list_names(keys))
            raise ModelError(f"{read.path}: not a checkpoint of torchvision's {name}: it {what} {len(keys)} ({listed})")
    return theirs


def _labels(name: str, num_classes: int, labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels is not None and len(labels) != num_classes:
        raise ModelError(f"{name}: has {num_classes} classes beside the background, so not {len(labels)} labels")
    _, *published = get_model_weights(name)["DEFAULT"].meta["categories"]
    if labels is None and len(published) == num_classes:
        return tuple(published)
    return tuple(labels or (f"class_{index}" for index in range(num_classes)))


def _metrics(release: WeightsEnum) -> dict[str, float]:
    measured = release.meta["_metrics"]["COCO-val2017"]
    return {ours: measured[theirs] for theirs, ours in _METRICS.items() if theirs in measured}
