"""Give threads the names that `top -H`, `ps -L` and profilers show; before Python 3.14 nobody else does."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

_MAX_BYTES = 15  # what the kernel keeps (TASK_COMM_LEN less the terminator)


def name_thread(name: str) -> None:
    """Name the calling thread for the operating system; threads that libraries start from it inherit the name."""
    with suppress(OSError):  # no /proc here: the name is a help and nothing hangs on it
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(name.encode()[:_MAX_BYTES])
