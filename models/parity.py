"""Run an artifact on pictures that somebody else resized, to compare its results with theirs.

found = parity.run(Path("model.pt"), [resized], [(height, width)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamd.errors import ModelError
from streamd.messages import Batch, Detections, Frame, Letterbox, Picture, Stamp
from streamd.models import artifact
from streamd.postprocess import postprocess

if TYPE_CHECKING:
    from streamd.models.spec import ModelSpec


def common_size(resized: Sequence[np.ndarray], multiple: int = 32) -> tuple[int, int]:
    """Return (height, width) to which Detectron2 pads pictures [3, h, w] that it runs as one batch.

    An artifact that is to agree with it to the last digit must be exported with this `input_size`: behind the first
    convolution padding is no longer zero, so that its extent shows a little.
    """
    height, width = (max(picture.shape[axis] for picture in resized) for axis in (1, 2))
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def run(
    path: Path, resized: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
) -> list[Detections]:
    """Say what is in each picture, as one batch, by the model's own rules and the daemon's own post-processing.

    `resized` are pictures [3, h, w] uint8 in the model's colour order, as they go into the network but not normalised;
    `sizes` are (height, width) of the pictures they were made from, in whose pixels the results are.

    The model runs in float32 and not optimised: fused layers round otherwise, and a network that knows nothing makes
    far more of that than one that was trained. Raises ModelError.
    """
    module, spec = artifact.load(path, device)
    letterboxes = tuple(_placed(picture, size, spec, path) for picture, size in zip(resized, sizes, strict=True))
    images = _assemble(resized, letterboxes, spec).to(device)
    inside = torch.tensor([(box.height, box.width) for box in letterboxes], dtype=torch.float32, device=device)
    batch = Batch(tuple(_frame(size) for size in sizes), images, letterboxes)
    with torch.inference_mode():
        raw = artifact.forward(module, spec, images, inside)
        return postprocess(raw, batch, spec, spec.nms, heads=_Methods(module))


@dataclass(frozen=True, slots=True)
class _Methods:
    """The methods of an artifact, as post-processing calls them."""

    module: torch.jit.ScriptModule

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        return self.module.masks(list(features), boxes, labels)

    def keypoints(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        return self.module.keypoints(list(features), boxes)

    def densepose(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        return self.module.densepose(list(features), boxes)


def _placed(picture: np.ndarray, size: tuple[int, int], spec: ModelSpec, path: Path) -> Letterbox:
    """Say where a resized picture lies in the input, by the rule's anchor."""
    _, height, width = picture.shape
    free_height, free_width = spec.input_size[0] - height, spec.input_size[1] - width
    if free_height < 0 or free_width < 0:
        raise ModelError(
            f"{path}: its input is {list(spec.input_size)}, too small for a picture of {[height, width]}; "
            "export the model with a larger input_size"
        )
    centred = spec.resize.anchor == "center"
    return Letterbox(
        scale_x=width / size[1],
        scale_y=height / size[0],
        left=free_width // 2 if centred else 0,
        top=free_height // 2 if centred else 0,
        width=width,
        height=height,
    )


def _assemble(resized: Sequence[np.ndarray], letterboxes: Sequence[Letterbox], spec: ModelSpec) -> Tensor:
    """Pad and normalise: float32 [B, 3, H, W]."""
    mean, std, pad = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std, spec.padding))
    images = ((pad - mean) / std).expand(len(resized), 3, *spec.input_size).clone()
    for image, picture, box in zip(images, resized, letterboxes, strict=True):
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        image[:, rows, columns] = (torch.from_numpy(picture).float() - mean) / std
    return images


def _frame(size: tuple[int, int]) -> Frame:
    """Make the frame of a picture of (height, width) pixels, which nobody looks at any more."""
    nothing = Picture((torch.empty(0, 0, 3, dtype=torch.uint8),), "rgb", "bt709", full_range=True, rotation=0)
    return Frame(
        stream="",
        seq=0,
        pts_s=0.0,
        stamp=Stamp(epoch=0, arrived_ns=0, arrived_at=0.0, captured_at=0.0, clock="arrival"),
        decode_ms=0.0,
        picture=nothing,
        width=size[1],
        height=size[0],
        keyframe=True,
        corrupt=False,
    )
