"""Read the configuration file: YAML with line numbers, secrets from outside, and all errors at once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from streamd.config import Config, StreamConfig, with_defaults
from streamd.errors import ConfigError
from streamd.redact import redact, register_secret

Place = tuple[str | int, ...]  # keys from the root to a value
_SUBSTITUTION = re.compile(r"\$\$|\$\{([^}]*)\}")
_MAX_BYTES = 4 << 20


class _Problems:
    """What is wrong with one file; each entry has a place and a sentence."""

    def __init__(self, lines: dict[Place, int]) -> None:
        self._lines = lines
        self._found: list[tuple[int, str]] = []

    def add(self, place: Place, sentence: str) -> None:
        known = place
        while known and known not in self._lines:
            known = known[:-1]
        line = self._lines.get(known, 1)
        name = ".".join(str(part) for part in place) or "the file"
        self._found.append((line, f"line {line}: {name}: {sentence}"))

    def raise_if_any(self, path: Path) -> None:
        if not self._found:
            return
        sentences = [redact(sentence) for _, sentence in sorted(dict.fromkeys(self._found))]
        count = "1 error" if len(sentences) == 1 else f"{len(sentences)} errors"
        raise ConfigError(f"{path}: {count}\n" + "\n".join(f"  {sentence}" for sentence in sentences))


def load(path: Path) -> Config:
    """Read, check and return the configuration.

    Raises ConfigError with every error of the file, each with its line, its place and, for an unknown key,
    the nearest known one. Relative model and file paths are taken from the file's folder.
    """
    return parse(_read(path), path)


def parse(text: str, path: Path) -> Config:
    """Like `load`, from text; `path` is for messages and for relative paths."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: not valid YAML: {where}{getattr(err, 'problem', None) or err}") from err
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected the keys models: and streams:, got {'nothing' if root is None else 'no map'}")
    lines: dict[Place, int] = {}
    problems = _Problems(lines)
    tree = _construct(root, (), lines, problems)
    tree = _substitute(tree, (), path.parent, problems)
    try:
        config = Config.model_validate(with_defaults(tree))
    except ValidationError as err:
        for detail in err.errors(include_url=False):
            problems.add(*_explain(detail, tree))
        problems.raise_if_any(path)
        raise
    for place, sentence in _cross_checks(config):
        problems.add(place, sentence)
    problems.raise_if_any(path)
    return _with_absolute_paths(config, path.parent)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; is this a configuration?")
        return data.decode()
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not a text file (byte {err.start} is not UTF-8)") from err


def _construct(node: yaml.Node, place: Place, lines: dict[Place, int], problems: _Problems) -> Any:
    """Build plain values from YAML nodes and remember each value's line; a repeated key is a problem."""
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(getattr(key_node, "value", ""))
            here = (*place, key)
            if key in values:
                lines[here] = key_node.start_mark.line + 1
                problems.add(here, "stands twice; a name may be used once")
                continue
            values[key] = _construct(value_node, here, lines, problems)
            lines[here] = key_node.start_mark.line + 1
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*place, i), lines, problems) for i, child in enumerate(node.value)]
    try:
        loader = yaml.SafeLoader("")
        return loader.construct_object(node)
    except yaml.YAMLError as err:
        problems.add(place, f"cannot be read: {getattr(err, 'problem', err)}")
        return None


def _substitute(value: Any, place: Place, folder: Path, problems: _Problems) -> Any:
    """Replace ${NAME} and ${file:PATH} in every string; what they give is a secret from then on."""
    if isinstance(value, dict):
        return {key: _substitute(child, (*place, key), folder, problems) for key, child in value.items()}
    if isinstance(value, list):
        return [_substitute(child, (*place, i), folder, problems) for i, child in enumerate(value)]
    if not isinstance(value, str) or "$" not in value:
        return value

    def look_up(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        name = match.group(1)
        try:
            secret = _look_up(name, folder)
        except ConfigError as err:
            problems.add(place, str(err))
            return "x"
        register_secret(secret)
        return secret

    return _SUBSTITUTION.sub(look_up, value)


def _look_up(name: str, folder: Path) -> str:
    if name.startswith("file:"):
        path = folder / name.removeprefix("file:")
        try:
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"${{{name}}}: cannot read {path}: {getattr(err, 'strerror', err)}") from err
    if name not in os.environ:
        raise ConfigError(f"${{{name}}}: the environment variable {name} is not set")
    return os.environ[name]


def _explain(detail: ErrorDetails, tree: Any) -> tuple[Place, str]:
    """Turn one of pydantic's errors into a place and a sentence for the operator."""
    place = tuple(part for part in detail["loc"] if not _is_union_member(part))
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _known_keys(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return place[:-1], f"unknown key '{place[-1]}' ({hint})"
    if kind == "missing":
        return place[:-1], f"'{place[-1]}' is missing"
    if kind == "string_pattern_mismatch" and "[key]" in place:
        return place[:-1], "a name holds 1 to 64 letters, digits, '_', '.' and '-', and begins with a letter or digit"
    sentence = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = _value_at(tree, place)
    shown = "" if kind == "value_error" or isinstance(got, dict | list) else f", got {got!r}"
    return place, sentence[0].lower() + sentence[1:] + shown


def _is_union_member(part: str | int) -> bool:
    """Pydantic puts the tried member of a union into the place; the operator never wrote that."""
    return isinstance(part, str) and (part.startswith(("literal[", "constrained-")) or part in ("int", "float"))


def _value_at(tree: Any, place: Place) -> Any:
    for part in place:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return tree
    return tree


def _known_keys(place: Place) -> list[str]:
    """List the keys that may stand at a place of the tree."""
    section: type[BaseModel] = Config
    rest: Iterator[str | int] = iter(place)
    for part in rest:
        annotation = section.model_fields[str(part)].annotation
        if getattr(annotation, "__origin__", None) is dict:
            next(rest, None)  # the name of the stream or model
            annotation = annotation.__args__[1]  # type: ignore[union-attr]
        choices = getattr(annotation, "__args__", (annotation,))
        section = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return list(section.model_fields)


def _cross_checks(config: Config) -> Iterator[tuple[Place, str]]:
    """Find what no single section can see."""
    for name, stream in config.streams.items():
        if stream.model is None and len(config.models) > 1:
            yield ("streams", name), f"'model' is missing; choose one of {', '.join(config.models)}"
        elif stream.model is not None and stream.model not in config.models:
            near = difflib.get_close_matches(stream.model, config.models, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(config.models)}"
            yield ("streams", name, "model"), f"no model '{stream.model}' under models: ({hint})"
        if stream.loop and not stream.is_file:
            yield ("streams", name, "loop"), "only a file can start again at its end"
        if stream.pace == "fast" and not stream.is_file:
            yield ("streams", name, "pace"), "only a file can be read faster than real time"


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    """Take relative paths from the file's folder; bare names of known models stay."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).absolute())

    def of_stream(stream: StreamConfig) -> StreamConfig:
        url = stream.url.get_secret_value()
        return stream.model_copy(update={"url": SecretStr(absolute(url))}) if "://" not in url else stream

    models = {
        name: model.model_copy(update={"path": absolute(model.path)})
        if "/" in model.path or model.path.endswith((".pt", ".pth"))
        else model
        for name, model in config.models.items()
    }
    streams = {name: of_stream(stream) for name, stream in config.streams.items()}
    return config.model_copy(update={"models": models, "streams": streams})
