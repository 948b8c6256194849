"""How this process takes memory: large tensors in huge pages; what is freed is kept for the next ones, for a while."""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_TRIM_BYTES = 256 << 20
_MMAP_BYTES = 32 << 20  # glibc's maximum on 64-bit machines
_NUM_ARENAS = 2


def keep_freed_memory() -> None:
    """Keep up to 256 MiB of freed memory in the process instead of giving each tensor back to the kernel.

    Without this, letterboxing one frame cost about 1,270 page faults and three times the time. What is kept must not be
    kept many times over: each thread of a stream takes any arena, each arena keeps the most that it ever held, and
    glibc would make eight for each core.
    To be called while the process has one thread: an arena that is there stays, and new threads take it.
    Does nothing where the C library has no mallopt (musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_ARENA_MAX, _NUM_ARENAS)


def give_back_freed_memory() -> None:
    """Give the kernel each page that nothing in the process uses at this moment; it takes about 1 ms.

    Called now and then by a process that runs for months: what a peak left, and the holes that streams leave in the
    heap as they come and go, otherwise stay with it. What is used again costs page faults once.
    Does nothing where the C library has no malloc_trim (musl).
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


class _MallInfo2(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES)


def heap_in_use() -> int | None:
    """Return the bytes that were allocated and not freed, of all arenas and mappings; None without glibc 2.33.

    A leak raises it. What the process holds beyond it is free memory between, Python's own arenas, and stacks.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def take_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch ask the kernel for 2 MiB pages for each CPU tensor that is as large; a value that is set stays.

    To be called before torch makes its first tensor, which is when it reads the environment. Where the kernel gives
    none (transparent_hugepage/enabled is `never`), nothing changes.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
