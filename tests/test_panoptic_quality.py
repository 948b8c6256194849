"""Panoptic quality of cases that can be worked out by hand, by the definition in arXiv:1801.00868, section 4."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamd.datasets.records import DataSet, Record
from streamd.errors import DataError
from streamd.evaluation.panoptic_quality import Region, Tally, panoptic, read_segments, semantic
from streamd.evaluation.predictions import FoundSegment, Prediction
from streamd.evaluation.scores import ClassPq
from tests.train_data import encode, make_shapes

TRUTH = np.zeros((10, 10), np.int64)
TRUTH[:, :6] = 7  # an object of category 0: 60 pixels
TRUTH[:5, 6:] = 8  # a region of category 1: 20 pixels; below it 20 pixels that nobody labelled
REGIONS = {7: Region(0), 8: Region(1)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_pictures=3, shift=2)


def tally(found: np.ndarray, categories: list[int], regions: dict[int, Region] = REGIONS) -> Tally:
    counts = Tally.empty(2)
    counts.add(TRUTH, regions, found, categories)
    return counts


def parts(quality: ClassPq | None) -> tuple[float, float, float]:
    assert quality is not None
    return quality.pq, quality.sq, quality.rq


def the_same(record: Record, dataset: DataSet) -> Prediction:
    """Find every segment exactly as it is annotated."""
    numbers = read_segments(record)
    first_stuff = len(dataset.labels) - 1
    segments = tuple(
        FoundSegment(one.label if one.is_thing else first_stuff + one.label, encode(numbers == one.id))
        for one in record.segments
    )
    nothing = np.zeros((0, 4))
    return Prediction(record, nothing, np.zeros(0), np.zeros(0, np.int64), segments=segments)


def test_what_is_found_as_it_is_has_quality_one() -> None:
    counts = tally(np.select([TRUTH == 7, TRUTH == 8], [1, 2]), [0, 1])
    for category in (0, 1):
        assert counts.quality(category) == ClassPq(pq=1.0, sq=1.0, rq=1.0)


def test_quality_is_the_overlap_of_what_matches_over_what_there_is() -> None:
    found = np.zeros_like(TRUTH)
    found[:, :4] = 1  # 40 of the object's 60 pixels: IoU 2/3
    found[:, 4:6] = 2  # another one of its label: wrong
    counts = tally(found, [0, 0])
    assert parts(counts.quality(0)) == pytest.approx((2 / 3 / 1.5, 2 / 3, 1 / 1.5))
    assert counts.quality(1) == ClassPq(pq=0.0, sq=0.0, rq=0.0)  # missed
    assert (counts.num_false.tolist(), counts.num_missed.tolist()) == ([1, 0], [0, 1])


def test_half_an_overlap_is_no_match() -> None:
    found = np.zeros_like(TRUTH)
    found[:5, :6] = 1  # 30 of 60 pixels
    counts = tally(found, [0])
    assert counts.num_true[0] == 0
    assert counts.num_false[0] == counts.num_missed[0] == 1


def test_another_label_is_wrong_and_missed() -> None:
    counts = tally((TRUTH == 7).astype(np.int64), [1])
    assert (counts.num_false.tolist(), counts.num_missed.tolist()) == ([0, 1], [1, 1])


def test_unlabelled_pixels_do_not_count_against_a_match() -> None:
    found = np.zeros_like(TRUTH)
    found[:, 6:] = 1  # the region of 20 pixels and the 20 below, which nobody labelled
    assert tally(found, [1]).quality(1) == ClassPq(pq=1.0, sq=1.0, rq=1.0)


def test_what_lies_mostly_in_unlabelled_pixels_is_not_wrong() -> None:
    found = np.zeros_like(TRUTH)
    found[4:, 6:] = 1  # 4 pixels of the region, 20 unlabelled
    found[:, 5] = 2  # within the object, and too small for it
    counts = tally(found, [1, 0])
    assert counts.num_false.tolist() == [1, 0]


def test_what_lies_mostly_in_a_crowd_of_its_label_is_not_wrong_and_a_crowd_is_not_missed() -> None:
    crowd = {7: Region(0, is_crowd=True), 8: Region(1)}
    inside = np.zeros_like(TRUTH)
    inside[2:5, 2:5] = 1
    counts = tally(inside, [0], crowd)
    assert counts.num_false[0] == counts.num_missed[0] == 0
    assert counts.quality(0) is None
    assert tally(inside, [1], crowd).num_false[1] == 1  # the crowd is of another label


def test_a_label_that_the_data_set_lacks_is_neither_right_nor_wrong() -> None:
    counts = tally((TRUTH == 7).astype(np.int64), [-1])
    assert counts.num_false.tolist() == [0, 0]
    assert counts.num_missed.tolist() == [1, 1]


def test_counts_add_up_over_pictures() -> None:
    counts = Tally.empty(2)
    counts.add(TRUTH, REGIONS, (TRUTH == 7).astype(np.int64), [0])
    counts.add(TRUTH, REGIONS, np.zeros_like(TRUTH), [])
    assert parts(counts.quality(0)) == pytest.approx((1 / 1.5, 1.0, 1 / 1.5))


def test_means_are_taken_over_things_and_over_stuff(shapes: DataSet) -> None:
    predictions = [the_same(record, shapes) for record in shapes.records]
    scores = panoptic(predictions, shapes)
    assert scores is not None
    assert scores.num_images == 3
    assert list(scores.per_class) == ["disc", "square", "sky", "ground"]
    assert scores.all == ClassPq(pq=1.0, sq=1.0, rq=1.0, num_classes=4)
    without_stuff = [
        replace(one, segments=tuple(segment for segment in one.segments or () if segment.category < 2))
        for one in predictions
    ]
    scores = panoptic(without_stuff, shapes)
    assert scores is not None and scores.all is not None
    assert scores.things == ClassPq(pq=1.0, sq=1.0, rq=1.0, num_classes=2)
    assert scores.stuff == ClassPq(pq=0.0, sq=0.0, rq=0.0, num_classes=2)
    assert scores.all.pq == pytest.approx(0.5)


def test_mean_iou_counts_pixels(shapes: DataSet) -> None:
    exact = [the_same(record, shapes) for record in shapes.records]
    scores = semantic(exact, shapes)
    assert scores is not None
    assert (scores.mean_iou, scores.pixel_accuracy) == (1.0, 1.0)
    # All ground is called sky: no ground is found, and the sky is half right.
    mistaken = [
        replace(one, segments=tuple(replace(s, category=2) if s.category == 3 else s for s in one.segments or ()))
        for one in exact
    ]
    scores = semantic(mistaken, shapes)
    assert scores is not None
    numbers = np.stack([read_segments(record) for record in shapes.records])
    sky, ground = (numbers == 1).sum(), (numbers == 2).sum()
    assert scores.per_class["ground"] == 0
    assert scores.per_class["sky"] == pytest.approx(sky / (sky + ground))
    assert scores.per_class["disc"] == 1
    assert scores.pixel_accuracy == pytest.approx(1 - ground / numbers.size)


def test_pictures_without_a_panoptic_annotation_are_left_out(shapes: DataSet) -> None:
    without = replace(shapes.records[0], segments_file=None, segments=())
    prediction = the_same(shapes.records[0], shapes)
    assert panoptic([replace(prediction, record=without)], shapes) is None
    assert semantic([replace(prediction, record=without)], shapes) is None


def test_a_panoptic_png_that_does_not_fit_its_picture_is_an_error(shapes: DataSet, tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    (tmp_path / "no.png").write_text("not a picture")
    for name, text in (("small.png", "5x5 pixels, but its picture has 96x64"), ("no.png", "cannot be read")):
        with pytest.raises(DataError, match=text):
            read_segments(replace(shapes.records[0], segments_file=tmp_path / name))


def test_the_numbers_of_a_panoptic_png_have_three_digits(shapes: DataSet, tmp_path: Path) -> None:
    record = shapes.records[0]
    Image.new("RGB", (record.width, record.height), (3, 2, 1)).save(tmp_path / "one.png")
    assert (read_segments(replace(record, segments_file=tmp_path / "one.png")) == 3 + 2 * 256 + 65536).all()
