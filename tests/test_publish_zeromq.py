"""ZeroMQ on real sockets: several subscribers, a slow one, and addresses that cannot be bound."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from streamd import wire
from streamd.errors import PublishError
from streamd.publish import Outgoing, Publisher
from streamd.publish.zeromq import ZeroMqSink
from tests.wire_samples import make_message, outgoing


@pytest.fixture
def sink() -> Iterator[ZeroMqSink]:
    sink = ZeroMqSink("tcp://127.0.0.1:0")
    sink.open()
    yield sink
    sink.close()


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    """Close what is entered, sockets before their context."""
    with ExitStack() as stack:
        yield stack


def connect(sockets: ExitStack, sink: ZeroMqSink, prefix: str = "streamd/", **options: int) -> zmq.Socket[bytes]:
    """Return a subscriber that the sink knows of."""
    context: zmq.Context[zmq.Socket[bytes]] = sockets.enter_context(zmq.Context())
    subscriber = sockets.enter_context(context.socket(zmq.SUB))
    subscriber.set(zmq.LINGER, 0)
    subscriber.set(zmq.SUBSCRIBE, prefix.encode())
    for name, value in options.items():
        subscriber.set(getattr(zmq, name), value)
    subscriber.set(zmq.RCVTIMEO, 5000)
    subscriber.connect(sink.endpoint)
    hello = Outgoing(prefix.removeprefix("streamd/").split("/")[0] or "hello", "status", b"hello")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # a subscription takes a moment to reach the publisher
        sink.send([hello])
        if subscriber.poll(20):
            while subscriber.poll(50):
                subscriber.recv_multipart()
            return subscriber
    raise AssertionError("the subscription did not reach the publisher")


def test_every_subscriber_gets_topic_and_payload(sink: ZeroMqSink, sockets: ExitStack) -> None:
    subscribers = [connect(sockets, sink) for _ in range(3)]
    for subscriber in subscribers:
        while subscriber.poll(50):
            subscriber.recv_multipart()  # the greetings of the later ones

    sink.send([outgoing("gate", 7), outgoing("yard", 8, "msgpack")])

    for subscriber in subscribers:
        topic, payload = subscriber.recv_multipart()
        assert topic == b"streamd/gate/detections" and wire.decode(payload, "detections") == make_message("gate", 7)
        topic, payload = subscriber.recv_multipart()
        assert topic == b"streamd/yard/detections" and wire.decode(payload, "detections") == make_message("yard", 8)


def test_a_slow_subscriber_neither_blocks_nor_costs_the_others(sockets: ExitStack) -> None:
    sink = ZeroMqSink("tcp://127.0.0.1:0", high_water_mark=100)
    sink.open()
    sockets.callback(sink.close)
    connect(sockets, sink, "streamd/big/", RCVHWM=1, RCVBUF=4096)  # reads nothing from here on
    quick = connect(sockets, sink, "streamd/gate/")
    big = Outgoing("big", "detections", bytes(100_000))
    began = time.monotonic()
    for seq in range(300):
        sink.send([big, outgoing("gate", seq)])
        quick.recv_multipart()
    assert time.monotonic() - began < 5.0
    sink.close()
    assert time.monotonic() - began < 7.0  # the linger is bounded, though the slow one takes nothing


def test_a_publisher_delivers_through_zeromq(sockets: ExitStack) -> None:
    sink = ZeroMqSink("tcp://127.0.0.1:0")
    publisher = Publisher(sink)
    publisher.start()
    context: zmq.Context[zmq.Socket[bytes]] = sockets.enter_context(zmq.Context())
    subscriber = sockets.enter_context(context.socket(zmq.SUB))
    subscriber.subscribe(b"")
    subscriber.connect(sink.endpoint)
    while not subscriber.poll(20):
        publisher.put(outgoing("gate", 0))
    publisher.put(outgoing("gate", 99))
    publisher.stop(2.0)
    received = [wire.decode(subscriber.recv_multipart()[1], "detections").seq]
    while subscriber.poll(100):
        received.append(wire.decode(subscriber.recv_multipart()[1], "detections").seq)
    assert received[-1] == 99 and publisher.num_dropped == 0


def test_a_taken_port_says_so(sink: ZeroMqSink) -> None:
    with pytest.raises(PublishError, match="the port is taken; stop the other process"):
        Publisher(ZeroMqSink(sink.endpoint)).start()


def test_a_taken_ipc_path_is_not_stolen(tmp_path: Path) -> None:
    first = ZeroMqSink(f"ipc://{tmp_path}/s")
    first.open()
    with pytest.raises(PublishError, match="another process listens there"):
        ZeroMqSink(f"ipc://{tmp_path}/s").open()
    first.close()


def test_a_stale_ipc_path_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    sink = ZeroMqSink(f"ipc://{tmp_path}/s")
    sink.open()
    sink.close()


@pytest.mark.parametrize(
    ("bind", "advice"),
    [
        ("tcp://5555", "must read like"),
        ("tcp://127.0.0.1:99999", "ports end at 65535"),
        ("tcp://no-such-interface:5555", "no such interface"),
        ("carrier-pigeon://roof", "must read like"),
        ("tcp://192.0.2.1:5555", "no such"),
        ("ipc:///nowhere/at/all", "the folder of the ipc path does not exist"),
        ("ipc://" + "/x" * 100, "too long"),
    ],
)
def test_a_wrong_address_says_what_to_do(bind: str, advice: str) -> None:
    with pytest.raises(PublishError, match=advice) as raised:
        ZeroMqSink(bind).open()
    assert bind in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may bind any port and write any folder")
def test_a_folder_that_may_not_be_written_says_so() -> None:
    with pytest.raises(PublishError, match="not allowed"):
        ZeroMqSink("ipc:///proc/s").open()
