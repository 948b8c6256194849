"""Decide which subscribers may come in, by their keys: libzmq asks at each handshake (ZAP, ZeroMQ's RFC 27)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import zmq
from zmq.utils import z85

from streamd.errors import PublishError
from streamd.publish import REPORT_INTERVAL_S
from streamd.threads import name_thread

logger = logging.getLogger(__name__)

_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks, by its documentation
_THREAD_NAME = "zeromq keys"


class Gatekeeper:
    """Admit the clients whose public keys are listed, from `open` until the context is terminated.

    Where it is not at work, `ZAP_ENFORCE_DOMAIN` has libzmq refuse everybody.
    """

    def __init__(self, name: str, clients: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        """`clients` are public keys by the names that the operator has given them."""
        self._name = name
        self._clock = clock
        self._names = _by_key(clients)  # never changed but replaced whole: libzmq's questions come at any time
        self._thread: threading.Thread | None = None
        self._crash: Exception | None = None
        self._num_refused = 0  # since the last line of the log
        self._next_line = float("-inf")

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Begin to answer. Raises PublishError where no thread can be had."""
        socket = context.socket(zmq.REP)
        socket.bind(_ADDRESS)
        self._thread = threading.Thread(target=self._run, args=(socket,), name=_THREAD_NAME)
        try:
            self._thread.start()
        except RuntimeError as err:
            self._thread = None
            socket.close()
            raise PublishError(f"{self._name}: no thread for its keys: {err}") from err

    def allow(self, clients: Mapping[str, str]) -> bool:
        """Admit these from now on, from any thread; return whether somebody was taken off the list."""
        before, self._names = self._names, _by_key(clients)
        return not before.keys() <= self._names.keys()

    def check(self) -> None:
        """Raise the error that has ended the thread, if one has: it is a bug."""
        if self._crash:
            raise self._crash

    def join(self) -> None:
        """Wait for the thread, after the context was terminated."""
        if self._thread:
            self._thread.join()

    def _run(self, socket: zmq.Socket[bytes]) -> None:
        name_thread(_THREAD_NAME)
        try:
            while True:
                version, request_id, _, address, _, mechanism, *credentials = socket.recv_multipart()
                verdict = (b"200", b"") if self._admits(address, mechanism, credentials) else (b"400", b"not listed")
                socket.send_multipart([version, request_id, *verdict, b"", b""])
        except zmq.ContextTerminated:
            pass
        except Exception as err:
            self._crash = err
        finally:
            socket.close(linger=0)

    def _admits(self, address: bytes, mechanism: bytes, credentials: list[bytes]) -> bool:
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        if (name := self._names.get(key)) is not None:
            logger.info("%s: %s subscribes from %s", self._name, name, address.decode())
            return True
        self._num_refused += 1
        if self._clock() >= self._next_line:
            self._next_line = self._clock() + REPORT_INTERVAL_S
            number, self._num_refused = self._num_refused, 0
            last = f"; the last has the public key {key}" if key else ""
            logger.warning("%s: refused %d tries, from %s%s", self._name, number, address.decode(), last)
        return False


def _by_key(clients: Mapping[str, str]) -> Mapping[str, str]:
    return {key: name for name, key in clients.items()}
