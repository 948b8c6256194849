"""Results leave in the order of their frames, whichever worker is first, and streams do not wait for each other."""

from __future__ import annotations

import random
import threading
from functools import partial

import pytest

from streamd.batch import Batcher
from streamd.in_order import InOrder
from streamd.messages import Result
from tests.fakes import in_threads, make_frame, make_frames, make_result


class Delivered:
    """Collect what is delivered, as (stream, seq)."""

    def __init__(self) -> None:
        self.names: list[tuple[str, int]] = []

    def __call__(self, result: Result) -> None:
        self.names.append((result.frame.stream, result.frame.seq))


@pytest.fixture
def delivered() -> Delivered:
    return Delivered()


def test_a_result_waits_for_the_earlier_frame_of_its_stream(delivered: Delivered) -> None:
    in_order = InOrder(delivered)
    first, second, third = make_frames(3)
    in_order.expect([first])
    in_order.expect([second, third])
    in_order.complete([make_result(second), make_result(third)])
    assert delivered.names == []
    in_order.complete([make_result(first)])
    assert delivered.names == [("gate", 0), ("gate", 1), ("gate", 2)]


def test_streams_do_not_wait_for_each_other(delivered: Delivered) -> None:
    in_order = InOrder(delivered)
    slow, early, late = make_frame("slow", 0), make_frame("quick", 0), make_frame("quick", 1)
    in_order.expect([slow, early])
    in_order.expect([late])
    in_order.complete([make_result(early)])
    in_order.complete([make_result(late)])
    assert delivered.names == [("quick", 0), ("quick", 1)]
    in_order.complete([make_result(slow)])
    assert delivered.names[-1] == ("slow", 0)


def test_frames_that_were_dropped_leave_no_gap_to_wait_for(delivered: Delivered) -> None:
    in_order = InOrder(delivered)
    for seq in (3, 9, 40):
        in_order.expect([make_frame(seq=seq)])
        in_order.complete([make_result(make_frame(seq=seq))])
    assert delivered.names == [("gate", 3), ("gate", 9), ("gate", 40)]


def test_two_workers_that_finish_out_of_order_deliver_in_order(delivered: Delivered) -> None:
    """Workers take batches of a file and two cameras, dawdle by chance, and complete."""
    in_order = InOrder(delivered)
    batcher = Batcher(on_take=in_order.expect)
    streams = ("clip", "other", "third")
    for stream in streams:
        batcher.add(stream, lossless=True)
    left = threading.Semaphore(0)

    def offer_all(stream: str) -> None:
        for frame in make_frames(200, stream):
            batcher.offer(frame)
        left.release()

    def close() -> None:
        for _ in streams:
            assert left.acquire(timeout=10)
        batcher.close()

    def work(seed: int) -> None:
        rng, pause = random.Random(seed), threading.Event()
        while frames := batcher.take(4):
            pause.wait(rng.choice((0.0, 0.0, 0.003)))
            in_order.complete([make_result(frame) for frame in frames])

    in_threads([*(partial(offer_all, stream) for stream in streams), partial(work, 1), partial(work, 2), close])
    for stream in streams:
        assert [seq for name, seq in delivered.names if name == stream] == list(range(200))


def test_a_stream_that_counts_from_zero_again_is_not_taken_for_the_one_before(delivered: Delivered) -> None:
    in_order = InOrder(delivered)
    before, after = make_frame(seq=0, epoch=0), make_frame(seq=0, epoch=1)
    in_order.expect([before])
    in_order.expect([after])
    in_order.complete([make_result(after)])
    assert delivered.names == [], "the earlier one is still on its way"
    in_order.complete([make_result(before)])
    assert len(delivered.names) == 2
