"""Read a ZeroMQ PUB socket."""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from streamd.backoff import Backoff
from streamd.curve import ClientKeys
from streamd.errors import SubscribeError
from streamd.feeds import Received, from_name
from streamd.wire import MAX_PAYLOAD_BYTES, Kind, topic

HEARTBEAT_MS = 5000
NUM_CUT_HANDSHAKES = 3  # in a row, before a daemon that hangs up counts as one that has another key

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class ZeroMqFeed:
    """A SUB socket; libzmq makes lost connections again by itself, but not those that were refused."""

    def __init__(self, url: str, stream: str | None, kinds: Sequence[Kind], keys: ClientKeys | None = None) -> None:
        self._url = url
        self._kinds = kinds
        self._has_keys = keys is not None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)  # libzmq hangs up on who sends more
        self._socket.setsockopt(zmq.IPV6, int("[" in url))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)  # notice a machine that vanished without a word
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        for prefix in ["streamd/"] if stream is None else [topic(stream, kind) for kind in kinds]:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, prefix)
        if keys:
            self._socket.setsockopt_string(zmq.CURVE_SERVERKEY, keys.server)
            self._socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(keys.secret.encode()))
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._num_cut = 0  # handshakes in a row that the other side has ended without a word
        self._was_welcome = False
        self._backoff = Backoff(ceiling_s=5.0)
        self._connect_at: float | None = None  # after a refusal, by the monotonic clock
        try:
            self._socket.connect(url)
        except zmq.ZMQError as err:
            self.close()
            raise SubscribeError(f"cannot subscribe to {url}: {err}; give tcp://HOST:PORT or ipc://PATH") from err

    def receive(self, timeout_s: float) -> Received | None:
        """Raises SubscribeError where the daemon refuses; the next call tries again, with back-off."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._connect_again()
            until = deadline if self._connect_at is None else min(deadline, self._connect_at)
            ready = self._wait(max(0.0, until - time.monotonic()))
            if self._socket in ready:
                frames = self._socket.recv_multipart()
                received = from_name(frames[0].decode(errors="replace"), "/", frames[-1], self._kinds)
                if received is not None:
                    return received
            elif self._monitor in ready:
                self._note_event()
            elif time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()

    def _wait(self, timeout_s: float) -> list[zmq.Socket[bytes]]:
        return [ready for ready, _ in self._poller.poll(round(timeout_s * 1000))]

    def _note_event(self) -> None:
        """Raise SubscribeError where the daemon will not have us."""
        event = recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_cut, self._was_welcome = 0, True
            self._backoff.reset()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise self._refused("the daemon does not know this key; its public key belongs into the clients' folder")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            advice = "the daemon has no keys; give none" if self._has_keys else "the daemon wants keys; give them"
            raise self._refused(f"{advice}, or something else than streamd listens there")
        elif self._has_keys and not self._was_welcome:  # else it is a daemon that stops, or a proxy without one
            self._num_cut += 1
            if self._num_cut >= NUM_CUT_HANDSHAKES:
                raise self._refused("the daemon hangs up; is its public key the right one, and has it keys at all?")

    def _refused(self, why: str) -> SubscribeError:
        self._num_cut, self._was_welcome = 0, False
        self._socket.disconnect(self._url)
        self._connect_at = time.monotonic() + self._backoff.next_delay_s()
        return SubscribeError(f"cannot subscribe to {self._url}: {why}")

    def _connect_again(self) -> None:
        if self._connect_at is not None and time.monotonic() >= self._connect_at:
            self._connect_at = None
            self._socket.connect(self._url)
