"""The subscriber against real sockets and a real Redis: names, gaps, formats, outages and advice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.client import GapCounter, Subscription, subscribe
from streamd.curve import ClientKeys
from streamd.errors import SubscribeError, WireError
from streamd.publish import Outgoing
from streamd.publish.redis_streams import RedisSink
from streamd.publish.zeromq import ZeroMqSink
from streamd.wire import DetectionsMessage, Message
from tests.keys import make_pair
from tests.redis_server import RedisServer, free_port
from tests.wire_samples import make_message, outgoing, outgoing_status


@pytest.fixture
def zeromq() -> Iterator[ZeroMqSink]:
    sink = ZeroMqSink("tcp://127.0.0.1:0")
    sink.open()
    yield sink
    sink.close()


@pytest.fixture
def redis_sink(redis_server: RedisServer) -> Iterator[RedisSink]:
    sink = RedisSink(redis_server.url)
    sink.open()
    yield sink
    sink.close()


def await_subscription(sink: ZeroMqSink, messages: Subscription[DetectionsMessage], stream: str = "gate") -> None:
    """Publish seq 0 until it arrives: a ZeroMQ subscription takes a moment to reach the publisher."""
    deadline = time.monotonic() + 5
    while True:
        sink.send([outgoing(stream, 0)])
        if messages.receive(0.02) is not None:
            break
        assert time.monotonic() < deadline, "the subscription did not reach the publisher"
    while messages.receive(0.05) is not None:
        pass


def test_zeromq_gives_typed_messages_of_both_formats(zeromq: ZeroMqSink) -> None:
    with subscribe(zeromq.endpoint, timeout_s=5) as messages:
        await_subscription(zeromq, messages)
        zeromq.send([outgoing("gate", 1), outgoing("gate", 2, "msgpack")])
        assert [next(messages), next(messages)] == [make_message("gate", 1), make_message("gate", 2)]


def test_a_stream_whose_name_begins_alike_is_not_delivered(zeromq: ZeroMqSink) -> None:
    with subscribe(zeromq.endpoint, "gate", timeout_s=5) as messages:
        await_subscription(zeromq, messages)
        zeromq.send([outgoing("gate2", 1), outgoing("gateway", 1), outgoing("gate", 7)])
        assert next(messages).stream == "gate" and messages.receive(0.1) is None


def test_only_the_kinds_that_are_asked_for_arrive(zeromq: ZeroMqSink) -> None:
    with (
        subscribe(zeromq.endpoint, timeout_s=5) as messages,
        subscribe(zeromq.endpoint, None, kinds=("status", "detections"), timeout_s=5) as everything,
    ):
        await_subscription(zeromq, messages)
        while everything.receive(0.1) is not None:
            pass
        zeromq.send([outgoing_status(), outgoing("gate", 1)])
        assert next(messages).seq == 1
        assert [type(next(everything)).__name__ for _ in range(2)] == ["StatusMessage", "DetectionsMessage"]


def test_an_ipc_path_works(tmp_path: Path) -> None:
    sink = ZeroMqSink(f"ipc://{tmp_path}/s")
    sink.open()
    with subscribe(f"ipc://{tmp_path}/s", timeout_s=5) as messages:
        await_subscription(sink, messages)
    sink.close()


def test_zeromq_comes_back_after_the_daemon_restarts() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with subscribe(address, timeout_s=5) as messages:  # before the daemon is there
        for _ in range(2):
            sink = ZeroMqSink(address)
            sink.open()
            await_subscription(sink, messages)
            sink.close()


def test_gaps_of_seq_are_counted_per_stream_and_a_restart_is_none() -> None:
    gaps = GapCounter()
    for seq in (5, 6, 9, 9, 10, 0, 1, 3):
        gaps.add(make_message("gate", seq))
    for seq in (100, 101):
        gaps.add(make_message("yard", seq))
    assert gaps.num_missed == {"gate": 3, "yard": 0}


def test_a_subscription_counts_what_it_missed(zeromq: ZeroMqSink) -> None:
    with subscribe(zeromq.endpoint, timeout_s=5) as messages:
        await_subscription(zeromq, messages)
        zeromq.send([outgoing("gate", 1), outgoing("gate", 5)])
        next(messages)
        next(messages)
        assert messages.num_missed == {"gate": 3}


def test_a_subscriber_that_is_late_and_too_slow_sees_each_message_or_counts_it(zeromq: ZeroMqSink) -> None:
    first, last = 500, 20_000
    zeromq.send([outgoing("gate", seq) for seq in range(first)])
    with subscribe(zeromq.endpoint, timeout_s=5) as messages:
        await_subscription(zeromq, messages)
        zeromq.send([outgoing("gate", seq) for seq in range(first, last)])  # far beyond both high-water marks
        received = []
        while (message := messages.receive(0.5)) is not None:
            received.append(message.seq)
        zeromq.send([outgoing("gate", last)])
        received.append(next(messages).seq)
        assert received == sorted(received) and 0 < len(received) < last - first, "some were lost, none came late"
        assert messages.num_missed["gate"] == last - len(received), "from seq 0, which told that we are there"


def test_garbage_raises_and_the_next_message_follows(zeromq: ZeroMqSink) -> None:
    with subscribe(zeromq.endpoint, timeout_s=5) as messages:
        await_subscription(zeromq, messages)
        zeromq.send([Outgoing("gate", "detections", b"garbage"), outgoing("gate", 1)])
        with pytest.raises(WireError, match="not a streamd detections message"):
            next(messages)
        assert next(messages).seq == 1


def test_silence_ends_the_iteration_with_advice(zeromq: ZeroMqSink) -> None:
    with (
        subscribe(zeromq.endpoint, "gaet", timeout_s=0.1) as messages,
        pytest.raises(SubscribeError, match="is the stream's name right"),
    ):
        next(messages)


@pytest.mark.parametrize("stream", ["gate", None])
def test_redis_pubsub_gives_what_is_published_from_now_on(
    redis_server: RedisServer, redis_sink: RedisSink, stream: str | None
) -> None:
    redis_sink.send([outgoing("gate", 0)])
    with subscribe(redis_server.url, stream, timeout_s=5) as messages:
        redis_sink.send([outgoing_status("gate"), outgoing("gate", 1), outgoing("gate", 2, "msgpack")])
        assert [next(messages).seq, next(messages).seq] == [1, 2]


def test_pubsub_does_not_deliver_a_stream_whose_name_begins_alike(
    redis_server: RedisServer, redis_sink: RedisSink
) -> None:
    with subscribe(redis_server.url, "gate", timeout_s=5) as messages:
        redis_sink.send([outgoing("gate2", 1), outgoing("gate", 7)])
        assert next(messages).stream == "gate"


def test_pubsub_of_both_kinds(redis_server: RedisServer, redis_sink: RedisSink) -> None:
    with subscribe(redis_server.url, "gate", kinds=("detections", "status"), timeout_s=5) as messages:
        redis_sink.send([outgoing_status("gate"), outgoing("gate", 7)])
        assert [type(next(messages)).__name__ for _ in range(2)] == ["StatusMessage", "DetectionsMessage"]


def test_pubsub_comes_back_after_redis_was_killed(redis_server: RedisServer, redis_sink: RedisSink) -> None:
    with subscribe(redis_server.url, timeout_s=20) as messages:
        redis_sink.send([outgoing("gate", 1)])
        assert next(messages).seq == 1
        redis_server.kill()
        assert messages.receive(0.3) is None
        redis_server.start()
        assert receive_while_publishing(messages, redis_server).seq == 5
        assert messages.num_missed == {"gate": 3}


def receive_while_publishing(messages: Subscription[DetectionsMessage], server: RedisServer) -> DetectionsMessage:
    """Publish seq 5 until it arrives: what is published before the subscriber is back is lost."""
    sink = RedisSink(server.url)
    sink.open()
    stop = threading.Event()

    def publish() -> None:
        while not stop.wait(0.05):
            sink.send([outgoing("gate", 5)])

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        return next(messages)
    finally:
        stop.set()
        thread.join()
        sink.close()


@pytest.mark.parametrize("stream", ["gate", None])
def test_redis_streams_give_what_was_published_before(
    redis_server: RedisServer, redis_sink: RedisSink, stream: str | None
) -> None:
    redis_sink.send([outgoing("gate", seq) for seq in range(250)])  # more than one read takes
    redis_sink.send([outgoing_status("gate")])
    with subscribe(redis_server.url, stream, timeout_s=5, since="0") as messages:
        assert [next(messages).seq for _ in range(250)] == list(range(250))
        redis_sink.send([outgoing("gate", 250)])
        assert next(messages).seq == 250 and messages.num_missed == {"gate": 0}


def test_reading_goes_on_from_the_last_id(redis_server: RedisServer, redis_sink: RedisSink) -> None:
    redis_sink.send([outgoing("gate", seq) for seq in range(10)])
    with subscribe(redis_server.url, "gate", timeout_s=5, since="0") as messages:
        for _ in range(4):
            next(messages)
        last_id = messages.last_ids["gate"]
    with subscribe(redis_server.url, "gate", timeout_s=5, since=last_id) as messages:
        assert next(messages).seq == 4


def test_a_stream_that_appears_later_is_read_from_its_first_entry(
    redis_server: RedisServer, redis_sink: RedisSink
) -> None:
    with subscribe(redis_server.url, timeout_s=10, since="9999999999999-0") as messages:
        assert messages.receive(0.1) is None
        redis_sink.send([outgoing("yard", 3)])
        assert next(messages).seq == 3


def test_redis_streams_miss_nothing_over_a_lost_connection(redis_server: RedisServer, redis_sink: RedisSink) -> None:
    redis_sink.send([outgoing("gate", 0)])
    with subscribe(redis_server.url, "gate", timeout_s=20, since="0") as messages:
        assert next(messages).seq == 0
        with redis_server.client() as admin:
            admin.client_kill_filter(_type="normal", skipme=True)
        sink = RedisSink(redis_server.url)
        sink.open()
        sink.send([outgoing("gate", 1), outgoing("gate", 2)])
        sink.close()
        assert [next(messages).seq, next(messages).seq] == [1, 2]


def test_a_redis_that_is_not_there_says_so() -> None:
    with pytest.raises(SubscribeError, match="is redis-server running and reachable"):
        subscribe(f"redis://127.0.0.1:{free_port()}")


def test_a_wrong_password_is_told_and_not_shown() -> None:
    server = RedisServer(password="the-right-one")
    server.start()
    with pytest.raises(SubscribeError, match="refuses the user or password") as raised:
        subscribe(f"redis://:hunter2-is-wrong@127.0.0.1:{server.port}/0")
    server.kill()
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "since", "advice"),
    [
        ("http://host", None, "the URL must be tcp://HOST:PORT"),
        ("127.0.0.1:5555", None, "the URL must be tcp://HOST:PORT"),
        ("tcp://host", None, "give tcp://HOST:PORT"),
        ("tcp://host:5555", "0", "ZeroMQ keeps nothing; use a Redis URL"),
        ("redis://host", "yesterday", 'give "0" for all that Redis keeps'),
        ("redis://:p#w@host", None, "must read like redis://"),
    ],
)
def test_a_wrong_request_says_what_to_give(url: str, since: str | None, advice: str) -> None:
    with pytest.raises(SubscribeError, match=advice):
        subscribe(url, since=since)


def test_keys_are_for_zeromq_alone() -> None:
    pair = make_pair()
    with pytest.raises(SubscribeError, match="with these keys: they are for tcp:// and ipc://"):
        subscribe("redis://127.0.0.1", keys=ClientKeys(pair.public, pair.secret))


def test_an_unknown_kind_says_which_there_are() -> None:
    with pytest.raises(SubscribeError, match="choose from detections, status"):
        subscribe("tcp://127.0.0.1:5555", kinds=("masks",))  # type: ignore[arg-type]


def test_waiting_costs_nothing(redis_server: RedisServer) -> None:
    waiting: list[Subscription[Message]] = [
        subscribe(f"tcp://127.0.0.1:{free_port()}", kinds=("detections", "status")),
        subscribe(redis_server.url, kinds=("detections", "status")),
        subscribe(redis_server.url, kinds=("detections", "status"), since="0"),
    ]
    before = os.times().user
    for messages in waiting:
        messages.receive(0.3)
        messages.close()
    assert os.times().user - before < 0.1
