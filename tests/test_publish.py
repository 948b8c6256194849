"""The publisher's thread and queue, with a sink that fails, hangs and recovers as the test says."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from streamd.backoff import Backoff
from streamd.errors import PublishError
from streamd.publish import MAX_BATCH, Outgoing, Publisher
from tests.waiting import wait_until


class FakeSink:
    """Keeps what it is sent; refuses it while `failure` is set, and waits while `gate` is closed."""

    name = "fake"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.failure: Exception | None = None
        self.num_failures = 0
        self.is_away = False
        self.num_pings = 0
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def open(self) -> None:
        pass

    def ping(self) -> None:
        self.num_pings += 1
        if self.is_away:
            raise PublishError("no connection")

    def send(self, messages: Sequence[Outgoing]) -> None:
        self.gate.wait(10)
        if self.is_away:
            raise PublishError("no connection")
        if self.failure is not None:
            self.num_failures += 1
            raise self.failure
        self.batches.append([message.stream for message in messages])

    def close(self) -> None:
        self.is_closed = True

    @property
    def sent(self) -> list[str]:
        return [stream for batch in self.batches for stream in batch]


class Immediately(Backoff):
    """A back-off of a hundredth of a second, for ever."""

    def next_delay_s(self, at_most_s: float = 0.0) -> float:
        return 0.01


Start = Callable[..., Publisher]


@pytest.fixture
def sink() -> FakeSink:
    return FakeSink()


@pytest.fixture
def start(sink: FakeSink) -> Iterator[Start]:
    started: list[Publisher] = []

    def start(queue_size: int = 1000, backoff: Backoff | None = None, **options: object) -> Publisher:
        publisher = Publisher(sink, queue_size, backoff or Immediately(), **options)  # type: ignore[arg-type]
        publisher.start()
        started.append(publisher)
        return publisher

    yield start
    sink.gate.set()
    for publisher in started:
        publisher.stop(1.0)


def named(*names: str) -> list[Outgoing]:
    return [Outgoing(name, "detections", b"{}") for name in names]


def put_all(publisher: Publisher, *names: str) -> None:
    for outgoing in named(*names):
        publisher.put(outgoing)


def hang(sink: FakeSink, publisher: Publisher) -> None:
    """Let the sink hang in the send of a first message, so that the queue fills."""
    sink.gate.clear()
    put_all(publisher, "first")
    wait_until(lambda: publisher.sending_for_s > 0)


def test_messages_arrive_in_order(sink: FakeSink, start: Start) -> None:
    publisher = start()
    names = [str(number) for number in range(300)]
    put_all(publisher, *names)
    wait_until(lambda: publisher.num_sent == 300)
    assert sink.sent == names and publisher.num_dropped == 0 and publisher.healthy


def test_what_waits_goes_in_one_batch(sink: FakeSink, start: Start) -> None:
    publisher = start()
    hang(sink, publisher)
    put_all(publisher, "a", "b", "c")
    sink.gate.set()
    wait_until(lambda: publisher.num_sent == 4)
    assert sink.batches == [["first"], ["a", "b", "c"]]


def test_a_batch_has_a_bound(sink: FakeSink, start: Start) -> None:
    publisher = start()
    hang(sink, publisher)
    put_all(publisher, *["x"] * (MAX_BATCH + 1))
    sink.gate.set()
    wait_until(lambda: publisher.num_sent == MAX_BATCH + 2)
    assert [len(batch) for batch in sink.batches] == [1, MAX_BATCH, 1]


def test_a_full_queue_drops_its_oldest_and_counts_it(sink: FakeSink, start: Start) -> None:
    publisher = start(queue_size=3)
    hang(sink, publisher)
    put_all(publisher, "a", "b", "c", "d", "e")
    sink.gate.set()
    wait_until(lambda: publisher.num_sent == 4)
    assert sink.sent == ["first", "c", "d", "e"] and publisher.num_dropped == 2


def test_put_returns_at_once_while_the_sink_hangs(sink: FakeSink, start: Start) -> None:
    publisher = start(queue_size=10)
    hang(sink, publisher)
    began = time.monotonic()
    put_all(publisher, *["x"] * 1000)
    assert time.monotonic() - began < 1.0
    assert publisher.sending_for_s > 0


def test_an_outage_loses_nothing_that_the_queue_holds(sink: FakeSink, start: Start) -> None:
    sink.is_away = True
    publisher = start()
    put_all(publisher, "a")
    wait_until(lambda: sink.num_pings >= 5)
    put_all(publisher, "b")
    assert not publisher.healthy
    sink.is_away = False
    wait_until(lambda: publisher.num_sent == 2)
    assert sink.sent == ["a", "b"] and publisher.num_dropped == 0 and publisher.healthy


def test_a_message_that_is_refused_twice_is_given_up(sink: FakeSink, start: Start) -> None:
    sink.failure = PublishError("refused")
    publisher = start()
    put_all(publisher, "a")
    wait_until(lambda: publisher.num_dropped == 1)
    assert sink.num_failures == 2 and not publisher.healthy
    sink.failure = None
    put_all(publisher, "b")
    wait_until(lambda: publisher.num_sent == 1)
    assert sink.sent == ["b"] and publisher.healthy


def test_the_log_tells_the_failure_once_and_the_recovery_with_its_losses(
    sink: FakeSink, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamd.publish")
    sink.is_away = True
    publisher = start(queue_size=1)
    put_all(publisher, "a")
    wait_until(lambda: not publisher.healthy)
    put_all(publisher, "b", "c", "d")
    sink.is_away = False
    wait_until(lambda: publisher.num_sent == 2)
    publisher.stop(1.0)
    failed, recovered = [record.getMessage() for record in caplog.records]
    assert failed == "fake: no connection; trying again"
    assert recovered.startswith("fake: publishing again after") and recovered.endswith("2 messages were lost")


def test_a_long_outage_is_reported_once_an_interval(
    sink: FakeSink, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    sink.is_away = True
    publisher = start(clock=lambda: now[0])
    put_all(publisher, "a")
    wait_until(lambda: sink.num_pings >= 5)
    assert len(caplog.records) == 1
    now[0] += 11
    pings = sink.num_pings
    wait_until(lambda: sink.num_pings >= pings + 5)
    assert len(caplog.records) == 2 and "failing for 11 s" in caplog.records[1].getMessage()


def test_a_slow_sink_is_reported_with_its_losses(
    sink: FakeSink, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = start(queue_size=2)
    hang(sink, publisher)
    put_all(publisher, "a", "b", "c", "d")
    sink.gate.set()
    wait_until(lambda: publisher.num_sent == 3)
    wait_until(lambda: len(caplog.records) == 1)
    assert "too slow for what is published: 2 messages lost" in caplog.records[0].getMessage()


def test_stop_sends_what_is_queued_and_closes(sink: FakeSink, start: Start) -> None:
    publisher = start()
    hang(sink, publisher)
    put_all(publisher, "a", "b")
    threading.Timer(0.1, sink.gate.set).start()
    publisher.stop(5.0)
    assert sink.sent == ["first", "a", "b"] and sink.is_closed and publisher.num_dropped == 0


def test_stop_keeps_its_deadline_while_the_sink_hangs(sink: FakeSink, start: Start) -> None:
    publisher = start()
    hang(sink, publisher)
    put_all(publisher, "a", "b")
    began = time.monotonic()
    publisher.stop(0.2)
    assert time.monotonic() - began < 1.0 and not sink.is_closed
    sink.gate.set()
    wait_until(lambda: sink.is_closed)
    assert publisher.num_dropped == 2


def test_stop_ends_a_long_back_off(sink: FakeSink, start: Start) -> None:
    class Hour(Backoff):
        def next_delay_s(self, at_most_s: float = 0.0) -> float:
            return 3600.0

    sink.is_away = True
    publisher = start(backoff=Hour())
    put_all(publisher, "a", "b")
    wait_until(lambda: not publisher.healthy)
    publisher.stop(5.0)
    assert sink.is_closed and publisher.num_dropped == 2 and not publisher.healthy


def test_a_sink_that_comes_back_at_the_stop_gets_the_rest(sink: FakeSink, start: Start) -> None:
    sink.is_away = True
    publisher = start(backoff=Backoff(base_s=3600, ceiling_s=3600))
    put_all(publisher, "a", "b")
    wait_until(lambda: not publisher.healthy)
    sink.is_away = False
    publisher.stop(5.0)
    assert sink.sent == ["a", "b"] and publisher.num_dropped == 0


def test_a_bug_in_a_sink_ends_the_thread_and_is_handed_on(sink: FakeSink, start: Start) -> None:
    crashes: list[Exception] = []
    sink.failure = ZeroDivisionError("bug")
    publisher = start(on_crash=crashes.append)
    put_all(publisher, "a")
    wait_until(lambda: sink.is_closed)
    assert crashes == [sink.failure] and not publisher.healthy


def test_a_publisher_that_was_never_started_stops(sink: FakeSink) -> None:
    Publisher(sink).stop(1.0)


def test_an_idle_publisher_uses_no_cpu(start: Start) -> None:
    start()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
