"""The control socket under clients of every kind: only who misbehaves is hurt."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamd import control
from streamd.changes import Changes, Names
from streamd.control import MAX_CONNECTIONS, MAX_REQUEST_BYTES, ControlServer, find_path
from streamd.control_client import ask
from streamd.control_messages import (
    AddRequest,
    Answer,
    AnswerError,
    ReloadRequest,
    RemoveRequest,
    Request,
    StatusRequest,
    decode_answer,
    decode_request,
    encode,
)
from streamd.errors import ConfigError, ModelError, StreamdError

WITHIN_S = 30.0


class Served:
    """A server whose daemon is a list of what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.crashes: list[Exception] = []
        self.reload: Future[Changes] = Future()
        self.server = ControlServer(path, self.handle, self.crashes.append)

    def handle(self, request: Request) -> Answer | Future[Changes]:
        self.requests.append(request)
        match request:
            case ReloadRequest():
                return self.reload
            case RemoveRequest():
                raise ConfigError("there is no such stream; the password of rtsp://u:hidden@h is not shown")
        return Answer(done="asked")

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(WITHIN_S)
        client.connect(str(self.path))
        return client

    def say(self, data: bytes) -> bytes:
        """Send bytes and the end of all bytes; return everything that comes back."""
        with self.connect() as client:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may hang up before it has read all
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            return _read_all(client)


def _read_all(client: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "control.sock")
    made.server.start()
    yield made
    made.server.stop()
    assert made.crashes == []


def still_answers(served: Served) -> None:
    assert ask(served.path, StatusRequest(), WITHIN_S).done == "asked"


def test_several_requests_go_over_one_connection(served: Served) -> None:
    lines = served.say(encode(StatusRequest()) + encode(AddRequest(name="gate", settings={"url": "a", "fps": 5})))
    assert [decode_answer(line).done for line in lines.splitlines()] == ["asked", "asked"]
    assert served.requests == [StatusRequest(), AddRequest(name="gate", settings={"url": "a", "fps": 5})]


def test_a_refusal_comes_back_as_an_error_without_a_secret(served: Served) -> None:
    with pytest.raises(ConfigError, match=r"rtsp://u:\*\*\*@h is not shown"):
        ask(served.path, RemoveRequest(name="gate"), WITHIN_S)


def test_what_cannot_be_done_just_now_is_no_error_of_the_configuration(served: Served) -> None:
    served.reload.set_exception(StreamdError("the daemon is still loading its models"))
    with pytest.raises(StreamdError, match="still loading") as refused:
        ask(served.path, ReloadRequest(), WITHIN_S)
    assert type(refused.value) is StreamdError
    served.reload = Future()
    served.reload.set_exception(ModelError("m.pt: the file is damaged"))
    with pytest.raises(ConfigError, match="damaged"):
        ask(served.path, ReloadRequest(), WITHIN_S)


def test_others_are_answered_while_a_change_is_being_made(served: Served) -> None:
    with served.connect() as waiting:
        waiting.sendall(encode(ReloadRequest()))
        still_answers(served)
        served.reload.set_result(Changes(streams=Names(added=("gate",))))
        with waiting.makefile("rb") as answers:
            assert decode_answer(answers.readline()).done == "streams added: gate"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"{}\n",
        b"[]\n",
        b'{"command": "shutdown"}\n',
        b'{"command": "status", "more": 1}\n',
        b'{"command": "streams.add", "name": 5, "settings": {}}\n',
        b'{"command": "streams.add", "name": "' + b"a" * 65 + b'", "settings": {}}\n',
        b'{"command": "streams.add", "name": "a", "settings": {"url": ["a"]}}\n',
        b'{"command": "streams.add", "name": "a", "settings": {"url": {"a": 1}}}\n',
        b"[" * 60_000 + b"\n",
        b"GET / HTTP/1.1\n",
    ],
)
def test_what_is_no_request_is_answered_with_an_error_and_reaches_nobody(served: Served, line: bytes) -> None:
    answer = decode_answer(served.say(line).splitlines()[0])
    assert answer.error is not None and answer.error.startswith("not a request")
    assert served.requests == []
    still_answers(served)


def test_a_line_without_end_is_cut_off(served: Served) -> None:
    answers = served.say(b"x" * (MAX_REQUEST_BYTES * 40))
    assert answers == b"" or "longer than 64 KiB" in str(decode_answer(answers).error)
    still_answers(served)


def test_half_a_line_is_no_request(served: Served) -> None:
    assert served.say(encode(StatusRequest())[:-1]) == b""
    assert served.requests == []
    still_answers(served)


def test_a_client_that_hangs_up_before_its_answer_disturbs_nobody(served: Served) -> None:
    for _ in range(20):
        with served.connect() as client:
            client.sendall(encode(ReloadRequest()))
    served.reload.set_result(Changes())
    still_answers(served)


def test_one_connection_too_many_is_told_so_and_there_is_room_again_later(served: Served) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(MAX_CONNECTIONS)]
        for client in clients:
            client.sendall(encode(StatusRequest()))
            assert client.recv(4096)
        with pytest.raises(StreamdError, match="connections are open already"):
            ask(served.path, StatusRequest(), WITHIN_S)
    deadline = threading.Event()
    for _ in range(1000):
        with suppress(StreamdError):
            still_answers(served)
            return
        deadline.wait(0.01)
    raise AssertionError("no room again")


def test_a_client_that_says_nothing_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "READ_TIMEOUT_S", 0.05)
    with served.connect() as client:
        client.sendall(b'{"command"')
        assert _read_all(client) == b""


def test_the_kernel_says_who_asks(served: Served) -> None:
    with served.connect() as client:
        assert control.user_of(client) == os.geteuid()


def test_another_user_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "user_of", lambda connection: os.geteuid() + 1)
    with pytest.raises(ConfigError, match="only the daemon's own user and root"):
        ask(served.path, StatusRequest(), WITHIN_S)
    assert served.requests == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
def test_no_bytes_crash_the_server(served: Served, data: bytes) -> None:
    for line in served.say(data + b"\n").splitlines():
        assert decode_answer(line).error or decode_answer(line).done
    assert served.crashes == []


@given(st.binary(max_size=300))
def test_no_line_crashes_a_reader(line: bytes) -> None:
    for decode in (decode_request, decode_answer):
        reader: Callable[[bytes], object] = decode
        with suppress(AnswerError):
            reader(line)


def test_only_the_own_user_may_open_it_and_it_goes_at_the_end(tmp_path: Path) -> None:
    served = Served(tmp_path / "made" / "control.sock")
    served.server.start()
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.path.parent.stat().st_mode) == 0o700
    served.server.stop()
    assert not served.path.exists()


def test_a_stop_does_not_wait_for_clients(served: Served) -> None:
    with served.connect() as client:
        client.sendall(encode(ReloadRequest()))
        served.server.stop()
        assert _read_all(client) == b""


def test_the_socket_of_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    served = Served(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(served.path))
    served.server.start()
    still_answers(served)
    served.server.stop()


def test_the_socket_of_a_living_daemon_is_left_alone(served: Served) -> None:
    with pytest.raises(ConfigError, match="another daemon answers there"):
        Served(served.path).server.start()
    still_answers(served)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("keep me")
    with pytest.raises(ConfigError, match="a file that is no socket"):
        Served(path).server.start()
    assert path.read_text() == "keep me"


@pytest.mark.parametrize(
    ("name", "complaint"), [("x" * 120, "longer than 107 bytes"), ("no/such/folder/a.sock", "No such file")]
)
def test_a_path_that_cannot_be_had_is_an_error_that_names_it(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Served(tmp_path / name).server.start()


def test_without_a_daemon_the_client_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StreamdError, match=r"is the daemon running\?"):
        ask(tmp_path / "none.sock", StatusRequest(), WITHIN_S)


@pytest.mark.parametrize(
    ("wanted", "environment", "path"),
    [
        ("/a/b.sock", {"RUNTIME_DIRECTORY": "/run/streamd"}, "/a/b.sock"),
        ("auto", {"RUNTIME_DIRECTORY": "/run/streamd", "XDG_RUNTIME_DIR": "/run/user/7"}, "/run/streamd/control.sock"),
        ("auto", {"RUNTIME_DIRECTORY": "/run/a:/run/b"}, "/run/a/control.sock"),
        ("auto", {"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/streamd/control.sock"),
        ("auto", {}, None),
    ],
)
def test_auto_is_the_folder_that_the_system_gives(wanted: str, environment: dict[str, str], path: str | None) -> None:
    assert find_path(wanted, environment) == (Path(path) if path else None)
