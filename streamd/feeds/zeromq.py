"""Read a ZeroMQ PUB socket."""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq

from streamd.errors import SubscribeError
from streamd.feeds import Received, from_name
from streamd.wire import Kind, topic

HEARTBEAT_MS = 5000


class ZeroMqFeed:
    """A SUB socket; libzmq makes lost connections again by itself."""

    def __init__(self, url: str, stream: str | None, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in url))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)  # notice a machine that vanished without a word
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        for prefix in ["streamd/"] if stream is None else [topic(stream, kind) for kind in kinds]:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, prefix)
        try:
            self._socket.connect(url)
        except zmq.ZMQError as err:
            self.close()
            raise SubscribeError(f"cannot subscribe to {url}: {err}; give tcp://HOST:PORT or ipc://PATH") from err

    def receive(self, timeout_s: float) -> Received | None:
        deadline = time.monotonic() + timeout_s
        while self._socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            frames = self._socket.recv_multipart()
            received = from_name(frames[0].decode(errors="replace"), "/", frames[-1], self._kinds)
            if received is not None:
                return received
        return None

    def close(self) -> None:
        self._socket.close()
        self._context.term()
