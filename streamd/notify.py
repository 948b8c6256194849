"""Tell systemd how the service is: sd_notify(3) on a datagram socket."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Mapping
from contextlib import suppress

_TIMEOUT_S = 0.5  # a manager that does not read must not stop the service


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Say after how long without WATCHDOG=1 the manager ends this process; None where it never does."""
    text = environment.get("WATCHDOG_USEC", "")
    is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if text.isdecimal() and int(text) and is_ours else None


class Notifier:
    """Send state lines to the service manager; silent where there is none.

    Its socket is there from the start: a daemon that may open no more files must not miss its watchdog.
    """

    def __init__(self, address: str | None = None) -> None:
        """`address` is that of $NOTIFY_SOCKET by default; an abstract one begins with '@'."""
        address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_TIMEOUT_S)
        weakref.finalize(self, self._socket.close)

    def send(self, *lines: str) -> None:
        """Send for example "READY=1" and "STATUS=..." as one message; a manager that is gone or stuck is no error."""
        if self._address:
            with suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)
