"""A daemon that may open no more files, or make no more threads: a stream fails and says why, the others go on."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamd.client import subscribe
from streamd.control_messages import AddRequest, Answer, ListRequest, ReloadRequest, Request, decode_answer, encode
from streamd.errors import PublishError, StreamdError
from streamd.publish.zeromq import ZeroMqSink
from streamd.room import require_room
from tests.daemon_process import DaemonProcess
from tests.redis_server import free_port

WITHIN_S = 120.0


class Control:
    """One connection to the control socket, made while there were descriptors for it."""

    def __init__(self, path: Path) -> None:
        """Connect; without a word for 10 s the daemon hangs up."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WITHIN_S)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")
        self.states()

    def ask(self, request: Request) -> Answer:
        self._socket.sendall(encode(request))
        return decode_answer(self._answers.readline())

    def states(self) -> dict[str, tuple[str, str]]:
        """Give state and reason of each stream."""
        entries = self.ask(ListRequest()).streams or ()
        return {entry.status.stream: (entry.status.state, entry.status.reason) for entry in entries}

    def wait_for(self, stream: str, state: str) -> str:
        """Wait for a state and return its reason."""
        deadline = time.monotonic() + WITHIN_S
        while (now := self.states()[stream])[0] != state:
            assert time.monotonic() < deadline, f"{stream} is {now}"
            time.sleep(0.2)
        return now[1]

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class Site:
    """A daemon with one stream, and what a test asks of it."""

    def __init__(self, folder: Path, clip: Path, model: Path, prefix: list[str]) -> None:
        self.clip = str(clip)
        self.address = f"tcp://127.0.0.1:{free_port()}"
        config: dict[str, Any] = {
            "models": {"m": {"path": str(model), "workers": 1, "threads": 1, "max_batch": 1}},
            "streams": {"gate": {"url": self.clip, "loop": True, "fps": 5}},
            "publish": {"zeromq": {"bind": self.address}},
            "metrics": {"listen": None},
            "control": {"path": str(folder / "control.sock")},
        }
        self._prefix = prefix
        self.daemon = DaemonProcess(folder, config, {"OMP_NUM_THREADS": "1"}, prefix)
        self.socket = folder / "control.sock"

    @contextmanager
    def control(self) -> Iterator[Control]:
        control = Control(self.socket)
        try:
            yield control
        finally:
            control.close()

    @contextmanager
    def limited(self, what: str, number: int) -> Iterator[None]:
        """Set a limit of the daemon, as its own user, and take it back."""
        pid = str(self.daemon.pid)
        command = [*self._prefix, "prlimit", "--pid", pid, f"--{what}", "--output", "SOFT", "--noheadings"]
        before = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        for limit in (number, before):
            subprocess.run([*self._prefix, "prlimit", "--pid", pid, f"--{what}={limit}:"], check=True)
            if limit is number:
                yield

    def ask_for_another_address(self) -> None:
        text = self.daemon.config_path.read_text()
        self.daemon.config_path.write_text(text.replace(self.address, f"tcp://127.0.0.1:{free_port()}"))

    def add(self, control: Control, name: str) -> None:
        answer = control.ask(AddRequest(name=name, settings={"url": self.clip, "loop": True, "fps": 5}))
        assert answer.error is None

    def goes_on(self) -> None:
        """Fail unless the first stream publishes without a gap."""
        with subscribe(self.address, "gate", timeout_s=WITHIN_S) as messages:
            seqs = [next(messages).seq for _ in range(10)]
        assert seqs == list(range(seqs[0], seqs[0] + 10))


@pytest.fixture
def prefix() -> list[str]:
    return []


@pytest.fixture
def site(demo_clip: Path, untrained_artifact: Path, prefix: list[str]) -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # pytest's own folders are for root alone
        made = Site(Path(name), demo_clip, untrained_artifact, prefix)
        with made.daemon:
            yield made
            print(made.daemon.log())  # shown where the test fails


def open_descriptors(pid: int) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


def test_without_descriptors_a_stream_fails_and_comes_when_there_are_some(site: Site) -> None:
    with subscribe(site.address, "gate", timeout_s=WITHIN_S) as messages, site.control() as control:
        first = next(messages).seq
        used = open_descriptors(site.daemon.pid)
        with site.limited("nofile", next(number for number in range(len(used) + 1) if number not in used)):
            site.add(control, "yard")
            assert "no more files can be opened" in control.wait_for("yard", "failed")
            assert [next(messages).seq for _ in range(10)] == list(range(first + 1, first + 11))
        control.wait_for("yard", "running")
    site.goes_on()


class TestThreads:
    @pytest.fixture
    def prefix(self) -> list[str]:
        """Run as a user of its own, since the limit counts a user's threads and does not bind root."""
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            pytest.skip("needs root and setpriv (Debian: util-linux), to run the daemon as a user of its own")
        user = str(50_000 + os.getpid() % 10_000)
        rights = ["--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]  # this Python may be root's alone
        return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *rights]

    def test_without_threads_a_stream_fails_and_comes_when_there_are_some(self, site: Site) -> None:
        with subscribe(site.address, "gate", timeout_s=WITHIN_S) as messages, site.control() as control:
            first = next(messages).seq
            with site.limited("nproc", 1):
                site.add(control, "yard")
                assert "no more threads can be had" in control.wait_for("yard", "failed")
                site.ask_for_another_address()
                refused = control.ask(ReloadRequest()).error
                assert refused is not None and "no more threads can be had" in refused
                assert [next(messages).seq for _ in range(10)] == list(range(first + 1, first + 11))
            control.wait_for("yard", "running")
        site.goes_on()
        assert "crashed" not in site.daemon.log()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.usefixtures("no_threads")
def test_a_publisher_that_gets_no_thread_is_an_error_before_libzmq_ends_the_process() -> None:
    with pytest.raises(PublishError, match="no more threads can be had"):
        ZeroMqSink("tcp://127.0.0.1:0").open()


def test_room_is_given_back() -> None:
    descriptors, threads = open_descriptors(os.getpid()), threading.active_count()
    require_room(5, 5)
    assert open_descriptors(os.getpid()) == descriptors and threading.active_count() == threads


def test_too_few_descriptors_are_an_error_that_names_the_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors(os.getpid())) + 20, before[1]))
    try:
        with pytest.raises(StreamdError, match="LimitNOFILE="):
            require_room(0, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
