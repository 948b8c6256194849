"""Threads: their names for the operating system, somebody at the top of each, and the wait for their end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_BYTES = 15  # what the kernel keeps (TASK_COMM_LEN less the terminator)


def name_thread(name: str) -> None:
    """Give the calling thread the name that `top -H`, `ps -L` and profilers show; before Python 3.14 nobody else does.

    Threads that libraries start from it inherit the name.
    """
    with suppress(OSError):  # no /proc here: the name is a help and nothing hangs on it
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(name.encode()[:_MAX_BYTES])


def guarded(name: str, target: Callable[[], None], on_crash: Callable[[Exception], None]) -> threading.Thread:
    """Make a thread that tells of what nobody expected, with a trace in the log, instead of ending unnoticed.

    It is a daemon thread only so that a camera or a GPU that hangs in a library cannot keep a stopped process alive.
    """

    def run() -> None:
        name_thread(name)
        try:
            target()
        except Exception as err:
            logger.exception("%s crashed", name)
            on_crash(err)

    return threading.Thread(target=run, name=name, daemon=True)


def join(threads: Iterable[threading.Thread], deadline_s: float) -> list[str]:
    """Wait for the threads that were started; name those that did not end in time."""
    deadline = time.monotonic() + deadline_s
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread.name for thread in started if thread.is_alive()]
