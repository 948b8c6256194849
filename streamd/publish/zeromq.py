"""Publish on a ZeroMQ PUB socket."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import zmq

from streamd.errors import PublishError, StreamdError
from streamd.publish import Outgoing
from streamd.publish.gatekeeper import Gatekeeper
from streamd.room import require_room
from streamd.wire import topic

LINGER_MS = 1000
MAX_INCOMING_BYTES = 4096  # of a subscription, which is a topic; libzmq hangs up on who sends more
_NUM_THREADS, _NUM_DESCRIPTORS = 3, 16  # of a context; libzmq aborts the process where it cannot have them
_ZAP_DOMAIN = b"streamd"

_ADVICE = {
    errno.EADDRINUSE: "the port is taken; stop the other process (`ss -ltnp` shows it) or choose another port",
    errno.EACCES: "not allowed; choose a port above 1023 or a folder that the daemon may write",
    errno.ENODEV: "this machine has no such interface or address; `tcp://*:PORT` binds all of them",
    errno.EADDRNOTAVAIL: "this machine has no such address; `tcp://*:PORT` binds all of them",
    errno.ENOENT: "the folder of the ipc path does not exist; create it",
    errno.ENAMETOOLONG: "the ipc path is too long; Linux allows 107 bytes",
}
_FORM = "the address must read like tcp://*:5555, tcp://127.0.0.1:5555 or ipc:///run/streamd/detections"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The daemon's secret key, and the public keys of those who may subscribe, by names for the log."""

    secret: str = field(repr=False)
    clients: Mapping[str, str]


class ZeroMqSink:
    """A PUB socket: each subscriber has a queue of its own, and one that is too slow loses messages, silently.

    `send` never blocks. Subscribers see the loss as a jump of `seq`. With `keys` all is encrypted, and only the listed
    clients get anything.
    """

    def __init__(self, bind: str, high_water_mark: int = 1000, keys: ServerKeys | None = None) -> None:
        self._bind = self._address = bind
        self._high_water_mark = high_water_mark  # messages queued for each subscriber
        self._secret = keys.secret if keys else ""
        self._gatekeeper = Gatekeeper(self.name, keys.clients) if keys else None
        self._must_reopen = False
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
        try:
            self._open()
        except zmq.ZMQError as err:
            self.close()
            raise PublishError(f"cannot publish on {self._bind}: {_ADVICE.get(err.errno or 0, _FORM)} ({err})") from err
        except PublishError:
            self.close()
            raise

    def allow(self, clients: Mapping[str, str]) -> None:
        """Admit these clients, and no others, from now on; from any thread.

        libzmq cannot hang up on one subscriber: where one was taken off the list, all are hung up on at the next
        `send`, and who may comes back, with a gap in `seq`. Nothing happens where there are no keys.
        """
        if self._gatekeeper and self._gatekeeper.allow(clients):
            self._must_reopen = True

    def _open(self) -> None:
        try:
            require_room(_NUM_THREADS, _NUM_DESCRIPTORS)
        except StreamdError as err:
            raise PublishError(f"cannot publish on {self._bind}: {err}") from err
        self._context = zmq.Context()
        if self._gatekeeper:
            self._gatekeeper.open(self._context)
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, self._high_water_mark)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_INCOMING_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in self._bind))
        if self._secret:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt_string(zmq.CURVE_SECRETKEY, self._secret)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # or all may come in where the gatekeeper is gone
        self._socket.bind(self._address)

    def _reopen(self) -> None:
        """Hang up on all subscribers. Raises PublishError, and is then tried again at the next `send`."""
        if self._socket is not None:
            self._address = self.endpoint
        self.close()
        self.open()
        self._must_reopen = False

    def ping(self) -> None:
        """Do nothing: a PUB socket has no far side that could be away."""

    def send(self, messages: Sequence[Outgoing]) -> None:
        if self._gatekeeper:
            self._gatekeeper.check()
        if self._must_reopen:
            self._reopen()
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
        if self._gatekeeper:
            self._gatekeeper.join()
        self._socket = self._context = None


def _is_listening(path: str) -> bool:
    address = "\0" + path[1:] if path.startswith("@") else path  # @ is ZeroMQ's sign for the abstract namespace
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.2)
        probe.connect(address)
        return True
    return False
