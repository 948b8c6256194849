"""Which prediction is which object, at one threshold: what the confusion matrix and the sheet of pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from streamd.datasets.records import DataSet
from streamd.evaluation.predictions import Prediction

_MIN_IOU = 0.5
_MOSTLY = 0.5  # a prediction that lies so far within a crowd is neither right nor wrong


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """One picture's objects and the predictions that are sure enough, in pairs."""

    prediction: Prediction
    shown: np.ndarray  # [S] rows of the prediction from the score threshold on, without those in crowds
    truth: np.ndarray  # [T] rows of the record's objects, without crowds
    pairs: np.ndarray  # [P,2]: a place in `shown` and one in `truth`

    @property
    def num_right(self) -> int:
        """Count the pairs of one label."""
        found, there = (self.pairs[:, side] for side in (0, 1))
        labels = self.prediction.labels[self.shown[found]], self.prediction.record.objects.labels[self.truth[there]]
        return int((labels[0] == labels[1]).sum())

    @property
    def num_wrong(self) -> int:
        return len(self.shown) - self.num_right

    @property
    def num_missed(self) -> int:
        return len(self.truth) - self.num_right

    @property
    def f1(self) -> float:
        """Return the F1 score of the picture; 1 where there is nothing and nothing was found."""
        total = len(self.shown) + len(self.truth)
        return 2 * self.num_right / total if total else 1.0


def match(prediction: Prediction, score_threshold: float) -> Match:
    """Pair predictions with objects by box IoU of at least 0.5: equal labels first, then by falling IoU."""
    objects = prediction.record.objects
    truth = np.flatnonzero(~objects.is_crowd)
    shown = np.flatnonzero(prediction.scores >= score_threshold)
    ious = _ious(prediction.boxes[shown], objects.boxes[truth])
    # So that two objects over each other, each found with its own label, are not swapped.
    same = prediction.labels[shown][:, None] == objects.labels[truth][None]
    order = np.argsort(-(ious + same), axis=None, kind="stable")
    pairs: list[tuple[int, int]] = []
    rows, columns = set(), set()
    for place in order:
        row, column = divmod(int(place), len(truth))
        if ious[row, column] >= _MIN_IOU and row not in rows and column not in columns:
            pairs.append((row, column))
            rows.add(row)
            columns.add(column)
    crowds = objects.boxes[objects.is_crowd]
    within = _ious(prediction.boxes[shown], crowds, of_first=True).max(1, initial=0) > _MOSTLY
    kept = np.array([row in rows or not within[row] for row in range(len(shown))], dtype=bool)
    place_of = np.cumsum(kept) - 1
    joined = np.array([(place_of[row], column) for row, column in pairs], dtype=np.int64).reshape(-1, 2)
    return Match(prediction, shown[kept], truth, joined)


def confusion_matrix(matches: Sequence[Match], dataset: DataSet) -> np.ndarray:
    """Count objects by (true label, predicted label) [C+1,C+1]; the last row and column stand for no object."""
    nothing = len(dataset.labels)
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    for one in matches:
        found = one.prediction.labels[one.shown]
        there = one.prediction.record.objects.labels[one.truth]
        np.add.at(counts, (there[one.pairs[:, 1]], found[one.pairs[:, 0]]), 1)
        np.add.at(counts[nothing], np.delete(found, one.pairs[:, 0]), 1)
        np.add.at(counts[:, nothing], np.delete(there, one.pairs[:, 1]), 1)
    return counts


def _ious(found: np.ndarray, there: np.ndarray, *, of_first: bool = False) -> np.ndarray:
    """Return IoU [F,T] of boxes x1 y1 x2 y2, or with `of_first` the shared part of the first one's area."""
    if not len(found) or not len(there):
        return np.zeros((len(found), len(there)))
    sides = []
    for boxes in (found, there):
        corners = boxes.astype(np.float64)
        corners[:, 2:] -= corners[:, :2]
        sides.append(corners)
    return np.asarray(coco_mask.iou(*sides, [int(of_first)] * len(there)))
