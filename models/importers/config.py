"""Detectron2's configuration: YAML read safely, `_BASE_` followed, and the keys that it leaves out filled in."""

from __future__ import annotations

import ast
import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from streamd.bounded import PlainLoader, read_bytes
from streamd.errors import ModelError
from streamd.models.anchors import AnchorGrid
from streamd.models.importers.datasets import labels_of
from streamd.models.importers.defaults import DEFAULTS
from streamd.models.spec import ModelSpec, ResizeRule, Task

Config = dict[str, Any]  # as Detectron2's CfgNode: maps of maps of numbers, words and lists

MAX_DETECTIONS = 1000  # of an image where the configuration sets no limit, since shapes must be fixed
_BASE = "_BASE_"
_MAX_BYTES = 1 << 20  # a full configuration has 10 kB
_MAX_VALUES = 100_000  # a few lines of aliases of aliases stand for billions of values
_MAX_DEPTH = 20
_MAX_FILES = 64  # that are read for one: each may name several, and those the same again
_MAX_NUMBER = 1 << 63  # of whole numbers where a broken one is meant
_LITERAL = re.compile(r"[(\[]|[-+.\d]+(e[-+]?\d+)?$", re.IGNORECASE)
_KINDS = {dict: "a map", list: "a list", str: "a word", bool: "a truth value", int: "a whole number", float: "a number"}
# The one expression that Detectron2's own files hold (Base-RetinaNet.yaml). It is looked up; nothing is evaluated.
_EXPRESSIONS = {
    "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]": [
        [x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)
    ]
}


def read(path: Path) -> Config:
    """Read a configuration; every key of `DEFAULTS` is there, and of its type. Raises ModelError."""
    own = _read_with_base(path, (), itertools.count(1))
    if own.get("VERSION", 2) != 2:
        raise ModelError(f"{path}: VERSION is {own['VERSION']}, and only 2 is read; convert it with Detectron2")
    return _merge(DEFAULTS, own, path, "")


def base_spec(config: Config, *, name: str, task: Task, num_classes: int, size_multiple: int = 1) -> ModelSpec:
    """Describe the input of a network, and its labels where the data set of its training is known.

    `size_multiple` is the backbone's `size_divisor`. Raises ModelError.
    """
    given = config["INPUT"]
    colours = {"BGR": "bgr", "RGB": "rgb"}
    if given["FORMAT"] not in colours:
        raise ModelError(f"INPUT.FORMAT is {given['FORMAT']!r}, want one of {', '.join(colours)}")
    min_size, max_size = given["MIN_SIZE_TEST"], given["MAX_SIZE_TEST"]
    if not 0 < min_size <= max_size:
        raise ModelError(
            f"INPUT.MIN_SIZE_TEST is {min_size} and MAX_SIZE_TEST {max_size}: the input of a model needs a size, "
            "so want 0 < MIN_SIZE_TEST <= MAX_SIZE_TEST"
        )
    height, width = (-(-side // size_multiple) * size_multiple for side in (min_size, max_size))
    return ModelSpec(
        name=name,
        task=task,
        labels=labels_of([*config["DATASETS"]["TRAIN"], *config["DATASETS"]["TEST"]], num_classes),
        input_size=(height, width),
        size_multiple=size_multiple,
        colour="bgr" if given["FORMAT"] == "BGR" else "rgb",
        mean=_per_colour(config, "PIXEL_MEAN"),
        std=_per_colour(config, "PIXEL_STD"),
        resize=ResizeRule(kind="shortest_edge", min_size=min_size, max_size=max_size, pad=None, antialias=True),
    )


def max_detections(config: Config) -> int:
    """Read TEST.DETECTIONS_PER_IMAGE, of which a negative number sets no limit. Raises ModelError."""
    given: int = config["TEST"]["DETECTIONS_PER_IMAGE"]
    if given == 0:
        raise ModelError("TEST.DETECTIONS_PER_IMAGE is 0, so that nothing would ever be found")
    return given if given > 0 else MAX_DETECTIONS


def anchor_grid(config: Config, strides: Sequence[int]) -> AnchorGrid:
    """Read MODEL.ANCHOR_GENERATOR for levels of these strides. Raises ModelError."""
    given = config["MODEL"]["ANCHOR_GENERATOR"]
    if given["NAME"] != "DefaultAnchorGenerator":
        raise ModelError(f"MODEL.ANCHOR_GENERATOR.NAME is {given['NAME']!r}; streamd builds DefaultAnchorGenerator")

    def rows(key: str) -> tuple[tuple[float, ...], ...]:
        values = given[key]
        return tuple(map(tuple, values if isinstance(values[0], list) else [values]))

    return AnchorGrid(tuple(strides), rows("SIZES"), rows("ASPECT_RATIOS"), given["OFFSET"])


def _per_colour(config: Config, key: str) -> tuple[float, float, float]:
    values = config["MODEL"][key]
    if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
        raise ModelError(f"MODEL.{key} is {values}, want three numbers")
    first, second, third = map(float, values)
    return first, second, third


class _Loader(PlainLoader):
    """Build plain values alone; a tag that names anything of Python is refused."""

    def plain_tuple(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def known_expression(self, node: yaml.SequenceNode) -> Any:
        expression = "".join("".join(map(str, self.construct_sequence(node))).split())
        if expression not in _EXPRESSIONS:
            raise yaml.constructor.ConstructorError(
                problem="it holds an expression of Python, which is not evaluated; write the values out",
                problem_mark=node.start_mark,
            )
        return _EXPRESSIONS[expression]


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.plain_tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.known_expression)


def _read_with_base(path: Path, readers: tuple[Path, ...], numbers: Iterator[int]) -> Config:
    """Read a file over those that its `_BASE_` names, which are relative to it; each takes one of the numbers."""
    if path.resolve() in readers:
        raise ModelError(f"{path}: is its own {_BASE}")
    if next(numbers) > _MAX_FILES:
        raise ModelError(f"{path}: more than {_MAX_FILES} files are read by way of {_BASE}")
    own = _load(path)
    bases = own.pop(_BASE, [])
    merged: Config = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ModelError(f"{path}: its {_BASE} is {base!r:.80}; fetch that configuration and name the file")
        try:
            base_path = (path.parent / Path(base).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError) as err:  # a home of nobody, a character that no name has
            raise ModelError(f"{path}: its {_BASE} is {base!r:.80}, and no file has that name: {err}") from err
        merged = _merge(merged, _read_with_base(base_path, (*readers, path.resolve()), numbers), path)
    return _merge(merged, own, path)


def _load(path: Path) -> Config:
    try:
        text = read_bytes(path, _MAX_BYTES).decode()
        content = _Plain().value(yaml.load(text, Loader=_Loader))
    except (OSError, ValueError, LookupError, AttributeError) as err:  # PyYAML lets values through that are no dates
        raise ModelError(f"{path}: cannot be read: {err}") from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ModelError(f"{path}: cannot be read: {where}{getattr(err, 'problem', None) or err}") from err
    except (RecursionError, OverflowError) as err:
        raise ModelError(f"{path}: cannot be read: it is nested too deeply, or its aliases multiply") from err
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a configuration of Detectron2: want keys such as MODEL and INPUT")
    return content


class _Plain:
    """Copy what YAML gave into maps, lists, numbers and words, and bound how much that may be."""

    def __init__(self) -> None:
        self._num_values = 0

    def value(self, value: Any, depth: int = 0) -> Any:
        """Raises OverflowError."""
        self._num_values += 1
        if self._num_values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise OverflowError
        if isinstance(value, dict):
            return {str(key): self.value(child, depth + 1) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(child, depth + 1) for child in value]
        return self._word(value, depth) if isinstance(value, str) else value

    def _word(self, text: str, depth: int) -> Any:
        """Read tuples as Detectron2 writes them, (640, 672), and numbers that YAML takes for words, 1e-4."""
        try:
            return self.value(ast.literal_eval(text), depth) if _LITERAL.match(text) else text
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def _merge(base: Config, own: Config, path: Path, place: str = "") -> Config:
    """Lay `own` over `base`; a value must be of the type that it replaces."""
    merged = copy.deepcopy(base)
    for key, value in own.items():
        merged[key] = _fit(base[key], value, path, place + key) if key in base else value
    return merged


def _fit(default: Any, value: Any, path: Path, place: str) -> Any:
    if isinstance(default, dict) and isinstance(value, dict):
        return _merge(default, value, path, f"{place}.")
    if type(default) is float and type(value) is int and abs(value) < _MAX_NUMBER:
        return float(value)
    if default is not None and type(default) is not type(value):
        raise ModelError(
            f"{path}: {place} is {value!r:.80}, want {_KINDS.get(type(default), 'nothing')} as {default!r}"
        )
    return value
