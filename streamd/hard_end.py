"""End the process in time, whatever hangs in it."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def end_within(seconds: float) -> None:
    """Let the process leave with 1 after so long, and a trace of every thread in the log, unless it has ended by then.

    That is done by a thread which needs neither the interpreter nor its lock: a call into a GPU's driver may never
    return and may hold that lock. A later call begins anew.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


@contextmanager
def no_end_after() -> Iterator[None]:
    """Take back, at the end of this context, what `end_within` was told in it."""
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
