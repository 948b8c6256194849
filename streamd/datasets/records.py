"""What a data set says of its pictures, whatever format it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np


class Rle(TypedDict):
    """A mask as pycocotools encodes it."""

    size: list[int]  # height, width in picture pixels
    counts: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """What is annotated in one picture; all fields share the length N."""

    boxes: np.ndarray  # [N,4] float32 x1 y1 x2 y2, picture pixels
    labels: np.ndarray  # [N] int64, index into DataSet.labels
    is_crowd: np.ndarray  # [N] bool: a region of many objects, which is neither an object nor background
    masks: tuple[Rle, ...] | None = None  # None: nobody drew masks in this picture
    keypoints: np.ndarray | None = None  # [N,J,3] float32 x, y in picture pixels, visibility 0 unmarked, 1 hidden, 2
    areas: np.ndarray | None = None  # [N] float64 px^2 as annotated, by which COCO measures; NaN: not said


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a panoptic annotation."""

    id: int  # the value of its pixels: R + 256 G + 256 * 256 B of the PNG
    label: int  # of a thing: index into DataSet.labels; of stuff: index into DataSet.stuff_labels
    is_thing: bool
    is_crowd: bool


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One picture and its annotations."""

    file: Path
    image_id: int  # as in the annotation file, else counted from 1
    width: int  # pixels
    height: int
    objects: Objects
    segments_file: Path | None = None  # panoptic PNG
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a data set, and where; what it concerns was left out."""

    place: str  # "train.json: annotation 804"
    kind: str  # one of a small closed set, for counting: "missing file", "box outside", ...
    text: str  # what was found


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """Pictures and their annotations, checked."""

    name: str
    labels: tuple[str, ...]
    records: tuple[Record, ...]
    keypoint_names: tuple[str, ...] = ()
    stuff_labels: tuple[str, ...] = ()  # channel 0 stands for all things, as in PanopticRule
    problems: Sequence[Problem] = ()
    fingerprint: str = ""  # sha256 over the annotations and the names and sizes of the picture files
