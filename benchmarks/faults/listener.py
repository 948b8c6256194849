"""Hear everything that a daemon publishes on ZeroMQ, and wait for what is expected."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import zmq

from benchmarks.faults.receiver import STAMP
from benchmarks.measure import ROOT
from streamd import wire
from streamd.wire import DetectionsMessage, Message

_MAX_KEPT = 60_000  # messages: about a quarter of an hour of them
_CONNECTED_WITHIN_S = 60.0


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
    """Subscribe, in a process of its own that stamps what comes; `with Listener(endpoint) as listener`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._news = threading.Condition()
        self._heard: list[Heard[Message]] = []  # by time
        self._connected = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        if not self._connected.wait(_CONNECTED_WITHIN_S):
            self._stop.set()
            raise TimeoutError(f"no receiver of {self._endpoint} began within {_CONNECTED_WITHIN_S:g} s")
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
        with context, context.socket(zmq.PULL) as stamped:
            stamped.setsockopt(zmq.RCVHWM, 0)
            stamped.bind("tcp://127.0.0.1:*")
            here = stamped.getsockopt_string(zmq.LAST_ENDPOINT)
            command = [sys.executable, "-m", "benchmarks.faults.receiver", self._endpoint, here]
            with subprocess.Popen(command, cwd=ROOT) as receiver:
                try:
                    while not self._stop.is_set():
                        if stamped.poll(200):
                            self._take(*stamped.recv_multipart())
                finally:
                    receiver.kill()

    def _take(self, stamp: bytes, *message: bytes) -> None:
        if message:
            self._note(STAMP.unpack(stamp)[0], *message)
        else:
            self._connected.set()

    def _note(self, at: float, topic: bytes, payload: bytes) -> None:
        kind: wire.Kind = "detections" if topic.endswith(b"/detections") else "status"
        heard = Heard(at, wire.decode(payload, kind))
        with self._news:
            self._heard.append(heard)
            if len(self._heard) > _MAX_KEPT:
                del self._heard[: _MAX_KEPT // 2]
            self._news.notify_all()
