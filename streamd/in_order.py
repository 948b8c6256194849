"""Release results in the order in which each stream's frames were taken, whichever worker finishes first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamd.messages import Frame, Result


@dataclass(slots=True, eq=False)
class _Expected:
    frame: tuple[int, int]  # epoch and seq: a stream that was removed and added again counts from 0 again
    result: Result | None = None


class InOrder:
    """Hold a result back until its stream's earlier frames are done; streams never wait for each other."""

    def __init__(self, deliver: Callable[[Result], None]) -> None:
        """`deliver` is called by one thread at a time, so it needs no lock of its own. It must not block."""
        self._deliver = deliver
        self._lock = threading.Lock()
        self._expected: dict[str, deque[_Expected]] = {}

    def expect(self, frames: Sequence[Frame]) -> None:
        """Note that these frames are now being processed, in this order."""
        with self._lock:
            for frame in frames:
                self._expected.setdefault(frame.stream, deque()).append(_Expected(_key(frame)))

    def complete(self, results: Sequence[Result]) -> None:
        """Deliver these results, and those that waited for them."""
        with self._lock:
            for result in results:
                expected = self._expected[result.frame.stream]
                next(entry for entry in expected if entry.frame == _key(result.frame)).result = result
                while expected and expected[0].result is not None:
                    self._deliver(expected.popleft().result)  # type: ignore[arg-type]
                if not expected:
                    del self._expected[result.frame.stream]  # it may never come again


def _key(frame: Frame) -> tuple[int, int]:
    return frame.stamp.epoch, frame.seq
