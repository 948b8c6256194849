"""Reloads of the real daemon: what changes is followed, what does not change notices nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamd.client import Subscription, subscribe
from streamd.control_client import ask
from streamd.control_messages import (
    AddRequest,
    Answer,
    ListRequest,
    ReloadRequest,
    RemoveRequest,
    Request,
    StatusRequest,
)
from streamd.errors import ConfigError
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.yolox import yolox_nano
from streamd.wire import DetectionsMessage, StatusMessage
from tests.clips import write_clip
from tests.daemon_process import DaemonProcess
from tests.redis_server import RedisServer, free_port

WITHIN_S = 90.0

Message = DetectionsMessage | StatusMessage


@pytest.fixture(scope="module")
def other_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export another version of the untrained network: the same labels, other weights."""
    out = tmp_path_factory.mktemp("models") / "other.pt"
    labels, sha256 = ("a", "b", "c"), "0123456789abcdef" * 4
    spec = ModelSpec(
        name="other", task="detect", labels=labels, input_size=(64, 96), colour="bgr", weights_sha256=sha256
    )
    artifact.export(yolox_nano(3, input_size=spec.input_size), spec, out)
    return out


class Site:
    """A daemon with a configuration that can be rewritten, and a subscriber that hears all."""

    def __init__(self, folder: Path, model: Path, clip: Path) -> None:
        self.socket = folder / "control.sock"
        self.camera = {"url": str(clip)}
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.config: dict[str, Any] = {
            "models": {"m": {"path": str(model), "workers": 1, "threads": 1, "max_batch": 2}},
            "defaults": {"model": "m"},
            "streams": {"steady": self.camera, "leaving": self.camera, "altered": self.camera},
            "publish": {"zeromq": {"bind": self.address}},
            "metrics": {"listen": None},
            "control": {"path": str(self.socket)},
        }
        self.daemon = DaemonProcess(folder, self.config)

    def write(self) -> None:
        self.daemon.config_path.write_text(yaml.safe_dump(self.config))

    def reload(self) -> Answer:
        self.write()
        return ask(self.socket, ReloadRequest(), WITHIN_S)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a file that plays for longer than a test lasts: one that begins again would begin a new epoch."""
    return write_clip(tmp_path_factory.mktemp("clips") / "long.mp4", 1500, fps=10)


@pytest.fixture
def site(tmp_path: Path, untrained_artifact: Path, long_clip: Path) -> Iterator[Site]:
    made = Site(tmp_path, untrained_artifact, long_clip)
    with made.daemon:
        yield made


def listen(url: str) -> Subscription[Message]:
    return subscribe(url, kinds=("detections", "status"), timeout_s=WITHIN_S)


def collect(messages: Subscription[Message], until: Callable[[list[Message]], bool]) -> list[Message]:
    """Take messages until they suffice."""
    received: list[Message] = []
    deadline = time.monotonic() + WITHIN_S
    for message in messages:
        received.append(message)
        if until(received):
            return received
        assert time.monotonic() < deadline, f"the last of {len(received)} were {received[-3:]}"
    raise AssertionError("the subscription ended")


def results_of(messages: list[Message], stream: str) -> list[DetectionsMessage]:
    return [m for m in messages if isinstance(m, DetectionsMessage) and m.stream == stream]


def has_results(*streams: str, num: int = 5) -> Callable[[list[Message]], bool]:
    return lambda messages: all(len(results_of(messages, stream)) >= num for stream in streams)


def assert_unbroken(messages: list[Message], stream: str) -> None:
    """The stream lost no message of its numbers and never connected anew."""
    results = results_of(messages, stream)
    assert [m.seq for m in results] == list(range(results[0].seq, results[0].seq + len(results)))
    assert {m.epoch for m in results} == {0}
    later = messages[messages.index(results[0]) :]
    states = [str(m.state) for m in later if isinstance(m, StatusMessage) and m.stream == stream]
    assert set(states) <= {"running"}, f"{stream} entered {states}"


def test_what_did_not_change_goes_on_without_a_gap_while_streams_models_and_publishers_come_and_go(
    site: Site, other_artifact: Path, redis_server: RedisServer
) -> None:
    site.daemon.notifications.clear()
    with listen(site.address) as messages:
        before = collect(messages, has_results("steady", "leaving", "altered"))
        site.config["models"]["n"] = {**site.config["models"]["m"], "path": str(other_artifact)}
        del site.config["streams"]["leaving"]
        site.config["streams"]["altered"] = {**site.camera, "fps": 5}
        site.config["streams"]["fresh"] = {**site.camera, "model": "n"}
        site.config["publish"]["redis"] = {"url": redis_server.url}
        done = site.reload().done
        assert done == (
            "streams added: fresh; streams changed: altered; streams removed: leaving; models added: n; "
            "publishers added: redis"
        )
        with listen(redis_server.url) as from_redis:
            collect(from_redis, has_results("steady", "fresh"))
        changed = collect(messages, has_results("steady", "fresh", "altered", num=20))
        del site.config["publish"]["redis"]
        assert site.reload().done == "publishers removed: redis"
        after = collect(messages, has_results("steady", "fresh", "altered"))

    assert_unbroken(before + changed + after, "steady")
    assert {m.model.name for m in results_of(changed, "fresh")} == {"n"}
    ended = [m for m in changed if isinstance(m, StatusMessage) and m.stream == "leaving" and m.state == "ended"]
    assert [m.reason for m in ended] == ["stopped"]
    assert results_of(after, "leaving") == []
    altered = results_of(before + changed + after, "altered")
    assert [m.seq for m in altered] == list(range(altered[0].seq, altered[0].seq + len(altered))), "its numbers go on"
    assert [m.epoch for m in altered] == sorted(m.epoch for m in altered)
    assert altered[-1].epoch > altered[0].epoch
    site.daemon.wait_for_notification("READY=1", 5)
    said = [line.partition("=")[0] for line in site.daemon.notifications]
    assert said.index("RELOADING") < said.index("MONOTONIC_USEC") < said.index("READY")


def test_a_change_of_every_stream_at_once_does_not_end_the_daemon(site: Site) -> None:
    with listen(site.address) as messages:
        before = collect(messages, has_results("steady", "leaving", "altered"))
        site.config["defaults"]["stall_timeout_s"] = 6
        assert site.reload().done == "streams changed: altered, leaving, steady"
        later = collect(messages, lambda got: bool(got) and has_results("steady", "leaving", "altered", num=20)(got))
    for stream in ("steady", "leaving", "altered"):
        numbers = [m.seq for m in results_of(before + later, stream)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "its numbers go on"


def test_another_model_file_takes_over_between_two_results_and_the_stream_stays_connected(
    site: Site, other_artifact: Path
) -> None:
    with listen(site.address) as messages:
        before = collect(messages, has_results("steady", "leaving", "altered"))
        site.config["models"]["m"]["path"] = str(other_artifact)
        done = site.reload().done or ""
        said = "models changed: m; streams moved to another model: altered, leaving, steady; model m: agreement 1.000 "
        assert done.startswith(said) and "24 frames of 3 streams (0 objects" in done
        shas = {m.model.sha256 for m in results_of(before, "steady")}
        after = collect(messages, lambda got: sum(m.model.sha256 not in shas for m in results_of(got, "steady")) == 10)
    received = before + after
    for stream in ("steady", "leaving", "altered"):
        assert_unbroken(received, stream)
    versions = [m.model.sha256 for m in results_of(received, "steady")]
    assert len(shas) == 1 and len(set(versions)) == 2
    assert versions == sorted(versions, key=lambda sha: sha not in shas), "the old one does not come back"
    state = ask(site.socket, StatusRequest(), WITHIN_S).state
    assert state is not None and [model.sha256 for model in state.models] == [versions[-1]]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"streams": {"steady": {"url": "a.mp4", "fsp": 5}}}, "unknown key 'fsp' (did you mean 'fps'?)"),
        ({"models": {"m": {"path": "/nowhere/new.pt"}}}, "/nowhere/new.pt: no such file"),
        (
            {"publish": {"zeromq": {"bind": "tcp://192.0.2.1:5555", "insecure": True}}},
            "this machine has no such address",
        ),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_whole_and_told_to_who_asked_and_once_to_the_log(
    site: Site, wrong: dict[str, Any], complaint: str
) -> None:
    with listen(site.address) as messages:
        before = collect(messages, has_results("steady", "leaving", "altered"))
        good = dict(site.config)
        site.config = {**good, **wrong, "streams": {**wrong.get("streams", good["streams"]), "fresh": site.camera}}
        with pytest.raises(ConfigError) as refused:
            site.reload()
        assert complaint in str(refused.value)
        after = collect(messages, has_results("steady", "leaving", "altered"))
    for stream in ("steady", "leaving", "altered"):
        assert_unbroken(before + after, stream)
    assert results_of(after, "fresh") == []
    assert site.daemon.log().count(complaint) == 1
    site.config = good
    assert site.reload().done == "nothing changed"


def test_a_storm_of_sighup_is_one_reload_at_a_time_and_ends_with_the_last_file(site: Site) -> None:
    with listen(site.address) as messages:
        before = collect(messages, has_results("steady"))
        site.config["streams"]["fresh"] = site.camera
        site.write()
        for _ in range(200):
            os.kill(site.daemon.pid, signal.SIGHUP)
        after = collect(messages, has_results("fresh", "steady"))
        assert_unbroken(before + after, "steady")
        assert site.daemon.stop() == 0
    assert site.daemon.log().count("streams added: fresh") == 1


def test_a_stream_of_the_socket_lives_until_the_file_is_read_again(site: Site) -> None:
    settings: dict[str, Any] = {**site.camera, "fps": 10}
    with listen(site.address) as messages:
        assert (
            ask(site.socket, AddRequest(name="visitor", settings=settings), WITHIN_S).done == "streams added: visitor"
        )
        collect(messages, has_results("visitor", "steady"))
        listed = ask(site.socket, ListRequest(), WITHIN_S).streams or ()
        assert [entry.status.stream for entry in listed] == ["altered", "leaving", "steady", "visitor"]
        assert ask(site.socket, RemoveRequest(name="leaving"), WITHIN_S).done == "streams removed: leaving"
        done = ask(site.socket, ReloadRequest(), WITHIN_S).done
        assert done == "streams added: leaving; streams removed: visitor"
    refusals: list[tuple[Request, str]] = [
        (AddRequest(name="steady", settings=settings), "there is a stream 'steady' already"),
        (AddRequest(name="new", settings={"url": "a.mp4"}), "must be absolute"),
        (AddRequest(name="new", settings={"url": "/a.mp4", "fsp": 3}), "did you mean 'fps'?"),
        (AddRequest(name="no/name", settings=settings), "a name holds"),
        (RemoveRequest(name="stedy"), "did you mean 'steady'?"),
    ]
    for request, complaint in refusals:
        with pytest.raises(ConfigError) as refused:
            ask(site.socket, request, WITHIN_S)
        assert complaint in str(refused.value)


def test_the_socket_is_for_the_daemons_user_alone_and_goes_with_it(site: Site) -> None:
    assert site.socket.stat().st_mode & 0o777 == 0o600
    state = ask(site.socket, StatusRequest(), WITHIN_S).state
    assert state is not None and state.pid == site.daemon.pid
    assert [publisher.name for publisher in state.publishers] == [f"zeromq {site.address}"]
    assert site.daemon.stop() == 0
    assert not site.socket.exists()


def test_garbage_on_the_socket_does_not_disturb_the_streams(site: Site) -> None:
    with listen(site.address) as messages, ExitStack() as stack:
        before = collect(messages, has_results("steady"))
        for index in range(100):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(WITHIN_S)
            client.connect(str(site.socket))
            with suppress(BrokenPipeError, ConnectionResetError):  # one connection too many is closed at once
                client.sendall([b"garbage\n", b'{"half', b"\xff" * 100_000, b"[" * 50_000 + b"\n"][index % 4])
        after = collect(messages, has_results("steady", num=20))
    assert_unbroken(before + after, "steady")
    assert site.daemon.stop() == 0
    assert "Traceback" not in site.daemon.log()


def test_the_watchdog_hears_of_a_daemon_that_works(site: Site) -> None:
    site.daemon.wait_for_notification("WATCHDOG=1", 30)
