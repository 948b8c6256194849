"""Send messages through the daemon's own encoder and publishers, and read what each costs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import redis

from benchmarks.measure import ROOT
from benchmarks.readers import BenchmarkError, free_endpoint
from streamd import wire
from streamd.announce import Announcer
from streamd.messages import Result
from streamd.models.spec import ModelSpec
from streamd.publish import Outgoing, Publisher
from streamd.publish.redis_streams import RedisSink, RedisStore
from streamd.publish.spool import Spool
from streamd.publish.stored import StoredPublisher
from streamd.publish.zeromq import ZeroMqSink
from tests.redis_server import RedisServer
from tests.wire_samples import LABELS, disc, make_result, rle

DEADLINE_S = 30.0
WARM_UP = 100  # messages
STREAM = "gate"
SPEC = ModelSpec(name="sample", task="detect", labels=LABELS, input_size=(64, 96), colour="rgb")
MASK_RADII_PX = (30, 90)  # of the discs that stand for masks, small and large objects in turn
MAX_LEN = 100_000  # nothing is trimmed while the entries are weighed

Sink = Literal["none", "zeromq", "redis pub/sub", "redis stream", "redis both", "stored"]
SINKS: tuple[Sink, ...] = ("none", "zeromq", "redis pub/sub", "redis stream", "redis both", "stored")
Format = wire.Format


@dataclass(frozen=True, slots=True)
class Load:
    """What a message holds."""

    num_objects: int
    has_masks: bool

    def __str__(self) -> str:
        return f"{self.num_objects} objects" + (" with masks" if self.has_masks else "")


LOADS = (Load(0, False), Load(10, False), Load(100, False), Load(10, True), Load(100, True))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one message, at a rate that leaves the publishers idle in between."""

    load: Load
    format: Format
    sink: Sink
    num_messages: int
    rate_hz: float
    payload_bytes: float
    encode_us: float  # CPU of the thread that has the result: make the message, encode it, queue it
    publish_us: float  # CPU of the publisher's threads, ZeroMQ's own included
    server_us: float | None  # CPU of redis-server
    redis_bytes: float | None  # memory of an entry in the Redis Stream

    @property
    def total_us(self) -> float:
        """CPU of the daemon."""
        return self.encode_us + self.publish_us


@dataclass(frozen=True, slots=True)
class _Target:
    """A publisher with somebody at its far end."""

    put: Callable[[Outgoing], None] | None
    num_sent: Callable[[], int]
    server: redis.Redis | None = None
    keeps: bool = False  # entries in a Redis Stream


def measure_messages(load: Load, format: Format, sink: Sink, seconds: float, rate_hz: float) -> Cost:
    """Publish results at a steady rate for so long. Raises BenchmarkError where some were lost."""
    result = _result(load)
    num_messages = round(seconds * rate_hz)
    with _target(sink) as target:
        announcer = Announcer(format, [target.put] if target.put else [])
        announcer.know({result.model: SPEC})
        _send(announcer, result, WARM_UP, rate_hz, target)
        server_s = _server_s(target)
        process_s, thread_s = time.process_time(), time.thread_time()
        encode_s = _send(announcer, result, num_messages, rate_hz, target)
        others_s = time.process_time() - process_s - (time.thread_time() - thread_s)
        server_used_s = _server_s(target) - server_s
        entry_bytes = _entry_bytes(target)
    per_message_us = 1e6 / num_messages
    return Cost(
        load=load,
        format=format,
        sink=sink,
        num_messages=num_messages,
        rate_hz=rate_hz,
        payload_bytes=len(wire.encode(announcer.message(result), format)),
        encode_us=encode_s * per_message_us,
        publish_us=others_s * per_message_us if target.put else 0.0,
        server_us=server_used_s * per_message_us if target.server else None,
        redis_bytes=entry_bytes,
    )


def _result(load: Load) -> Result:
    small, large = (rle(disc(1080, 1920, radius)) for radius in MASK_RADII_PX)
    masks = tuple(small if index % 2 else large for index in range(load.num_objects)) if load.has_masks else None
    return make_result(STREAM, load.num_objects, masks)


def _send(announcer: Announcer, result: Result, number: int, rate_hz: float, target: _Target) -> float:
    """Publish so many results at this rate, and wait until all are sent; return the CPU seconds of making them."""
    wanted = target.num_sent() + number
    used_s, began = 0.0, time.monotonic()
    for index in range(number):
        time.sleep(max(0.0, began + index / rate_hz - time.monotonic()))
        before = time.thread_time()
        announcer.result(result)
        used_s += time.thread_time() - before
    deadline = time.monotonic() + DEADLINE_S
    while target.put and target.num_sent() < wanted:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{wanted - target.num_sent()} of {number} messages were not sent")
        time.sleep(0.01)
    return used_s


@contextmanager
def _target(sink: Sink) -> Iterator[_Target]:
    """Start a publisher as the daemon would, its server where it has one, and a subscriber in another process."""
    with ExitStack() as stack:
        if sink == "none":
            yield _Target(None, lambda: 0)
            return
        if sink == "zeromq":
            endpoint = free_endpoint()
            publisher = _started(stack, Publisher(ZeroMqSink(endpoint)))
            stack.enter_context(_listener("zeromq", endpoint))
            yield _Target(publisher.put, lambda: publisher.num_sent)
            return
        server = stack.enter_context(RedisServer())
        client = stack.enter_context(server.client())
        if sink == "stored":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamd-scale-"))
            spool = Spool(Path(folder) / "spool.sqlite", 200_000, 512 << 20)
            stored = _started(stack, StoredPublisher(RedisStore(server.url, MAX_LEN), spool))
            yield _Target(lambda outgoing: stored.put(_marked(outgoing)), lambda: stored.num_sent, client, keeps=True)
            return
        pubsub, streams = sink in ("redis pub/sub", "redis both"), sink in ("redis stream", "redis both")
        if pubsub:
            stack.enter_context(_listener("redis", server.url))
        live = _started(stack, Publisher(RedisSink(server.url, pubsub, streams, MAX_LEN)))
        yield _Target(live.put, lambda: live.num_sent, client, keeps=streams)


def _started(stack: ExitStack, publisher: Publisher | StoredPublisher) -> Publisher | StoredPublisher:
    publisher.start()
    stack.callback(publisher.stop, DEADLINE_S)
    return publisher


def _marked(outgoing: Outgoing) -> Outgoing:
    return Outgoing(outgoing.stream, outgoing.kind, outgoing.payload, stored=True)


def _server_s(target: _Target) -> float:
    """Ask Redis itself: /proc counts in steps of 10 ms."""
    if target.server is None:
        return 0.0
    cpu = target.server.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])


def _entry_bytes(target: _Target) -> float | None:
    if target.server is None or not target.keeps:
        return None
    key = wire.stream_key(STREAM)
    num_bytes = target.server.memory_usage(key, samples=0)
    assert num_bytes is not None, "something was sent"
    return num_bytes / target.server.xlen(key)


@contextmanager
def _listener(kind: str, address: str) -> Iterator[None]:
    """Run a subscriber in a process of its own, and go on when it has connected."""
    command = [sys.executable, "-m", "benchmarks.scale.listener", kind, address]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "connected":
            raise BenchmarkError("the subscriber did not connect; its words are on stderr")
        yield
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
