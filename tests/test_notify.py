"""systemd hears what the service says, over a real datagram socket; without systemd nothing happens."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from streamd.notify import Notifier, watchdog_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """Listen as systemd does; give the socket and what $NOTIFY_SOCKET would say."""
    name = str(uuid.uuid4())
    address = str(tmp_path / "notify") if request.param == "path" else f"@{name}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(address if request.param == "path" else f"\0{name}")
        sock.settimeout(5)
        yield sock, address


def test_lines_come_as_one_message(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    Notifier(address).send("READY=1", "STATUS=3 of 4 streams running")
    assert sock.recv(1000) == b"READY=1\nSTATUS=3 of 4 streams running"


def test_the_address_is_that_of_the_environment(
    manager: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, address = manager
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    Notifier().send("STOPPING=1")
    assert sock.recv(1000) == b"STOPPING=1"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().send("READY=1")


def test_a_service_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Notifier(str(tmp_path / "gone")).send("READY=1")
    Notifier(str(tmp_path / ("far too long a path for a socket " * 10))).send("READY=1")


def test_a_service_manager_that_reads_nothing_does_not_stop_the_service(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as filling, suppress(BlockingIOError):
        filling.setblocking(False)
        filling.connect(address.replace("@", "\0"))
        while True:
            filling.send(b"WATCHDOG=1")
    started = time.monotonic()
    Notifier(address).send("WATCHDOG=1")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),  # of the process that started this one
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_patience_is_known(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_s(environment) == seconds
