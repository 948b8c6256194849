"""Delays grow, stay under the ceiling, and begin anew after a success."""

from __future__ import annotations

import random

from streamd.backoff import Backoff


class HighestDraw(random.Random):
    """Draw the upper end of every range, so that the limit shows."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_the_limit_doubles_up_to_the_ceiling() -> None:
    backoff = Backoff(base_s=0.5, ceiling_s=3.0, rng=HighestDraw())
    assert [backoff.next_delay_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_success_begins_anew_at_the_base() -> None:
    backoff = Backoff(base_s=0.5, rng=HighestDraw())
    backoff.next_delay_s()
    backoff.next_delay_s()
    backoff.reset()
    assert backoff.next_delay_s() == 0.5


def test_delays_are_spread_over_the_whole_range() -> None:
    backoff = Backoff(base_s=1.0, ceiling_s=1.0, rng=random.Random(0))
    delays = [backoff.next_delay_s() for _ in range(1000)]
    assert 0 <= min(delays) < 0.05 and 0.95 < max(delays) <= 1.0


def test_years_of_failures_do_not_overflow() -> None:
    backoff = Backoff(rng=HighestDraw())
    assert {backoff.next_delay_s() for _ in range(5000)} <= {0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0}


def test_long_delays_are_near_the_ceiling_and_spread() -> None:
    """Many streams of one recorder may be refused at the same moment."""
    delays_s = [Backoff(rng=random.Random(seed)).long_delay_s() for seed in range(200)]
    assert 22.5 <= min(delays_s) < 23.5 and 29 < max(delays_s) <= 30


def test_a_delay_may_be_bounded_and_the_next_limit_doubles_all_the_same() -> None:
    backoff = Backoff(rng=random.Random(0))
    assert all(backoff.next_delay_s(at_most_s=0.1) <= 0.1 for _ in range(7))
    assert max(backoff.next_delay_s() for _ in range(50)) > 25
