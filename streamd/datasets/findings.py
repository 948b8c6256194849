"""What is wrong in a data set, gathered while it is read, and the drafts that the readers of all formats make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streamd.datasets.records import Problem, Rle, Segment

Kind = Literal[
    "missing file",
    "unreadable picture",
    "size differs",
    "unreadable annotation",
    "bad record",
    "unknown category",
    "unknown picture",
    "duplicate id",
    "duplicate picture",
    "duplicate box",
    "bad box",
    "no area",
    "box outside",
    "box clipped",
    "bad mask",
    "missing mask",
    "bad keypoints",
    "bad segment",
]


@dataclass(slots=True)
class Findings:
    """The problems of one data set, in the order in which they were met."""

    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: Kind, place: str, text: str) -> None:
        self.problems.append(Problem(_printable(place), kind, _printable(text)))


def _printable(text: str) -> str:
    """Write out the bytes of a file's name that is not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, slots=True, eq=False)
class DraftObject:
    """One annotation as its file has it: of the right shape, its values not looked at yet."""

    place: str
    label: int
    box: Sequence[object] | None  # x1 y1 x2 y2 in pixels; None: that of the mask
    is_crowd: bool = False
    segmentation: object = None  # as COCO writes it: polygons, run lengths in a list or in a string
    mask: Rle | None = None  # where the reader itself made it
    keypoints: object = None  # as COCO writes it: x y visibility, of all points in one list
    area: float = math.nan  # px^2, where the annotations say


@dataclass(frozen=True, slots=True, eq=False)
class DraftPicture:
    """One picture as the annotations describe it."""

    place: str
    file: Path
    image_id: int
    size: tuple[int, int] | None  # width, height in pixels; None: the annotations do not say
    objects: Sequence[DraftObject]
    has_masks: bool | None = None  # None: as its objects show
    segments_file: Path | None = None
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A data set as read from its annotation files, the pictures not looked at yet."""

    name: str
    labels: tuple[str, ...]
    pictures: Sequence[DraftPicture]
    sources: Sequence[Path]  # the files that were read
    keypoint_names: tuple[str, ...] = ()
    stuff_labels: tuple[str, ...] = ()
