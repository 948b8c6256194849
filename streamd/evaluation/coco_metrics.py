"""Average precision as COCO defines it, by pycocotools or faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from streamd.datasets.records import DataSet, Record
from streamd.errors import ConfigError
from streamd.evaluation.predictions import Prediction
from streamd.evaluation.scores import ApScores, Backend, ClassAp

Kind = Literal["boxes", "masks", "keypoints"]

# How exactly people mark each of COCO's 17 points of a person, as a share of the person's size.
COCO_SIGMAS = tuple(sigma / 1000 for sigma in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89))
UNIFORM_SIGMA = 0.068  # their mean, for points of which nobody knows it

_IOU_TYPES = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}
_MAX_POSES = 20  # of a picture, by COCO's rule
_IOU_50, _IOU_75 = 0, 5  # places among the IoU thresholds 0.50, 0.55, ... 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Precision over recall at IoU 0.5, for C labels; rows of labels without objects are NaN."""

    labels: tuple[str, ...]
    recall: np.ndarray  # [R]
    precision: np.ndarray  # [C,R]
    scores: np.ndarray  # [C,R]: the score threshold at each place of a curve; 0 behind its end


def measure(
    predictions: Sequence[Prediction], dataset: DataSet, kind: Kind, backend: Backend, max_detections: int
) -> tuple[ApScores, Curves] | None:
    """Measure one kind on the pictures that are annotated with it; None where no object is.

    Keypoints are compared by COCO's object keypoint similarity, with its sigmas for 17 points and `UNIFORM_SIGMA` else.
    Raises ConfigError where the backend is not installed.
    """
    counted = [prediction for prediction in predictions if is_annotated(prediction.record, kind)]
    if not any(len(prediction.record.objects.boxes) for prediction in counted):
        return None
    pictures = _numbered(counted)
    header = {
        "images": [{"id": index, "height": p.record.height, "width": p.record.width} for index, p in pictures],
        "categories": [{"id": index, "name": name} for index, name in _numbered(dataset.labels)],
    }
    truth = [one for index, p in pictures for one in _truth(p.record, index, kind)]
    found = [one for index, p in pictures for one in as_results(p, index, kind)]
    for side in (truth, found):
        for number, one in _numbered(side):  # from 1: pycocotools takes 0 for "not matched"
            one["id"] = number
    evaluation = _evaluation(
        {**header, "annotations": truth}, {**header, "annotations": found}, _IOU_TYPES[kind], backend
    )
    if kind == "keypoints":
        num_points = len(dataset.keypoint_names)
        evaluation.params.kpt_oks_sigmas = np.array(sigmas(num_points))
    evaluation.params.maxDets = [_MAX_POSES] if kind == "keypoints" else [1, 10, max_detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation.evaluate()
        evaluation.accumulate()
    return _read(evaluation, dataset, truth, len(counted))


def is_annotated(record: Record, kind: Kind) -> bool:
    """Tell whether a picture says what there is to find of a kind; one without objects says it of every kind."""
    objects = record.objects
    if kind == "boxes" or len(objects.boxes) == 0:
        return True
    return (objects.masks if kind == "masks" else objects.keypoints) is not None


def sigmas(num_points: int) -> tuple[float, ...]:
    """Return how exactly each point can be marked, as object keypoint similarity takes it."""
    return COCO_SIGMAS if num_points == len(COCO_SIGMAS) else (UNIFORM_SIGMA,) * num_points


def as_results(prediction: Prediction, image_id: int, kind: Kind) -> list[dict[str, Any]]:
    """Return objects as COCO's results and as pycocotools' annotations; category ids count the labels from 1."""
    boxes = prediction.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    results = []
    for index, (box, score, label) in enumerate(
        zip(boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), strict=True)
    ):
        one: dict[str, Any] = {"image_id": image_id, "category_id": label + 1, "score": score, "bbox": box}
        one |= {"area": box[2] * box[3], "iscrowd": 0}
        if kind == "masks" and prediction.masks is not None:
            one |= {"segmentation": prediction.masks[index], "area": float(coco_mask.area(prediction.masks[index]))}
        if kind == "keypoints" and prediction.keypoints is not None:
            points = prediction.keypoints[index]
            width, height = np.ptp(points[:, :2], axis=0).tolist()  # as pycocotools' loadRes sizes a pose
            one |= {"keypoints": points.flatten().tolist(), "area": width * height}
        results.append(one)
    return results


def _truth(record: Record, image_id: int, kind: Kind) -> list[dict[str, Any]]:
    objects = record.objects
    boxes = objects.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    annotations = []
    for index, (box, label, is_crowd) in enumerate(
        zip(boxes.tolist(), objects.labels.tolist(), objects.is_crowd.tolist(), strict=True)
    ):
        one: dict[str, Any] = {"image_id": image_id, "category_id": label + 1, "bbox": box, "iscrowd": int(is_crowd)}
        # COCO's sizes, small to large, are those of the masks; where nobody drew them, of the boxes.
        mask = objects.masks[index] if objects.masks is not None else None
        area = math.nan if objects.areas is None else float(objects.areas[index])
        if math.isnan(area):
            area = box[2] * box[3] if mask is None else float(coco_mask.area(mask))
        one["area"] = area
        if kind == "masks":
            one["segmentation"] = mask
        if kind == "keypoints" and objects.keypoints is not None:
            points = objects.keypoints[index].astype(np.float64)
            one |= {"keypoints": points.flatten().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        annotations.append(one)
    return annotations


def _evaluation(truth: dict[str, Any], found: dict[str, Any], iou_type: str, backend: Backend) -> Any:
    if backend == "faster-coco-eval":
        try:
            from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped,unused-ignore]
        except ImportError as err:
            raise ConfigError(
                "faster-coco-eval is not installed: `pip install faster-coco-eval`, or use pycocotools, "
                "which gives the same figures"
            ) from err
        return COCOeval_faster(COCO(truth), COCO(found), iou_type)
    from pycocotools.coco import COCO as PythonCoco
    from pycocotools.cocoeval import COCOeval

    sides = []
    for dataset in (truth, found):
        side = PythonCoco()
        side.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            side.createIndex()
        sides.append(side)
    return COCOeval(*sides, iou_type)


def _read(
    evaluation: Any, dataset: DataSet, truth: Sequence[dict[str, Any]], num_images: int
) -> tuple[ApScores, Curves]:
    """Take COCO's figures out of precision [IoU, recall, label, size, limit] and recall [IoU, label, size, limit]."""
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    thresholds = evaluation.eval["scores"][_IOU_50, :, :, 0, -1].T
    sizes = {name: index for index, name in enumerate(evaluation.params.areaRngLbl)}
    curves = Curves(
        labels=dataset.labels,
        recall=np.asarray(evaluation.params.recThrs),
        precision=np.where(precision[_IOU_50, :, :, 0] < 0, np.nan, precision[_IOU_50, :, :, 0]).T,
        scores=thresholds,
    )
    # An object without a marked point is not counted for keypoints.
    real = [one["category_id"] for one in truth if not one["iscrowd"] and one.get("num_keypoints", 1)]
    counts = np.bincount(np.array(real, dtype=np.int64), minlength=len(dataset.labels) + 1)[1:]
    scores = ApScores(
        ap=_mean(precision[:, :, :, 0]),
        ap50=_mean(precision[_IOU_50, :, :, 0]),
        ap75=_mean(precision[_IOU_75, :, :, 0]),
        ap_small=_mean(precision[..., sizes["small"]]) if "small" in sizes else None,
        ap_medium=_mean(precision[..., sizes["medium"]]),
        ap_large=_mean(precision[..., sizes["large"]]),
        ar=_mean(recall[:, :, 0]),
        num_images=num_images,
        num_objects=len(real),
        max_detections=evaluation.params.maxDets[-1],
        per_class={
            name: _class_ap(precision[:, :, index, 0], curves, index, int(counts[index]))
            for index, name in enumerate(dataset.labels)
        },
    )
    return scores, curves


def _class_ap(precision: np.ndarray, curves: Curves, index: int, num_objects: int) -> ClassAp:
    curve, recall = curves.precision[index], curves.recall
    f1 = 2 * curve * recall / np.maximum(curve + recall, 1e-9)
    best = int(np.nanargmax(f1)) if np.isfinite(f1).any() and np.nanmax(f1) > 0 else None
    return ClassAp(
        ap=_mean(precision),
        ap50=_mean(precision[_IOU_50]),
        num_objects=num_objects,
        best_f1=None if best is None else float(f1[best]),
        best_score=None if best is None else float(curves.scores[index, best]),
    )


def _mean(values: np.ndarray) -> float | None:
    """Average what could be measured; COCO marks the rest with -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _numbered(things: Sequence[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(things, start=1))
