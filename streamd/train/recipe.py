"""The recipe of a training run: one frozen tree, read from YAML and `key=value` on the command line.

Each field's description is what `streamd train --keys` lists.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console

from streamd.config import Name, Section
from streamd.errors import ConfigError
from streamd.file_errors import Problem, error_of, explain, read_text
from streamd.train.augment import Augmentation
from streamd.train.losses.config import LossConfig
from streamd.yaml_tree import YamlTree

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

Side = Annotated[int, Field(ge=32, le=4096)]


class ModelRecipe(Section):
    """Which network is trained, and what it begins with."""

    start: str = Field(
        description="A known name (yolox_nano), an artifact (.pt), a YOLOX checkpoint (.pth), a name of torchvision's "
        "(maskrcnn_resnet50_fpn) or a configuration of Detectron2 (.yaml; .json for a ViTDet)."
    )
    weights: str | None = Field(
        None,
        description="A checkpoint for a name of torchvision's or a configuration; DEFAULT fetches torchvision's; none "
        "begins with random weights, also where `start` has its own.",
    )
    backbone_weights: str | None = Field(None, description="A checkpoint of an image classifier, for the backbone.")
    input_size: tuple[Side, Side] | None = Field(
        None, description="Height and width of the network's input; its own by default."
    )
    prototypes: int | None = Field(
        None, ge=1, le=256, description="YOLOX: so many mask prototypes; makes a segmenter of a detector."
    )
    freeze: list[str] = Field([], description="What begins with one of these names is not trained (backbone.stem).")
    norms: Literal["train", "freeze", "recalibrate"] = Field(
        "train",
        description="Batch norms. freeze: those that come with weights stay as they are. recalibrate: first give those "
        "that were folded away the statistics of the data, without changing what the network computes; train them.",
    )


class SetRecipe(Section):
    """One data set."""

    path: str = Field(description="A COCO JSON file, or a folder in COCO's, Pascal VOC's or YOLO's layout.")
    images: str | None = Field(None, description="Where the pictures are, if not where the format has them.")
    format: Literal["auto", "coco", "panoptic", "voc", "yolo"] = "auto"
    split: str | None = Field(None, description="train, val, test ..., where one folder holds several.")


class DataRecipe(Section):
    """What is learnt from, and what is measured on."""

    train: SetRecipe
    val: SetRecipe = Field(description="Measured after each `evaluate_every` epochs; never learnt from.")
    workers: int = Field(2, ge=0, le=64, description="Processes that read pictures; 0: the training process itself.")
    cache: bool = Field(False, description="Keep decoded pictures in memory (each worker its own).")


class OptimizerRecipe(Section):
    """How weights follow gradients."""

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0, description="The highest learning rate, for the whole batch.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: Nesterov's momentum; adamw: the first beta.")
    weight_decay: float = Field(5e-4, ge=0, description="Of weights; norms and biases have none.")
    warmup_epochs: float = Field(1.0, ge=0, description="The rate rises from 0 so long, linearly.")
    final_lr: float = Field(0.05, ge=0, le=1, description="The rate ends here, as a part of lr, along half a cosine.")
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="The rate of what begins with a name, as a part of lr; the longest name counts."
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Vision transformers: each block has so much of the next one's rate."
    )
    clip_norm: float | None = Field(None, gt=0, description="Longest gradient of a step; null does not clip.")


class Recipe(Section):
    """The whole file."""

    name: Name = Field(description="Of the run and of its model.")
    model: ModelRecipe
    data: DataRecipe
    augment: Augmentation = Augmentation()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    losses: LossConfig = LossConfig()
    epochs: int = Field(gt=0, le=100_000)
    batch_size: int = Field(8, ge=1, description="Images of one step, over all processes.")
    accumulate: int = Field(1, ge=1, description="A step's images go through the network in so many parts.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights that are kept; 0 keeps the last.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Of activations (AMP).")
    compile: bool = Field(False, description="torch.compile; worth its minutes on a GPU.")
    channels_last: bool = True
    sync_batch_norm: bool = Field(False, description="Batch norms over all processes (GPUs alone).")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    seed: int = Field(0, ge=0, lt=2**31)
    evaluate_every: int = Field(1, ge=1, description="Epochs; the last one is always measured.")
    keep_every_s: float = Field(300, gt=0, description="A checkpoint at least so often, beside one an epoch.")
    licence: str = Field("", description="Of the model that comes out, for its spec.")


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` such as optimizer.lr=0.02 replace its values.

    Relative paths are taken from the recipe's folder, those of overrides from the working directory. Raises ConfigError
    with every error of the file.
    """
    problems: list[Problem] = []
    expected = "name:, model:, data: and epochs:"
    text = read_text(path)
    try:
        tree = YamlTree(text, lambda place, sentence: problems.append(Problem(place, sentence)), expected)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    values = _with_absolute_paths(tree.root, path.parent)
    for override in overrides:
        values = _override(values, override)
    recipe = None
    try:
        recipe = Recipe.model_validate(_as_meant(values))
    except ValidationError as err:
        problems += explain(err, values, Recipe)
    if recipe is None or problems:
        raise error_of(path, tree, problems)
    return recipe


def dump(recipe: Recipe) -> str:
    """Write a recipe with every key, so that reading it gives the same one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: want key=value, such as optimizer.lr=0.02")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"{override!r}: the value is not YAML: {err}") from err
    parts = key.split(".")
    tree = _copy_maps(values)
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {part} is a value, and nothing can stand below it")
    node[parts[-1]] = value
    return _with_absolute_paths(tree, Path.cwd(), only=key)


def _copy_maps(tree: Any) -> Any:
    return {key: _copy_maps(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


_PATHS = (
    "model.start",
    "model.weights",
    "model.backbone_weights",
    "data.train.path",
    "data.train.images",
    "data.val.path",
    "data.val.images",
)


def _with_absolute_paths(values: dict[str, Any], folder: Path, only: str | None = None) -> dict[str, Any]:
    """Take relative paths from `folder`; names, which have no slash and no suffix of a file, stay."""
    tree = _copy_maps(values)
    for key in _PATHS:
        if only is not None and not key.startswith(only):
            continue
        *parents, last = key.split(".")
        node: Any = tree
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or not isinstance(node.get(last), str):
            continue
        text = node[last]
        if key.startswith("data.") or "/" in text or Path(text).suffix in (".pt", ".pth", ".pkl", ".yaml", ".json"):
            node[last] = str((folder / os.path.expanduser(text)).absolute())
    return tree


def _as_meant(tree: Any) -> Any:
    """Read 1e-3 as a number, which YAML 1.1 takes for a word, and lists of numbers as tuples, as fields are."""
    if isinstance(tree, dict):
        return {key: _as_meant(value) for key, value in tree.items()}
    if isinstance(tree, list):
        values = [_as_meant(value) for value in tree]
        return tuple(values) if values and all(isinstance(value, int | float) for value in values) else values
    return float(tree) if isinstance(tree, str) and _EXPONENT.fullmatch(tree) else tree


def show_keys(console: Console) -> None:
    """List every key of a recipe with its default and what it means."""
    for key, default, text in _keys(Recipe, ""):
        console.print(f"{key}  [{default}]", highlight=False, markup=False, soft_wrap=True)
        if text:
            console.print(f"    {text}", highlight=False, markup=False, soft_wrap=True)


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
            continue
        if kind is Augmentation:
            for key, text in Augmentation.descriptions().items():
                yield f"{prefix}{name}.{key}", _as_text(getattr(field.default, key)), text
            continue
        if dataclasses.is_dataclass(field.default):
            yield from _plain_keys(field.default, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _as_text(field.default)
        yield f"{prefix}{name}", default, field.description or ""


def _plain_keys(section: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """List the numbers of the losses, which streamd/train/losses/config.py explains."""
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        if dataclasses.is_dataclass(value):
            yield from _plain_keys(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", _as_text(value), ""


def _as_text(value: Any) -> str:
    """Write a plain value as YAML would."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).strip().removesuffix("...").strip()
