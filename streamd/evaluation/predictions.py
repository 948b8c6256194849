"""What a model said of pictures, in the labels of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamd.datasets.records import DataSet, Record, Rle
from streamd.errors import ConfigError
from streamd.models.spec import ModelSpec
from streamd.wire import DetectionsMessage, Mask

_MAX_SHOWN = 12  # labels in a sentence


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """A region that the model found."""

    category: int  # see `categories`; -1: of a label that the data set does not know
    mask: Rle


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What is said of one picture: N objects by falling score, in picture pixels."""

    record: Record
    boxes: np.ndarray  # [N,4] float64 x1 y1 x2 y2
    scores: np.ndarray  # [N] float64
    labels: np.ndarray  # [N] int64, index into DataSet.labels
    masks: tuple[Rle, ...] | None = None
    keypoints: np.ndarray | None = None  # [N,J,3] float64 x, y, score, in the data set's order of points
    segments: tuple[FoundSegment, ...] | None = None


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Which of the data set's labels, regions and points those of a model are; what has no counterpart is absent."""

    labels: dict[int, int]  # of objects, which are categories, too
    stuff: dict[int, int]  # of segments that are no objects, to categories
    points: tuple[int, ...] | None  # the model's point for each of the data set's; None where they cannot be compared
    things_are_one: bool  # the model is semantic, and has one class for all objects
    notes: tuple[str, ...]


def categories(dataset: DataSet) -> tuple[str, ...]:
    """Name the classes that a pixel may have: the labels of objects, those of stuff, and that for all objects."""
    return (*dataset.labels, *dataset.stuff_labels[1:], *dataset.stuff_labels[:1])


def match_labels(spec: ModelSpec, dataset: DataSet) -> LabelMap:
    """Find the model's labels in the data set, by name: case, `_` and `-` do not count.

    Raises ConfigError where they have no label in common.
    """
    classes, num_things = categories(dataset), len(dataset.labels)
    num_single = num_things + len(dataset.stuff_labels[1:])  # without the class for all objects
    things_are_one = False
    if spec.task == "semantic":
        labels: dict[int, int] = {}
        stuff = _by_name(spec.labels, classes)
        things_are_one = num_single in stuff.values()
        wanted = range(num_things, len(classes)) if things_are_one else range(num_single)
    else:
        labels = _by_name(spec.labels, dataset.labels)
        channels = _by_name(spec.semantic_labels[1:], dataset.stuff_labels[1:])
        stuff = {channel + 1: num_things + category for channel, category in channels.items()}
        wanted = range(num_single) if spec.panoptic else range(num_things)
    known = {*labels.values(), *stuff.values()}
    both, lacking = ([classes[one] for one in wanted if (one in known) is there] for there in (True, False))
    if not both:
        raise ConfigError(
            f"{spec.name} and {dataset.name} have no label in common: the model knows {_listed(spec.labels)}; "
            f"the data set has {_listed(lacking)}. Evaluate on data with the model's labels, or train the model first"
        )
    points = _match_points(spec, dataset)
    return LabelMap(labels, stuff, points, things_are_one, tuple(_notes(spec, dataset, both, lacking)))


def convert(message: DetectionsMessage, record: Record, names: LabelMap) -> Prediction:
    """Read a message of the daemon in the data set's labels; objects of other labels are left out."""
    objects = [found for found in message.objects if found.label_id in names.labels]
    masks = [found.mask for found in objects]
    points = [found.keypoints for found in objects]
    keypoints = None
    if names.points is not None and None not in points:
        shape = (len(objects), len(names.points), 3)
        keypoints = np.array([[pose[index] for index in names.points] for pose in points if pose], dtype=np.float64)
        keypoints = keypoints.reshape(shape)
    return Prediction(
        record=record,
        boxes=np.array([found.box for found in objects], dtype=np.float64).reshape(-1, 4),
        scores=np.array([found.score for found in objects], dtype=np.float64),
        labels=np.array([names.labels[found.label_id] for found in objects], dtype=np.int64),
        masks=None if None in masks else tuple(_rle(mask) for mask in masks if mask is not None),
        keypoints=keypoints,
        segments=None if message.segments is None else tuple(_segments(message, names)),
    )


def _segments(message: DetectionsMessage, names: LabelMap) -> Iterator[FoundSegment]:
    for segment in message.segments or ():
        of = names.labels if segment.thing else names.stuff
        yield FoundSegment(of.get(segment.label_id, -1), _rle(segment.mask))


def _rle(mask: Mask) -> Rle:
    return {"size": list(mask.size), "counts": mask.counts.encode("ascii")}


def _by_name(names: Sequence[str], known: Sequence[str]) -> dict[int, int]:
    places = {_plain(name): index for index, name in reversed(list(enumerate(known)))}
    return {index: places[_plain(name)] for index, name in enumerate(names) if _plain(name) in places}


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _match_points(spec: ModelSpec, dataset: DataSet) -> tuple[int, ...] | None:
    if spec.keypoints is None or not dataset.keypoint_names:
        return None
    found = _by_name(dataset.keypoint_names, spec.keypoints.names)
    whole = len(found) == len(dataset.keypoint_names)
    return tuple(found[index] for index in range(len(found))) if whole else None


def _notes(spec: ModelSpec, dataset: DataSet, both: Sequence[str], lacking: Sequence[str]) -> Iterator[str]:
    """Say what was matched, where that is not everything."""
    num_own = len(spec.labels) + (len(spec.semantic_labels) - 1 if spec.panoptic else 0)
    if num_own > len(both):
        yield f"of the model's {num_own} labels {len(both)} count: {_listed(both)}"
    if lacking:
        yield f"the model lacks {_listed(lacking)}, which are measured as never found"
    if spec.keypoints and dataset.keypoint_names and _match_points(spec, dataset) is None:
        yield "keypoints are not measured: the model does not have all points of the data set"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"
