"""Redis on a real server: pub/sub, streams, and a server that goes away, comes late, or refuses."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from streamd import wire
from streamd.backoff import Backoff
from streamd.errors import PublishError
from streamd.publish import Publisher
from streamd.publish.redis_streams import RedisSink
from tests.redis_server import RedisServer, free_port
from tests.waiting import wait_until
from tests.wire_samples import make_message, outgoing, outgoing_status


@pytest.fixture
def sink(redis_server: RedisServer) -> Iterator[RedisSink]:
    sink = RedisSink(redis_server.url)
    sink.open()
    yield sink
    sink.close()


@pytest.fixture
def publisher(redis_server: RedisServer) -> Iterator[Publisher]:
    publisher = Publisher(RedisSink(redis_server.url), queue_size=100, backoff=Backoff(base_s=0.05, ceiling_s=0.1))
    publisher.start()
    yield publisher
    publisher.stop(5.0)


@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_pubsub_and_streams_get_the_same_payload(
    redis_server: RedisServer, sink: RedisSink, format: wire.Format
) -> None:
    client = redis_server.client()
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("streamd:gate:detections")
    pubsub.get_message(timeout=1.0)

    sink.send([outgoing("gate", 5, format), outgoing_status("gate", format)])

    message = pubsub.get_message(timeout=1.0)
    assert wire.decode(message["data"], "detections") == make_message("gate", 5)
    entries: Any = client.xrange("streamd:gate")
    (_, first), (_, second) = entries
    assert first == {b"kind": b"detections", b"payload": message["data"]}
    assert second[b"kind"] == b"status"
    pubsub.close()
    client.close()


def test_streams_are_kept_about_as_long_as_asked(redis_server: RedisServer) -> None:
    sink = RedisSink(redis_server.url, pubsub=False, max_len=200)
    sink.open()
    for _ in range(20):
        sink.send([outgoing("gate", seq) for seq in range(50)])
    with redis_server.client() as client:
        assert 200 <= client.xlen("streamd:gate") <= 200 + 100  # Redis trims by whole nodes of 100 entries
    sink.close()


def test_a_switch_turns_streams_off(redis_server: RedisServer) -> None:
    sink = RedisSink(redis_server.url, streams=False)
    sink.open()
    sink.send([outgoing("gate", 0)])
    with redis_server.client() as client:
        assert client.keys() == []
    sink.close()


def test_both_switches_off_is_a_mistake(redis_server: RedisServer) -> None:
    with pytest.raises(PublishError, match="switch on one of them"):
        RedisSink(redis_server.url, pubsub=False, streams=False).open()


def test_the_publisher_survives_a_killed_redis_and_counts_the_loss(
    redis_server: RedisServer, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamd.publish")
    publisher.put(outgoing("gate", 0))
    wait_until(lambda: publisher.num_sent == 1)

    redis_server.kill()
    publisher.put(outgoing("gate", 1))
    wait_until(lambda: not publisher.healthy)
    for seq in range(2, 302):
        publisher.put(outgoing("gate", seq))
    redis_server.start()
    wait_until(lambda: publisher.num_sent == 102)  # one before, the one that failed, and the queue of 100

    assert publisher.num_dropped == 200 and publisher.healthy
    with redis_server.client() as client:
        entries: Any = client.xrange("streamd:gate")
    seqs = [wire.decode(fields[b"payload"], "detections").seq for _, fields in entries]
    assert seqs == [1, *range(202, 302)]  # the first went with the killed server
    assert "no connection; is redis-server running" in caplog.text
    assert "200 messages were lost" in caplog.text


def test_a_redis_that_comes_late_gets_what_is_queued(redis_server: RedisServer) -> None:
    redis_server.kill()
    publisher = Publisher(RedisSink(redis_server.url), backoff=Backoff(base_s=0.05, ceiling_s=0.1))
    publisher.start()
    for seq in range(10):
        publisher.put(outgoing("gate", seq))
    redis_server.start()
    wait_until(lambda: publisher.num_sent == 10)
    publisher.stop(5.0)
    assert publisher.num_dropped == 0


def test_ping_tells_a_redis_that_is_not_there() -> None:
    sink = RedisSink(f"redis://127.0.0.1:{free_port()}")
    sink.open()
    with pytest.raises(PublishError, match="is redis-server running and reachable"):
        sink.ping()
    sink.close()


def test_a_wrong_password_is_told_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(password="the-right-one")
    server.start()
    url = f"redis://:hunter2-is-wrong@127.0.0.1:{server.port}/0"
    publisher = Publisher(RedisSink(url), backoff=Backoff(base_s=0.01, ceiling_s=0.01))
    publisher.start()
    publisher.put(outgoing("gate", 0))
    wait_until(lambda: "refuses" in caplog.text)
    publisher.stop(1.0)
    server.kill()
    assert publisher.num_dropped == 1
    assert "refuses the user or password" in caplog.text
    assert "hunter2" not in caplog.text and f"redis://:***@127.0.0.1:{server.port}" in caplog.text


def test_a_missing_password_is_told() -> None:
    server = RedisServer(password="the-right-one")
    server.start()
    sink = RedisSink(f"redis://127.0.0.1:{server.port}/0")
    sink.open()
    with pytest.raises(PublishError, match="refuses the user or password"):
        sink.send([outgoing("gate", 0)])
    sink.close()
    server.kill()


@pytest.mark.parametrize("url", ["redis://:p#ss-word@host:6379", "redis://host:port", "http://host", "nonsense"])
def test_a_wrong_url_says_the_form_and_no_piece_of_the_password(url: str) -> None:
    with pytest.raises(PublishError, match="must read like redis://") as raised:
        RedisSink(url).open()
    assert "ss-word" not in str(raised.value) and raised.value.__cause__ is not None
    assert raised.value.__cause__.__cause__ is None  # urllib's error quotes the password


def test_a_redis_out_of_memory_is_told(redis_server: RedisServer, sink: RedisSink) -> None:
    with redis_server.client() as client:
        client.config_set("maxmemory", "1")
    with pytest.raises(PublishError, match="raise its maxmemory or lower max_len"):
        sink.send([outgoing("gate", 0)])


def test_a_read_only_replica_is_told(redis_server: RedisServer, sink: RedisSink) -> None:
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
    with pytest.raises(PublishError, match="read-only replica; give the URL of the primary"):
        sink.send([outgoing("gate", 0)])


def test_an_error_does_not_quote_the_payload(redis_server: RedisServer, sink: RedisSink) -> None:
    with redis_server.client() as client:
        client.set("streamd:gate", "not a stream")
    with pytest.raises(PublishError, match="WRONGTYPE") as raised:
        sink.send([outgoing("gate", 0)])
    assert "captured_at" not in str(raised.value)


def test_a_redis_that_hangs_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = RedisSink(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        sink.open()
        began = time.monotonic()
        with pytest.raises(PublishError, match="does not answer in time"):
            sink.send([outgoing("gate", 0)])
        assert 1.0 < time.monotonic() - began < 5.0
        sink.close()
