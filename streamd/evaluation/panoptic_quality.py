"""Panoptic quality and mean IoU, by the formulas of arXiv:1801.00868 and of Pascal VOC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from streamd.datasets.masks import decode
from streamd.datasets.records import DataSet, Record
from streamd.errors import DataError
from streamd.evaluation.predictions import FoundSegment, Prediction, categories
from streamd.evaluation.scores import ClassPq, PanopticScores, SemanticScores

_MATCHED = 0.5  # IoU above which at most one pair can be; part of the definition of panoptic quality
_MOSTLY = 0.5  # a found segment that lies so far in unlabelled pixels or crowds is not held against the model


@dataclass(frozen=True, slots=True)
class Region:
    """What a number in a map of segments stands for."""

    category: int
    is_crowd: bool = False


@dataclass(slots=True, eq=False)
class Tally:
    """Counts for each of C categories."""

    iou: np.ndarray  # [C] float64, summed over the true positives
    num_true: np.ndarray  # [C] int64
    num_false: np.ndarray  # found, but not there
    num_missed: np.ndarray

    @classmethod
    def empty(cls, num_categories: int) -> Tally:
        return cls(np.zeros(num_categories), *(np.zeros(num_categories, np.int64) for _ in range(3)))

    def add(
        self, truth: np.ndarray, regions: dict[int, Region], found: np.ndarray, found_categories: Sequence[int]
    ) -> None:
        """Count one picture.

        `truth` [H,W] holds numbers of `regions`, other numbers are unlabelled; `found` [H,W] holds 0 for nothing and
        n for `found_categories[n - 1]`, of which -1 is a category that is not measured.
        """
        numbers = np.array([0, *sorted(regions)])
        rows = np.where(np.isin(truth, numbers[1:]), np.searchsorted(numbers, truth).clip(max=len(numbers) - 1), 0)
        shape = (len(numbers), len(found_categories) + 1)
        shared = np.bincount((rows * shape[1] + found).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        true_areas, found_areas = shared.sum(1), shared.sum(0)
        of_row = [Region(-1), *(regions[number] for number in sorted(regions))]
        matched_rows, matched_columns = set(), set()
        for row, column in np.argwhere(shared > 0):
            if row == 0 or column == 0 or of_row[row].is_crowd:
                continue
            if of_row[row].category != found_categories[column - 1]:
                continue
            union = true_areas[row] + found_areas[column] - shared[row, column] - shared[0, column]
            if (iou := shared[row, column] / union) > _MATCHED:
                self.iou[of_row[row].category] += iou
                self.num_true[of_row[row].category] += 1
                matched_rows.add(int(row))
                matched_columns.add(int(column))
        for row in range(1, shape[0]):
            if row not in matched_rows and not of_row[row].is_crowd and true_areas[row]:
                self.num_missed[of_row[row].category] += 1
        for column, category in enumerate(found_categories, start=1):
            if column in matched_columns or category < 0 or not found_areas[column]:
                continue
            crowds = [row for row, region in enumerate(of_row) if region.is_crowd and region.category == category]
            if shared[[0, *crowds], column].sum() <= _MOSTLY * found_areas[column]:
                self.num_false[category] += 1

    def quality(self, category: int) -> ClassPq | None:
        """Return the quality of a category, None where none was there and none was found."""
        num_true = int(self.num_true[category])
        weight = num_true + (int(self.num_false[category]) + int(self.num_missed[category])) / 2
        if weight == 0:
            return None
        iou = float(self.iou[category])
        return ClassPq(pq=iou / weight, sq=iou / num_true if num_true else 0.0, rq=num_true / weight)


def panoptic(predictions: Sequence[Prediction], dataset: DataSet) -> PanopticScores | None:
    """Measure the pictures that have a panoptic annotation; None where there is none. Raises DataError."""
    names = categories(dataset)
    tally = Tally.empty(len(names))
    num_images = 0
    for prediction in predictions:
        record = prediction.record
        if record.segments_file is None:
            continue
        found, found_categories = _found_map(prediction)
        tally.add(read_segments(record), _regions(record, dataset), found, found_categories)
        num_images += 1
    if not num_images:
        return None
    qualities = [tally.quality(category) for category in range(len(names))]
    return PanopticScores(
        all=_mean(qualities),
        things=_mean(qualities[: len(dataset.labels)]),
        stuff=_mean(qualities[len(dataset.labels) :]),
        num_images=num_images,
        per_class={name: one for name, one in zip(names, qualities, strict=True) if one is not None},
    )


def semantic(
    predictions: Sequence[Prediction], dataset: DataSet, *, things_are_one: bool = False
) -> SemanticScores | None:
    """Measure how the labelled pixels are classified, crowds included; None without a panoptic annotation.

    The mean is over the classes that are in the data set or were found. `things_are_one`: all objects are of the class
    that `stuff_labels` begins with. Raises DataError.
    """
    names = categories(dataset)
    void = len(names)
    confusion = np.zeros((void + 1, void + 1), np.int64)  # [truth, found]; the last is neither
    num_images = 0
    for prediction in predictions:
        record = prediction.record
        if record.segments_file is None:
            continue
        numbers = read_segments(record)
        truth = np.full(numbers.shape, void)
        for number, region in _regions(record, dataset).items():
            is_thing = region.category < len(dataset.labels)
            truth[numbers == number] = void - 1 if things_are_one and is_thing else region.category
        found_map, found_categories = _found_map(prediction)
        found = np.array([void, *(void if one < 0 else one for one in found_categories)])[found_map]
        pairs = truth.ravel() * (void + 1) + found.ravel()
        confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
        num_images += 1
    if not num_images:
        return None
    confusion = confusion[:void]  # what nobody labelled does not count
    right = np.diagonal(confusion)
    union = confusion.sum(1) + confusion[:, :void].sum(0) - right
    ious = {name: float(right[index] / union[index]) for index, name in enumerate(names) if union[index]}
    total = int(confusion.sum())
    return SemanticScores(
        mean_iou=float(np.mean(list(ious.values()))) if ious else None,
        pixel_accuracy=float(right.sum() / total) if total else None,
        num_images=num_images,
        per_class=ious,
    )


def read_segments(record: Record) -> np.ndarray:
    """Read a panoptic PNG: the number of each pixel's segment, int64 [H,W]. Raises DataError."""
    assert record.segments_file is not None
    try:
        with Image.open(record.segments_file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    except OSError as err:
        raise DataError(f"{record.segments_file}: cannot be read as a panoptic PNG: {err}") from err
    if pixels.shape[:2] != (record.height, record.width):
        raise DataError(
            f"{record.segments_file}: {pixels.shape[1]}x{pixels.shape[0]} pixels, "
            f"but its picture has {record.width}x{record.height}"
        )
    return pixels @ np.array([1, 256, 256 * 256])


def _regions(record: Record, dataset: DataSet) -> dict[int, Region]:
    first_stuff = len(dataset.labels) - 1  # stuff's channel 0 stands for all things
    return {
        segment.id: Region(segment.label if segment.is_thing else first_stuff + segment.label, segment.is_crowd)
        for segment in record.segments
    }


def _found_map(prediction: Prediction) -> tuple[np.ndarray, list[int]]:
    """Draw the found segments, which do not overlap, as numbers from 1; also return the category of each."""
    segments: tuple[FoundSegment, ...] = prediction.segments or ()
    numbers = np.zeros((prediction.record.height, prediction.record.width), np.int64)
    for number, segment in enumerate(segments, start=1):
        numbers[decode(segment.mask) > 0] = number
    return numbers, [segment.category for segment in segments]


def _mean(qualities: Sequence[ClassPq | None]) -> ClassPq | None:
    measured = [one for one in qualities if one is not None]
    if not measured:
        return None
    pq, sq, rq = (float(np.mean([getattr(one, name) for one in measured])) for name in ("pq", "sq", "rq"))
    return ClassPq(pq=pq, sq=sq, rq=rq, num_classes=len(measured))
