"""Make a training image and its targets as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from streamd.datasets.records import DataSet
from streamd.gpu import ops
from streamd.messages import Picture
from streamd.models.spec import ModelSpec
from streamd.train import copy_paste
from streamd.train.augment import Layer, Plan
from streamd.train.scene import Scene, Wanted, join, pick, place
from streamd.train.targets import Targets

_ReadPicture = Callable[[int], np.ndarray]


def render(plan: Plan, dataset: DataSet, spec: ModelSpec, read: _ReadPicture) -> tuple[Tensor, Targets]:
    """Return the image [3,H,W] float32, normalised, and its targets; `read` gives a record's picture."""
    wanted = Wanted.by(spec)
    scenes = [place(dataset, layer, spec.input_size, wanted) for layer in plan.layers]
    image = _canvas(plan.layers, spec, read)
    scene = scenes[0] if len(scenes) == 1 else join(scenes)
    if plan.pasted is not None and scene.masks is not None:
        other = place(dataset, plan.pasted, spec.input_size, replace(wanted, masks=True))
        chosen = copy_paste.choose(other, plan.paste_seed, _extent(plan.layers))
        if chosen.any():
            assert other.masks is not None
            covered = other.masks[chosen].any(0)
            image = torch.where(torch.from_numpy(covered), _canvas((plan.pasted,), spec, read), image)
            scene = copy_paste.paste(scene, pick(other, chosen), covered)
    if plan.colour is not None:
        _recolour(image, plan, spec)
    if any(spec.mean) or spec.std != (1.0, 1.0, 1.0):
        mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        image.sub_(mean).div_(std)
    return image, _targets(scene)


def _canvas(layers: Sequence[Layer], spec: ModelSpec, read: _ReadPicture) -> Tensor:
    """Return pictures and padding as the network's input, but for mean and std: float32 [3,H,W] in 0..255."""
    height, width = spec.input_size
    image = torch.empty(1, 3, height, width)
    if len(layers) > 1:
        image[:] = torch.tensor(spec.padding)[:, None, None]
    for layer in layers:
        plane = torch.from_numpy(read(layer.record))
        if layer.mirrored:
            plane = plane.flip(1)
        x1, y1, x2, y2 = layer.crop
        plane, box = plane[y1:y2, x1:x2], layer.letterbox
        out = image
        if len(layers) > 1:  # the kernel pads all that it is given: give it this picture's part
            out = image[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
            box = replace(box, left=0, top=0)
        ops.preprocess(
            [Picture((plane,), "rgb", "bt601", True, 0)],
            [box],
            out,
            colour=spec.colour,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            pad=spec.padding,
            antialias=spec.resize.antialias,
        )
    return image[0]


def _extent(layers: Sequence[Layer]) -> tuple[int, int, int, int]:
    """Return x1 y1 x2 y2 of what the layers cover together."""
    boxes = [layer.letterbox for layer in layers]
    right, lower = max(box.left + box.width for box in boxes), max(box.top + box.height for box in boxes)
    return min(box.left for box in boxes), min(box.top for box in boxes), right, lower


def _recolour(image: Tensor, plan: Plan, spec: ModelSpec) -> None:
    """Change the colours of what is picture, and leave the padding."""
    assert plan.colour is not None
    matrix = torch.from_numpy(plan.colour)
    if spec.colour == "bgr":
        matrix = matrix.flip(0, 1)
    for layer in plan.layers:
        box = layer.letterbox
        part = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        part.copy_((matrix @ part.reshape(3, -1)).clamp_(0, 255).view_as(part))


def _targets(scene: Scene) -> Targets:
    """Part the objects from the crowds."""
    is_object = ~scene.is_crowd

    def of_objects(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values[is_object]))

    return Targets(
        boxes=torch.from_numpy(scene.boxes[is_object]),
        labels=torch.from_numpy(scene.labels[is_object]),
        crowds=torch.from_numpy(scene.boxes[scene.is_crowd]),
        masks=of_objects(scene.masks),
        keypoints=of_objects(scene.keypoints),
        semantic=None if scene.semantic is None else torch.from_numpy(scene.semantic.astype(np.int64)),
    )
