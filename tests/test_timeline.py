"""A packet's capture time is the sender's where there is one, and an epoch ends where times cannot be compared."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from streamd.messages import Stamp
from streamd.sources.timeline import SenderClock, Timeline

NOW = 1769853600.0  # 2026-01-31


def stamp(timeline: Timeline, pts_s: float | None, at_s: float, sender_at: float | None = None) -> Stamp:
    """Stamp a packet that came `at_s` seconds after the begin."""
    return timeline.stamp(pts_s, arrived_ns=round(at_s * 1e9), arrived_at=NOW + at_s, sender_at=sender_at)


@pytest.fixture
def timeline() -> Timeline:
    timeline = Timeline()
    timeline.connect()
    return timeline


def test_without_a_sender_report_a_picture_was_taken_when_it_came(timeline: Timeline) -> None:
    assert stamp(timeline, 0.0, 2.5) == Stamp(0, 2_500_000_000, NOW + 2.5, NOW + 2.5, "arrival")


def test_the_sender_s_clock_is_used_where_it_is_known(timeline: Timeline) -> None:
    assert stamp(timeline, 0.0, 2.5, NOW - 0.2) == Stamp(0, 2_500_000_000, NOW + 2.5, NOW - 0.2, "sender")


@pytest.mark.parametrize("never_set", [0.0, -2208988800.0, 946_684_799.0])
def test_a_camera_whose_clock_was_never_set_is_not_believed(timeline: Timeline, never_set: float) -> None:
    assert stamp(timeline, 0.0, 1.0, never_set).clock == "arrival"


def test_each_connection_is_an_epoch_of_its_own(timeline: Timeline) -> None:
    first = stamp(timeline, 100.0, 0.0)
    timeline.connect()
    assert (first.epoch, stamp(timeline, 100.04, 0.04).epoch) == (0, 1)


@pytest.mark.parametrize(
    ("pts_s", "at_s", "is_new"),
    [
        (100.04, 0.04, False),
        (99.96, 0.04, False),  # a B-frame
        (99.0, 0.04, False),
        (98.9, 0.04, True),  # the camera began anew
        (0.0, 0.04, True),
        (109.9, 0.04, False),
        (110.1, 0.04, True),  # its clock was set
        (130.0, 30.0, False),  # half a minute of silence
        (145.0, 30.0, True),
    ],
)
def test_an_epoch_ends_when_the_camera_s_clock_jumps(
    timeline: Timeline, pts_s: float, at_s: float, is_new: bool
) -> None:
    stamp(timeline, 100.0, 0.0)
    assert stamp(timeline, pts_s, at_s).epoch == int(is_new)


def test_a_file_that_is_read_faster_than_real_time_has_one_epoch(timeline: Timeline) -> None:
    assert {stamp(timeline, index / 25, index / 1000).epoch for index in range(1000)} == {0}


def test_after_a_jump_times_are_compared_with_the_new_ones(timeline: Timeline) -> None:
    times = [100.0, 0.0, 0.04, 0.08]
    assert [stamp(timeline, pts_s, index / 25).epoch for index, pts_s in enumerate(times)] == [0, 1, 1, 1]


def test_a_packet_without_a_time_changes_nothing(timeline: Timeline) -> None:
    assert [stamp(timeline, pts_s, index / 25).epoch for index, pts_s in enumerate([100.0, None, 100.08])] == [0] * 3


@dataclass
class PacketWithReport:
    """As av.Packet, with the side data that FFmpeg attaches after an RTCP sender report."""

    content: bytes | None

    def has_sidedata(self, kind: str) -> bool:
        return kind == "prft" and self.content is not None

    def get_sidedata(self, kind: str) -> bytes:
        assert self.content is not None
        return self.content


def report(unix_us: int) -> PacketWithReport:
    return PacketWithReport(struct.pack("<qi4x", unix_us, 1))


def time_of(clock: SenderClock, packet: PacketWithReport, pts_s: float | None) -> float | None:
    return clock.time_of(packet, pts_s)  # type: ignore[arg-type]


def test_the_sender_s_time_is_read_from_the_packet() -> None:
    assert time_of(SenderClock(), report(1_769_853_600_123_456), 5.0) == pytest.approx(1769853600.123456, abs=1e-6)


def test_before_the_first_report_there_is_no_sender_s_time() -> None:
    clock = SenderClock()
    assert time_of(clock, PacketWithReport(None), 0.0) is None
    assert time_of(clock, report(1_000_000_000_000_000), None) is None
    assert time_of(clock, report(1_000_000_000_000_000), 0.04) == pytest.approx(1e9)


def test_between_two_reports_the_sender_s_time_runs_with_the_presentation_time() -> None:
    clock = SenderClock()
    time_of(clock, report(1_000_000_000_000_000), 10.0)
    assert time_of(clock, PacketWithReport(None), 10.2) == pytest.approx(1e9 + 0.2)
    assert time_of(clock, report(1_000_000_000_700_000), 10.6) == pytest.approx(1e9 + 0.7), "the camera's clock drifts"
    assert time_of(clock, report(1_000_000_100_000_000), 3.0) == pytest.approx(1e9 + 100), "its times began anew"


def test_after_a_jump_the_old_report_is_not_believed_and_a_new_one_is(timeline: Timeline) -> None:
    """FFmpeg carries the last report over the jump: as far as presentation times are off, so is the sender's time."""
    stamp(timeline, 7200.0, 0.0, NOW - 0.1)
    stale = stamp(timeline, 0.0, 0.04, NOW + 0.04 - 0.1 - 7200)
    assert (stale.epoch, stale.clock, stale.captured_at) == (1, "arrival", NOW + 0.04)
    assert stamp(timeline, 0.04, 0.08, NOW + 0.08 - 0.1 - 7200).clock == "arrival"
    fresh = stamp(timeline, 0.08, 0.12, NOW + 0.02)
    assert (fresh.epoch, fresh.clock, fresh.captured_at) == (1, "sender", NOW + 0.02)


def test_a_camera_whose_clock_is_set_while_its_presentation_times_follow_is_believed_at_once(
    timeline: Timeline,
) -> None:
    stamp(timeline, 100.0, 0.0, NOW - 10_800)
    now_right = stamp(timeline, 100.04 + 10_800, 0.04, NOW + 0.04)
    assert (now_right.epoch, now_right.clock) == (1, "sender")


def test_a_step_of_this_machine_s_clock_is_no_jump_of_the_camera_s(timeline: Timeline) -> None:
    first = timeline.stamp(0.0, 0, NOW, NOW)
    second = timeline.stamp(0.04, 40_000_000, NOW + 3600, NOW + 0.04)
    assert (first.epoch, second.epoch, second.clock) == (0, 0, "sender")


def test_what_a_clock_that_was_never_set_says_is_kept_for_the_operator(timeline: Timeline) -> None:
    got = stamp(timeline, 0.0, 1.0, 12.5)
    assert (got.clock, got.captured_at, got.arrived_at, got.unset_at) == ("arrival", NOW + 1, NOW + 1, 12.5)
    assert stamp(timeline, 0.04, 1.04, NOW).unset_at is None
