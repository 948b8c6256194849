"""A stream connects, fails, backs off and comes back; no frame leaves it twice, late, damaged or too often."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from streamd.backoff import Backoff
from streamd.errors import SourceError
from streamd.messages import Frame, Status, StreamState
from streamd.supervisor import Policy, Supervisor
from tests.fakes import FakeCamera, FakeClock, Step, in_threads, make_frame, make_frames

REFUSED = SourceError("the connection was refused", "unreachable")


class Watched:
    """A supervisor with a scripted camera and a told clock; it keeps what the supervisor says and hands over."""

    def __init__(
        self, *connections: Iterable[Step] | SourceError, policy: Policy | None = None, backoff: Backoff | None = None
    ) -> None:
        self.camera = FakeCamera(*connections)
        self.clock = FakeClock()
        self.statuses: list[Status] = []
        self.handed: list[Frame] = []
        self.handed_at_s: list[float] = []
        self.wanted = True
        self.supervisor = Supervisor(
            "gate",
            policy or Policy(),
            self.camera.connect,
            self._hand_over,
            self.statuses.append,
            backoff,
            self.clock,
            self.clock.wait,
        )

    def _hand_over(self, frame: Frame) -> bool:
        self.handed.append(frame)
        self.handed_at_s.append(self.clock())
        return self.wanted

    def run(self) -> Watched:
        self.supervisor.run()
        assert all(connection.closed for connection in self.camera.opened)
        return self

    @property
    def stop(self) -> Callable[[], None]:
        return self.supervisor.stop

    @property
    def states(self) -> list[str]:
        return [str(status.state) for status in self.statuses]

    @property
    def seqs(self) -> list[int]:
        return [frame.seq for frame in self.handed]


def run(script: Iterable[Step], policy: Policy | None = None) -> Watched:
    """Play one connection to its end."""
    return Watched(script, policy=policy).run()


def run_failures(count: int, err: SourceError, rng: random.Random) -> list[float | None]:
    """Let a camera refuse so many connections; return the planned delays."""
    failures: list[Iterable[Step] | SourceError] = [err] * count
    watched = Watched(*failures, [make_frame()], backoff=Backoff(rng=rng)).run()
    delays = [status.retry_in_s for status in watched.statuses if status.retry_in_s is not None]
    assert watched.clock.waits_s == delays, "it waited as long as it said"
    return list(delays)


class HighestDraw(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def test_a_file_runs_from_connecting_to_its_end() -> None:
    watched = run(make_frames(3))
    assert watched.states == ["connecting", "waiting_keyframe", "running", "ended"]
    assert watched.seqs == [0, 1, 2]
    last = watched.statuses[-1]
    assert (last.reason, last.decoder, last.frames, last.dropped) == (
        "the file came to its end",
        "fake: in a test",
        3,
        0,
    )
    assert last.retry_in_s is None


def test_running_is_said_at_the_first_frame_and_not_before() -> None:
    watched = Watched([None, None, lambda: states.extend(watched.states), make_frame(), None])
    states: list[str] = []
    watched.run()
    assert states == ["connecting", "waiting_keyframe"]


@pytest.mark.parametrize("state", ["unreachable", "unauthorized", "not_found", "stalled", "failed", "waiting_keyframe"])
def test_each_failure_is_a_state_with_its_reason_and_the_time_to_the_next_try(state: str) -> None:
    watched = Watched(SourceError("why it failed", state), [make_frame()]).run()
    assert watched.states == ["connecting", state, "connecting", "waiting_keyframe", "running", "ended"]
    failed = watched.statuses[1]
    assert failed.reason == "why it failed"
    assert failed.retry_in_s is not None and 0 <= failed.retry_in_s <= 0.5
    assert watched.clock.waits_s == [failed.retry_in_s]
    assert abs(failed.at - time.time()) < 60


def test_back_off_doubles_from_half_a_second_to_thirty() -> None:
    assert run_failures(9, REFUSED, HighestDraw()) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_back_off_is_spread_over_the_whole_of_each_range() -> None:
    limits = (0.5, 1, 2, 4, 8, 16, 30)
    tries = [run_failures(7, REFUSED, random.Random(seed)) for seed in range(200)]
    for index, limit in enumerate(limits):
        delays = [delays[index] or 0.0 for delays in tries]
        assert 0 <= min(delays) < 0.05 * limit
        assert 0.95 * limit < max(delays) <= limit


def test_an_error_that_will_not_go_away_soon_is_retried_at_the_ceiling_at_once() -> None:
    wrong_password = SourceError("refused", "unauthorized", permanent=True)
    assert run_failures(3, wrong_password, HighestDraw()) == [30.0] * 3


def test_a_camera_that_was_here_a_moment_ago_is_tried_more_often_for_five_minutes() -> None:
    refusals = [SourceError("gone", "unreachable")] * 60
    watched = Watched([make_frame(), *refusals[:1]], *refusals, [make_frame(seq=2)], backoff=Backoff(rng=HighestDraw()))
    watched.run()
    assert watched.clock.waits_s[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    num_often = watched.clock.waits_s.index(30.0)
    assert 300 - 8 < sum(watched.clock.waits_s[: num_often + 1]) - 30 <= 300 + 8
    assert set(watched.clock.waits_s[num_often:]) == {30.0}


@pytest.mark.parametrize("away_s", [1, 5, 20, 60, 240])
def test_a_hundred_cameras_that_reboot_at_once_are_back_in_fifteen_seconds_and_do_not_come_in_a_herd(
    away_s: float,
) -> None:
    """Each try of an absent camera takes the five seconds of the time-out, as a host without power does."""
    returned: list[float] = []
    knocks: Counter[int] = Counter()
    for index in range(100):
        seen = reboot(away_s, random.Random(index))
        knocks.update(int(at_s) for at_s in seen)
        returned.append(seen[-1])
    assert max(returned) - away_s <= 15
    assert max(knocks[second] for second in range(20, 300)) <= 30, "knocks in any one second, of a hundred"


def reboot(away_s: float, rng: random.Random) -> list[float]:
    """Let a camera be away for so long; return when the supervisor tried, in seconds from the begin of that."""
    tries: list[float] = []
    watched: Watched

    def connections() -> Iterator[Iterable[Step] | SourceError]:
        yield [make_frame(), SourceError("gone", "unreachable")]
        while True:
            tries.append(watched.clock() - 1000)
            if tries[-1] >= away_s:
                yield [make_frame(seq=1, epoch=1)]
                return
            watched.clock.advance(min(5.0, away_s - tries[-1]))
            yield SourceError("no answer", "unreachable")

    watched = Watched(*[], backoff=Backoff(rng=rng))
    watched.camera._connections = connections()
    watched.run()
    return tries


@pytest.mark.parametrize(("healthy_s", "delay_s"), [(29.0, 4.0), (31.0, 0.5)])
def test_back_off_begins_anew_after_half_a_minute_of_frames(healthy_s: float, delay_s: float) -> None:
    watched = Watched(
        REFUSED,
        REFUSED,
        REFUSED,
        [make_frame(), lambda: watched.clock.advance(healthy_s), SourceError("gone", "unreachable")],
        [make_frame(seq=1)],
        backoff=Backoff(rng=HighestDraw()),
    )
    watched.run()
    assert watched.clock.waits_s == [0.5, 1.0, 2.0, delay_s]


def test_a_long_time_in_connecting_or_without_a_frame_is_no_health() -> None:
    watched = Watched(
        [lambda: watched.clock.advance(100), SourceError("no answer", "unreachable")],
        [None, lambda: watched.clock.advance(100), SourceError("gone", "unreachable")],
        [make_frame()],
        backoff=Backoff(rng=HighestDraw()),
    )
    watched.run()
    assert watched.clock.waits_s == [0.5, 1.0]


def test_reconnects_and_frames_are_counted_over_all_connections() -> None:
    watched = Watched(
        [*make_frames(3), SourceError("gone", "unreachable")],
        REFUSED,
        make_frames(2, first_seq=3, epoch=1),
    ).run()
    last = watched.statuses[-1]
    assert (last.frames, last.reconnects, watched.seqs) == (5, 1, [0, 1, 2, 3, 4])
    assert watched.camera.first_seqs == [0, 3, 3]


def test_the_present_counts_are_in_the_status_between_two_states() -> None:
    watched = Watched([make_frame(), make_frame(seq=1), lambda: seen.append(watched.supervisor.status), None])
    seen: list[Status] = []
    watched.run()
    assert (seen[0].state, seen[0].frames) == ("running", 2)


def test_without_retry_the_first_failure_is_the_last_state() -> None:
    watched = Watched(SourceError("no", "not_found"), policy=Policy(retry=False)).run()
    assert watched.states == ["connecting", "not_found"]
    assert watched.statuses[-1].retry_in_s is None
    assert watched.clock.waits_s == []


def test_a_file_without_a_frame_has_failed() -> None:
    watched = Watched([None, None], [make_frame()]).run()
    failed = watched.statuses[2]
    assert failed.state == "failed" and failed.retry_in_s is not None and 22.5 <= failed.retry_in_s <= 30
    assert failed.reason == "holds no frame that can be decoded"


def test_a_file_of_which_every_frame_is_damaged_has_failed() -> None:
    watched = Watched([make_frame(corrupt=True)], [make_frame(seq=1)]).run()
    assert (watched.statuses[2].state, watched.statuses[2].corrupt) == ("failed", 1)


def test_another_exception_is_a_bug_and_goes_up_after_the_connection_is_closed() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    watched = Watched([make_frame(), broken])
    with pytest.raises(ZeroDivisionError):
        watched.run()
    assert watched.camera.opened[0].closed


def test_damaged_frames_are_dropped_and_counted() -> None:
    watched = run([make_frame(seq=0), make_frame(seq=1, corrupt=True), make_frame(seq=2)])
    last = watched.statuses[-1]
    assert (watched.seqs, last.corrupt, last.dropped, last.frames) == ([0, 2], 1, 1, 3)


def test_damaged_frames_are_published_where_asked_for() -> None:
    watched = run([make_frame(seq=0), make_frame(seq=1, corrupt=True)], Policy(drop_corrupt=False))
    assert [frame.corrupt for frame in watched.handed] == [False, True]
    assert watched.statuses[-1].corrupt == 0


def test_a_stream_of_which_only_damaged_frames_come_waits_for_a_key_frame_and_says_so() -> None:
    watched = Watched(
        [
            make_frame(seq=0),
            lambda: watched.clock.advance(1.5),
            make_frame(seq=1, corrupt=True),
            lambda: watched.clock.advance(1.5),
            make_frame(seq=2, corrupt=True),
            make_frame(seq=3, corrupt=True),
            make_frame(seq=4),
        ],
        policy=Policy(stall_timeout_s=2),
    )
    watched.run()
    assert watched.states == ["connecting", "waiting_keyframe", "running", "waiting_keyframe", "running", "ended"]
    assert watched.statuses[3].reason == "only damaged frames for 3.0 s"
    assert watched.seqs == [0, 4]


@pytest.mark.parametrize("first", [[], [make_frame(seq=0)]], ids=["at the begin", "after damage"])
def test_a_camera_that_sends_no_key_frame_for_a_minute_is_asked_for_one_by_a_new_connection(
    first: list[Frame],
) -> None:
    def until_told() -> Iterator[Step]:
        yield from first
        while watched.clock() < 1000 + 10 * 60:
            watched.clock.advance(0.5)
            yield make_frame(seq=1, corrupt=True)

    watched = Watched(until_told(), [make_frame(seq=2, epoch=1)])
    watched.run()
    reconnecting = next(status for status in watched.statuses if status.retry_in_s is not None)
    assert (reconnecting.state, reconnecting.reason) == ("waiting_keyframe", "no key frame for 66 s")
    assert watched.seqs[-1] == 2


def test_ten_seconds_without_a_key_frame_are_waited_for() -> None:
    watched = Watched([], policy=Policy(stall_timeout_s=2))
    half_seconds: list[Step] = [None, lambda: watched.clock.advance(0.5)]
    watched.camera = FakeCamera([*half_seconds * 20, make_frame()])
    watched.supervisor._connect = watched.camera.connect
    assert watched.run().states == ["connecting", "waiting_keyframe", "running", "ended"]


def test_a_camera_s_clock_that_was_never_set_is_said_once_and_taken_back_when_it_is_set() -> None:
    def at(seq: int, unset_at: float | None) -> Frame:
        frame = make_frame(seq=seq)
        return replace(frame, stamp=replace(frame.stamp, unset_at=unset_at))

    watched = run([at(0, None), at(1, 12.0), at(2, 12.04), at(3, None), at(4, None)])
    running = [status.reason for status in watched.statuses if status.state == "running"]
    said = "the camera's clock was never set (it says 1970-01-01 00:00:12); times are those of arrival"
    assert running == ["", said, ""]


def test_repeated_and_backward_presentation_times_are_dropped_and_counted() -> None:
    times = [0.0, 0.04, 0.04, 0.0, 0.02, 0.08]
    watched = run([make_frame(seq=seq, pts_s=pts_s) for seq, pts_s in enumerate(times)])
    last = watched.statuses[-1]
    assert (watched.seqs, last.dropped, last.corrupt) == ([0, 1, 5], 3, 0)


def test_a_new_epoch_may_begin_anywhere() -> None:
    watched = run(
        [make_frame(seq=0, pts_s=100.0), make_frame(seq=1, pts_s=0.0, epoch=1), make_frame(seq=2, pts_s=0.04, epoch=1)]
    )
    assert (watched.seqs, watched.statuses[-1].dropped) == ([0, 1, 2], 0)


@pytest.mark.parametrize("jitter_s", [0.0, 0.002, 0.01])
@pytest.mark.parametrize(("source_fps", "fps"), [(25, 10), (30, 7.5), (25, 24), (60, 1), (29.97, 25), (12.5, 0.5)])
def test_thinning_is_even_on_the_stream_s_own_clock(source_fps: float, fps: float, jitter_s: float) -> None:
    rng, seconds = random.Random(0), 60
    times = [index / source_fps + rng.uniform(0, jitter_s) for index in range(round(seconds * source_fps))]
    frames = [make_frame(seq=seq, pts_s=pts_s) for seq, pts_s in enumerate(times)]
    handed = [frame.pts_s for frame in run(frames, Policy(fps=fps)).handed]
    assert len(handed) == pytest.approx(seconds * fps, rel=0.03, abs=1)
    for begin in range(seconds - 1):
        in_this_second = sum(begin <= pts_s < begin + 1 for pts_s in handed)
        assert abs(in_this_second - fps) <= 1, f"{in_this_second} frames in second {begin}"
    steps = [after - before for before, after in pairwise(handed)]
    assert max(steps) <= 1 / fps + 1 / source_fps + 2 * jitter_s


def test_a_stream_that_is_slower_than_its_cap_keeps_every_frame() -> None:
    assert len(run(make_frames(50, fps=5), Policy(fps=10)).handed) == 50


def test_thinning_does_not_catch_up_after_a_gap() -> None:
    frames = make_frames(25) + [make_frame(seq=25 + i, pts_s=60 + i / 25) for i in range(25)]
    handed = [frame.pts_s for frame in run(frames, Policy(fps=5)).handed]
    assert sum(pts_s >= 60 for pts_s in handed) <= 6


def test_thinning_begins_anew_with_an_epoch() -> None:
    frames = [
        make_frame(seq=0, pts_s=1000.0),
        make_frame(seq=1, pts_s=0.0, epoch=1),
        make_frame(seq=2, pts_s=1.0, epoch=1),
    ]
    assert run(frames, Policy(fps=2)).seqs == [0, 1, 2]


def test_thinned_frames_are_not_counted_as_dropped() -> None:
    assert run(make_frames(25), Policy(fps=5)).statuses[-1].dropped == 0


def test_a_file_in_real_time_hands_over_as_its_presentation_times_say() -> None:
    watched = run(
        [make_frame(seq=seq, pts_s=pts_s) for seq, pts_s in enumerate((7.0, 7.1, 7.5))], Policy(realtime=True)
    )
    begin = watched.handed_at_s[0]
    assert [at - begin for at in watched.handed_at_s] == pytest.approx([0.0, 0.1, 0.5])


def test_frames_that_were_held_back_arrive_when_they_are_due() -> None:
    (held,) = run([make_frame()], Policy(realtime=True)).handed
    (live,) = run([make_frame()], Policy()).handed
    assert time.time() - held.stamp.captured_at < 60 and time.monotonic_ns() - held.stamp.arrived_ns < 60e9
    assert live.stamp == make_frame().stamp, "a camera's frames keep their own"


def test_a_slow_hand_over_does_not_shift_a_file_in_real_time() -> None:
    watched = Watched(
        [
            make_frame(pts_s=0.0),
            lambda: watched.clock.advance(0.3),
            make_frame(seq=1, pts_s=0.1),
            make_frame(seq=2, pts_s=0.5),
        ],
        policy=Policy(realtime=True),
    )
    watched.run()
    assert [at - watched.handed_at_s[0] for at in watched.handed_at_s] == pytest.approx([0.0, 0.3, 0.5])


def test_a_file_that_loops_begins_again_and_keeps_its_pace() -> None:
    loops = [make_frames(5, first_seq=5 * epoch, fps=10, epoch=epoch) for epoch in range(3)]
    watched = Watched(
        *loops, [make_frame(seq=15, epoch=3), lambda: watched.stop()], policy=Policy(loop=True, realtime=True)
    )
    watched.run()
    assert watched.seqs == list(range(16))
    assert [at - watched.handed_at_s[0] for at in watched.handed_at_s] == pytest.approx([i / 10 for i in range(16)])
    assert watched.states.count("running") == 4
    assert watched.statuses[-1].reason == "stopped"


def test_a_picture_that_loops_does_not_spin() -> None:
    pictures = [[make_frame(seq=seq, pts_s=0.0, epoch=seq)] for seq in range(10)]
    watched = Watched(*pictures, [lambda: watched.stop(), None], policy=Policy(loop=True, realtime=True))
    watched.run()
    assert watched.handed_at_s[9] - watched.handed_at_s[0] == pytest.approx(9 * 0.04)


def test_packets_without_frames_are_a_stall_after_the_time_out() -> None:
    watched = Watched(
        [make_frame(), lambda: watched.clock.advance(1.9), None, lambda: watched.clock.advance(0.2), None],
        [make_frame(seq=1, epoch=1)],
        policy=Policy(stall_timeout_s=2),
    )
    watched.run()
    stalled = watched.statuses[3]
    assert (stalled.state, stalled.reason) == ("stalled", "packets come, but no frame for 2.1 s")


def test_a_hand_over_that_waits_for_the_model_is_no_stall() -> None:
    watched = Watched([make_frame(), None, make_frame(seq=1)], policy=Policy(stall_timeout_s=2))
    hand_over = watched.supervisor._hand_over

    def slow(frame: Frame) -> bool:
        watched.clock.advance(10)
        return hand_over(frame)

    watched.supervisor._hand_over = slow
    watched.run()
    assert watched.states == ["connecting", "waiting_keyframe", "running", "ended"]


def test_nobody_wanting_frames_ends_the_stream_even_if_it_loops() -> None:
    watched = Watched(make_frames(3), policy=Policy(loop=True))
    watched.wanted = False
    watched.run()
    assert (watched.seqs, watched.states[-1], watched.statuses[-1].reason) == ([0], "ended", "stopped")


def test_stopping_while_frames_come_ends_at_the_next_one() -> None:
    watched = Watched([make_frame(), lambda: watched.stop(), make_frame(seq=1), make_frame(seq=2)])
    watched.run()
    assert (watched.seqs, watched.statuses[-1].reason) == ([0], "stopped")


def test_stopping_while_connecting_reads_no_frame() -> None:
    watched = Watched([make_frame()])
    connect = watched.supervisor._connect

    def slow(first_seq: int) -> object:
        watched.stop()
        return connect(first_seq)

    watched.supervisor._connect = slow  # type: ignore[assignment]
    watched.run()
    assert (watched.seqs, watched.states[-1]) == ([], "ended")


def test_stopping_before_the_begin_connects_to_nothing() -> None:
    watched = Watched()
    watched.stop()
    assert watched.run().states == ["ended"]


def endless(stop_reading: threading.Event) -> Iterator[Step]:
    """Give packets as a camera does, one each millisecond."""
    while not stop_reading.wait(0.001):
        yield None


@pytest.mark.parametrize("where", ["back-off", "read", "pace"])
def test_stopping_a_real_thread_takes_no_time(where: str) -> None:
    camera = {
        "back-off": FakeCamera(SourceError("no", "not_found", permanent=True)),
        "read": FakeCamera(endless(threading.Event())),
        "pace": FakeCamera([make_frame(), make_frame(seq=1, pts_s=1000.0)]),
    }[where]
    reached = threading.Semaphore(0)
    supervisor = Supervisor(
        "gate", Policy(realtime=True), camera.connect, lambda frame: True, lambda status: reached.release()
    )
    took_s: list[float] = []

    def stop_soon() -> None:
        for _ in range({"back-off": 2, "read": 2, "pace": 3}[where]):
            assert reached.acquire(timeout=5)
        started = time.monotonic()
        supervisor.stop()
        assert reached.acquire(timeout=5)  # the state `ended`
        took_s.append(time.monotonic() - started)

    in_threads([supervisor.run, stop_soon])
    assert supervisor.status.state == StreamState.ENDED
    assert took_s[0] < 1.0


def test_the_reading_counts_packets_drops_and_failures_over_all_connections() -> None:
    first = [make_frame(seq=0), None, make_frame(seq=1, corrupt=True), SourceError("silent", "stalled")]
    second = [make_frame(seq=2, pts_s=1.0, epoch=1), make_frame(seq=3, pts_s=1.0, epoch=1), None]
    watched = Watched(first, SourceError("refused", "unreachable"), second)
    assert watched.supervisor.reading.newest_age_s is None
    watched.run()
    reading = watched.supervisor.reading
    assert reading.num_packets == 6
    assert reading.num_dropped == {"corrupt": 1, "late": 1, "thinned": 0}
    assert reading.num_failures == {"stalled": 1, "unreachable": 1}
    assert reading.status.reconnects == 1
    watched.clock.advance(7)
    assert reading.newest_age_s is not None
    assert watched.supervisor.reading.newest_age_s == reading.newest_age_s + 7


def test_frames_over_fps_are_counted_as_thinned() -> None:
    watched = run(make_frames(50, fps=25), Policy(fps=5))
    assert watched.supervisor.reading.num_dropped["thinned"] == 50 - len(watched.handed) == 40
