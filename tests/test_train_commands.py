"""Tests of streamd/train_commands.py: what `streamd train` and `streamd data` say to their users."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from streamd.errors import ConfigError, DataError, ModelError
from streamd.train_commands import data_app, train
from tests.coco_folder import write_coco

APP = typer.Typer()
APP.command()(train)
RECIPE = """
name: shapes
model: {start: yolox_nano, weights: none, input_size: [64, 96]}
data: {train: {path: data/instances.json}, val: {path: data/instances.json}, workers: 0}
epochs: 1
batch_size: 4
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_coco(tmp_path / "data", 4)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shapes.yaml"
    path.write_text(RECIPE)
    return path


def test_run_goes_into_a_folder_of_its_name(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(APP, [str(recipe), "model.prototypes=4"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs/shapes/shapes.pt").exists()
    assert "prototypes: 4" in (tmp_path / "runs/shapes/recipe.yaml").read_text()


def test_keys_are_listed_without_a_recipe() -> None:
    done = CliRunner().invoke(APP, ["--keys"])
    assert done.exit_code == 0 and "optimizer.lr  [0.01]" in done.output


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["model.start=nothing.pt"], ModelError, "no such file"),
        (["data.val.path=nowhere.json"], DataError, "no such file or folder"),
        (["model.start=ssd999"], ModelError, "no such model"),
        (["--publish", "a/b"], ConfigError, "want a plain name"),
    ],
)
def test_what_is_missing_is_said_and_leaves_no_folder(
    recipe: Path, tmp_path: Path, arguments: list[str], error: type[Exception], sentence: str
) -> None:
    done = CliRunner().invoke(APP, [str(recipe), *arguments])
    assert isinstance(done.exception, error)
    assert sentence in str(done.exception)
    assert not (tmp_path / "runs").exists()


def test_neither_recipe_nor_keys_is_wrong_usage() -> None:
    assert CliRunner().invoke(APP, []).exit_code == 2


def test_data_check_counts_and_draws(recipe: Path, tmp_path: Path) -> None:
    picture = tmp_path / "set.png"
    done = CliRunner().invoke(data_app, [str(tmp_path / "data/instances.json"), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert "4 pictures" in done.output and "disc" in done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_data_check_of_a_set_with_a_missing_picture_ends_with_1(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "data/0002.png").unlink()
    done = CliRunner().invoke(data_app, [str(tmp_path / "data/instances.json")])
    assert done.exit_code == 1
    assert "missing file" in done.output and "0002.png" in done.output
