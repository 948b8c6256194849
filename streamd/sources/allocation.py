"""Bound what a camera can make FFmpeg allocate with one number, such as the length of its description."""

from __future__ import annotations

import ctypes
import functools

import av._core

MAX_BYTES = 128 << 20  # one plane of 8K in 16 bits has 68 MiB


@functools.cache
def bound_allocations() -> None:
    """Let FFmpeg refuse larger allocations, for the whole process."""
    library = ctypes.CDLL(av._core.__file__)  # PyAV names no such function; its library is linked with FFmpeg's
    library.av_max_alloc.argtypes = [ctypes.c_size_t]
    library.av_max_alloc.restype = None
    library.av_max_alloc(MAX_BYTES)
