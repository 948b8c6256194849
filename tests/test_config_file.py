"""A wrong file gives one error that names everything wrong with it, and a secret is never shown."""

from __future__ import annotations

import json
import logging
import pickle
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streamd import redact
from streamd.config import Config, StreamConfig
from streamd.config_file import load, parse
from streamd.errors import ConfigError

SECRET = "hunter22"
PATH = Path("/etc/streamd/streamd.yaml")


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redact, "_secrets", set())
    monkeypatch.setattr(redact, "_secrets_pattern", None)
    yield


def config_of(text: str, path: Path = PATH) -> Config:
    return parse(textwrap.dedent(text), path)


def problems_of(text: str, path: Path = PATH) -> list[str]:
    """Give the lines below the error's first one."""
    with pytest.raises(ConfigError) as caught:
        config_of(text, path)
    first, *problems = str(caught.value).splitlines()
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    assert first == f"{path}: {count}"
    return [problem.strip() for problem in problems]


def with_stream(stream: str) -> str:
    return f"models: {{m: {{path: m.pt}}}}\nstreams:\n  gate: {{{stream}}}\n"


def test_all_errors_of_a_file_come_at_once_with_line_place_and_nearest_key() -> None:
    text = """\
        models:
          people: {path: yolox_s, score_threshold: 1.5, max_batch: many}
          cars:
            device: gpu
        streams:
          gate:
            url: rtsp://camera/1
            model: peple
            fsp: 5
          yard: {url: "ftp://camera/2", model: cars, transport: sctp}
          "bad name!": {url: a.mp4, model: cars}
          roof: {url: rtsp://camera/3}
          shed: {url: rtsp://camera/4, model: cars, loop: true, pace: fast}
          barn:
        publish:
          redis: {urk: redis://localhost}
          zeromq: tcp://127.0.0.1:5555
        metric: {}
        """
    assert problems_of(text) == [
        "line 2: models.people.max_batch: should be 'auto' or a valid integer, got 'many'",
        "line 2: models.people.score_threshold: should be less than or equal to 1, got 1.5",
        "line 3: models.cars: 'path' is missing",
        r"line 4: models.cars.device: string should match pattern '^(auto|cpu|cuda(:\d+)?)$', got 'gpu'",
        "line 8: streams.gate.model: no model 'peple' under models: (did you mean 'people'?)",
        "line 9: streams.gate: unknown key 'fsp' (did you mean 'fps'?)",
        "line 10: streams.yard.transport: should be 'tcp' or 'udp', got 'sctp'",
        "line 10: streams.yard.url: unknown scheme 'ftp://'; known are rtsp, rtsps, http, https, file, v4l2, "
        "or a file's path",
        "line 11: streams.bad name!: a name holds 1 to 64 letters, digits, '_', '.' and '-', and begins with a letter "
        "or digit",
        "line 12: streams.roof: 'model' is missing; choose one of people, cars",
        "line 13: streams.shed.loop: only a file can start again at its end",
        "line 13: streams.shed.pace: only a file can be read faster than real time",
        "line 14: streams.barn: should be a map of keys and values, got nothing",
        "line 16: publish.redis: 'url' is missing",
        "line 16: publish.redis: unknown key 'urk' (did you mean 'url'?)",
        "line 17: publish.zeromq: should be a map of keys and values, got 'tcp://127.0.0.1:5555'",
        "line 18: the file: unknown key 'metric' (did you mean 'metrics'?)",
    ]


def test_an_error_in_the_defaults_is_said_once_and_there() -> None:
    text = """\
        defaults: {fps: fast, model: nothing}
        models: {m: {path: m.pt}}
        streams:
          gate: {url: a.mp4}
          yard: {url: b.mp4}
        """
    assert problems_of(text) == [
        "line 1: defaults.fps: should be a valid number, got 'fast'",
        "line 1: defaults.model: no model 'nothing' under models: (known are m)",
    ]


def test_defaults_for_files_do_not_forbid_cameras() -> None:
    config = config_of("""\
        defaults: {loop: true, pace: fast}
        models: {m: {path: m.pt}}
        streams: {gate: {url: rtsp://camera}, clip: {url: a.mp4}}
        """)
    assert config.streams["clip"].loop


def test_a_key_without_a_near_one_names_the_known_ones() -> None:
    (problem,) = problems_of("models: {m: {path: m.pt}}\nstreams: {s: {url: a}}\npublish: {zzz: 1}\n")
    assert problem == "line 3: publish: unknown key 'zzz' (known are format, queue_size, zeromq, redis, spool)"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: {m: {path: m.pt}}\n", "line 1: the file: 'streams' is missing"),
        ("models: {}\nstreams: {s: {url: a}}\n", "line 1: models: is empty; name at least one"),
        ("models: {m: {path: m.pt}}\nstreams: []\n", "line 2: streams: should be a map of keys and values"),
        (with_stream("url: a, url: b"), "line 3: streams.gate.url: stands twice; a name may be used once"),
        (with_stream("url: a") + "  gate: {url: b}\n", "line 4: streams.gate: stands twice; a name may be used once"),
        (with_stream("url: a, fps: true"), "line 3: streams.gate.fps: should be a valid number, got true"),
        (with_stream("url: a, fps: '5'"), "line 3: streams.gate.fps: should be a valid number, got '5'"),
        (with_stream("url: a, fps: .nan"), "line 3: streams.gate.fps: should be a finite number, got nan"),
        (with_stream("url: 5"), "line 3: streams.gate.url: should be a valid string, got 5"),
        (with_stream("url: ''"), "line 3: streams.gate.url: is empty"),
        (with_stream("url: a, pace: 2026-01-31"), "line 3: streams.gate.pace: should be 'realtime' or 'fast', got "
         "2026-01-31"),
        (with_stream(f"url: a, model: {'m' * 200}"), f"line 3: streams.gate.model: no model '{'m' * 200}' under models:"
         " (known are m)"),
        (with_stream(f"url: a, transport: {'m' * 200}"), "line 3: streams.gate.transport: should be 'tcp' or 'udp', got"
         f" '{'m' * 80}...'"),
        (with_stream("url: a, {}: b"), "line 3: streams.gate: a list, map or control character is no key (line 3); "
         "quote it if it is text"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_sentence(text: str, problem: str) -> None:
    assert problems_of(text) == [problem]


def test_names_that_look_like_numbers_types_or_words_of_yaml_are_names() -> None:
    text = """\
        models: {int: {path: m.pt, fsp: 1}}
        streams: {1: {url: a, model: int}, no: {url: a, model: int}, float: {url: a, model: int, fps: 0}}
        """
    assert problems_of(text) == [
        "line 1: models.int: unknown key 'fsp' (known are path, device, precision, labels, score_threshold, "
        "iou_threshold, max_detections, max_batch, max_wait_ms, workers, threads, sha256, gate, probation_s)",
        "line 2: streams.float.fps: should be greater than 0, got 0",
    ]
    config = config_of(text.replace(", fsp: 1", "").replace("fps: 0", "fps: 1"))
    assert list(config.streams) == ["1", "no", "float"]


def test_anchors_and_merge_keys_share_what_streams_have_in_common() -> None:
    config = config_of("""\
        models: {m: {path: m.pt}}
        streams:
          gate: &camera
            url: rtsp://camera/1
            fps: 5
            transport: udp
          yard:
            <<: *camera
            url: rtsp://camera/2
        """)
    gate, yard = config.streams["gate"], config.streams["yard"]
    assert (yard.fps, yard.transport) == (gate.fps, gate.transport) == (5, "udp")
    assert yard.url.get_secret_value() == "rtsp://camera/2"


def test_an_error_in_a_merged_map_names_the_line_where_it_is_written() -> None:
    text = "models: {m: {path: m.pt}}\nstreams:\n  a: &a\n    url: x\n    fps: 0\n  b:\n    <<: *a\n"
    assert problems_of(text) == [
        "line 5: streams.a.fps: should be greater than 0, got 0",
        "line 5: streams.b.fps: should be greater than 0, got 0",
    ]


def test_relative_paths_begin_at_the_file_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/op")
    text = """\
        models: {a: {path: m.pt}, b: {path: sub/m}, c: {path: yolox_s}, d: {path: ~/m.pt}, e: {path: /m.pth}}
        streams: {s: {url: clip.mp4, model: a}, t: {url: "file:///clip.mp4", model: a}, u: {url: ~/c.mp4, model: a}}
        """
    config = config_of(text, tmp_path / "streamd.yaml")
    paths = [model.path for model in config.models.values()]
    assert paths == [f"{tmp_path}/m.pt", f"{tmp_path}/sub/m", "yolox_s", "/srv/op/m.pt", "/m.pth"]
    urls = [stream.url.get_secret_value() for stream in config.streams.values()]
    assert urls == [f"{tmp_path}/clip.mp4", "file:///clip.mp4", "/srv/op/c.mp4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the keys models: and streams:, got nothing"),
        (b"\n# only a comment\n", "got nothing"),
        (b"- a\n- b\n", "got no map"),
        (b"just a sentence", "got no map"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not a text file (byte 0 is not UTF-8)"),
        (b"a: \xff\n", "not a text file (byte 3 is not UTF-8)"),
        (b"models: [\n", "not valid YAML: line 2, column 1"),
        (b"models:\n\tm: 1\n", "not valid YAML: line 2, column 1: found character '\\t'"),
        (b"a: &a [*a]\n", "does an anchor contain itself?"),
        (b"#" * ((1 << 20) + 1), "larger than 1 MiB"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_file_that_is_no_configuration_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "streamd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "streamd.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + with_stream("url: a.mp4").replace("\n", "\r\n").encode())
    assert list(load(path).streams) == ["gate"]


@pytest.fixture
def secret_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("CAMERA_PASSWORD", SECRET)
    (tmp_path / "redis.password").write_text("swordfish\n")
    return config_of(
        """\
        models: {m: {path: m.pt, labels: ["${CAMERA_PASSWORD}"]}}
        streams:
          gate: {url: "rtsp://viewer:${CAMERA_PASSWORD}@camera/1"}
          yard: {url: "rtsp://viewer:t%40ken$$1@camera/1"}
        publish: {redis: {url: "redis://:${file:redis.password}@localhost"}}
        """,
        tmp_path / "streamd.yaml",
    )


def test_secrets_come_from_the_environment_and_from_files(secret_config: Config) -> None:
    redis = secret_config.publish.redis
    assert redis is not None and redis.url.get_secret_value() == "redis://:swordfish@localhost"
    urls = {name: stream.url.get_secret_value() for name, stream in secret_config.streams.items()}
    assert urls == {"gate": "rtsp://viewer:hunter22@camera/1", "yard": "rtsp://viewer:t%40ken$1@camera/1"}


def test_a_credential_of_systemd_comes_before_the_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoadCredential=credentials:FOLDER names each file of the folder credentials_FILE."""
    given = tmp_path / "given"
    for folder in (given, tmp_path / "credentials"):
        folder.mkdir()
    (tmp_path / "credentials" / "gate").write_text("by-hand")
    text = """
        models: {m: {path: m.pt}}
        streams: {gate: {url: "rtsp://u:${file:credentials/gate}@192.0.2.1/1"}}
        publish: {redis: {url: "rediss://localhost", cert_file: redis.crt, key_file: credentials/redis.key}}
    """
    path = tmp_path / "streamd.yaml"

    def found() -> tuple[str, str | None]:
        config = parse(textwrap.dedent(text), path)
        assert config.publish.redis is not None and config.publish.redis.cert_file == str(tmp_path / "redis.crt")
        return config.streams["gate"].url.get_secret_value(), config.publish.redis.key_file

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    assert found() == ("rtsp://u:by-hand@192.0.2.1/1", str(tmp_path / "credentials" / "redis.key"))
    (given / "credentials_gate").write_text("by-systemd\n")
    (given / "credentials_redis.key").touch()
    assert found() == ("rtsp://u:by-systemd@192.0.2.1/1", str(given / "credentials_redis.key"))


def test_no_representation_of_the_configuration_shows_a_secret(secret_config: Config) -> None:
    shown = [repr(secret_config), str(secret_config), f"{secret_config!r}"]
    streams = list(secret_config.streams.values())
    shown += [repr(streams), str(streams), str(secret_config.publish), json.dumps(str(secret_config.models))]
    shown += [secret_config.model_dump_json(include={"streams", "publish"}), str(secret_config.model_dump()["streams"])]
    for text in shown:
        assert SECRET not in text and "swordfish" not in text and "t%40ken" not in text
        assert "***" in text


def test_no_log_shows_a_secret_however_it_came_into_the_message(secret_config: Config) -> None:
    formatter = redact.RedactingFormatter("%(message)s")
    for said in (SECRET, "swordfish", "t%40ken$1", "t@ken$1", secret_config.streams["gate"].url.get_secret_value()):
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "cannot open %s", (said,), None)
        assert said not in formatter.format(record)


@pytest.mark.parametrize(
    "stream",
    [
        'url: a, fps: "${SECRET}"',
        'url: "ftp://u:${SECRET}@camera"',
        'url: "ftp://${SECRET}"',
        'url: "rtsp://[${SECRET}"',
        'url: ["${SECRET}"]',
        'url: a, transport: "${SECRET}"',
        'url: a, model: "${SECRET}"',
        "url: a, fps: ftp://user:hunter22@camera",
        'url: a, "rtsp://u:hunter22@camera": 1',
    ],
)
@pytest.mark.parametrize("secret", [SECRET, "pw1"], ids=["long", "too short to be redacted"])
def test_no_error_shows_a_secret(stream: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", secret)
    with pytest.raises(ConfigError) as caught:
        parse(with_stream(stream), PATH)
    assert secret not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None, "its text would hold the input"


def test_a_validation_error_that_escapes_shows_no_input() -> None:
    with pytest.raises(ValueError) as caught:
        StreamConfig.model_validate({"url": 5, "password": SECRET})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rtsp://${NOPE}@camera", "${NOPE}: the environment variable NOPE is not set"),
        ("${}", "${}: the environment variable  is not set"),
        ("${file:nope}", "${file:nope}: cannot read /etc/streamd/nope: No such file or directory"),
        ("${file:/}", "${file:/}: cannot read /: Is a directory"),
        ("${file:/dev/zero}", "${file:/dev/zero}: /dev/zero is larger than 64 KiB; is this a secret?"),
        (r"${file:a\0b}", "is not a text file"),
        ("rtsp://u:${PASSWORD@camera", "'${' without its '}'; write $${ for a plain '${'"),
    ],
)
def test_a_secret_that_cannot_be_had_is_an_error_and_only_one(url: str, message: str) -> None:
    (problem,) = problems_of(with_stream(f'url: "{url}"'))
    assert problem.startswith("line 3: streams.gate.url: ") and message in problem


def test_a_wrong_place_for_a_secret_is_named_once() -> None:
    text = with_stream("url: a") + 'publish: {redis: {url: "${NOPE}"}}\n'
    assert problems_of(text) == ["line 4: publish.redis.url: ${NOPE}: the environment variable NOPE is not set"]


def test_dollars_that_begin_nothing_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X", "1")
    config = config_of(with_stream('url: "rtsp://u:a$b$$c$${X}$$${X}@camera"'))
    assert config.streams["gate"].url.get_secret_value() == "rtsp://u:a$b$c${X}$1@camera"


def test_what_a_secret_holds_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "${INNER}$$: {")
    config = config_of(with_stream('url: "rtsp://u:${OUTER}@camera"'))
    assert config.streams["gate"].url.get_secret_value() == "rtsp://u:%24%7BINNER%7D%24%24%3A%20%7B@camera"


KEYS = sorted(
    {"defaults", "models", "streams", "publish", "metrics", "zeromq", "redis", "url", "path", "<<", "gate", "[key]"}
    | set(StreamConfig.model_fields)
    | {"max_batch", "labels", "device", "bind", "int", "literal['auto']"}
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["auto", "a.pt", "rtsp://u:p@h/1", "${NOPE}", "${file:x}", "${", "$$", "cuda:0", "~x/y.pt"])
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4) | st.integers(), inner, max_size=5)
    ),
    max_leaves=30,
)
# Nearly right files reach deeper than wild ones.
SECTIONS = st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=4)
NEARLY = st.fixed_dictionaries(
    {
        "models": st.dictionaries(st.sampled_from(["m", "int", "a b"]), SECTIONS | SCALARS, max_size=2),
        "streams": st.dictionaries(st.sampled_from(["gate", "float", "1", ""]), SECTIONS | SCALARS, max_size=3),
    },
    optional={"defaults": SECTIONS | TREES, "publish": TREES, "metrics": SECTIONS},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=NEARLY | st.dictionaries(st.sampled_from(KEYS), TREES, max_size=5))
@example(tree={"streams": {"a": ["${X}"]}, "models": 1, "defaults": None})
@example(tree={"streams": ["${X}"], "models": {"m": {"max_batch": {"int": 1}}}})
def test_garbage_gives_a_configuration_or_a_config_error(tree: Any) -> None:
    with suppress(ConfigError):
        parse(yaml.safe_dump(tree, allow_unicode=True), PATH)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="abc:-[]{}&*!|>'\"#%@`,?<\n \t0", max_size=60))
def test_any_text_gives_a_configuration_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        parse(text, PATH)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_any_bytes_give_a_configuration_or_a_config_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with suppress(ConfigError):
        load(tmp_path / "x.yaml")


def test_a_configuration_survives_being_pickled(secret_config: Config) -> None:
    assert pickle.loads(pickle.dumps(secret_config)) == secret_config


@pytest.mark.parametrize(
    ("url", "secret", "expected"),
    [
        ("rtsp://u:${SECRET}@camera/1", "p@:s/s%w#\u00f6", "rtsp://u:p%40%3As%2Fs%25w%23%C3%B6@camera/1"),
        ("rtsp://${SECRET}@camera/1", "user:p@ss", "rtsp://user:p%40ss@camera/1"),
        ("rtsp://camera/${SECRET}/1", "a/b", "rtsp://camera/a/b/1"),
        ("rtsp://u:p@${SECRET}/1", "camera:554", "rtsp://u:p@camera:554/1"),
    ],
)
def test_a_secret_in_a_url_s_login_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, url: str, secret: str, expected: str
) -> None:
    monkeypatch.setenv("SECRET", secret)
    assert config_of(with_stream(f'url: "{url}"')).streams["gate"].url.get_secret_value() == expected
