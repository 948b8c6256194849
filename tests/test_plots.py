"""Diagrams and sheets are made of what was measured, whatever there is of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamd.datasets.records import DataSet, Record
from streamd.errors import DataError, OutputError
from streamd.evaluation import plots, sheet
from streamd.evaluation.coco_metrics import Curves
from streamd.evaluation.matching import Match, match
from streamd.evaluation.predictions import Prediction
from tests.train_data import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_pictures=16)


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return image.size


def some_curves(num_labels: int) -> Curves:
    recall = np.linspace(0, 1, 101)
    falls_at = np.linspace(0.3, 0.95, num_labels)[:, None]
    precision = 1 / (1 + np.exp((recall - falls_at) * 14))
    labels = tuple(f"label {index}" for index in range(num_labels))
    return Curves(labels, recall, precision, np.broadcast_to(1 - recall, precision.shape))


def found_in(record: Record, num_right: int) -> Match:
    """Find so many of the objects, and a thing that is not there."""
    objects = record.objects
    boxes = np.concatenate((objects.boxes[:num_right], [(2, 2, 8, 60)])).astype(np.float64)
    labels = np.concatenate((objects.labels[:num_right], [0]))
    assert objects.masks is not None
    masks = (*objects.masks[:num_right], objects.masks[-1])
    scores = np.linspace(0.95, 0.5, len(boxes))
    return match(Prediction(record, boxes, scores, labels, masks), 0.3)


@pytest.mark.parametrize("num_labels", [1, 3, 80])
def test_precision_is_drawn_over_recall_for_each_kind(num_labels: int, tmp_path: Path) -> None:
    curves = some_curves(num_labels)
    plots.precision_recall({"boxes": curves}, tmp_path / "one.png")
    plots.precision_recall({"boxes": curves, "masks": curves}, tmp_path / "two.png")
    (width, height), (both_width, both_height) = size_of(tmp_path / "one.png"), size_of(tmp_path / "two.png")
    assert (both_width, both_height) == (2 * width, height)


def test_labels_without_objects_have_no_curve(tmp_path: Path) -> None:
    curves = some_curves(3)
    curves.precision[1] = np.nan
    plots.precision_recall({"boxes": curves}, tmp_path / "some.png")
    curves.precision[:] = np.nan
    plots.precision_recall({"boxes": curves}, tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size < (tmp_path / "some.png").stat().st_size


@pytest.mark.parametrize("num_labels", [1, 5, 80])
def test_a_confusion_matrix_of_any_size_is_drawn(num_labels: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, (num_labels + 1, num_labels + 1)) + 40 * np.eye(num_labels + 1, dtype=np.int64)
    plots.confusion(counts, [f"label {index}" for index in range(num_labels)], 0.3, tmp_path / "confusion.png")
    width, height = size_of(tmp_path / "confusion.png")
    assert 500 < height < width < 2500


def test_labels_may_hold_what_matplotlib_would_read(tmp_path: Path) -> None:
    labels = ("$^$", "_hidden", "\N{CJK UNIFIED IDEOGRAPH-4EBA}")
    plots.precision_recall({"boxes": replace(some_curves(3), labels=labels)}, tmp_path / "curves.png")
    plots.confusion(np.eye(4, dtype=np.int64), labels, 0.3, tmp_path / "confusion.png")
    for name in ("curves.png", "confusion.png"):  # and matplotlib raised nothing, and warned of nothing
        assert size_of(tmp_path / name)[0] > 500


def write_metrics(file: Path, num_steps: int) -> None:
    random = np.random.default_rng(0)
    lines = []
    for step in range(1, num_steps + 1):
        epoch = step / 50
        loss = 3 / (1 + epoch) + random.random() * 0.3
        lines.append({"step": step, "epoch": epoch, "loss": loss, "loss/box": loss * 0.6, "loss/class": loss * 0.4})
        lines[-1]["lr"] = 0.01 * (1 - step / num_steps)
        if step % 50 == 0:
            lines.append({"step": step, "epoch": step // 50, "val/boxes_ap": 0.5 * (1 - 0.7**epoch)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("num_steps", [1, 400])
def test_the_curves_of_a_run_are_drawn(num_steps: int, tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", num_steps)
    plots.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    num_panels = 2 if num_steps < 50 else 3
    assert size_of(tmp_path / "curves.png") == (num_panels * 624, 504)


def test_a_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 10)
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 11, "epo')
    plots.curves(metrics, tmp_path / "curves.png")
    metrics.write_text('{"step": 11, "epo\n' + whole)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        plots.curves(metrics, tmp_path / "curves.png")


def test_metrics_without_anything_to_draw_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"epoch": 1, "loss": NaN}\n[]\n{"loss": 2}\n')
    with pytest.raises(DataError, match="has the run begun"):
        plots.curves(tmp_path / "empty.jsonl", tmp_path / "curves.png")
    with pytest.raises(DataError, match="cannot read the metrics"):
        plots.curves(tmp_path / "none.jsonl", tmp_path / "curves.png")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the picture"):
        plots.precision_recall({"boxes": some_curves(1)}, tmp_path / "file" / "one.png")


def test_the_sheet_shows_the_best_and_the_worst_pictures(shapes: DataSet) -> None:
    matches = [found_in(record, index % 5) for index, record in enumerate(shapes.records)]
    chosen = sheet.choose(matches, 6)
    order = [one.f1 for one in chosen]
    ranked = sorted((one.f1 for one in matches), reverse=True)
    assert order == [*ranked[:3], *ranked[-3:]]
    assert len({id(one) for one in chosen}) == 6
    assert len(sheet.choose(matches[:4], 6)) == 4


def test_pictures_where_nothing_is_and_nothing_was_found_tell_nothing(shapes: DataSet) -> None:
    record = shapes.records[0]
    empty = replace(
        record,
        objects=replace(
            record.objects,
            **{
                name: getattr(record.objects, name)[:0]
                for name in ("boxes", "labels", "is_crowd", "masks", "keypoints")
            },
        ),
    )
    nothing = Prediction(empty, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    assert match(nothing, 0.3).f1 == 1
    assert sheet.choose([match(nothing, 0.3)], 6) == []


def test_the_sheet_marks_what_is_there_in_green(shapes: DataSet, tmp_path: Path) -> None:
    matches = [found_in(record, 2) for record in shapes.records[:5]]

    def read(one: Match) -> np.ndarray:
        return np.full((one.prediction.record.height, one.prediction.record.width, 3), 128, np.uint8)

    sheet.draw(matches, shapes, read, tmp_path / "sheet.png")
    assert size_of(tmp_path / "sheet.png") == (4 * 488 - 8, 2 * 532 - 8)
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == (0x00, 0xC8, 0x53)).all(1).sum() > 1000
    assert (pixels == (0x00, 0x72, 0xB2)).all(1).sum() > 1000
