"""Say what is wrong with a YAML file to whoever wrote it: every error at once, each with its line and its place."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from streamd.errors import ConfigError
from streamd.redact import redact
from streamd.yaml_tree import Place, YamlTree

_MAX_BYTES = 1 << 20  # PyYAML takes its time: some seconds for so much
_MAX_SHOWN = 80  # characters of a wrong value

AsWritten = Callable[[Place], Place]  # where a value stands in the file that was merged to another place


class Problem(NamedTuple):
    """One thing that is wrong with the file."""

    place: Place
    sentence: str  # for the operator
    key: str | None = None  # the key at `place` that the sentence is about, where it is not the place itself


def error_of(
    path: Path, tree: YamlTree, problems: Sequence[Problem], as_written: AsWritten = lambda place: place
) -> ConfigError:
    """Join everything that is wrong with the file, by line."""
    found = set()
    for problem in problems:
        place = as_written(problem.place)
        line = tree.line_of(place if problem.key is None else (*place, problem.key))
        name = ".".join(map(str, place)) or "the file"
        found.add((line, f"line {line}: {redact(name)}: {redact(problem.sentence)}"))
    count = "1 error" if len(found) == 1 else f"{len(found)} errors"
    return ConfigError(f"{path}: {count}\n" + "\n".join(f"  {sentence}" for _, sentence in sorted(found)))


def explain(
    err: ValidationError, written: Any, root: type[BaseModel], as_written: AsWritten = lambda place: place
) -> Iterator[Problem]:
    """Turn pydantic's errors about a tree of `root` into places and sentences for the operator."""
    choices: dict[Place, list[str]] = {}  # what the members of a union say about one value
    for detail in err.errors(include_url=False):
        place, kind = detail["loc"], detail["type"]
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
            section, key = place[:-1], str(place[-1])
            yield Problem(section, f"unknown key '{key}' ({nearest(key, _known_keys(section, root))})", key)
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
        got = value_at(written, as_written(place))  # before substitution, so that no secret is shown
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


def nearest(wrong: str, known: Sequence[str]) -> str:
    """Offer the known word that is most like a wrong one."""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"


def _without_union_member(place: Place) -> Place:
    """Drop the tried member of a union, which pydantic puts last; the operator never wrote that."""
    last = str(place[-1]) if len(place) > 3 else ""
    return place[:-1] if last.startswith(("literal[", "constrained-", "dict[")) or last == "str" else place


def value_at(tree: Any, place: Place) -> Any:
    """Return what stands at a place of a tree, None where there is nothing."""
    for part in place:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _known_keys(place: Place, root: type[BaseModel]) -> list[str]:
    """List the keys that may stand at a place of the tree."""
    section: type = root
    rest: Iterator[str | int] = iter(place)
    for part in rest:
        annotation = typing.get_type_hints(section)[str(part)]
        if getattr(annotation, "__origin__", None) is dict:
            next(rest, None)  # the name of the stream or model
            annotation = annotation.__args__[1]
        choices = getattr(annotation, "__args__", (annotation,))
        section = next(choice for choice in choices if _has_keys(choice))
    if dataclasses.is_dataclass(section):
        return [one.name for one in dataclasses.fields(section)]
    return list(section.model_fields)  # type: ignore[attr-defined]


def _has_keys(choice: object) -> bool:
    return isinstance(choice, type) and (issubclass(choice, BaseModel) or dataclasses.is_dataclass(choice))


def read_text(path: Path) -> str:
    """Read a file that should be a configuration. Raises ConfigError."""
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
