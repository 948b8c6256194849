"""How many frames a batch may have where memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable

RECOVERS_AFTER_S = 30.0  # without another shortage the limit doubles
_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # between the tries of one frame alone


class BatchLimit:
    """Halve the batch when memory runs out, and double it again after a while without. Safe from any thread."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._limit = most
        self._may_grow_at_s = 0.0
        self._num_alone = 0  # shortages in a row of one frame alone

    @property
    def now(self) -> int:
        """The most frames of the next batch."""
        if self._limit < self._most and self._clock() >= self._may_grow_at_s:
            self._limit = min(self._most, self._limit * 2)
            self._may_grow_at_s = self._clock() + RECOVERS_AFTER_S
        return self._limit

    def ran_out(self, num_frames: int) -> float | None:
        """Note that memory was short for so many frames; say how long to wait before the next try, None for never."""
        self._limit = max(1, min(self._limit, num_frames) // 2)
        self._may_grow_at_s = self._clock() + RECOVERS_AFTER_S
        if num_frames > 1:
            return 0.0
        self._num_alone += 1
        return _PAUSES_S[self._num_alone - 1] if self._num_alone <= len(_PAUSES_S) else None

    def sufficed(self) -> None:
        """Note that a batch went through."""
        self._num_alone = 0
