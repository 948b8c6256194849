"""Hear everything that a daemon publishes on ZeroMQ, and wait for what is expected."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import zmq

from streamd import wire
from streamd.wire import DetectionsMessage, Message

_MAX_KEPT = 60_000  # messages: about a quarter of an hour of them


M = TypeVar("M", bound=Message, covariant=True)


@dataclass(frozen=True, slots=True)
class Heard(Generic[M]):
    """A message, and when it came."""

    at: float  # Unix s
    message: M

    @property
    def latency_ms(self) -> float:
        """From capture, by the message's own clock, to its arrival here."""
        assert isinstance(self.message, DetectionsMessage)
        return (self.at - self.message.captured_at_s) * 1e3


class Listener:
    """Subscribe in a thread of its own; `with Listener(endpoint) as listener`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._news = threading.Condition()
        self._heard: list[Heard[Message]] = []  # by time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener")

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def since(self, at: float) -> Sequence[Heard[Message]]:
        """Return what came from this Unix time on."""
        with self._news:
            return self._since(at)

    def results(self, stream: str, since: float, until: float = float("inf")) -> list[Heard[DetectionsMessage]]:
        """Return a stream's detections messages that came in the interval."""
        return [
            cast("Heard[DetectionsMessage]", heard)
            for heard in self.since(since)
            if heard.at < until and heard.message.stream == stream and isinstance(heard.message, DetectionsMessage)
        ]

    def wait_for(self, matches: Callable[[Message], bool], since: float, within_s: float) -> Heard[Message] | None:
        """Return the first message from `since` on that matches, or None when the time is over."""
        deadline = time.monotonic() + within_s
        num_seen = 0
        with self._news:
            while True:
                recent = self._since(since)
                for heard in recent[num_seen:]:
                    if matches(heard.message):
                        return heard
                num_seen = len(recent)
                if (left_s := deadline - time.monotonic()) <= 0:
                    return None
                self._news.wait(left_s)

    def _since(self, at: float) -> Sequence[Heard[Message]]:
        return self._heard[bisect_left(self._heard, at, key=lambda heard: heard.at) :]

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with context, context.socket(zmq.SUB) as subscriber:
            subscriber.setsockopt(zmq.RCVHWM, 0)
            subscriber.setsockopt(zmq.LINGER, 0)
            subscriber.setsockopt(zmq.RECONNECT_IVL, 50)  # ms
            subscriber.subscribe(b"streamd/")
            subscriber.connect(self._endpoint)
            while not self._stop.is_set():
                if subscriber.poll(200):
                    topic, payload = subscriber.recv_multipart()
                    self._note(topic, payload, time.time())

    def _note(self, topic: bytes, payload: bytes, at: float) -> None:
        kind: wire.Kind = "detections" if topic.endswith(b"/detections") else "status"
        heard = Heard(at, wire.decode(payload, kind))
        with self._news:
            self._heard.append(heard)
            if len(self._heard) > _MAX_KEPT:
                del self._heard[: _MAX_KEPT // 2]
            self._news.notify_all()
