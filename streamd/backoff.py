"""How long to wait before trying again."""

from __future__ import annotations

import math
import random


class Backoff:
    """Full-jitter exponential back-off: each delay is uniform in 0..min(ceiling, base * 2^n).

    The jitter keeps many clients of one server that came back from all knocking at once; see M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, base_s: float = 0.5, ceiling_s: float = 30.0, rng: random.Random | None = None) -> None:
        self._base_s = base_s
        self.ceiling_s = ceiling_s
        self._rng = rng or random.Random()
        self._limit_s = min(base_s, ceiling_s)

    def next_delay_s(self, at_most_s: float = math.inf) -> float:
        """Return the delay before the next try and double the limit of the one after."""
        delay_s = self._rng.uniform(0.0, min(self._limit_s, at_most_s))
        self._limit_s = min(self._limit_s * 2, self.ceiling_s)
        return delay_s

    def long_delay_s(self) -> float:
        """Return a delay near the ceiling, spread: one server may refuse many at the same moment."""
        return self._rng.uniform(0.75, 1.0) * self.ceiling_s

    def reset(self) -> None:
        """Begin anew at the base, after a success."""
        self._limit_s = min(self._base_s, self.ceiling_s)
