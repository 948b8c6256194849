"""The commands that talk to a running daemon, against a socket whose daemon is told what to answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from streamd.changes import Changes, Names
from streamd.cli import app
from streamd.control import ControlServer
from streamd.control_messages import (
    AddRequest,
    Answer,
    DaemonState,
    ListRequest,
    ModelEntry,
    PublisherEntry,
    ReloadRequest,
    RemoveRequest,
    Request,
    SpoolEntry,
    StatusRequest,
    StreamEntry,
)
from streamd.errors import ConfigError, StreamdError
from streamd.top import Rates, render
from streamd.wire import StatusMessage
from tests.conftest import ROOT


def entry(stream: str, state: str, reason: str = "", published: int = 0) -> StreamEntry:
    status = StatusMessage(
        schema=1,
        stream=stream,
        state=state,
        reason=reason,
        decoder="software: no GPU",
        at="2026-01-31T10:00:00.000000Z",
        retry_in_s=None,
        reconnects=2,
        frames=100,
        dropped=7,
        corrupt=0,
    )
    return StreamEntry(status=status, model="people", published=published)


def state_with(published: int) -> DaemonState:
    return DaemonState(
        version="1.2.3",
        pid=4711,
        uptime_s=200.0,
        streams=(entry("gate", "running", published=published), entry("yard", "unreachable", "refused")),
        models=(ModelEntry(name="people", network="yolox_s", sha256="ab" * 32, devices=("cuda:0",)),),
        publishers=(
            PublisherEntry(name="redis redis://h", healthy=False, sent=5, dropped=3, queued=0),
            PublisherEntry(
                name="stored redis redis://h",
                healthy=True,
                sent=8,
                dropped=0,
                queued=2,
                spool=SpoolEntry(entries=70, bytes=3 << 20, accepted=78),
            ),
        ),
    )


class FakeDaemon:
    """A control socket that notes what it is asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.server = ControlServer(path, self.handle, lambda err: None)

    def handle(self, request: Request) -> Answer | Future[Changes]:
        self.requests.append(request)
        match request:
            case StatusRequest():
                return Answer(state=state_with(published=90))
            case ListRequest():
                return Answer(streams=state_with(published=90).streams)
            case RemoveRequest(name="none"):
                raise ConfigError("there is no stream 'none'")
        changes: Future[Changes] = Future()
        changes.set_result(Changes(streams=Names(added=("yard",))))
        return changes

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        ended = CliRunner().invoke(app, [*arguments, "--socket", str(self.path)], input=stdin)
        if isinstance(ended.exception, StreamdError):
            raise ended.exception
        assert ended.exit_code == 0, ended.output
        return ended.output


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    made = FakeDaemon(tmp_path / "control.sock")
    made.server.start()
    yield made
    made.server.stop()


def test_status_shows_what_runs_and_why_something_does_not(daemon: FakeDaemon) -> None:
    shown = daemon.run("status")
    for expected in ("1.2.3", "4711", "3 min", "gate", "running", "yard: refused", "yolox_s", "3 lost, failing"):
        assert expected in shown
    assert "stored redis redis://h: 8 sent, 0 lost, 70 in the spool (3.0 MiB)" in shown


def test_status_as_json_is_the_daemons_own_description(daemon: FakeDaemon) -> None:
    state = json.loads(daemon.run("status", "--json"))
    assert [stream["status"]["stream"] for stream in state["streams"]] == ["gate", "yard"]
    assert state["models"][0]["sha256"] == "ab" * 32


def test_top_shows_the_streams_for_as_long_as_it_is_told(daemon: FakeDaemon) -> None:
    assert "gate" in daemon.run("top", "--seconds", "0")


def test_streams_are_listed_one_a_line(daemon: FakeDaemon) -> None:
    assert daemon.run("streams", "list").splitlines() == ["gate  running", "yard  unreachable: refused"]
    lines = [json.loads(line) for line in daemon.run("streams", "list", "--json").splitlines()]
    assert [line["status"]["state"] for line in lines] == ["running", "unreachable"]


def test_a_stream_is_added_with_typed_settings_and_says_for_how_long(daemon: FakeDaemon) -> None:
    said = daemon.run("streams", "add", "yard", "clip.mp4", "--set", "fps=5", "--set", "loop=true", "--set", "model=a")
    [asked] = daemon.requests
    assert isinstance(asked, AddRequest) and asked.name == "yard"
    assert asked.settings == {"url": str(Path("clip.mp4").absolute()), "fps": 5, "loop": True, "model": "a"}
    assert "streams added: yard" in said and "until the next reload" in said


def test_an_url_with_a_password_may_come_from_stdin(daemon: FakeDaemon) -> None:
    daemon.run("streams", "add", "yard", "-", stdin="rtsp://u:hidden@h/1\n")
    assert daemon.requests == [AddRequest(name="yard", settings={"url": "rtsp://u:hidden@h/1"})]


@pytest.mark.parametrize("setting", ["fps", "a=[1]", "a={b"])
def test_a_setting_that_cannot_be_read_is_an_error_before_anything_is_asked(daemon: FakeDaemon, setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        daemon.run("streams", "add", "yard", "rtsp://h/1", "--set", setting)
    assert daemon.requests == []


def test_remove_and_reload_say_what_changed_or_why_not(daemon: FakeDaemon) -> None:
    assert "streams added: yard" in daemon.run("reload")
    assert "until the next reload" in daemon.run("streams", "remove", "yard")
    with pytest.raises(ConfigError, match="no stream 'none'"):
        daemon.run("streams", "remove", "none")
    assert daemon.requests == [ReloadRequest(), RemoveRequest(name="yard"), RemoveRequest(name="none")]


def test_without_a_daemon_the_program_ends_with_1_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamd", "reload", "--socket", str(tmp_path / "none.sock")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("streamd: cannot talk to a daemon on") and ended.stderr.count("\n") == 1


def test_rates_come_from_what_was_published_between_two_states() -> None:
    now_s = [0.0]
    rates = Rates(lambda: now_s[0])
    assert rates.update(state_with(published=100)) == {}
    now_s[0] = 2.0
    assert rates.update(state_with(published=150)) == {"gate": 25.0, "yard": 0.0}
    now_s[0] = 100.0
    assert rates.update(state_with(published=150))["gate"] == 0.0, "what is long ago does not count"


def test_the_table_fits_80_columns() -> None:
    out = StringIO()
    Console(file=out, width=80).print(render(state_with(published=123_456), {"gate": 25.0}))
    assert "25.0" in out.getvalue()
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80
