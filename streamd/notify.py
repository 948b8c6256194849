"""Tell systemd how the service is: sd_notify(3) on a datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

_TIMEOUT_S = 0.5  # a manager that does not read must not stop the service


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Say after how long without WATCHDOG=1 the manager ends this process; None where it never does."""
    text = environment.get("WATCHDOG_USEC", "")
    is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if text.isdecimal() and int(text) and is_ours else None


class Notifier:
    """Send state lines to the service manager; silent where there is none."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is that of $NOTIFY_SOCKET by default; an abstract one begins with '@'."""
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address

    def send(self, *lines: str) -> None:
        """Send for example "READY=1" and "STATUS=..." as one message; a manager that is gone or stuck is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_TIMEOUT_S)
            try:
                sock.connect(address)
                sock.sendall("\n".join(lines).encode())
            except OSError:
                pass
