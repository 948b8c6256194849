"""Which frames go together: the newest wins for cameras, nothing is lost of files, and nobody starves."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest

from streamd.batch import Batcher
from streamd.messages import Frame
from tests.fakes import FakeClock, in_threads, make_frame, make_frames
from tests.waiting import wait_until

LONG_S = 30.0  # longer than a test may take: who waits so long has been forgotten


def batcher_of(*streams: str, lossless: bool = False) -> Batcher:
    batcher = Batcher()
    for stream in streams:
        batcher.add(stream, lossless=lossless)
    return batcher


def names(frames: Sequence[Frame]) -> list[tuple[str, int]]:
    return [(frame.stream, frame.seq) for frame in frames]


@contextmanager
def running(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run a function beside the test; it must have returned soon after the block's end."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    yield thread
    thread.join(5.0)
    assert not thread.is_alive(), "still waiting"


def num_waiting(batcher: Batcher) -> int:
    """Count the threads that wait in `take`."""
    return len(batcher._frame_came._waiters)  # type: ignore[attr-defined]


def test_the_newest_frame_of_a_camera_wins_and_what_it_replaces_is_counted() -> None:
    batcher = batcher_of("gate", "yard")
    for frame in make_frames(5):
        assert batcher.offer(frame)
    batcher.offer(make_frame("yard", 7))
    assert names(batcher.take(8)) == [("gate", 4), ("yard", 7)]
    assert (batcher.num_dropped("gate"), batcher.num_dropped("yard")) == (4, 0)


def test_frames_that_are_taken_in_time_are_not_counted_as_dropped() -> None:
    batcher = batcher_of("gate")
    for frame in make_frames(5):
        batcher.offer(frame)
        assert names(batcher.take(8)) == [("gate", frame.seq)]
    assert batcher.num_dropped("gate") == 0


def test_a_batch_is_never_larger_than_asked_for_and_the_rest_comes_next() -> None:
    batcher = batcher_of(*"abcde")
    for stream in "abcde":
        batcher.offer(make_frame(stream))
    assert names(batcher.take(2)) == [("a", 0), ("b", 0)]
    assert names(batcher.take(2)) == [("c", 0), ("d", 0)]
    assert names(batcher.take(2)) == [("e", 0)]


def test_a_file_that_is_read_fast_loses_nothing_and_waits_for_room() -> None:
    batcher = batcher_of("clip", lossless=True)
    offered: list[int] = []

    def offer_all() -> None:
        for frame in make_frames(100, "clip"):
            assert batcher.offer(frame)
            offered.append(frame.seq)

    with running(offer_all):
        wait_until(lambda: len(offered) == 8)
        time.sleep(0.02)
        assert len(offered) == 8, "the queue of a file must be bounded"
        taken: list[int] = []
        while len(taken) < 100:
            taken += [frame.seq for frame in batcher.take(3)]
    assert taken == list(range(100))
    assert batcher.num_dropped("clip") == 0


def test_one_batch_may_hold_several_frames_of_a_file_in_their_order() -> None:
    batcher = batcher_of("clip", lossless=True)
    batcher.add("gate")
    for frame in make_frames(4, "clip"):
        batcher.offer(frame)
    batcher.offer(make_frame("gate"))
    assert names(batcher.take(4)) == [("clip", 0), ("gate", 0), ("clip", 1), ("clip", 2)]


def test_a_partial_batch_is_sent_at_once_where_nobody_wants_to_wait() -> None:
    batcher = batcher_of("gate", "yard")
    batcher.offer(make_frame())
    assert names(batcher.take(8)) == [("gate", 0)]


def test_take_waits_for_the_first_frame() -> None:
    batcher, taken = batcher_of("gate"), list[Frame]()
    with running(lambda: taken.extend(batcher.take(8))):
        wait_until(lambda: num_waiting(batcher) == 1)
        batcher.offer(make_frame())
    assert names(taken) == [("gate", 0)]


def test_a_batch_is_sent_as_soon_as_every_camera_has_delivered() -> None:
    batcher, taken = batcher_of("gate", "yard"), list[Frame]()
    with running(lambda: taken.extend(batcher.take(8, LONG_S))):
        batcher.offer(make_frame("gate"))
        wait_until(lambda: num_waiting(batcher) == 1)
        batcher.offer(make_frame("yard"))
    assert names(taken) == [("gate", 0), ("yard", 0)]


def test_a_batch_is_sent_as_soon_as_it_is_full() -> None:
    batcher, taken = batcher_of(*"abc"), list[Frame]()
    with running(lambda: taken.extend(batcher.take(2, LONG_S))):
        batcher.offer(make_frame("a"))
        wait_until(lambda: num_waiting(batcher) == 1)
        batcher.offer(make_frame("c"))
    assert names(taken) == [("a", 0), ("c", 0)]


def test_a_file_is_waited_for_until_the_batch_is_full() -> None:
    batcher, taken = batcher_of("clip", lossless=True), list[Frame]()
    with running(lambda: taken.extend(batcher.take(3, LONG_S))):
        for frame in make_frames(3, "clip"):
            batcher.offer(frame)
    assert names(taken) == [("clip", 0), ("clip", 1), ("clip", 2)]


def test_a_batch_is_sent_when_the_slowest_camera_is_late() -> None:
    batcher = batcher_of("gate", "late")
    batcher.offer(make_frame("gate"))
    started = time.monotonic()
    assert names(batcher.take(2, 0.05)) == [("gate", 0)]
    assert 0.04 < time.monotonic() - started < 5.0


def test_of_64_streams_one_that_is_slow_does_not_hold_the_others_beyond_the_deadline() -> None:
    clock, taken = FakeClock(), list[list[tuple[str, int]]]()
    batcher = Batcher(clock=clock)
    cameras = [f"cam{index}" for index in range(64)]
    for camera in cameras:
        batcher.add(camera)

    def take_twice() -> None:
        taken.extend(names(batcher.take(64, LONG_S)) for _ in range(2))

    with running(take_twice):
        for round in range(2):
            for camera in cameras[1:]:
                batcher.offer(make_frame(camera, round))
            wait_until(lambda: num_waiting(batcher) == 1)
            assert len(taken) == round, "it waits for the slow one, but no longer than it may"
            clock.advance(LONG_S)
            batcher.offer(make_frame(cameras[1], round))  # wakes the worker, to look at the told clock
            wait_until(lambda round=round: len(taken) == round + 1)  # type: ignore[misc]
    assert [sorted(batch) for batch in taken] == [sorted((camera, round) for camera in cameras[1:]) for round in (0, 1)]


def test_the_wait_for_more_is_measured_from_its_begin_however_many_frames_come() -> None:
    clock, taken = FakeClock(), list[Frame]()
    batcher = Batcher(clock=clock)
    for stream in ("gate", "late"):
        batcher.add(stream)
    batcher.offer(make_frame("gate", 0))
    with running(lambda: taken.extend(batcher.take(2, LONG_S))):
        wait_until(lambda: num_waiting(batcher) == 1)
        clock.advance(LONG_S - 1)
        batcher.offer(make_frame("gate", 1))
        wait_until(lambda: num_waiting(batcher) == 1)
        assert not taken
        clock.advance(1)
        batcher.offer(make_frame("gate", 2))
    assert names(taken) == [("gate", 2)]


def test_a_worker_whose_frames_another_one_took_goes_on_waiting() -> None:
    batcher, taken = batcher_of("gate", "late"), list[Frame]()
    batcher.offer(make_frame("gate", 0))
    with running(lambda: taken.extend(batcher.take(2, 0.05))):
        wait_until(lambda: num_waiting(batcher) == 1)
        assert names(batcher.take(2)) == [("gate", 0)]
        time.sleep(0.1)  # past the first worker's wait for more
        batcher.offer(make_frame("gate", 1))
    assert names(taken) == [("gate", 1)]


def test_closing_wakes_who_waits_and_hands_out_what_is_there() -> None:
    batcher, taken = batcher_of("gate", "late"), list[Frame]()
    batcher.offer(make_frame("gate"))
    with running(lambda: taken.extend(batcher.take(2, LONG_S))):
        wait_until(lambda: num_waiting(batcher) == 1)
        batcher.close()
    assert names(taken) == [("gate", 0)]
    assert batcher.take(2, LONG_S) == []
    assert not batcher.offer(make_frame("gate", 1))


def test_closing_lets_go_of_a_file_that_waits_for_room_but_keeps_its_queue() -> None:
    batcher, accepted = batcher_of("clip", lossless=True), list[bool]()
    with running(lambda: accepted.extend(batcher.offer(frame) for frame in make_frames(9, "clip"))):
        wait_until(lambda: len(accepted) == 8)
        batcher.close()
    assert accepted == [True] * 8 + [False]
    assert [frame.seq for frame in batcher.take(5) + batcher.take(5)] == list(range(8))


def test_removing_a_stream_lets_go_of_its_thread_and_forgets_what_waits() -> None:
    batcher, accepted = batcher_of("clip", lossless=True), list[bool]()
    batcher.add("gate")
    with running(lambda: accepted.extend(batcher.offer(frame) for frame in make_frames(9, "clip"))):
        wait_until(lambda: len(accepted) == 8)
        batcher.remove("clip")
    assert accepted[-1] is False
    batcher.offer(make_frame("gate"))
    assert names(batcher.take(8)) == [("gate", 0)]
    assert not batcher.offer(make_frame("clip", 10))


def test_removing_the_only_stream_that_had_a_frame_leaves_the_worker_waiting() -> None:
    batcher, taken = batcher_of("gate", "late"), list[Frame]()
    batcher.offer(make_frame("gate"))
    with running(lambda: taken.extend(batcher.take(2, 0.02))):
        wait_until(lambda: num_waiting(batcher) == 1)
        batcher.remove("gate")
        time.sleep(0.05)
        batcher.offer(make_frame("late"))
    assert names(taken) == [("late", 0)]


def test_a_stream_that_nobody_added_is_refused() -> None:
    batcher = batcher_of("gate")
    assert not batcher.offer(make_frame("stranger"))
    batcher.remove("stranger")
    assert batcher.num_dropped("stranger") == 0


def test_on_take_sees_each_batch_before_another_worker_can_take_the_next() -> None:
    seen: list[list[tuple[str, int]]] = []
    batcher = Batcher(on_take=lambda frames: seen.append(names(frames)))
    batcher.add("clip", lossless=True)
    returned: list[list[tuple[str, int]]] = []

    def offer_all() -> None:
        for frame in make_frames(300, "clip"):
            batcher.offer(frame)
        batcher.close()

    def take_all() -> None:
        while frames := batcher.take(3):
            returned.append(names(frames))

    in_threads([offer_all, take_all, take_all, take_all])
    assert sorted(seen) == sorted(returned)
    assert [seq for batch in seen for _, seq in batch] == list(range(300))


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_no_stream_starves_when_the_model_is_slower_than_the_cameras(max_batch: int) -> None:
    """Cameras of 10 to 60 frames/s before a model that makes 16 frames/s in all, in simulated time."""
    rates = {f"cam{index}": rate for index, rate in enumerate((10, 12, 15, 20, 25, 30, 50, 60))}
    batcher = batcher_of(*rates)
    taken: Counter[str] = Counter()
    offered: Counter[str] = Counter()
    for step in range(60 * 100):  # 100 s in steps of 1/60 s
        for stream, rate in rates.items():
            if step * rate // 60 != (step - 1) * rate // 60:
                batcher.offer(make_frame(stream, offered[stream]))
                offered[stream] += 1
        if step % round(60 * max_batch / 16) == 0:
            taken.update(frame.stream for frame in batcher.take(max_batch))
    mean = sum(taken.values()) / len(rates)
    assert min(taken.values()) >= 0.95 * mean, taken
    for stream in rates:
        assert batcher.num_dropped(stream) in (offered[stream] - taken[stream], offered[stream] - taken[stream] - 1)


def test_many_threads_neither_lose_a_file_s_frame_nor_get_one_twice_nor_hang() -> None:
    """Twelve streams and four workers at once; stream and worker threads end by themselves."""
    files, cameras = [f"file{i}" for i in range(4)], [f"cam{i}" for i in range(8)]
    batcher = batcher_of(*cameras)
    for stream in files:
        batcher.add(stream, lossless=True)
    taken: list[tuple[str, int]] = []
    still_offering = threading.Semaphore(0)

    def offer_all(stream: str) -> None:
        for frame in make_frames(1000, stream):
            assert batcher.offer(frame)
        still_offering.release()

    def take_all(max_batch: int, max_wait_s: float) -> None:
        while frames := batcher.take(max_batch, max_wait_s):
            taken.extend(names(frames))  # list.extend is atomic

    def close_at_the_end() -> None:
        for _ in files + cameras:
            assert still_offering.acquire(timeout=10)
        batcher.close()

    offering = [partial(offer_all, stream) for stream in files + cameras]
    workers = [partial(take_all, size, wait_s) for size, wait_s in ((1, 0.0), (4, 0.0), (8, 0.001), (8, 0.001))]
    in_threads([*offering, *workers, close_at_the_end])
    counts = Counter(taken)
    assert max(counts.values()) == 1
    for stream in files:
        assert sum(name == stream for name, _ in taken) == 1000
    for stream in cameras:
        assert sum(name == stream for name, _ in taken) + batcher.num_dropped(stream) == 1000


def test_a_stream_that_moves_takes_along_what_waits_and_its_count() -> None:
    old, new = Batcher(), Batcher()
    old.add("gate")
    first, second, third = make_frames(3)
    assert old.offer(first) and old.offer(second)
    new.adopt("gate", old.release("gate"))
    assert not old.offer(third), "it is not there any more"
    assert old.num_dropped("gate") == new.num_dropped("gate") == 1, "frames on their way still need the count"
    assert new.take(4) == [second]
    assert new.offer(third) and new.take(4) == [third]


def test_who_waits_for_room_hears_that_the_stream_moved() -> None:
    old, new = Batcher(), Batcher()
    old.add("clip", lossless=True)
    frames = make_frames(9, "clip")
    assert all(old.offer(frame) for frame in frames[:8])
    answers: list[bool] = []

    def wait_for_room() -> None:
        answers.append(old.offer(frames[8]))

    in_threads([wait_for_room, lambda: new.adopt("clip", old.release("clip"))])
    assert answers == [False]
    assert new.take(9) == list(frames[:8])
