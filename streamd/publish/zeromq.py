"""Publish on a ZeroMQ PUB socket."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Sequence

import zmq

from streamd.errors import PublishError
from streamd.publish import Outgoing
from streamd.wire import topic

LINGER_MS = 1000

_ADVICE = {
    errno.EADDRINUSE: "the port is taken; stop the other process (`ss -ltnp` shows it) or choose another port",
    errno.EACCES: "not allowed; choose a port above 1023 or a folder that the daemon may write",
    errno.ENODEV: "this machine has no such interface or address; `tcp://*:PORT` binds all of them",
    errno.EADDRNOTAVAIL: "this machine has no such address; `tcp://*:PORT` binds all of them",
    errno.ENOENT: "the folder of the ipc path does not exist; create it",
    errno.ENAMETOOLONG: "the ipc path is too long; Linux allows 107 bytes",
}
_FORM = "the address must read like tcp://*:5555, tcp://127.0.0.1:5555 or ipc:///run/streamd/detections"


class ZeroMqSink:
    """A PUB socket: each subscriber has a queue of its own, and one that is too slow loses messages, silently.

    `send` never blocks. Subscribers see the loss as a jump of `seq`.
    """

    def __init__(self, bind: str, high_water_mark: int = 1000) -> None:
        self._bind = bind
        self._high_water_mark = high_water_mark  # messages queued for each subscriber
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    @property
    def name(self) -> str:
        return f"zeromq {self._bind}"

    @property
    def endpoint(self) -> str:
        """The address as bound: with the real port where port 0 was asked for."""
        assert self._socket is not None, "open() comes first"
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def open(self) -> None:
        if self._bind.startswith("ipc://") and _is_listening(self._bind.removeprefix("ipc://")):
            # libzmq would take the path over and leave the other process without subscribers
            raise PublishError(f"cannot publish on {self._bind}: another process listens there; choose another path")
        port = re.fullmatch(r"tcp://.*:(\d+)", self._bind)
        if port and int(port[1]) > 65535:  # libzmq would take the remainder by 65536
            raise PublishError(f"cannot publish on {self._bind}: ports end at 65535")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, self._high_water_mark)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.IPV6, int("[" in self._bind))
        try:
            self._socket.bind(self._bind)
        except zmq.ZMQError as err:
            self.close()
            raise PublishError(f"cannot publish on {self._bind}: {_ADVICE.get(err.errno or 0, _FORM)} ({err})") from err

    def ping(self) -> None:
        """Do nothing: a PUB socket has no far side that could be away."""

    def send(self, messages: Sequence[Outgoing]) -> None:
        assert self._socket is not None, "open() comes first"
        try:
            for message in messages:
                frames = (topic(message.stream, message.kind).encode(), message.payload)
                self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError as err:
            raise PublishError(f"cannot send on {self._bind}: {err}") from err

    def close(self) -> None:
        """Give the subscribers a second to take what is queued for them."""
        if self._socket is not None:
            self._socket.close()
        if self._context is not None:
            self._context.term()
        self._socket = self._context = None


def _is_listening(path: str) -> bool:
    address = "\0" + path[1:] if path.startswith("@") else path  # @ is ZeroMQ's sign for the abstract namespace
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.2)
        probe.connect(address)
        return True
    return False
