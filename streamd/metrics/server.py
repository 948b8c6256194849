"""Answer GET on a loopback port or a Unix socket: one page a path, each made when it is asked for."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from streamd.errors import PublishError
from streamd.metrics.endpoint import Endpoint
from streamd.threads import name_thread

logger = logging.getLogger(__name__)

_MAX_REQUESTS = 8  # at once; more are hung up on, so that no client can take the daemon's threads and memory
_READ_TIMEOUT_S = 5.0
_PAUSE_S = 0.2  # after a connection that could not be taken
_SOCKET_MODE = 0o660  # the daemon's user and group


@dataclass(frozen=True, slots=True)
class Page:
    """What a path answers."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]


class PageServer:
    """Serve pages from a thread of its own, and each request from a short-lived one."""

    def __init__(self, endpoint: Endpoint, pages: Pages, tls: ssl.SSLContext | None = None) -> None:
        """Bind; what connects from now on is answered once `start` was called. Raises PublishError."""
        try:
            self._server = _Server(endpoint, pages, tls)
        except OSError as err:
            raise PublishError(f"cannot serve metrics on {endpoint}: {_why(err)}") from err
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @property
    def endpoint(self) -> Endpoint:
        """The address as bound: with the real port where port 0 was asked for."""
        return self._server.bound

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more requests; those under way end by their own time-out."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _run(self) -> None:
        name_thread(self._thread.name)
        self._server.serve_forever(poll_interval=0.2)


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, endpoint: Endpoint, pages: Pages, tls: ssl.SSLContext | None) -> None:
        self.pages = pages
        self._tls = tls
        self._room = threading.BoundedSemaphore(_MAX_REQUESTS)
        self._pause = threading.Event()  # never set
        self._endpoint = endpoint
        self._owns_path = False
        if endpoint.path:
            self.address_family = socket.AF_UNIX
            _remove_stale(endpoint.path)
        else:
            self.address_family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        address: Any = endpoint.path or (endpoint.host, endpoint.port)
        super().__init__(address, _Handler)

    @property
    def bound(self) -> Endpoint:
        if self._endpoint.path:
            return self._endpoint
        return Endpoint(self._endpoint.host, self.socket.getsockname()[1])

    def server_bind(self) -> None:
        if self._endpoint.path:
            os.fchmod(self.socket.fileno(), _SOCKET_MODE)  # before it has a name, so that it never has a wider mode
        super().server_bind()
        self._owns_path = bool(self._endpoint.path)

    def server_close(self) -> None:
        super().server_close()
        if self._owns_path:  # socketserver comes here after a failed bind, too
            with contextlib.suppress(OSError):
                os.unlink(self._endpoint.path)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads can be had
            self._room.release()
            self.shutdown_request(request)
        except BaseException:
            self._room.release()
            raise

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:  # no more files can be opened: whoever connects waits, and may not keep this thread busy
            self._pause.wait(_PAUSE_S)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        name_thread("metrics request")
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the request's own thread, so that who does not answer holds up nobody."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_READ_TIMEOUT_S)
        with self._tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what is a bug; a client that hung up is no news."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("metrics: a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "streamd"
    sys_version = ""
    timeout = _READ_TIMEOUT_S

    def do_GET(self) -> None:
        page = self._page()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    do_HEAD = do_GET

    def _page(self) -> Page:
        path = self.path.partition("?")[0]
        make = self.server.pages.get(path)
        if make is None:
            return Page(HTTPStatus.NOT_FOUND, f"{' '.join(self.server.pages)}\n".encode())
        try:
            return make()
        except Exception:  # the top of this request's thread; a page that fails must not stop the cameras
            logger.exception("metrics: %s failed", path)
            return Page(HTTPStatus.INTERNAL_SERVER_ERROR, b"failed; the log says why\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""


def _remove_stale(path: str) -> None:
    """Remove the socket that a killed daemon left; bind then fails on anything else that has the name."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def _why(err: OSError) -> str:
    if err.errno == errno.EADDRINUSE:
        return "it is taken, by another process or a file; choose another address under metrics.listen, or null"
    return err.strerror or type(err).__name__
