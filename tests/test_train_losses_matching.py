"""Which object a box stands for, and what a data set must have for a network to be trained."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamd.datasets.records import DataSet, Objects, Record
from streamd.errors import ConfigError
from streamd.models.anchors import decode_deltas
from streamd.models.spec import KeypointRule, MaskRule, ModelSpec, PanopticRule
from streamd.train import losses
from streamd.train.losses.boxes import crowded, encode_deltas, pairwise_iou
from streamd.train.losses.matching import BACKGROUND, IGNORED, match, sample
from streamd.train.losses.roi_targets import keypoint_targets
from streamd.train.targets import Targets
from tests.small_networks import make


def targets(boxes: list[list[float]], crowds: list[list[float]] | None = None) -> Targets:
    return Targets(tensor(boxes), torch.zeros(len(boxes), dtype=torch.int64), tensor(crowds or []))


def tensor(boxes: list[list[float]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def test_a_box_is_an_object_background_or_neither_by_its_overlap() -> None:
    boxes = tensor([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4], [0, 0, 10, 2], [50, 50, 60, 60]])
    objects = targets([[100, 100, 101, 101], [0, 0, 10, 10]])
    assert match(boxes, objects, (0.3, 0.6)).tolist() == [1, 1, IGNORED, BACKGROUND, BACKGROUND]
    assert match(boxes, targets([]), (0.3, 0.6)).tolist() == [BACKGROUND] * 5


def test_every_object_gets_the_boxes_that_overlap_it_best() -> None:
    boxes = tensor([[0, 0, 10, 1], [0, 0, 10, 1], [0, 0, 10, 0.5]])
    objects = targets([[0, 0, 10, 10], [80, 80, 90, 90]])
    assert match(boxes, objects, (0.3, 0.7)).tolist() == [BACKGROUND] * 3
    # Not those that do not overlap it at all.
    assert match(boxes, objects, (0.3, 0.7), every_object=True).tolist() == [0, 0, BACKGROUND]


def test_background_within_a_crowd_is_ignored_and_objects_there_are_not() -> None:
    boxes = tensor([[0, 0, 10, 10], [20, 20, 30, 30], [28, 20, 48, 30], [60, 60, 70, 70]])
    objects = targets([[0, 0, 10, 10]], crowds=[[0, 0, 34, 34]])
    assert match(boxes, objects, (0.5, 0.5)).tolist() == [0, IGNORED, BACKGROUND, BACKGROUND]
    assert crowded(boxes, objects.crowds).tolist() == [True, True, False, False]


def test_samples_keep_their_fractions_and_take_what_there_is() -> None:
    matches = torch.tensor([0] * 30 + [BACKGROUND] * 100 + [IGNORED] * 50)
    positive, negative = sample(matches, 40, 0.25, torch.Generator().manual_seed(0))
    assert (len(positive), len(negative)) == (10, 30)
    assert (matches[positive] == 0).all()
    assert (matches[negative] == BACKGROUND).all()
    assert len(positive.unique()) == 10
    again = sample(matches, 40, 0.25, torch.Generator().manual_seed(0))
    other = sample(matches, 40, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(again[1], negative)
    assert not torch.equal(other[1], negative)
    positive, negative = sample(matches[25:], 500, 0.5, torch.Generator())
    assert (len(positive), len(negative)) == (5, 100)


def test_encoded_deltas_decode_to_the_boxes() -> None:
    anchors, boxes = tensor([[3, 5, 20, 9], [0, 0, 8, 8]]), tensor([[1, 1, 30, 40], [4, 3, 5, 4]])
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(decode_deltas(encode_deltas(boxes, anchors, weights), anchors, weights), boxes)


def test_boxes_without_area_overlap_nothing() -> None:
    assert pairwise_iou(tensor([[5, 5, 5, 5]]), tensor([[5, 5, 5, 5], [0, 0, 9, 9]])).tolist() == [[0, 0]]


def test_keypoints_lie_in_cells_of_their_box() -> None:
    points = torch.tensor([[[10.0, 20, 2], [30, 60, 1], [19.9, 39.9, 1], [31, 30, 2], [15, 25, 0]]])
    cells, taught = keypoint_targets(points, tensor([[10, 20, 30, 60]]), 4)
    assert taught.tolist() == [[True, True, True, False, False]]
    assert cells[0, :3].tolist() == [0, 15, 5]


def dataset(
    *,
    masks: bool = False,
    points: int = 0,
    crowd: bool = False,
    segments: bool = False,
    labels: int = 3,
    stuff: int = 0,
    num_records: int = 1,
) -> DataSet:
    rle = {"size": [4, 4], "counts": b"0"}
    objects = Objects(
        np.array([[0, 0, 2, 2]], dtype=np.float32),
        np.zeros(1, dtype=np.int64),
        np.array([crowd]),
        (rle,) if masks else None,  # type: ignore[arg-type]
        np.zeros((1, points, 3), dtype=np.float32) if points else None,
    )
    record = Record(Path("a.png"), 1, 4, 4, objects, Path("a_segments.png") if segments else None)
    names = tuple(f"class_{index}" for index in range(labels))
    return DataSet(
        "set", names, (record,) * num_records, ("p",) * points, tuple(f"stuff_{index}" for index in range(stuff))
    )


SPEC = ModelSpec(name="net", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="rgb")
WITH_MASKS = msgspec.structs.replace(SPEC, task="segment", masks=MaskRule(kind="box"))
WITH_POINTS = msgspec.structs.replace(SPEC, task="keypoints", keypoints=KeypointRule(names=("p", "q")))
PANOPTIC = msgspec.structs.replace(WITH_MASKS, task="panoptic", panoptic=PanopticRule(stuff_labels=("things", "sky")))
SEMANTIC = msgspec.structs.replace(SPEC, task="semantic")


@pytest.mark.parametrize(
    ("name", "spec", "fits"),
    [
        ("faster_rcnn", SPEC, dataset()),
        ("mask_rcnn", WITH_MASKS, dataset(masks=True)),
        ("keypoint_rcnn", WITH_POINTS, dataset(points=2)),
        ("panoptic_fpn", PANOPTIC, dataset(masks=True, segments=True, stuff=2)),
        ("semantic_fpn", SEMANTIC, dataset(segments=True, stuff=3)),
    ],
)
def test_a_data_set_that_fits_is_taken(name: str, spec: ModelSpec, fits: DataSet) -> None:
    losses.check(make(name), spec, fits)


@pytest.mark.parametrize(
    ("spec", "lacking", "complaint"),
    [
        (SPEC, dataset(num_records=0), "set: it has no pictures"),
        (SPEC, dataset(crowd=True), "set: it has no objects"),
        (SPEC, dataset(labels=2), "set: it has 2 labels, the network 3 classes"),
        (WITH_MASKS, dataset(), "none of its pictures has any; take a network for boxes alone"),
        (WITH_POINTS, dataset(points=5), "the network finds 2 keypoints, and its objects have 5"),
        (PANOPTIC, dataset(masks=True), "none of its pictures has segments"),
        (PANOPTIC, dataset(masks=True, segments=True, stuff=4), "it has 4 stuff labels, the network 2"),
        (SEMANTIC, dataset(masks=True), "none of its pictures has segments"),
    ],
)
def test_a_data_set_that_lacks_something_is_refused(spec: ModelSpec, lacking: DataSet, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^net cannot be trained with .*{complaint}"):
        losses.check(make("faster_rcnn"), spec, lacking)


def test_a_network_without_losses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"net: a Linear cannot be trained here; those that can are YOLOX, Rcnn"):
        losses.check(nn.Linear(1, 1), SPEC, dataset())
    with pytest.raises(ConfigError, match="net: the charts of DensePose cannot be trained here"):
        losses.check(make("faster_rcnn"), msgspec.structs.replace(SPEC, task="densepose"), dataset())
