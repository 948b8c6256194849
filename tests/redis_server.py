"""A real redis-server for tests and benchmarks: a free port, a folder of its own, nothing kept."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
import redis

DEADLINE_S = 10.0


def missing_for_redis() -> str:
    """Say what the Redis server lacks on this machine; empty when it can run."""
    return "" if shutil.which("redis-server") else "redis-server is missing (Debian: redis-server)"


class RedisServer:
    """Run redis-server on 127.0.0.1; `kill` and `start` play an outage.

    Its data are gone after it, unless `durable_in` names a folder: then each write is on the disk before its answer.
    """

    def __init__(self, *, password: str = "", durable_in: Path | None = None) -> None:
        self.port = free_port()
        self.password = password
        self._durable_in = durable_in
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """Connect to it; the caller closes the client."""
        return redis.Redis(host="127.0.0.1", port=self.port, password=self.password or None)

    def start(self) -> None:
        """Start on the same port as before, and return when clients can connect."""
        self._folder = self._durable_in or Path(tempfile.mkdtemp(prefix="redis-"))
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "yes" if self._durable_in else "no",
            "appendfsync": "always",
            "dir": str(self._folder),
        }
        if self.password:
            options["requirepass"] = self.password
        command = ["redis-server", *(word for key, value in options.items() for word in (f"--{key}", value))]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        while not answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"redis-server does not listen on port {self.port}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End in good order."""
        self._end(kill=False)

    def kill(self) -> None:
        """End at once."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(DEADLINE_S)
        if self._folder and not self._durable_in:
            shutil.rmtree(self._folder)


def running_redis() -> Iterator[RedisServer]:
    """Yield an empty server and end it afterwards, for fixtures; skip where redis-server is missing."""
    if missing := missing_for_redis():
        pytest.skip(missing)
    with RedisServer() as server:
        yield server


def free_port() -> int:
    """Find a TCP port that nobody listens on; another process may still take it before its user does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
