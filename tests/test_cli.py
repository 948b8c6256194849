"""Every command explains itself, and what goes wrong is one plain message with the documented exit code."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from streamd import __version__
from streamd.cli import app, exit_code_of, main
from streamd.errors import ConfigError, ModelError, PublishError, SourceError, StreamdError
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from tests.clips import write_clip
from tests.conftest import ROOT
from tests.redis_server import free_port
from tests.test_infer import Tiny


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


class Streamd:
    """Run `streamd ARGUMENTS` in this process, as its entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["streamd", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)


@pytest.fixture
def streamd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Streamd]:
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Streamd(monkeypatch, capsys)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    spec = ModelSpec(name="tiny", task="detect", labels=("a", "b"), input_size=(16, 24), colour="rgb")
    artifact.export(Tiny(), spec, path)
    return path


def write_config(folder: Path, model: Path | str, streams: dict[str, Any], **sections: Any) -> Path:
    path = folder / "streamd.yaml"
    tree = {"models": {"m": {"path": str(model)}}, "streams": streams, "publish": {"zeromq": None}, **sections}
    path.write_text(yaml.safe_dump(tree))
    return path


def commands() -> dict[tuple[str, ...], Any]:
    """Find every command and group of commands, by the words that call it."""
    found: dict[tuple[str, ...], Any] = {(): typer.main.get_command(app)}
    for name, command in found[()].commands.items():
        found[name,] = command
        found |= {(name, below): inner for below, inner in getattr(command, "commands", {}).items()}
    return found


def test_the_commands_are_those_that_are_documented() -> None:
    names = {" ".join(words) for words in commands()}
    assert names >= {"run", "check", "watch", "predict", "demo", "export", "doctor", "config", "config schema"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(streamd: Streamd, words: tuple[str, ...]) -> None:
    command = commands()[words]
    ended = streamd(*words, "--help")
    assert ended.code == 0
    assert "Usage: streamd" in ended.out
    is_group = hasattr(command, "commands")
    assert is_group or re.search(rf"Example: streamd {' '.join(words)}\b", ended.out)
    assert [parameter.name for parameter in command.params if not parameter.help] == []


def test_exit_codes_are_documented_in_the_help(streamd: Streamd) -> None:
    text = streamd("--help").out
    for code in (0, 1, 2, 69, 78, 130):
        assert re.search(rf"\b{code} ", text), code


def test_the_version_is_that_of_the_package(streamd: Streamd) -> None:
    assert streamd("--version") == Ended(0, f"streamd {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["run"],
        ["run", "a.yaml", "--fsp", "1"],
        ["run", "a.yaml", "--log-level", "loud"],
        ["watch", "--seconds", "soon"],
        ["watch", "--zmq", "tcp://x:1", "--redis", "redis://x"],
        ["watch", "--server-key", "server.public"],
        ["config"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_how(streamd: Streamd, arguments: list[str]) -> None:
    ended = streamd(*arguments)
    assert ended.code == 2
    assert "Usage: streamd" in ended.err + ended.out


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_wrong_file_exits_with_78_and_one_message_of_all_errors(
    streamd: Streamd, command: str, tmp_path: Path
) -> None:
    path = tmp_path / "streamd.yaml"
    path.write_text("models: {m: {path: a.pt}}\nstreams:\n  gate: {url: rtsp://u:hunter22@h, fsp: 5}\n  yard: {}\n")
    ended = streamd(command, path)
    assert (ended.code, ended.out) == (78, "")
    assert ended.err.splitlines() == [
        f"streamd: {path}: 2 errors",
        "  line 3: streams.gate: unknown key 'fsp' (did you mean 'fps'?)",
        "  line 4: streams.yard: 'url' is missing",
    ]


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_configuration_exits_with_78(streamd: Streamd, command: str, tmp_path: Path) -> None:
    ended = streamd(command, tmp_path / "nothing.yaml")
    assert ended.code == 78
    assert ended.err == f"streamd: {tmp_path}/nothing.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("name", ["missing.pt", "text.pt"])
def test_a_missing_or_foreign_model_exits_with_78(streamd: Streamd, command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("this is no model\n")
    ended = streamd(command, write_config(tmp_path, name, {"gate": {"url": "clip.mp4"}}))
    message = {"missing.pt": "no such file", "text.pt": "not a model file"}[name]
    assert ended.code == 78
    assert f"streamd: {tmp_path / name}: {message}" in ended.err
    assert "Traceback" not in ended.err
    assert "still sending" not in ended.err  # publishers that had nothing to send are no news


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"streams": {"gate": {"url": "a.mp4", "decoder": "nvdec"}}}, "decoder 'nvdec' cannot work on cpu: no GPU"),
        ({"models": {"m": {"path": "", "labels": ["unicorn"]}}}, "knows no 'unicorn'"),
    ],
)
def test_a_wish_that_cannot_be_granted_exits_with_78(
    streamd: Streamd, command: str, section: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    tree = {"models": {"m": {"path": str(model)}}, "streams": {"gate": {"url": "a.mp4"}}, **section}
    tree["models"]["m"]["path"] = str(model)
    ended = streamd(command, write_config(tmp_path, model, **tree))
    assert (ended.code, message in ended.err) == (78, True), ended.err


def test_a_port_that_is_taken_exits_with_69(streamd: Streamd, model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(tmp_path, model, {"gate": {"url": "a.mp4"}}, publish={"zeromq": {"bind": bind}})
        ended = streamd("run", config)
    assert ended.code == 69
    assert bind.removeprefix("tcp://") in ended.err and "Traceback" not in ended.err


def test_run_reads_a_file_to_its_end_and_exits_with_0(streamd: Streamd, model: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 20)
    streams = {"clip": {"url": "clip.mp4", "pace": "fast"}}
    bind = f"tcp://127.0.0.1:{free_port()}"
    ended = streamd("run", write_config(tmp_path, model, streams, publish={"zeromq": {"bind": bind}}))
    assert ended.code == 0, ended.err
    assert "stopped: 20 results published" in ended.err


def test_check_says_one_line_for_each_model_and_stream(streamd: Streamd, model: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 3)
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    good = {"clip": {"url": "clip.mp4"}}
    ended = streamd("check", write_config(tmp_path, model, good))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "ok    model m: tiny, detect, 2 labels, on cpu",
        "ok    stream clip: 64x48, decoder software: no GPU",
    ]
    camera = f"rtsp://viewer:hunter22@127.0.0.1:{free_port()}/1"
    bad = {"text": {"url": "text.mp4"}, "gone": {"url": "gone.mp4"}, "gate": {"url": camera}}
    ended = streamd("check", write_config(tmp_path, model, good | bad))
    assert (ended.code, "hunter22" in ended.out + ended.err) == (1, False)
    lines = {line.split()[2].rstrip(":"): line for line in ended.out.splitlines() if " stream " in line}
    assert lines["clip"].startswith("ok    stream clip: 64x48")
    assert lines["text"] == "FAIL  stream text: failed: not a video or picture that FFmpeg can read"
    assert lines["gone"] == "FAIL  stream gone: not_found: there is no such file or device"
    assert lines["gate"].startswith("FAIL  stream gate: unreachable: the connection was refused")


def test_check_stops_where_it_is_told(streamd: Streamd, model: Path, tmp_path: Path) -> None:
    gone = {"gone": {"url": "gone.mp4"}}
    config = write_config(tmp_path, model, gone)
    assert streamd("check", config, "--up-to", "models").out == "ok    model m: tiny, detect, 2 labels, on cpu\n"
    config = write_config(tmp_path, tmp_path / "missing.pt", gone)
    assert streamd("check", config, "--up-to", "models").code == 78
    ended = streamd("check", config, "--up-to", "config")
    assert (ended.code, ended.out) == (0, f"ok    {config}: 1 model(s), 1 stream(s)\n")


@pytest.mark.parametrize(
    ("err", "code"),
    [
        (ConfigError("x"), 78),
        (ModelError("x"), 78),
        (PublishError("x"), 69),
        (SourceError("x"), 1),
        (StreamdError("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(err: StreamdError, code: int) -> None:
    assert exit_code_of(err) == code


def test_the_schema_of_the_configuration_is_one_and_accepts_the_examples(streamd: Streamd) -> None:
    schema = json.loads(streamd("config", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in ("streamd.yaml", "example.yaml"):
        validator.validate(yaml.safe_load((ROOT / "configs" / name).read_text()))
    assert not validator.is_valid({"models": {}, "streams": {}})
    assert not validator.is_valid({"models": {"m": {"path": "a"}}, "streams": {"gate": {"url": "a", "fsp": 1}}})
    assert not validator.is_valid({"models": {"m": {"path": "a"}}, "streams": {"bad name": {"url": "a"}}})


def test_every_key_is_described_for_editors(streamd: Streamd) -> None:
    schema = json.loads(streamd("config", "schema").out)
    sections = {"Config": schema, **schema["$defs"]}
    undescribed = [
        f"{section}.{key}"
        for section, body in sections.items()
        for key, value in body["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert undescribed == []


def test_the_program_starts_without_what_is_heavy() -> None:
    code = "import sys, streamd.cli; print(*(name for name in ('torch', 'av', 'zmq', 'redis') if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, ""), ended.stderr


def test_the_module_is_the_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "streamd", "run", "nothing.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 78
    assert ended.stderr == "streamd: nothing.yaml: cannot be read: No such file or directory\n"
