"""Tests of streamd/train/recipe.py: what a recipe may say, and how it is told what is wrong with it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from streamd.errors import ConfigError
from streamd.train import recipe as recipes

PLAIN = """
name: cells
model:
  start: yolox_nano
  input_size: [416, 416]
data:
  train: {path: cells, split: train}
  val: {path: cells, split: val}
augment:
  multi_scale: [0.8, 1.2]
epochs: 3
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "cells.yaml"
    path.write_text(PLAIN)
    return path


def test_recipe_is_read_with_its_defaults(plain: Path) -> None:
    recipe = recipes.load(plain)
    assert recipe.model.input_size == (416, 416)
    assert recipe.augment.multi_scale == (0.8, 1.2)
    assert recipe.optimizer.kind == "sgd"


def test_paths_are_taken_from_the_recipes_folder_and_names_stay(plain: Path) -> None:
    recipe = recipes.load(plain)
    assert recipe.data.train.path == str(plain.parent / "cells")
    assert recipe.model.start == "yolox_nano"


def test_paths_of_overrides_are_taken_from_the_working_directory(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    recipe = recipes.load(plain, ["data.train.path=mine", "model.start=start.pt"])
    assert recipe.data.train.path == str(elsewhere / "mine")
    assert recipe.model.start == str(elsewhere / "start.pt")
    assert recipe.data.val.path == str(plain.parent / "cells")


def test_overrides_replace_values_of_every_kind(plain: Path) -> None:
    overrides = ["epochs=7", "optimizer.lr=5e-1", "augment.mosaic=0.25", "model.input_size=[64, 96]", "ema=0"]
    recipe = recipes.load(plain, overrides)
    assert (recipe.epochs, recipe.optimizer.lr, recipe.augment.mosaic, recipe.ema) == (7, 0.5, 0.25, 0)
    assert recipe.model.input_size == (64, 96)


def test_what_is_written_reads_as_the_same_recipe(plain: Path, tmp_path: Path) -> None:
    recipe = recipes.load(plain, ["optimizer.lr_factors={backbone: 0.1}", "model.freeze=[backbone.stem]"])
    again = tmp_path / "again.yaml"
    again.write_text(recipes.dump(recipe))
    assert recipes.load(again) == recipe


def test_all_errors_are_said_at_once_with_their_lines(plain: Path) -> None:
    plain.write_text(
        PLAIN.replace(
            "epochs: 3", "epochs: 0\nepoch: 3\noptimizer: {kind: adam, lrr: 1}\nlosses: {yolox: {mask_wait: 1.0}}"
        ).replace("multi_scale: [0.8, 1.2]", "flipp: 0.5")
    )
    with pytest.raises(ConfigError) as caught:
        recipes.load(plain)
    text = str(caught.value)
    assert "6 errors" in text
    for sentence in (
        "augment: unknown key 'flipp' (did you mean 'flip'?)",
        "epochs: should be greater than 0, got 0",
        "unknown key 'epoch' (did you mean 'epochs'?)",
        "optimizer.kind: should be 'sgd' or 'adamw', got 'adam'",
        "optimizer: unknown key 'lrr' (did you mean 'lr'?)",
        "losses.yolox: unknown key 'mask_wait' (did you mean 'mask_weight'?)",
    ):
        assert sentence in text


def test_value_that_augmentation_refuses_is_an_error_of_the_recipe(plain: Path) -> None:
    with pytest.raises(ConfigError, match="flip is 2"):
        recipes.load(plain, ["augment.flip=2.0"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("epochs", "want key=value"),
        ("=3", "want key=value"),
        ("name.x=3", "nothing can stand below"),
        ("epochs=[", "not YAML"),
        ("epoch=3", "unknown key 'epoch'"),
    ],
)
def test_override_that_is_none_is_refused(plain: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        recipes.load(plain, [override])


def test_file_that_is_no_map_names_the_keys_it_wants(plain: Path) -> None:
    plain.write_text("just a word")
    with pytest.raises(ConfigError, match="expected the keys name:, model:"):
        recipes.load(plain)


def test_every_key_is_listed_with_its_meaning() -> None:
    out = io.StringIO()
    recipes.show_keys(Console(file=out, width=200))
    text = out.getvalue()
    for key in (
        "model.start  [required]",
        "optimizer.lr  [0.01]",
        "augment.flip  [0.5]",
        "losses.yolox.l1_weight  [0.0]",
        "data.val.split",
    ):
        assert key in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "train").glob("*.yaml")), ids=str)
def test_shipped_recipes_are_whole(path: Path) -> None:
    assert recipes.load(path).epochs > 0
