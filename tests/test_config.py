"""The tree of the configuration: its defaults, its schema, and the files that show it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from streamd.config import (
    Config,
    CurveConfig,
    ModelConfig,
    PublishConfig,
    RedisConfig,
    StreamConfig,
    StreamDefaults,
    with_defaults,
)
from streamd.config_file import load
from tests.conftest import ROOT

FULL = ROOT / "configs" / "streamd.yaml"
EXAMPLE = ROOT / "configs" / "example.yaml"


def make_config(**stream: Any) -> Config:
    return Config.model_validate({"models": {"m": {"path": "m.pt"}}, "streams": {"gate": {"url": "a.mp4", **stream}}})


def with_redis(text: str) -> str:
    """Switch on what stands in the full configuration as a comment."""
    head, block, tail = re.split(r"  redis: null.*\n((?:  # .*\n)+)", text)
    return head + re.sub(r"^  # ", "  ", block, flags=re.MULTILINE) + tail


def defaults_of(section: type[BaseModel]) -> dict[str, Any]:
    """Give the defaults of a section as YAML would hold them; keys without a default are left out."""
    fields = section.model_fields.items()
    values = {name: field.get_default() for name, field in fields if not field.is_required()}
    return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in values.items()}


def test_the_full_configuration_states_every_key_with_its_default() -> None:
    written = yaml.safe_load(FULL.read_text())
    redis = yaml.safe_load(with_redis(FULL.read_text()))["publish"]["redis"]
    model, stream = written["models"]["people"], written["streams"]["gate"]
    assert model == {"path": model["path"], **defaults_of(ModelConfig)}
    assert list(model) == list(ModelConfig.model_fields), "in the same order"
    assert list(stream) == ["url"] == [key for key, field in StreamConfig.model_fields.items() if field.is_required()]
    assert redis == {"url": redis["url"], **defaults_of(RedisConfig)}
    assert {key: written[key] for key in ("defaults", "publish", "metrics", "control")} == defaults_of(Config)
    assert set(written) == set(Config.model_fields)
    assert list(written["defaults"]) == list(StreamDefaults.model_fields)


def test_the_full_configuration_shows_the_keys_of_zeromq() -> None:
    block = re.search(r"    curve: null.*\n((?:    # .*\n)+)", FULL.read_text())
    assert block is not None
    shown = yaml.safe_load(re.sub(r"^    # ", "", block[1], flags=re.MULTILINE))
    assert list(shown["curve"]) == list(CurveConfig.model_fields)


def test_every_key_of_the_full_configuration_has_a_comment() -> None:
    lines = with_redis(FULL.read_text()).splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        names_something = re.fullmatch(r"  (people|gate|redis):", line)
        if re.match(r" *\w+:", line) and not names_something:
            assert " # " in line or before.lstrip().startswith("#"), f"without a comment: {line}"


def test_the_full_configuration_loads_with_and_without_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATE_PASSWORD", "hunter22")
    config = load(FULL)
    assert config.publish.redis is None
    assert config.streams["gate"].url.get_secret_value() == "rtsp://viewer:hunter22@192.0.2.10/stream1"
    changed = tmp_path / "streamd.yaml"
    changed.write_text(with_redis(FULL.read_text()))
    redis = load(changed).publish.redis
    assert redis is not None and redis.url.get_secret_value() == "redis://localhost:6379"


def test_the_example_of_the_readme_has_twelve_lines_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) == 12
    assert f"```yaml\n{text}```" in (ROOT / "README.md").read_text()
    monkeypatch.setenv("GATE_PASSWORD", "hunter22")
    (tmp_path / "yard.password").write_text("swordfish\n")
    (tmp_path / "example.yaml").write_text(text)
    config = load(tmp_path / "example.yaml")
    assert config.streams["yard"].url.get_secret_value() == "rtsp://viewer:swordfish@192.0.2.11/stream1"
    assert [stream.fps for stream in config.streams.values()] == [10, 10]
    assert config.model_of("yard") == "people"


def test_a_stream_says_otherwise_than_the_defaults() -> None:
    tree = with_defaults({"defaults": {"fps": 5, "loop": True}, "streams": {"a": {}, "b": {"fps": None}, "c": None}})
    assert tree["streams"] == {"a": {"fps": 5, "loop": True}, "b": {"fps": None, "loop": True}, "c": None}


@pytest.mark.parametrize("tree", [None, [], {}, {"defaults": 1, "streams": {}}, {"defaults": {}, "streams": 1}])
def test_defaults_of_a_wrong_tree_are_left_for_the_validation(tree: Any) -> None:
    assert with_defaults(tree) == tree


@pytest.mark.parametrize(
    ("url", "is_file"),
    [
        ("clip.mp4", True),
        ("/a/b c.mp4", True),
        ("file:///a.mp4", True),
        ("rtsp://h/x", False),
        ("v4l2:///dev/x", False),
    ],
)
def test_a_path_is_told_from_a_camera(url: str, is_file: bool) -> None:
    assert make_config(url=url).streams["gate"].is_file == is_file


@pytest.mark.parametrize("url", ["", "  ", "ftp://host/clip.mp4", "concat://a", "rtsp://[::1/x"])
def test_a_url_that_no_source_can_open_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        make_config(url=url)


@pytest.mark.parametrize("key", ["fps", "stall_timeout_s", "max_latency_ms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "5", True])
def test_a_number_that_means_nothing_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        make_config(**{key: value})


def test_the_tree_cannot_be_changed() -> None:
    config = make_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.publish = PublishConfig()  # type: ignore[misc]
