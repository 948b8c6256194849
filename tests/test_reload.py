"""How changes are carried out: one at a time, whole or not at all, and told to who asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.changes import Changes, Names
from streamd.config import Config
from streamd.config_file import load
from streamd.errors import ConfigError, ModelError, StreamdError
from streamd.notify import Notifier
from streamd.reload import Reloader

WITHIN_S = 30.0
FILE = """
models: {m: {path: /a.pt}}
defaults: {fps: 5}
streams: {gate: {url: /a.mp4}}
"""


class Told(Notifier):
    """Note what systemd is told, without numbers."""

    def __init__(self) -> None:
        super().__init__("")
        self.lines: list[str] = []

    def send(self, *lines: str) -> None:
        self.lines += [line.partition("=")[0] for line in lines if not line.startswith("STATUS")]


class Followed:
    """A daemon that notes what it is to follow, and may be told to fail or to take its time."""

    def __init__(self, path: Path) -> None:
        path.write_text(FILE)
        self.path = path
        self.told = Told()
        self.changes: list[Changes] = []
        self.failure: Exception | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()
        self.crashes: list[Exception] = []
        self.reloader = Reloader(load(path), path, self.follow, self.told, self.crashes.append)

    def follow(self, config: Config, changes: Changes) -> tuple[str, ...]:
        self.has_begun.set()
        assert self.may_go_on.wait(WITHIN_S)
        if self.failure:
            raise self.failure
        self.changes.append(changes)
        return ()

    def add_to_file(self, stream: str) -> None:
        self.path.write_text(FILE.replace("streams: {", f"streams: {{{stream}: {{url: /b.mp4}}, "))


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[Followed]:
    made = Followed(tmp_path / "streamd.yaml")
    made.reloader.start()
    yield made
    made.may_go_on.set()
    made.reloader.stop(WITHIN_S)


def test_a_reload_follows_the_file_and_tells_systemd(followed: Followed) -> None:
    followed.add_to_file("yard")
    changes = followed.reloader.reload().result(WITHIN_S)
    assert changes == Changes(streams=Names(added=("yard",)))
    assert followed.changes == [changes]
    followed.reloader.stop(WITHIN_S)
    assert followed.told.lines == ["RELOADING", "MONOTONIC_USEC", "READY"]


@pytest.mark.parametrize("failure", [ModelError("no such model"), ConfigError("rtsp://u:hidden@h is wrong")])
def test_a_refusal_leaves_the_configuration_as_it_was(
    followed: Followed, failure: StreamdError, caplog: pytest.LogCaptureFixture
) -> None:
    before = followed.reloader.config
    followed.failure = failure
    followed.add_to_file("yard")
    with pytest.raises(type(failure)) as refused:
        followed.reloader.reload().result(WITHIN_S)
    assert "hidden" not in str(refused.value)
    assert followed.reloader.config is before
    followed.reloader.stop(WITHIN_S)
    assert followed.told.lines[-1] == "READY"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_who_asks_again_before_it_began_shares_the_reload(followed: Followed) -> None:
    followed.may_go_on.clear()
    first = followed.reloader.reload()
    assert followed.has_begun.wait(WITHIN_S)
    followed.add_to_file("yard")
    later = [followed.reloader.reload() for _ in range(100)]
    assert all(one is later[0] for one in later) and later[0] is not first
    followed.may_go_on.set()
    assert first.result(WITHIN_S) == Changes()
    assert later[0].result(WITHIN_S) == Changes(streams=Names(added=("yard",)))


def test_more_changes_than_can_wait_are_refused(followed: Followed) -> None:
    followed.may_go_on.clear()
    followed.reloader.reload()
    assert followed.has_begun.wait(WITHIN_S)
    asked = [followed.reloader.remove_stream("none") for _ in range(17)]
    with pytest.raises(StreamdError, match="16 changes are waiting"):
        asked[-1].result(0)
    with pytest.raises(StreamdError, match="16 changes are waiting"):
        followed.reloader.reload().result(0)
    followed.may_go_on.set()
    with pytest.raises(ConfigError, match="no stream 'none'"):
        asked[0].result(WITHIN_S)
    assert followed.reloader.reload().result(WITHIN_S) == Changes(), "there is room again"


def test_a_stream_is_added_with_the_files_defaults_until_the_next_reload(followed: Followed) -> None:
    assert followed.reloader.add_stream("yard", {"url": "/c.mp4"}).result(WITHIN_S).streams.added == ("yard",)
    assert followed.reloader.config.streams["yard"].fps == 5
    with pytest.raises(ConfigError, match="only a file can start again"):
        followed.reloader.add_stream("far", {"url": "rtsp://h/1", "loop": True}).result(WITHIN_S)
    assert followed.reloader.remove_stream("gate").result(WITHIN_S).streams.removed == ("gate",)
    with pytest.raises(ConfigError, match="is the only stream"):
        followed.reloader.remove_stream("yard").result(WITHIN_S)
    changes = followed.reloader.reload().result(WITHIN_S)
    assert changes.streams == Names(added=("gate",), removed=("yard",))


def test_without_a_file_there_is_nothing_to_reload(followed: Followed) -> None:
    embedded = Reloader(followed.reloader.config, None, followed.follow, followed.told, followed.crashes.append)
    embedded.start()
    with pytest.raises(ConfigError, match="not started from a file"):
        embedded.reload().result(WITHIN_S)
    embedded.stop(WITHIN_S)


def test_a_stop_refuses_what_waits(followed: Followed) -> None:
    followed.may_go_on.clear()
    first = followed.reloader.reload()
    assert followed.has_begun.wait(WITHIN_S)
    waiting = followed.reloader.remove_stream("gate")
    followed.reloader.stop(0.0)
    late = followed.reloader.reload()
    followed.may_go_on.set()
    assert first.result(WITHIN_S) == Changes()
    for refused in (waiting, late):
        with pytest.raises(StreamdError, match="is stopping"):
            refused.result(WITHIN_S)
    followed.reloader.stop(WITHIN_S)
    assert "READY" not in followed.told.lines, "STOPPING=1 has the last word"


def test_a_bug_stops_the_daemon_and_is_told_to_who_asked(followed: Followed) -> None:
    followed.failure = ZeroDivisionError("a bug")
    with pytest.raises(StreamdError, match="a bug: ZeroDivisionError"):
        followed.reloader.reload().result(WITHIN_S)
    followed.reloader.stop(WITHIN_S)
    assert [type(err) for err in followed.crashes] == [ZeroDivisionError]
