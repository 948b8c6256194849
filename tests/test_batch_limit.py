"""Where memory is short batches become smaller, and larger again when it is not."""

from __future__ import annotations

from streamd.batch_limit import RECOVERS_AFTER_S, BatchLimit
from tests.fakes import FakeClock


def test_the_limit_halves_at_each_shortage_and_doubles_after_a_while_without() -> None:
    clock = FakeClock()
    limit = BatchLimit(12, clock)
    assert limit.now == 12
    assert limit.ran_out(12) == 0.0
    assert limit.now == 6
    assert limit.ran_out(6) == 0.0
    assert limit.ran_out(3) == 0.0
    assert limit.now == 1
    seen = []
    for _ in range(5):
        clock.advance(RECOVERS_AFTER_S)
        seen.append(limit.now)
    assert seen == [2, 4, 8, 12, 12]


def test_a_batch_that_was_not_full_says_more_than_the_limit() -> None:
    limit = BatchLimit(32, FakeClock())
    limit.ran_out(4)
    assert limit.now == 2


def test_a_shortage_while_it_recovers_begins_the_wait_anew() -> None:
    clock = FakeClock()
    limit = BatchLimit(8, clock)
    limit.ran_out(8)
    clock.advance(RECOVERS_AFTER_S - 1)
    limit.ran_out(4)
    clock.advance(RECOVERS_AFTER_S - 1)
    assert limit.now == 2
    clock.advance(1)
    assert limit.now == 4


def test_one_frame_alone_is_tried_with_growing_pauses_and_then_no_more() -> None:
    limit = BatchLimit(1, FakeClock())
    pauses = [limit.ran_out(1) for _ in range(7)]
    assert pauses[-1] is None
    waited = [pause for pause in pauses if pause is not None]
    assert waited == sorted(waited) and 5 < sum(waited) < 30
    limit.sufficed()
    assert limit.ran_out(1) == waited[0], "it begins again after a batch that went through"
