"""`streamd eval` reads a data set as training does, measures, and prints what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, DataError, ModelError
from streamd.eval_command import evaluate
from streamd.evaluation.scores import Scores
from streamd.models import artifact
from tests.train_data import ColourSegmenter, make_shapes, segmenter_spec

APP = typer.Typer()
APP.command()(evaluate)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "colours.pt"
    artifact.export(ColourSegmenter(), segmenter_spec(), path)
    return path


@pytest.fixture(scope="module")
def truth_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shapes = make_shapes(folder / "images", num_pictures=6)
    file = folder / "train.json"
    file.write_text(json.dumps(as_coco(shapes)))
    return file


def as_coco(dataset: DataSet) -> dict[str, object]:
    """Write boxes alone."""
    annotations = [
        {"image_id": record.image_id, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 196}
        for record in dataset.records
        for (x1, y1, x2, y2), label in zip(record.objects.boxes.tolist(), record.objects.labels.tolist(), strict=True)
    ]
    return {
        "images": [
            {"id": one.image_id, "file_name": one.file.name, "width": one.width, "height": one.height}
            for one in dataset.records
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(dataset.labels)],
        "annotations": [{"id": index, "iscrowd": 0, **one} for index, one in enumerate(annotations, start=1)],
    }


def run(*arguments: str | Path) -> tuple[str, str]:
    result = CliRunner().invoke(APP, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_one_line_of_json_holds_the_scores(model: Path, truth_file: Path) -> None:
    output, _ = run(model, truth_file, "--json", "--limit", "4", "--device", "cpu", "--max-detections", "50")
    assert output.count("\n") == 1
    scores = msgspec.json.decode(output, type=Scores)
    assert scores.num_images == 4
    assert scores.through == "artifact"
    assert scores.boxes is not None and scores.boxes.max_detections == 50
    assert 0.1 < (scores.boxes.ap or 0) < 0.95
    assert "masks are not measured: the data set has none" in scores.notes


def test_a_table_is_printed_and_files_are_written(model: Path, truth_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output, errors = run(model, truth_file, "--out", out, "--through", "daemon", "--device", "cpu")
    assert "colours on " in output and "boxes" in output
    assert "the daemon's whole pipeline" in output
    names = {"scores.json", "predictions.json", "precision_recall.png", "confusion.png", "predictions.png"}
    assert {path.name for path in out.iterdir()} == names
    assert "predictions.png" in errors


def test_records_that_are_wrong_are_counted(model: Path, truth_file: Path, tmp_path: Path) -> None:
    tree = json.loads(truth_file.read_text())
    tree["annotations"][0]["bbox"] = [0, 0, 0, 5]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(tree))
    _, errors = run(model, wrong, "--images", truth_file.parent / "images", "--device", "cpu", "--json")
    assert "1 records of" in errors
    assert "streamd data check" in errors


def test_what_is_not_there_is_one_clear_error(model: Path, truth_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        run(model, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="device 'gpu': no such device; use auto, cpu, cuda or cuda:N"):
        run(model, truth_file, "--device", "gpu", "--through", "daemon")
    with pytest.raises(ModelError, match=r"none\.pt"):
        run(tmp_path / "none.pt", truth_file)
