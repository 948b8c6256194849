"""Small data sets made by the tests: coloured squares and discs on grey, and networks that find them by colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision.ops  # noqa: F401  its operators
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional

from streamd.datasets.records import DataSet, Objects, Record, Rle, Segment
from streamd.models.spec import KeypointRule, MaskRule, ModelSpec, NmsRule, PanopticRule, Task

LABELS = ("disc", "square")
STUFF = ("things", "sky", "ground")
POINTS = ("top", "right", "bottom")
SIZE = (96, 64)  # width, height
_COLOURS = np.array([(230, 30, 30), (30, 30, 230)])  # of discs and squares
_CELL = 16  # pixels; an object lies in each of some cells
_SIDE = 14


def make_shapes(folder: Path, num_pictures: int = 8, *, shift: int = 3, seed: int = 0) -> DataSet:
    """Write JPEGs and panoptic PNGs; objects lie up to `shift` pixels beside the grid of 16 pixels."""
    random = np.random.default_rng(seed)
    records = tuple(_record(folder, index + 1, random, shift) for index in range(num_pictures))
    return DataSet("shapes", LABELS, records, keypoint_names=POINTS, stuff_labels=STUFF, fingerprint="test")


def encode(mask: np.ndarray) -> Rle:
    """Return bool [H,W] as run lengths."""
    encoded: Rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return encoded


def _record(folder: Path, image_id: int, random: np.random.Generator, shift: int) -> Record:
    width, height = SIZE
    pixels = random.integers(110, 140, (height, width, 3))
    numbers = np.where(np.arange(height)[:, None] < height // 2, 1, 2) + np.zeros((height, width), np.int64)
    segments = [Segment(1, 1, is_thing=False, is_crowd=False), Segment(2, 2, is_thing=False, is_crowd=False)]
    boxes, labels, masks, points = [], [], [], []
    cells = random.permutation(width // _CELL * (height // _CELL))[: random.integers(2, 6)]
    y, x = np.mgrid[:height, :width]
    for number, cell in enumerate(cells.tolist(), start=3):
        corner = np.array((cell % (width // _CELL), cell // (width // _CELL))) * _CELL + 1
        left, top = (corner + random.integers(-shift, shift + 1, 2)).clip(0, np.array(SIZE) - _SIDE).tolist()
        label = int(random.integers(2))
        inside = (x >= left) & (x < left + _SIDE) & (y >= top) & (y < top + _SIDE)
        middle = (_SIDE - 1) / 2
        if label == 0:
            inside &= (x - left - middle) ** 2 + (y - top - middle) ** 2 <= (_SIDE / 2) ** 2
        inside &= numbers < 3  # what was drawn first lies on top
        pixels[inside] = _COLOURS[label]
        numbers[inside] = number
        segments.append(Segment(number, label, is_thing=True, is_crowd=False))
        boxes.append((left, top, left + _SIDE, top + _SIDE))
        labels.append(label)
        masks.append(encode(inside))
        points.append(((left + middle, top, 2), (left + _SIDE - 1, top + middle, 2), (left + middle, top + _SIDE, 1)))
    folder.mkdir(parents=True, exist_ok=True)
    file, segments_file = folder / f"{image_id:04}.jpg", folder / f"{image_id:04}.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file, quality=95, subsampling=0)
    Image.fromarray(np.stack((numbers, 0 * numbers, 0 * numbers), axis=-1).astype(np.uint8)).save(segments_file)
    objects = Objects(
        boxes=np.array(boxes, np.float32),
        labels=np.array(labels, np.int64),
        is_crowd=np.zeros(len(boxes), bool),
        masks=tuple(masks),
        keypoints=np.array(points, np.float32),
    )
    return Record(file, image_id, width, height, objects, segments_file, tuple(segments))


class ColourSegmenter(nn.Module):
    """Find an object in each cell of 16 pixels that is red or blue enough; masks are its red or blue pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        width, height = SIZE
        top, left = torch.meshgrid(torch.arange(0, height, _CELL), torch.arange(0, width, _CELL), indexing="ij")
        corners = torch.stack((left, top), dim=-1).reshape(-1, 2).float() + 1
        self.register_buffer("cells", torch.cat((corners, corners + _SIDE), dim=-1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return boxes, scores, prototypes and coefficients of RGB images."""
        red, _, blue = images.float().unbind(1)
        excess = torch.stack((red - blue, blue - red), dim=1) / 255
        share = functional.avg_pool2d(excess, _CELL).flatten(2).transpose(1, 2)
        scores = (self.sharpness * (share - 0.25)).sigmoid()
        boxes = self.cells.expand(images.shape[0], -1, -1)  # type: ignore[operator]
        prototypes = 40 * (functional.avg_pool2d(excess, 2) - 0.35)
        return {"boxes": boxes, "scores": scores, "prototypes": prototypes, "coefficients": (share * 10).softmax(-1)}


def segmenter_spec() -> ModelSpec:
    """Describe a `ColourSegmenter`, whose name for discs is the data set's but for its case."""
    return ModelSpec(
        name="colours",
        task="segment",
        labels=("Disc", "square"),
        input_size=(SIZE[1], SIZE[0]),
        colour="rgb",
        masks=MaskRule(),
        nms=NmsRule(score_threshold=0.4),
    )


class ColourHeads(ColourSegmenter):
    """Find the same objects, and their masks and points in a second stage, as a Mask R-CNN does."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return boxes, scores, a feature map of stride 2 and, if panoptic, logits of things, sky, ground."""
        output = super().forward(images)
        features = output["prototypes"] / 40
        found = {"boxes": output["boxes"], "scores": output["scores"], "features.0": features}
        if self.task == "keypoints":
            return found
        upper = (torch.arange(features.shape[2], device=images.device) < features.shape[2] // 2)[None, :, None]
        things = 2 * features.amax(1)
        halves = [half.float().expand_as(things) for half in (upper, ~upper)]
        semantic = torch.stack((things, *halves), dim=1)
        return {**found, "semantic": semantic}

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return mask probabilities [B,N,14,14]."""
        num_images, num_boxes = boxes.shape[:2]
        places = torch.arange(num_images, device=boxes.device)[:, None, None].expand(-1, num_boxes, -1)
        regions = torch.cat((places.float(), boxes), dim=-1).flatten(0, 1)
        pooled = torch.ops.torchvision.roi_align(features[0], regions, 0.5, 14, 14, 2, True)
        chosen = pooled.gather(1, labels.reshape(-1, 1, 1, 1).expand(-1, -1, 14, 14))
        return (40 * chosen).sigmoid().reshape(num_images, num_boxes, 14, 14)

    def keypoints(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """Return logits of heat maps [B,N,3,15,15]: bottom, right, top."""
        maps = features[0].new_zeros(3, 15, 15)
        maps[0, 14, 7] = maps[1, 7, 14] = maps[2, 0, 7] = 8.0
        return maps.expand(boxes.shape[0], boxes.shape[1], -1, -1, -1)


def heads_spec(task: Task) -> ModelSpec:
    """Describe a `ColourHeads` that gives keypoints, or masks and segments."""
    panoptic = PanopticRule(stuff_labels=STUFF, score_threshold=0.4, stuff_area_limit=20)
    return ModelSpec(
        name=f"colours-{task}",
        task=task,
        labels=LABELS,
        input_size=(SIZE[1], SIZE[0]),
        colour="rgb",
        masks=MaskRule(kind="box") if task == "panoptic" else None,
        keypoints=KeypointRule(names=POINTS[::-1]) if task == "keypoints" else None,
        panoptic=panoptic if task == "panoptic" else None,
        nms=NmsRule(score_threshold=0.4),
    )


class ColourClassifier(nn.Module):
    """Say of each pixel whether it is red, blue, or in the upper or lower half."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits of disc, square, sky, ground."""
        red, _, blue = functional.avg_pool2d(images.float(), 2).unbind(1)
        height = red.shape[1]
        upper = (torch.arange(height, device=images.device) < height // 2)[None, :, None].expand_as(red).float()
        return {"semantic": torch.stack((red - blue, blue - red, 60 * upper, 60 * (1 - upper)), dim=1)}


def classifier_spec() -> ModelSpec:
    """Describe a `ColourClassifier`."""
    return ModelSpec(
        name="pixels",
        task="semantic",
        labels=("disc", "square", "sky", "ground"),
        input_size=(SIZE[1], SIZE[0]),
        colour="rgb",
    )
