"""The report on a data set says what is in it and what is wrong."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from streamd.datasets import check, data
from streamd.datasets.records import DataSet, Objects, Problem
from streamd.errors import DataError, OutputError
from tests.train_data import make_shapes


def report(dataset: DataSet, picture: Path | None = None) -> tuple[int, str]:
    out = io.StringIO()
    code = check.show(dataset, Console(file=out, width=110), picture)
    return code, out.getvalue()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8)


def test_sound_data_set_is_counted_and_exits_with_0(shapes: DataSet) -> None:
    code, text = report(shapes)
    num_objects = sum(len(record.objects.boxes) for record in shapes.records)
    assert code == 0
    assert f"8 pictures, {num_objects} objects, 2 labels" in text
    assert "masks in 8 pictures; 3 key points; 2 kinds of stuff" in text
    discs = sum(int((record.objects.labels == 0).sum()) for record in shapes.records)
    assert f"disc {discs}" in " ".join(text.split())
    assert "100% small (below 32)" in text and "no problems found" in text


def test_problems_are_counted_by_kind_and_the_first_of_each_named(shapes: DataSet) -> None:
    problems = [Problem(f"a.json: annotation {n}", "no area", "the box is 0 x [3] pixels") for n in range(9)]
    problems.append(Problem("a.json: image 3", "missing file", "there is no picture b.jpg"))
    code, text = report(replace(shapes, problems=problems))
    lines = [line.strip() for line in text.splitlines()]
    assert code == 1
    start = lines.index("10 problems; what they concern was left out:")
    assert lines[start + 1 : start + 3] == ["no area: 9", "a.json: annotation 0: the box is 0 x [3] pixels"]
    assert lines[start + 6 :] == [
        "... and 5 more",
        "missing file: 1",
        "a.json: image 3: there is no picture b.jpg",
    ]


def test_picture_shows_samples_below_diagrams(shapes: DataSet, tmp_path: Path) -> None:
    _, text = report(shapes, tmp_path / "new" / "sheet.png")
    assert str(tmp_path) in text.replace("\n", "")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape[1] == 1600 and sheet.shape[0] > 800
    assert (sheet[:430] == 255).mean() > 0.5  # diagrams are on white
    assert (sheet[450:] == 255).all(-1).mean() < 0.05
    with pytest.raises(OutputError, match="cannot write the picture"):
        report(shapes, tmp_path / "new" / "sheet.png" / "a.png")


def test_set_without_objects_can_be_shown(shapes: DataSet, tmp_path: Path) -> None:
    nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    empty = replace(shapes, records=tuple(replace(record, objects=nothing) for record in shapes.records))
    code, text = report(empty, tmp_path / "empty.png")
    assert code == 0 and "8 pictures without objects" in text
    assert (tmp_path / "empty.png").exists()


def test_many_labels_are_cut_to_what_can_be_read(shapes: DataSet, tmp_path: Path) -> None:
    labels = ("disc", "square", *(f"label of a long name {number}" for number in range(100)))
    _, text = report(replace(shapes, labels=labels), tmp_path / "many.png")
    assert "62 more" in text


def test_picture_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset = make_shapes(tmp_path, 2)
    dataset.records[0].file.unlink()
    with pytest.raises(DataError, match=r"0001\.jpg: cannot read the picture: No such file"):
        report(dataset, tmp_path / "sheet.png")


def test_blood_cells_are_shown_with_their_two_bad_boxes(shared: Path, tmp_path: Path) -> None:
    code, text = report(data.read(shared / "data/bccd"), tmp_path / "cells.png")
    assert code == 1
    assert "364 pictures, 4886 objects, 3 labels" in text
    assert "BloodImage_00338.xml: object 13: the box is 0 x 0 pixels" in text
