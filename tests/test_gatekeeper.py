"""CURVE on real sockets: who has a listed key gets all, who has not gets nothing and is told why."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import zmq

from streamd.client import Subscription, subscribe
from streamd.curve import ClientKeys
from streamd.errors import SubscribeError
from streamd.publish.zeromq import ServerKeys, ZeroMqSink
from streamd.wire import DetectionsMessage
from tests.keys import Pair, make_pair
from tests.wire_samples import outgoing

WITHIN_S = 30.0
# Ended without closing: libzmq frees so long a subscription by recursion and crashes.
RUDE = """
import os, sys, zmq
socket = zmq.Context().socket(zmq.SUB)
monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
socket.subscribe(bytes(1 << 20))
socket.connect(sys.argv[1])
os._exit(not monitor.poll(30_000))
"""


@pytest.fixture(scope="module")
def server() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def dashboard() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def stranger() -> Pair:
    return make_pair()


@pytest.fixture
def sink(server: Pair, dashboard: Pair) -> Iterator[ZeroMqSink]:
    sink = ZeroMqSink("tcp://127.0.0.1:0", keys=ServerKeys(server.secret, {"dashboard": dashboard.public}))
    sink.open()
    yield sink
    sink.close()


@pytest.fixture
def unlocked() -> Iterator[ZeroMqSink]:
    sink = ZeroMqSink("tcp://127.0.0.1:0")
    sink.open()
    yield sink
    sink.close()


def publish_until_received(sink: ZeroMqSink, messages: Subscription[DetectionsMessage]) -> DetectionsMessage:
    """Send until something arrives; raises what the subscription raises."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        sink.send([outgoing("gate", 0)])
        if (message := messages.receive(0.02)) is not None:
            return message
        assert time.monotonic() < deadline, "nothing arrives"


def refusal(sink: ZeroMqSink, keys: ClientKeys | None) -> str:
    """Subscribe while the sink sends; return what the subscriber is told."""
    with subscribe(sink.endpoint, keys=keys) as messages, pytest.raises(SubscribeError) as raised:
        publish_until_received(sink, messages)
    return str(raised.value)


def test_a_listed_client_gets_all_and_the_log_names_it(
    sink: ZeroMqSink, server: Pair, dashboard: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with subscribe(sink.endpoint, keys=ClientKeys(server.public, dashboard.secret)) as messages:
        assert publish_until_received(sink, messages).stream == "gate"
    assert "dashboard subscribes from 127.0.0.1" in caplog.text


def test_a_client_whose_key_is_not_listed_gets_nothing_and_both_sides_say_so(
    sink: ZeroMqSink, server: Pair, stranger: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    said = refusal(sink, ClientKeys(server.public, stranger.secret))
    assert "does not know this key" in said and sink.endpoint in said
    assert "refused 1 tries, from 127.0.0.1" in caplog.text and stranger.public in caplog.text
    assert stranger.secret not in caplog.text + said


def test_a_client_without_keys_gets_nothing_and_is_told(sink: ZeroMqSink) -> None:
    assert "wants keys" in refusal(sink, None)


def test_a_client_with_another_daemons_public_key_is_told(sink: ZeroMqSink, dashboard: Pair, stranger: Pair) -> None:
    assert "is its public key the right one" in refusal(sink, ClientKeys(stranger.public, dashboard.secret))


def test_keys_for_a_daemon_that_has_none_are_told(unlocked: ZeroMqSink, server: Pair, dashboard: Pair) -> None:
    said = refusal(unlocked, ClientKeys(server.public, dashboard.secret))
    assert "has no keys; give none" in said or "has it keys at all?" in said, "libzmq does not always see why"


def test_a_raw_socket_without_keys_gets_nothing_while_a_listed_one_does(
    sink: ZeroMqSink, server: Pair, dashboard: Pair
) -> None:
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as raw,
        subscribe(sink.endpoint, keys=ClientKeys(server.public, dashboard.secret)) as messages,
    ):
        raw.linger = 0
        raw.subscribe(b"")
        raw.connect(sink.endpoint)
        for _ in range(20):
            publish_until_received(sink, messages)
        assert not raw.poll(200)


def test_a_refused_client_is_let_in_when_its_key_was_added(sink: ZeroMqSink, server: Pair, stranger: Pair) -> None:
    with subscribe(sink.endpoint, keys=ClientKeys(server.public, stranger.secret)) as messages:
        with pytest.raises(SubscribeError):
            publish_until_received(sink, messages)
        sink.allow({"stranger": stranger.public})
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                assert publish_until_received(sink, messages).stream == "gate"
                break
            except SubscribeError:
                assert time.monotonic() < deadline


def test_a_client_that_is_taken_off_the_list_is_hung_up_on_and_another_comes_back(
    sink: ZeroMqSink, server: Pair, dashboard: Pair, stranger: Pair
) -> None:
    sink.allow({"dashboard": dashboard.public, "other": stranger.public})
    with (
        subscribe(sink.endpoint, keys=ClientKeys(server.public, stranger.secret)) as leaves,
        subscribe(sink.endpoint, keys=ClientKeys(server.public, dashboard.secret)) as stays,
    ):
        publish_until_received(sink, leaves)
        publish_until_received(sink, stays)
        address = sink.endpoint
        sink.allow({"dashboard": dashboard.public})
        sink.send([outgoing("gate", 1)])
        assert sink.endpoint == address
        while leaves.receive(0.0) is not None:
            pass  # sent before it was taken off
        while stays.receive(0.0) is not None:
            pass
        publish_until_received(sink, stays)
        with pytest.raises(SubscribeError, match="does not know this key"):
            publish_until_received(sink, leaves)


def test_sending_goes_on_while_somebody_is_refused(sink: ZeroMqSink, server: Pair, stranger: Pair) -> None:
    with subscribe(sink.endpoint, keys=ClientKeys(server.public, stranger.secret)) as messages:
        sink.send([outgoing("gate", seq) for seq in range(2000)])
        with pytest.raises(SubscribeError):
            messages.receive(WITHIN_S)
        sink.send([outgoing("gate", seq) for seq in range(2000)])


def test_who_sends_a_subscription_that_is_no_topic_is_hung_up_on(unlocked: ZeroMqSink) -> None:
    rude = subprocess.run([sys.executable, "-c", RUDE, unlocked.endpoint], timeout=60)
    assert rude.returncode == 0, "it was not hung up on"
    with subscribe(unlocked.endpoint) as messages:
        assert publish_until_received(unlocked, messages).stream == "gate"


def test_a_bug_in_the_gatekeeper_comes_out_at_the_next_send(
    sink: ZeroMqSink, server: Pair, dashboard: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(data: bytes) -> bytes:
        raise LookupError("a bug")

    monkeypatch.setattr("streamd.publish.gatekeeper.z85.encode", crash)
    with subscribe(sink.endpoint, keys=ClientKeys(server.public, dashboard.secret)) as messages:
        assert messages.receive(0.5) is None, "nobody is let in"
        with pytest.raises(LookupError):
            sink.send([outgoing("gate", 0)])
