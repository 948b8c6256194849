"""Hear what FFmpeg tells nobody but its log: which request a camera refused, and which RTP packets never came."""

from __future__ import annotations

import functools
import logging
from types import TracebackType

import av.logging


class FfmpegLog:
    """Collect what FFmpeg logs in this thread while a `with` of this object is open; for the thread that made it."""

    def __init__(self) -> None:
        _listen()
        self._capture = av.logging.Capture()
        self._lines: list[tuple[int, str, str]] = self._capture.logs  # level, who, what

    def __enter__(self) -> FfmpegLog:
        self._capture.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._capture.__exit__(None, None, None)

    def take(self) -> list[tuple[str, str]]:
        """Return who said what since the last time."""
        if not self._lines:
            return []
        taken = [(who, what.strip()) for _, who, what in self._lines]
        self._lines.clear()
        return taken


class Silent(FfmpegLog):
    """Leave the log off, for what is read without it."""

    def __init__(self) -> None:
        """Collect nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to do."""

    def take(self) -> list[tuple[str, str]]:
        return []


@functools.cache
def _listen() -> None:
    """Switch the log on, for the whole process, and keep what nobody collects out of Python's log.

    Lines for debugging end in C. A decoder with threads by frame (which streamd has nowhere) must not be closed in such
    a process before it is drained: PyAV waits for its threads with Python's lock, which they may want for a line.
    """
    if av.logging.get_level() is None:
        logging.getLogger("libav").setLevel(logging.CRITICAL + 1)
        av.logging.set_level(av.logging.INFO)  # where redirections are told
    av.logging.set_skip_repeated(False)
