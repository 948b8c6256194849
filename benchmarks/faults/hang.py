"""Stop one thread of another process where it stands, as a deadlock would: ptrace(2)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.row import Absent
from benchmarks.measure import thread_name

_SEIZE, _INTERRUPT, _DETACH, _WALL = 0x4206, 0x4207, 17, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def find_thread(pid: int, name: str) -> int:
    """Return the id of the thread whose name begins so."""
    tasks = {thread_name(task): int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
    found = [thread for known, thread in tasks.items() if known.startswith(name)]
    if not found:
        raise LookupError(f"no thread {name} among {', '.join(sorted(tasks))}")
    return found[0]


@contextmanager
def hung(thread: int) -> Iterator[None]:
    """Stop a thread until the end of the block, which must be left by the thread that entered it.

    Raises Absent where the kernel does not allow it.
    """
    _ptrace(_SEIZE, thread)
    _ptrace(_INTERRUPT, thread)
    try:
        yield
    finally:
        if _libc.ptrace(_DETACH, thread, None, None) != 0:  # it was killed: who traces it must bury it
            os.waitpid(thread, _WALL)


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) != 0:
        raise Absent(f"needs ptrace of a child: {os.strerror(ctypes.get_errno())}")
