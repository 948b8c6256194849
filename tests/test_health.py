"""A loop that waits is well, one whose work never ends is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamd.batch import Batcher
from streamd.metrics.health import STUCK_AFTER_S, stuck_loops
from streamd.metrics.readings import LaneMeter
from tests.fakes import NO_TIMES, FakeClock, make_frame


@dataclass
class Sink:
    name: str = "redis redis://localhost"
    sending_for_s: float = 0.0


def make_meter(clock: FakeClock) -> LaneMeter:
    return LaneMeter("people", "cpu", "yolox_s", "", clock)


def test_an_idle_model_is_well_for_ever() -> None:
    clock = FakeClock()
    meter = make_meter(clock)
    clock.advance(1e6)
    assert meter.busy_for_s == 0
    assert not list(stuck_loops([meter], [Sink()]))


def test_a_batch_that_never_ends_is_named() -> None:
    clock = FakeClock()
    meter = make_meter(clock)
    meter.begin(make_frame(), 1)
    clock.advance(STUCK_AFTER_S)
    assert not list(stuck_loops([meter], []))
    clock.advance(1)
    (line,) = stuck_loops([meter], [])
    assert "people" in line and "31 s" in line
    assert not list(stuck_loops([meter], [], after_s=32))


def test_the_oldest_of_several_batches_counts() -> None:
    clock = FakeClock()
    meter = make_meter(clock)
    slow, quick = make_frame(seq=1), make_frame(seq=2)
    meter.begin(slow, 1)
    clock.advance(5)
    meter.begin(quick, 3)
    clock.advance(2)
    assert meter.busy_for_s == 7
    meter.end(slow, replace(NO_TIMES, infer=7000))
    assert meter.busy_for_s == 2
    meter.end(quick, replace(NO_TIMES, infer=2000))
    assert meter.busy_for_s == 0
    assert meter.inferences.read() == (meter.inferences.read()[0], 9.0), "milliseconds became seconds"
    assert dict(meter.batch_sizes.read()[0])["1"] == 1
    assert dict(meter.batch_sizes.read()[0])["4"] == 2


def test_frames_that_nobody_takes_are_named() -> None:
    clock = FakeClock()
    meter, batcher = make_meter(clock), Batcher(clock=clock)
    meter.neglected_for_s = lambda: batcher.neglected_for_s
    batcher.add("gate")
    clock.advance(1e6)
    assert not list(stuck_loops([meter], [])), "nothing waits"
    for seq in range(3):
        batcher.offer(make_frame("gate", seq=seq))
        clock.advance(STUCK_AFTER_S / 2)
    (line,) = stuck_loops([meter], [])
    assert "people" in line and "frames wait" in line and "45 s" in line
    batcher.take(1)
    assert not list(stuck_loops([meter], []))


def test_who_takes_some_of_what_waits_neglects_nothing() -> None:
    clock = FakeClock()
    batcher = Batcher(clock=clock)
    batcher.add("film", lossless=True)
    for seq in range(4):
        batcher.offer(make_frame("film", seq=seq))
    for _ in range(3):
        clock.advance(STUCK_AFTER_S)
        assert batcher.neglected_for_s == STUCK_AFTER_S
        batcher.take(1)
        assert batcher.neglected_for_s == 0
    batcher.readmit([make_frame("film", seq=9)], {}, by_taker=True)
    clock.advance(2)
    assert batcher.neglected_for_s == 2
    assert [frame.seq for frame in batcher.take(4)] == [9] and batcher.take(4)
    assert batcher.neglected_for_s == 0


def test_a_send_that_never_ends_is_named() -> None:
    (line,) = stuck_loops([], [Sink(), Sink("zeromq tcp://127.0.0.1:5555", STUCK_AFTER_S + 1)])
    assert "zeromq" in line
