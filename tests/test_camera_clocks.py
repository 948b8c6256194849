"""What a camera's time stamps and sender reports say over RTSP, also wrongly, gives times that are right."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from streamd.messages import Frame
from tests.clips import write_clip
from tests.rtsp_faults import Bitstream, Camera, RtpClock
from tests.watching import Seen, assert_clean, watch


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small clip of 25 frames/s with a key frame each second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 50, gop=25)


def assert_right_times(seen: Seen) -> None:
    """Check that capture times are those of this machine's clock, as the server's are, and rise with the frames."""
    assert_clean(seen)
    for frame in seen.frames:
        assert -2 < frame.stamp.arrived_at - frame.stamp.captured_at < 5, "a loaded machine may be late"
    for before, after in pairwise(frame.stamp.captured_at for frame in seen.frames):
        assert after > before - 0.5


def epoch_sizes(seen: Seen) -> list[int]:
    return [sum(frame.stamp.epoch == epoch for frame in seen.frames) for epoch in seen.epochs]


def test_rtp_time_stamps_that_wrap_go_on_rising(clip: Path) -> None:
    seen = watch(Camera(clip, clock=RtpClock(first_timestamp=2**32 - 90_000 // 2)), 40)
    assert_right_times(seen)
    assert seen.epochs == [0] and seen.last.dropped == 0
    assert np.diff([frame.pts_s for frame in seen.frames]) == pytest.approx(0.04, abs=1e-4)
    assert seen.clocks[-1] == "sender"


JUMPS = {
    "ahead by three hours": RtpClock(jumps=((30, 3 * 3600.0),), report_interval_s=1.0),
    "back by three hours": RtpClock(jumps=((30, -3 * 3600.0),), report_interval_s=1.0),
    "again from 0": RtpClock(first_timestamp=1 << 31, restart_at=30, report_interval_s=1.0),
}


@pytest.mark.parametrize("clock", JUMPS.values(), ids=JUMPS)
def test_time_stamps_that_jump_begin_an_epoch_and_capture_times_stay_right(clip: Path, clock: RtpClock) -> None:
    """The sender's time is not believed between the jump and the next report."""
    seen = watch(Camera(clip, clock=clock), 80)
    assert_right_times(seen)
    assert epoch_sizes(seen) == [30, 50]
    assert seen.clocks[-3:] == ["sender", "arrival", "sender"], "what is said of it"
    assert (seen.last.reconnects, seen.last.dropped) == (0, 0)


def test_repeated_and_backward_time_stamps_are_dropped_and_counted_and_spoil_no_other_frame(clip: Path) -> None:
    for clock in (RtpClock(duplicate_every=10), RtpClock(backward_every=10)):
        seen = watch(Camera(clip, bitstream=Bitstream(speed=2), clock=clock), 54)
        assert_right_times(seen)
        assert [frame.seq for frame in seen.frames] == [seq for seq in range(59) if seq % 10 != 9]
        assert (seen.last.dropped, seen.last.corrupt, seen.epochs) == (5, 0, [0])


def test_without_sender_reports_times_are_those_of_arrival_and_say_so(clip: Path) -> None:
    seen = watch(Camera(clip, clock=RtpClock(reports=False)), 30)
    assert_right_times(seen)
    assert seen.clocks == ["arrival"]
    assert all(frame.stamp.captured_at == frame.stamp.arrived_at for frame in seen.frames)


def test_a_sender_report_that_comes_late_is_used_from_then_on(clip: Path) -> None:
    seen = watch(Camera(clip, clock=RtpClock(first_report_s=0.6)), 40)
    assert_right_times(seen)
    assert seen.clocks == ["arrival", "sender"]
    assert len(seen.epochs) == 1


def test_a_camera_whose_clock_says_1970_is_not_believed_and_the_status_says_so(clip: Path) -> None:
    seen = watch(Camera(clip, clock=RtpClock(wall_clock_at=0.0)), 30)
    assert_right_times(seen)
    assert seen.clocks == ["arrival"]
    running = [status for status in seen.statuses if status.state == "running"]
    assert len(running) == 1, "said once"
    assert running[-1].reason.startswith("the camera's clock was never set (it says 1970-01-01 00:00:0")


def test_a_camera_whose_clock_is_wrong_is_told_by_the_time_of_arrival_beside_it(clip: Path) -> None:
    seen = watch(Camera(clip, clock=RtpClock(wall_clock_at=1_000_000_000.0)), 30)

    def is_old(frame: Frame) -> bool:
        return frame.stamp.captured_at < 1_000_000_100 and frame.stamp.arrived_at > 1_700_000_000

    assert is_old(seen.frames[-1]) and seen.frames[-1].stamp.clock == "sender"
