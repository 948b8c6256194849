"""Count values by size, cheaply enough to do it for every frame."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

# One ladder for all times, so that two of them can be laid over each other: from a kernel's run to a stuck camera.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Histogram:
    """A bounded number of counts, as Prometheus wants them. Safe to use from any thread."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise; each bucket holds what is at most its bound, and one more the rest."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one value."""
        index = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[index] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return each bound, as the label `le` has it, with the number of values up to it; and the sum of all."""
        with self._lock:
            counts, total = self._counts.copy(), self._sum
        buckets: list[tuple[str, float]] = []
        num_values = 0
        for bound, count in zip((*map("{:g}".format, self._bounds), "+Inf"), counts, strict=True):
            num_values += count
            buckets.append((bound, num_values))
        return buckets, total
