"""Run the real daemon as systemd would: a process, a notify socket, signals, and its log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
READY_WITHIN_S = 90.0  # a loaded machine loads torch slowly
STOPPED_WITHIN_S = 15.0


class DaemonProcess:
    """`with DaemonProcess(tmp_path, config) as daemon`: started and ready; stopped at the end."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is a command that ends by executing the one behind it, such as unshare."""
        self._prefix = prefix
        self._folder = folder
        self._environment = environment or {}
        self.config_path = folder / "streamd.yaml"
        self.config_path.write_text(yaml.safe_dump(config))
        self.log_path = folder / "streamd.log"
        self.notifications: list[str] = []
        self.watchdog_at = 0.0  # monotonic s, of the last WATCHDOG=1 that `read_notifications` has read
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DaemonProcess:
        self.start()
        self.wait_for_notification("READY=1", READY_WITHIN_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._socket.close()
        if error is not None:
            print(self.log())

    def start(self) -> None:
        address = self._folder / "notify"
        self._socket.bind(str(address))
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "streamd", "run", str(self.config_path)],
                cwd=ROOT,
                env={**os.environ, "NOTIFY_SOCKET": str(address), **self._environment},
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for_notification(self, wanted: str, within_s: float) -> None:
        """Read the notify socket until a line begins with `wanted`."""
        deadline = time.monotonic() + within_s
        while not any(line.startswith(wanted) for line in self.notifications):
            assert self._process is not None
            self._socket.settimeout(0.2)
            try:
                self.notifications += self._socket.recv(4096).decode().splitlines()
            except TimeoutError:
                assert self._process.poll() is None, f"the daemon exited with {self._process.returncode}:\n{self.log()}"
                assert time.monotonic() < deadline, f"no {wanted} within {within_s} s:\n{self.log()}"

    @contextmanager
    def read_notifications(self) -> Iterator[None]:
        """Read the notify socket in a thread, as systemd does all the time: else a daemon that says much waits."""
        ended = threading.Event()
        self._socket.settimeout(0.2)

        def read() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    lines = self._socket.recv(4096).decode().splitlines()
                    self.notifications += lines
                    if "WATCHDOG=1" in lines:
                        self.watchdog_at = time.monotonic()

        thread = threading.Thread(target=read, name="notifications")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(STOPPED_WITHIN_S)

    def wait(self, within_s: float) -> int:
        """Wait for the daemon to end by itself and return its exit code."""
        assert self._process is not None
        return self._process.wait(within_s)
