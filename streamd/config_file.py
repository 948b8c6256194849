"""Read the configuration file: YAML with line numbers, secrets from outside, and all errors at once."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from pydantic import SecretStr, ValidationError

from streamd import curve
from streamd.config import Config, ModelConfig, Section, StreamConfig, is_file_url, with_defaults
from streamd.errors import ConfigError
from streamd.exposure import exposures, is_for_everybody, secrets_of
from streamd.file_errors import Problem, error_of, explain, nearest, read_text, value_at
from streamd.redact import register_secret, register_url
from streamd.yaml_tree import Place, YamlTree

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)

_SUBSTITUTION = re.compile(r"\$\$|\$\{([^}]*)(\}?)")
_LOGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?P<login>(?:\$\{[^}]*\}|[^/])*)@", re.IGNORECASE)  # of a URL
_MAX_SECRET_BYTES = 64 << 10


def load(path: Path) -> Config:
    """Read, check and return the configuration.

    Raises ConfigError with every error of the file, each with its line, its place and, for an unknown key,
    the nearest known one. Relative model and file paths are taken from the file's folder.
    """
    text = read_text(path)
    config = parse(text, path)
    for sentence in exposures(config, text, path):
        logger.warning("%s", sentence)
    return config


def parse(text: str, path: Path) -> Config:
    """Like `load`, from text; `path` is for messages and for relative paths."""
    problems: list[Problem] = []
    try:
        tree = YamlTree(text, complain=lambda place, sentence: problems.append(Problem(place, sentence)))
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    written = tree.root
    as_written = functools.partial(_as_written, written=written)
    merged = with_defaults(_substitute(written, (), path.parent, problems))
    merged = _with_client_keys(merged, path.parent, problems)
    problems += _cross_checks(written, merged)
    config = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as err:
        unread = {problem.place for problem in problems}
        problems += [problem for problem in explain(err, written, Config, as_written) if problem.place not in unread]
    if config is None or problems:
        raise error_of(path, tree, problems, as_written)
    config = _with_absolute_paths(config, path.parent)
    for secret in secrets_of(config):
        register_secret(secret)
        register_secret(unquote(secret))
    return config


def with_stream(config: Config, name: str, settings: Mapping[str, object]) -> Config:
    """Add a stream with these keys and the file's `defaults:`. Raises ConfigError with all that is wrong.

    Nothing is substituted, and a file's path must be absolute: both belong to who asks.
    """
    if name in config.streams:
        raise ConfigError(f"there is a stream '{name}' already; remove it first, or choose another name")
    written = {
        "defaults": config.defaults.model_dump(exclude_unset=True),
        "models": {model: {"path": ""} for model in config.models},
        "streams": {name: dict(settings)},
        "publish": config.publish.model_dump(exclude_unset=True),
    }
    merged = with_defaults(written)
    problems = list(_cross_checks(written, merged))
    url = settings.get("url")
    if isinstance(url, str) and is_file_url(url) and not url.startswith(("/", "file://")):
        problems.append(Problem(("streams", name, "url"), "a file's path must be absolute here"))
    try:
        stream = Config.model_validate(merged).streams[name]
    except ValidationError as err:
        problems += explain(err, written, Config, functools.partial(_as_written, written=written))
    if problems:
        raise ConfigError("; ".join(f"{'.'.join(map(str, place))}: {sentence}" for place, sentence, _ in problems))
    register_url(stream.url.get_secret_value())
    return config.model_copy(update={"streams": {**config.streams, name: stream}})


def without_stream(config: Config, name: str) -> Config:
    """Remove a stream. Raises ConfigError where there is none, or no other."""
    if name not in config.streams:
        raise ConfigError(f"there is no stream '{name}' ({nearest(name, list(config.streams))})")
    if len(config.streams) == 1:
        raise ConfigError(f"'{name}' is the only stream; stop the daemon instead")
    return config.model_copy(update={"streams": {key: one for key, one in config.streams.items() if key != name}})


def _as_written(place: Place, written: Any) -> Place:
    """Find where the operator wrote a value that a stream has from `defaults:`."""
    stream, defaults = value_at(written, place[:2]), written.get("defaults")
    if len(place) < 3 or place[0] != "streams" or not isinstance(stream, dict) or not isinstance(defaults, dict):
        return place
    return ("defaults", *place[2:]) if place[2] in defaults and place[2] not in stream else place


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
        return _encoded_in_login(secret, value, match.start())

    return _SUBSTITUTION.sub(look_up, value)


def _encoded_in_login(secret: str, text: str, position: int) -> str:
    """Percent-encode a secret that becomes the user or password of a URL, where an @ or / would end it."""
    login = _LOGIN.match(text)
    if not login or not login.start("login") <= position < login.end("login"):
        return secret
    is_whole_login = ":" not in text[login.start("login") : position]  # ${LOGIN} may be user:password
    encoded = quote(secret, safe=":" if is_whole_login else "")
    register_secret(encoded)
    return encoded


def _look_up(name: str, folder: Path) -> str:
    if not name.startswith("file:"):
        if not name or name not in os.environ:
            raise ConfigError(f"${{{name}}}: the environment variable {name} is not set")
        return os.environ[name]
    path = _find(name.removeprefix("file:"), folder)
    try:
        with path.open("rb") as file:
            if is_for_everybody(file.fileno()):
                logger.warning("%s holds a secret and every user of this machine may read it: chmod o-r it", path)
            data = file.read(_MAX_SECRET_BYTES + 1)
        if len(data) > _MAX_SECRET_BYTES:
            raise ConfigError(f"${{{name}}}: {path} is larger than {_MAX_SECRET_BYTES >> 10} KiB; is this a secret?")
        return data.decode().strip()
    except OSError as err:
        raise ConfigError(f"${{{name}}}: cannot read {path}: {err.strerror}") from err
    except ValueError as err:  # not UTF-8, or a path with a zero byte
        raise ConfigError(f"${{{name}}}: {path} is not a text file") from err


def _with_client_keys(tree: Any, folder: Path, problems: list[Problem]) -> Any:
    """Put the public keys in the place of the folder that holds them, so that a reload sees which come and go."""
    place = ("publish", "zeromq", "curve", "clients")
    written = value_at(tree, place)
    if not isinstance(written, str):
        return tree
    path, keys = folder / os.path.expanduser(written), {}
    try:
        if not path.is_dir():
            raise OSError(None, "there is no such folder; `streamd keys client NAME` makes it")
        for file in sorted(path.iterdir()):
            if file.suffix == curve.PUBLIC_SUFFIX:
                keys[file.stem] = curve.read_key(file)
    except OSError as err:
        problems.append(Problem(place, f"cannot read {err.filename or path}: {err.strerror}"))
    except ValueError as err:
        problems.append(Problem(place, f"{file}: {err}"))
    return _with_value(tree, place, keys)


def _with_value(tree: Any, place: Place, value: object) -> Any:
    return {**tree, place[0]: _with_value(tree[place[0]], place[1:], value)} if place else value


def _find(path: str, folder: Path) -> Path:
    """Say where a file that holds a secret is: among the credentials that systemd gives, or at `path`.

    LoadCredential=credentials:/etc/streamd/credentials gives what is in credentials/gate as `credentials_gate`.
    """
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(given, path.replace("/", "_")) if given and not path.startswith("/") else None
    return credential if credential and credential.is_file() else folder / path


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
            shown = value_at(written, _as_written(place, written))  # before substitution
            yield Problem(place, f"no model '{shown}' under models: ({nearest(shown, list(models))})")
        if stream.get("delivery") == "stored" and not _has_redis_streams(merged):
            place = ("streams", name, "delivery")
            yield Problem(_as_written(place, written), "stored needs publish.redis, with its `streams` on")
        if isinstance(url, str) and not is_file_url(url):
            own = written["streams"][name]  # `defaults:` may say it for the files among the streams
            if own.get("loop") is True:
                yield Problem(("streams", name, "loop"), "only a file can start again at its end")
            if own.get("pace") == "fast":
                yield Problem(("streams", name, "pace"), "only a file can be read faster than real time")


def _with_absolute_model_paths(model: ModelConfig, absolute: Callable[[str], str]) -> ModelConfig:
    if "/" in model.path or model.path.endswith((".pt", ".pth")):
        model = model.model_copy(update={"path": absolute(model.path)})
    if model.gate is not None and model.gate.data is not None:
        gate = model.gate.model_copy(update={"data": absolute(model.gate.data)})
        model = model.model_copy(update={"gate": gate})
    return model


def _with_absolute_stream_paths(stream: StreamConfig, absolute: Callable[[str], str]) -> StreamConfig:
    files: dict[str, Any] = {}
    if "://" not in (url := stream.url.get_secret_value()):
        files["url"] = SecretStr(absolute(url))
    if stream.ca_file is not None:
        files["ca_file"] = absolute(stream.ca_file)
    return stream.model_copy(update=files) if files else stream


def _has_redis_streams(tree: Any) -> bool:
    redis = value_at(tree, ("publish", "redis"))
    return isinstance(redis, dict) and redis.get("streams") is not False


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    """Take relative paths from the file's folder; bare names of known models stay."""

    def absolute(path: str) -> str:
        return str((folder / os.path.expanduser(path)).absolute())

    models = {name: _with_absolute_model_paths(model, absolute) for name, model in config.models.items()}
    streams = {name: _with_absolute_stream_paths(stream, absolute) for name, stream in config.streams.items()}
    publish = config.publish
    if publish.spool.path is not None:
        spool = publish.spool.model_copy(update={"path": absolute(publish.spool.path)})
        publish = publish.model_copy(update={"spool": spool})
    if publish.redis is not None:
        redis = _with_absolute_files(publish.redis, ("ca_file", "cert_file", "key_file"), folder)
        publish = publish.model_copy(update={"redis": redis})
    metrics = _with_absolute_files(config.metrics, ("cert_file", "key_file", "client_ca_file"), folder)
    return config.model_copy(update={"models": models, "streams": streams, "publish": publish, "metrics": metrics})


def _with_absolute_files(section: S, names: Sequence[str], folder: Path) -> S:
    """Find certificates and keys, which may be credentials of the service manager."""
    written = {name: path for name in names if (path := getattr(section, name)) is not None}
    files = {name: (folder / os.path.expanduser(_find(path, folder))).absolute() for name, path in written.items()}
    return section.model_copy(update={name: str(path) for name, path in files.items()})
