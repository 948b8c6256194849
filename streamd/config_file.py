"""Read the configuration file: YAML with line numbers, secrets from outside, and all errors at once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from streamd.config import Config, is_file_url, with_defaults
from streamd.errors import ConfigError
from streamd.redact import redact, register_secret, register_url
from streamd.yaml_tree import Place, YamlTree

_SUBSTITUTION = re.compile(r"\$\$|\$\{([^}]*)(\}?)")
_MAX_BYTES = 4 << 20
_MAX_SECRET_BYTES = 64 << 10
_MAX_SHOWN = 80  # characters of a wrong value


class Problem(NamedTuple):
    """One thing that is wrong with the file."""

    place: Place
    sentence: str  # for the operator
    key: str | None = None  # the key at `place` that the sentence is about, where it is not the place itself


def load(path: Path) -> Config:
    """Read, check and return the configuration.

    Raises ConfigError with every error of the file, each with its line, its place and, for an unknown key,
    the nearest known one. Relative model and file paths are taken from the file's folder.
    """
    return parse(_read(path), path)


def parse(text: str, path: Path) -> Config:
    """Like `load`, from text; `path` is for messages and for relative paths."""
    problems: list[Problem] = []
    try:
        tree = YamlTree(text, complain=lambda place, sentence: problems.append(Problem(place, sentence)))
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    written = tree.root
    merged = with_defaults(_substitute(written, (), path.parent, problems))
    problems += _cross_checks(written, merged)
    config = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as err:
        unread = {problem.place for problem in problems}
        problems += [problem for problem in _explain(err, written) if problem.place not in unread]
    if config is None or problems:
        raise _config_error(path, tree, problems)
    config = _with_absolute_paths(config, path.parent)
    for stream in config.streams.values():
        register_url(stream.url.get_secret_value())
    return config


def _config_error(path: Path, tree: YamlTree, problems: Sequence[Problem]) -> ConfigError:
    """Say everything that is wrong with the file, by line; what came from `defaults:` is said once, there."""
    found = set()
    for problem in problems:
        place = _as_written(problem.place, tree.root)
        line = tree.line_of(place if problem.key is None else (*place, problem.key))
        name = ".".join(map(str, place)) or "the file"
        found.add((line, f"line {line}: {redact(name)}: {redact(problem.sentence)}"))
    count = "1 error" if len(found) == 1 else f"{len(found)} errors"
    return ConfigError(f"{path}: {count}\n" + "\n".join(f"  {sentence}" for _, sentence in sorted(found)))


def _as_written(place: Place, written: Any) -> Place:
    """Find where the operator wrote a value that a stream has from `defaults:`."""
    stream, defaults = _value_at(written, place[:2]), written.get("defaults")
    if len(place) < 3 or place[0] != "streams" or not isinstance(stream, dict) or not isinstance(defaults, dict):
        return place
    return ("defaults", *place[2:]) if place[2] in defaults and place[2] not in stream else place


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; is this a configuration?")
        return data.decode()
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not a text file (byte {err.start} is not UTF-8)") from err
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err


def _substitute(value: Any, place: Place, folder: Path, problems: list[Problem]) -> Any:
    """Replace ${NAME} and ${file:PATH} in every string; what they give is a secret from then on."""
    if isinstance(value, dict):
        return {key: _substitute(child, (*place, key), folder, problems) for key, child in value.items()}
    if isinstance(value, list):
        return [_substitute(child, (*place, i), folder, problems) for i, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        try:
            if not match[2]:
                raise ConfigError("'${' without its '}'; write $${ for a plain '${'")
            secret = _look_up(match[1], folder)
        except ConfigError as err:
            problems.append(Problem(place, str(err)))
            return match[0]
        register_secret(secret)
        return secret

    return _SUBSTITUTION.sub(look_up, value)


def _look_up(name: str, folder: Path) -> str:
    if not name.startswith("file:"):
        if not name or name not in os.environ:
            raise ConfigError(f"${{{name}}}: the environment variable {name} is not set")
        return os.environ[name]
    path = folder / name.removeprefix("file:")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SECRET_BYTES + 1)
        if len(data) > _MAX_SECRET_BYTES:
            raise ConfigError(f"${{{name}}}: {path} is larger than {_MAX_SECRET_BYTES >> 10} KiB; is this a secret?")
        return data.decode().strip()
    except OSError as err:
        raise ConfigError(f"${{{name}}}: cannot read {path}: {err.strerror}") from err
    except ValueError as err:  # not UTF-8, or a path with a zero byte
        raise ConfigError(f"${{{name}}}: {path} is not a text file") from err


def _explain(err: ValidationError, written: Any) -> Iterator[Problem]:
    """Turn pydantic's errors into places and sentences for the operator."""
    choices: dict[Place, list[str]] = {}  # what the members of a union say about one value
    for detail in err.errors(include_url=False):
        place, kind = detail["loc"], detail["type"]
        if kind == "extra_forbidden":
            section, key = place[:-1], str(place[-1])
            yield Problem(section, f"unknown key '{key}' ({_nearest(key, _known_keys(section))})", key)
        elif kind == "missing":
            yield Problem(place[:-1], f"'{place[-1]}' is missing")
        elif place[-1:] == ("[key]",):
            rule = "a name holds 1 to 64 letters, digits, '_', '.' and '-', and begins with a letter or digit"
            yield Problem(place[:-1], rule)
        elif kind == "value_error":  # of a URL, which may hold a password
            yield Problem(place, _sentence(detail))
        else:
            place = _without_union_member(place)
            choices.setdefault(place, []).append(_sentence(detail))
    for place, sentences in choices.items():
        got = _value_at(written, _as_written(place, written))  # before substitution, so that no secret is shown
        yield Problem(place, " or ".join(sentences).replace(" or should be ", " or ") + _shown(got))


def _sentence(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in ("dict_type", "model_type"):
        return "should be a map of keys and values"
    if kind == "too_short":
        return "is empty; name at least one"
    sentence = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return sentence[0].lower() + sentence[1:]


def _shown(value: Any) -> str:
    """Quote a wrong value as YAML would write it, where it is short."""
    if isinstance(value, dict | list):
        return ""
    if isinstance(value, str):
        text = redact(value)
        return f", got '{text[:_MAX_SHOWN]}...'" if len(text) > _MAX_SHOWN else f", got '{text}'"
    return ", got nothing" if value is None else f", got {str(value).lower()}"


def _nearest(wrong: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"


def _without_union_member(place: Place) -> Place:
    """Drop the tried member of a union, which pydantic puts last; the operator never wrote that."""
    last = str(place[-1]) if len(place) > 3 else ""
    return place[:-1] if last.startswith(("literal[", "constrained-")) else place


def _value_at(tree: Any, place: Place) -> Any:
    for part in place:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
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


def _cross_checks(written: Any, merged: Any) -> Iterator[Problem]:
    """Find what no single section can see; the trees may be wrong in any other way."""
    models, streams = merged.get("models"), merged.get("streams")
    if not isinstance(models, dict) or not isinstance(streams, dict):
        return
    for name, stream in streams.items():
        if not isinstance(stream, dict):
            continue
        model, url = stream.get("model"), stream.get("url")
        if model is None and len(models) > 1:
            yield Problem(("streams", name), f"'model' is missing; choose one of {', '.join(models)}")
        elif isinstance(model, str) and model not in models:
            place = ("streams", name, "model")
            shown = _value_at(written, _as_written(place, written))  # before substitution
            yield Problem(place, f"no model '{shown}' under models: ({_nearest(shown, list(models))})")
        if isinstance(url, str) and not is_file_url(url):
            own = written["streams"][name]  # `defaults:` may say it for the files among the streams
            if own.get("loop") is True:
                yield Problem(("streams", name, "loop"), "only a file can start again at its end")
            if own.get("pace") == "fast":
                yield Problem(("streams", name, "pace"), "only a file can be read faster than real time")


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    """Take relative paths from the file's folder; bare names of known models stay."""

    def absolute(path: str) -> str:
        return str((folder / os.path.expanduser(path)).absolute())

    models = {
        name: model.model_copy(update={"path": absolute(model.path)})
        if "/" in model.path or model.path.endswith((".pt", ".pth"))
        else model
        for name, model in config.models.items()
    }
    streams = {
        name: stream
        if "://" in (url := stream.url.get_secret_value())
        else stream.model_copy(update={"url": SecretStr(absolute(url))})
        for name, stream in config.streams.items()
    }
    return config.model_copy(update={"models": models, "streams": streams})
